"""Events as JSON: valid against the published schema, and every bit of a tensor comes back."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from phoenix_server.dataplane import Prediction
from phoenix_server.errors import Code, PhoenixError
from phoenix_server.event_format import EventFormat, schema, size_of, tensor_from
from phoenix_server.event_stream import Stream
from phoenix_server.metrics import EventCounts
from phoenix_server.tensors import DType, InferRequest, InferResponse

PUBLISHED = Path(__file__).parents[2] / "docs" / "reference" / "event.schema.json"
VALIDATOR = jsonschema.Draft202012Validator(schema(), format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)


def model(*, features: Any = None, **events: Any) -> Any:
    settings = SimpleNamespace(**({"topic": "", "sample_percent": 100, "include_tensors": True} | events))
    return SimpleNamespace(
        name="fraud%d",
        version="3",
        manifest=SimpleNamespace(model=SimpleNamespace(metadata=SimpleNamespace(namespace="ml"))),
        artifact=SimpleNamespace(sha256="0" * 64),
        engine=SimpleNamespace(provider="CPUExecutionProvider"),
        spec=SimpleNamespace(features=features, bindings=SimpleNamespace(kafka=SimpleNamespace(events=settings))),
    )


def prediction(
    *arrays: Any, error: PhoenixError | None = None, request_id: str = "r-1", of: Any = None, **parameters: Any
) -> Prediction:
    tensors = {f"t{index}": array for index, array in enumerate(arrays)}
    request = InferRequest(tensors, id=request_id, parameters=parameters)
    response = None if error else InferResponse("fraud", "3", request_id, list(tensors.items()))
    return Prediction(of or model(), request, response, error, 1795849879.25, 0.00123)


def written(item: Prediction, **events: Any) -> dict[str, Any]:
    text = EventFormat(item.model, include_tensors=events.get("include_tensors", True)).encode(item, "e-1")
    assert b"\n" not in text
    document: dict[str, Any] = json.loads(text)
    VALIDATOR.validate(document)
    return document


def same_bits(one: Any, other: Any) -> bool:
    if one.dtype.kind == "O":
        return one.shape == other.shape and one.tolist() == other.tolist()
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


ARRAYS = st.one_of(
    [
        npst.arrays(
            dtype.numpy,
            npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
            # what a decoder of UTF-8 can give
            elements=st.text(st.characters(exclude_categories=["Cs"])) if dtype is DType.BYTES else None,
        )
        for dtype in DType
    ]
)


@given(st.lists(ARRAYS, min_size=1, max_size=3))
def test_every_bit_of_a_tensor_comes_back(arrays: list[Any]) -> None:
    document = written(prediction(*arrays))
    for part in ("inputs", "outputs"):
        assert [tensor["name"] for tensor in document[part]] == [f"t{index}" for index in range(len(arrays))]
        for array, tensor in zip(arrays, document[part], strict=True):
            assert same_bits(array, tensor_from(tensor))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_bits_of_a_nan_and_the_sign_of_a_zero_come_back(dtype: Any) -> None:
    array = np.array([-0.0, np.nan, -np.inf, 1e-45], dtype)
    array.view(np.uint8)[dtype().itemsize] ^= 5  # a payload of its own
    assert same_bits(array, tensor_from(written(prediction(array))["inputs"][0]))
    zero = np.array([-0.0], dtype)
    assert same_bits(zero, tensor_from(written(prediction(zero))["inputs"][0]))


def test_a_view_that_is_not_contiguous_is_written_row_by_row() -> None:
    array = np.arange(12, dtype=np.int32).reshape(3, 4).T
    assert same_bits(np.ascontiguousarray(array), tensor_from(written(prediction(array))["inputs"][0]))


def test_an_event_says_what_was_asked_and_answered() -> None:
    document = written(prediction(np.array([1.5], np.float32), request_id='a"b\u2028'))
    tensor = {"name": "t0", "datatype": "FP32", "shape": [1], "data": [1.5]}
    assert document == {
        "schema_version": 1,
        "id": "e-1",
        "time": "2026-11-28T07:11:19.250000Z",
        "request_id": 'a"b\u2028',
        "entity": None,
        "namespace": "ml",
        "model": "fraud%d",
        "version": "3",
        "digest": "0" * 64,
        "provider": "CPUExecutionProvider",
        "outcome": "ok",
        "latency_seconds": 0.00123,
        "inputs": [tensor],
        "outputs": [tensor],
    }


def test_a_failed_prediction_has_the_error_and_no_outputs() -> None:
    document = written(prediction(np.array([1]), error=PhoenixError(Code.INVALID, "input 'x' is missing")))
    assert document["outcome"] == "client_error"
    assert document["error"] == {"code": "invalid", "message": "input 'x' is missing"}
    assert "outputs" not in document


def test_without_tensors_an_event_has_none() -> None:
    document = written(prediction(np.array([1])), include_tensors=False)
    assert not {"inputs", "outputs"} & document.keys()


def test_the_key_is_the_entity_or_else_the_request() -> None:
    with_features = model(features=SimpleNamespace(entity_parameter="card"))
    keys = [
        Stream(item.model, EventCounts()).event(item, "e").key
        for item in (
            prediction(request_id="r", of=with_features, card="4711"),
            prediction(request_id="r", of=with_features),
            prediction(request_id="r", card="4711"),
        )
    ]
    assert keys == [b"4711", b"r", b"r"]
    assert written(prediction(of=with_features, card="4711"))["entity"] == "4711"


def test_the_topic_is_the_manifests_or_named_after_the_model() -> None:
    assert Stream(model(), EventCounts()).topic == "phoenix.ml.fraud%d.predictions"
    assert Stream(model(topic="mine"), EventCounts()).topic == "mine"


def test_sampling_takes_its_share_and_always_the_same() -> None:
    ids = [f"9f2c0b-{number:x}" for number in range(20_000)]
    stream = Stream(model(sample_percent=20), EventCounts())
    taken = [request_id for request_id in ids if stream.takes(request_id)]
    assert 0.18 < len(taken) / len(ids) < 0.22
    assert taken == [request_id for request_id in ids if stream.takes(request_id)]


def test_the_size_of_strings_counts() -> None:
    assert size_of([np.array(["x" * 1000], dtype=object)]) > 1000


def test_the_published_schema_is_current() -> None:
    assert json.loads(PUBLISHED.read_text()) == schema()
