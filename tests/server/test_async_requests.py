"""Request records, pure: how they are read, what a dead letter keeps, which faults pass."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from phoenix_server import async_requests
from phoenix_server.async_requests import Record
from phoenix_server.codec_json import OutputForms
from phoenix_server.errors import Code, PhoenixError
from phoenix_server.tensors import DType, InferRequest, InferResponse, Signature, TensorSpec

MODEL: Any = SimpleNamespace(
    name="double",
    max_request_bytes=10_000,
    signature=Signature((TensorSpec("x", DType.FP32, (-1, 1)),), (TensorSpec("y", DType.FP32, (-1, 1)),), True),
)
HEADER = json.dumps(
    {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "parameters": {"binary_data_size": 4}}]}
).encode()


def record(value: bytes | None, *headers: tuple[str, bytes | None], key: bytes | None = b"k") -> Record:
    return Record("requests", 2, 17, key, value, headers)


def test_a_json_record_is_a_request() -> None:
    text = b'{"id":"r","inputs":[{"name":"x","shape":[1,1],"datatype":"FP32","data":[2]}]}'
    request, forms = async_requests.decode(record(text), MODEL)
    assert request.id == "r"
    assert request.inputs["x"].tolist() == [[2.0]]
    assert not forms.is_binary


@pytest.mark.parametrize("name", ["inference-header-content-length", "Inference-Header-Content-Length"])
def test_a_binary_record_is_a_request_named_after_its_place(name: str) -> None:
    body = HEADER + np.array([3], "<f4").tobytes()
    request, _ = async_requests.decode(record(body, (name, b"%d" % len(HEADER))), MODEL)
    assert request.inputs["x"].tolist() == [[3.0]]
    assert request.id == "requests-2-17"


def test_a_raw_record_is_the_one_input() -> None:
    request, forms = async_requests.decode(
        record(np.array([3], "<f4").tobytes(), ("inference-header-content-length", b"0")), MODEL
    )
    assert request.inputs["x"].tolist() == [[3.0]]
    assert forms.is_binary


@pytest.mark.parametrize(
    ("value", "headers", "code"),
    [
        (None, (), Code.INVALID),
        (b"", (), Code.INVALID),
        (b"\xff", (), Code.INVALID),
        (b"{}", (), Code.INVALID),
        (b"{}", (("inference-header-content-length", b"99"),), Code.INVALID),
        (b"{}", (("inference-header-content-length", b"x"),), Code.INVALID),
        (b" " * 10_001, (), Code.TOO_LARGE),
    ],
)
def test_what_is_no_request_is_refused(value: bytes | None, headers: Any, code: Code) -> None:
    with pytest.raises(PhoenixError) as caught:
        async_requests.decode(record(value, *headers), MODEL)
    assert caught.value.code is code


def test_a_result_keeps_key_and_headers_but_the_requests_own() -> None:
    headers = (("traceparent", b"00-1"), ("inference-header-content-length", b"5"), ("phoenix-reason", b"old"))
    response = InferResponse("double", "1", "r", [("y", np.array([[4]], np.float32))])
    reply = async_requests.result(record(b"", *headers), response, OutputForms())
    assert (reply.key, reply.headers, reply.dead_reason) == (b"k", (("traceparent", b"00-1"),), None)
    assert json.loads(reply.value or b"")["id"] == "r"
    binary = async_requests.result(record(b"", *headers), response, OutputForms(is_binary=True))
    size = int(dict(binary.headers)["inference-header-content-length"] or b"")
    assert (binary.value or b"")[size:] == np.array([4], "<f4").tobytes()


def test_a_dead_letter_is_the_request_with_its_reason() -> None:
    reply = async_requests.dead_letter(record(b"{", ("traceparent", b"00-1")), "invalid", "ü" * 5000)
    headers = dict(reply.headers)
    assert (reply.key, reply.value, reply.dead_reason) == (b"k", b"{", "invalid")
    assert headers["traceparent"] == b"00-1"
    assert headers["phoenix-reason"] == b"invalid"
    assert len(headers["phoenix-message"] or b"") == 2000
    assert [headers[f"phoenix-{part}"] for part in ("topic", "partition", "offset")] == [b"requests", b"2", b"17"]


def test_what_is_too_large_for_the_broker_becomes_smaller_twice_and_no_more() -> None:
    request = record(b"x" * 100)
    response = InferResponse("double", "1", "r", [("y", np.zeros((100, 1), np.float32))])
    first = async_requests.smaller(request, async_requests.result(request, response, OutputForms()))
    assert first is not None
    assert (first.dead_reason, first.value) == ("too_large", b"x" * 100)
    second = async_requests.smaller(request, first)
    assert second is not None
    assert second.value is None
    assert b"too large to keep" in (dict(second.headers)["phoenix-message"] or b"")
    assert async_requests.smaller(request, second) is None


@pytest.mark.parametrize(
    ("code", "attempt", "timeout_us", "passes"),
    [
        (Code.UNAVAILABLE, 1000, 0, True),
        (Code.OVERLOADED, 1000, 5, True),
        (Code.DEADLINE, 0, 0, True),
        (Code.DEADLINE, 2, 0, False),
        (Code.DEADLINE, 0, 5, False),
        (Code.INTERNAL, 0, 0, True),
        (Code.INTERNAL, 2, 0, False),
        (Code.INVALID, 0, 0, False),
        (Code.TOO_LARGE, 0, 0, False),
    ],
)
def test_only_faults_that_pass_are_tried_again(code: Code, attempt: int, timeout_us: int, passes: bool) -> None:
    request = InferRequest({}, timeout_us=timeout_us)
    assert async_requests.passes(PhoenixError(code, ""), request, attempt) is passes
