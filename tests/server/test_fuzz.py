"""Ten thousand broken requests against real server processes: REST and gRPC, from documents down to bytes.

Whatever comes, the server answers in time and in its own words, blames the caller and not itself, and is afterwards
what it was before: the same answers, connections, memory, an empty queue and nothing unforeseen in its log.
"""

import asyncio
import contextlib
import copy
import functools
import gzip
import hashlib
import http.client
import json
import random
import re
import socket
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import phoenix_process
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from onnx import TensorProto, helper
from phoenix_process import Running, wait_until

from phoenix_server._proto import inference as proto
from phoenix_server.codec_json import BIG_BODY_BYTES
from phoenix_server.grpc_service import SERVICE

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
SEED = 20_261
ANSWER_DEADLINE_S = 20.0
# Requests of each kind, for each engine; before them a tenth, of another seed, warms the server up.
COUNTS = {"openapi": 300, "json": 1600, "binary": 1000, "raw": 1000, "grpc": 1000}
# What the allocator keeps of bodies over 1 MB that worker threads parsed (an arena of each thread) is no leak: it comes
# to 30 to 40 MiB, and stays there however often the whole is repeated. 12 kB lost at each request would be too much.
MAX_GROWTH_BYTES = 64 << 20
# The server's timeouts are short, so that requests that never end are answered (408) while the test waits.
ENV = {
    "PHOENIX_HEADER_TIMEOUT_SECONDS": "1",
    "PHOENIX_BODY_TIMEOUT_SECONDS": "1",
    "PHOENIX_KEEP_ALIVE_SECONDS": "1",
    "PHOENIX_MEASURE_CAPACITY": "false",
}
MIXED = {"FP32": TensorProto.FLOAT, "FP16": TensorProto.FLOAT16, "INT8": TensorProto.INT8, "INT64": TensorProto.INT64,
         "UINT64": TensorProto.UINT64, "BOOL": TensorProto.BOOL, "BYTES": TensorProto.STRING}  # fmt: skip


# --- what is served, and requests that are right ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The examples `iris` and `text`, and `mixed`, which gives back one input of each kind of datatype."""
    folder = tmp_path_factory.mktemp("models")
    nodes = [helper.make_node("Identity", [f"x_{name}"], [f"y_{name}"]) for name in MIXED]
    sides = [[helper.make_tensor_value_info(f"{s}_{name}", t, ["n", 2]) for name, t in MIXED.items()] for s in "xy"]
    graph = helper.make_graph(nodes, "mixed", *sides)
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    (folder / "mixed.onnx").write_bytes(data)
    manifest = {
        "apiVersion": "phoenix-ml.io/v1alpha1",
        "kind": "PhoenixModel",
        "metadata": {"name": "mixed"},
        "spec": {
            "model": {"uri": "mixed.onnx", "sha256": hashlib.sha256(data).hexdigest()},
            "limits": {"maxRequestBytes": "2Mi"},
        },
    }
    (folder / "mixed.yaml").write_text(json.dumps(manifest))
    assert onnx.load_from_string(data)
    return [EXAMPLES / "iris", EXAMPLES / "text", folder]


def tensor(name: str, datatype: str, shape: list[int], data: list[Any]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


def infer_path(model: str) -> str:
    return f"/v2/models/{model}/infer"


IRIS: dict[str, Any] = {"id": "good", "inputs": [tensor("x", "FP32", [2, 4], [5.1, 3.5, 1.4, 0.2, 6.7, 3, 5.2, 2.3])]}
DOCUMENTS: list[tuple[str, dict[str, Any]]] = [
    (infer_path("iris"), IRIS),
    (
        infer_path("iris"),
        {"inputs": [tensor("x", "FP32", [1, 4], [[5.1, 3.5, 1.4, 0.2]])], "outputs": [{"name": "label"}]},
    ),
    (
        infer_path("iris"),
        {
            "inputs": [tensor("x", "FP32", [1, 4], [1, 2, 3, 4]) | {"parameters": {"a": "b"}}],
            "outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}, {"name": "label"}],
            "parameters": {"timeout": 5_000_000, "binary_data_output": False, "sequence": 1.5},
        },
    ),
    (infer_path("text"), json.loads((EXAMPLES / "text" / "request.json").read_bytes())),
    (
        infer_path("mixed"),
        {
            "inputs": [
                tensor("x_FP32", "FP32", [2, 2], [[1.5, -2.25], [0, 1e-3]]),
                tensor("x_FP16", "FP16", [2, 2], []) | {"parameters": {"binary_data_size": 8}},
                tensor("x_INT8", "INT8", [2, 2], [-128, 127, 0, 1]),
                tensor("x_INT64", "INT64", [2, 2], [-(2**63), 2**63 - 1, 0, 1]),
                tensor("x_UINT64", "UINT64", [2, 2], [0, 2**64 - 1, 1, 2]),
                tensor("x_BOOL", "BOOL", [2, 2], [True, False, [True, False]]),
                tensor("x_BYTES", "BYTES", [2, 2], [["", "grün"], ["🔥", "\u0000"]]),
            ],
            "outputs": [{"name": "y_BYTES"}, {"name": "y_INT64"}],
        },
    ),
    ("/v2/logging", {"log_verbose_level": 0, "log_info": True, "log_format": "default"}),
    ("/v2/repository/index", {"ready": True}),
    ("/v2/repository/models/none/load", {"parameters": {"config": "{}"}}),
    ("/v2/repository/models/none/unload", {"parameters": {"unload_dependents": False}}),
]
# Header documents and the bytes behind them.
BINARIES: list[tuple[str, dict[str, Any], bytes]] = [
    (
        "iris",
        {
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}}],
            "parameters": {"binary_data_output": True},
        },
        np.array([5.1, 3.5, 1.4, 0.2], "<f4").tobytes(),
    ),
    (
        "mixed",
        {
            "id": "b",
            "inputs": [
                {"name": f"x_{name}", "datatype": name, "shape": [1, 2], "parameters": {"binary_data_size": size}}
                for name, size in zip(MIXED, (8, 4, 2, 16, 16, 2, 11), strict=True)
            ],
            "parameters": {"binary_data_output": True},
        },
        bytes(8 + 4 + 2 + 16 + 16) + b"\x00\x01" + b"\x03\x00\x00\x00abc\x00\x00\x00\x00",
    ),
]  # fmt: skip


def good_message() -> Any:
    message = proto.ModelInferRequest(model_name="iris", model_version="1", id="good")
    one = message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    one.contents.fp32_contents.extend([5.1, 3.5, 1.4, 0.2])
    return message


def messages() -> list[Any]:
    """Return requests that are right: typed, raw, with outputs and parameters, of every kind of datatype."""
    raw = proto.ModelInferRequest(model_name="iris", raw_input_contents=[np.zeros(8, "<f4").tobytes()])
    raw.inputs.add(name="x", datatype="FP32", shape=[2, 4])
    raw.outputs.add(name="label")
    raw.parameters["timeout"].int64_param = 5_000_000
    raw.parameters["note"].string_param = "ä"
    mixed = proto.ModelInferRequest(model_name="mixed")
    for (name, _), data in zip(
        MIXED.items(), (bytes(8), bytes(4), bytes(2), bytes(16), bytes(16), bytes(2), bytes(8)), strict=True
    ):
        mixed.inputs.add(name=f"x_{name}", datatype=name, shape=[1, 2])
        mixed.raw_input_contents.append(data)
    return [good_message(), raw, mixed]


# --- mutations of documents -------------------------------------------------------------------------------------------

# Text that stands in the document as it is, JSON or not; a marker keeps its place until the document is text.
RAW_TOKENS = [
    "NaN", "-Infinity", "1e400", "-1e400", "-0", "1E+2", "0x10", "01", "1.", "'x'", '"\\ud800"', '"\\u0000"',
    "undefined",
    "9" * 400, "0." + "1" * 5000, "1" * 5000, "18446744073709551616", "-9223372036854775809", '{"a":1,"a":2}',
    *("[" * depth + "]" * depth for depth in (33, 65, 400, 1020, 5000)), "[" * 50_000,
    '{"a":' * 1000 + "1" + "}" * 1000, "[" * 900 + "1,true" + "]" * 900, "\x01", '"\x7f\t"', "", ",",
]  # fmt: skip
MARKER = re.compile(r'"@raw(\d+)@"')
WORDS = ["x", "inputs", "FP32", "BYTES", "BF16", "shape", "binary_data_size", "timeout", "\u0000", "ä🔥", "a" * 300]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 1, 2, 2**31, 2**40, 2**40 + 1, 2**63 - 1, 2**63, 2**64, 10**30]),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=8),
    st.integers(0, len(RAW_TOKENS) - 1).map("@raw{}@".format),
)
junk = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=4), inner, max_size=3),
    ),
    max_leaves=6,
)


def spots(document: Any) -> list[tuple[Any, Any]]:
    """Return every place of a document as (container, key)."""
    found: list[tuple[Any, Any]] = []
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        found.append((document, key))
        if isinstance(value, dict | list):
            found += spots(value)
    return found


@st.composite
def mutated_document(draw: Any, base: dict[str, Any]) -> bytes:
    """A valid document with one to three faults, as text that need not be JSON."""
    holder = {"": copy.deepcopy(base)}
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(spots(holder)))
        match draw(st.sampled_from(["replace", "replace", "remove", "extra", "wrap", "repeat"])):
            case "replace":
                container[key] = draw(junk)
            case "remove":
                del container[key]
            case "extra" if isinstance(container, dict):
                container[draw(st.sampled_from(WORDS) | st.text(max_size=4))] = draw(junk)
            case "wrap":
                container[key] = [container[key]]
            case _:
                value = container[key]
                container[key] = (
                    value * draw(st.sampled_from([0, 2, 100])) if isinstance(value, str | list) else [value] * 2
                )
        if not holder:
            break
    text = json.dumps(holder.get(""), ensure_ascii=draw(st.booleans()))
    text = MARKER.sub(lambda found: RAW_TOKENS[int(found[1]) % len(RAW_TOKENS)], text)
    return text.encode("utf-8", "surrogatepass")


@st.composite
def mutated_bytes(draw: Any, data: bytes) -> bytes:
    """Bytes with some flipped, cut, inserted or repeated."""
    broken = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(broken)))
        match draw(st.sampled_from(["flip", "flip", "cut", "insert", "remove", "repeat"])):
            case "flip" if at < len(broken):
                broken[at] = draw(st.integers(0, 255))
            case "cut":
                del broken[at:]
            case "insert":
                broken[at:at] = draw(st.binary(max_size=8))
            case "remove":
                del broken[at : at + draw(st.integers(1, 8))]
            case _:
                broken[at:at] = broken[at : at + 64]
    return bytes(broken)


def deflated(data: bytes) -> bytes:
    return zlib.compress(data)


ENCODINGS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": functools.partial(gzip.compress, mtime=0),
    "deflate": deflated,
}
other_headers = st.fixed_dictionaries(
    {},
    optional={
        "accept-encoding": st.sampled_from(["gzip", "deflate;q=0, gzip", "*", ",;=,", "gzip;q=x", "\xff"]),
        "content-type": st.sampled_from(["text/plain", "application/octet-stream", "multipart/form-data", "\xe4", ""]),
        "x-request-id": st.sampled_from(["good", "\xff\xfe", "a" * 5000]),
        "traceparent": st.sampled_from(["00-0-0-00", "\xff"]),
    },
)
header_lengths = st.sampled_from(
    ["", "0", "-1", "+5", "1e3", "abc", "\xb2", "9" * 30, "9" * 5000, "1, 2", "0x10", " 7 ", "1_0"]
)


@dataclass(frozen=True)
class Post:
    """One inference over REST; `padding_bytes` of white space behind the first byte make a body big, not its `repr`."""

    path: str
    headers: dict[str, str]
    body: bytes
    padding_bytes: int = 0


# --- the clients ------------------------------------------------------------------------------------------------------


@dataclass
class Target:
    """A server under fire: how it is asked, what is demanded of each answer, and what was sent."""

    server: Running
    engine: str
    sent: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    _http: http.client.HTTPConnection | None = None
    _used_s: float = 0.0

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.server.rest_url.removeprefix("http://").partition(":")
        return host, int(port)

    def post(self, path: str, headers: dict[str, str], body: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Ask over a kept connection; a fresh one where the server may be about to close the last."""
        if self._http is None or time.monotonic() - self._used_s > 0.4:
            self.close()
            self._http = http.client.HTTPConnection(*self.address, timeout=ANSWER_DEADLINE_S)
        self._http.request("POST", path, body, headers)
        response = self._http.getresponse()
        answer = response.status, response.headers, response.read()
        self._used_s = time.monotonic()
        return answer

    def close(self) -> None:
        if self._http is not None:
            self._http.close()

    def count(self, kind: str, status: object) -> None:
        self.sent[kind] += 1
        self.statuses[f"{kind} {status}"] += 1

    def infer(self, kind: str, request: Post) -> None:
        body = request.body[:1] + b" " * request.padding_bytes + request.body[1:]
        status, got, answer = self.post(request.path, request.headers, body)
        self.count(kind, status)
        check_answer(status, {name.lower(): value for name, value in got.items()}, answer)


def check_answer(status: int, headers: dict[str, str], body: bytes) -> None:
    """Fail unless an answer blames the caller in the one error form, or is right, or sheds with a declared reason."""
    assert status < 500 or status in (503, 504), (status, body[:500])
    assert b"Traceback" not in body
    if status >= 400:
        error = json.loads(body)
        assert isinstance(error, dict), error
        assert list(error) == ["error"]
        assert isinstance(error["error"], str)
        assert error["error"]
        assert status != 503 or int(headers["retry-after"]) > 0
        assert status != 504 or "timeout" in error["error"] or "deadline" in error["error"], error
    elif headers.get("content-type") == "application/json" and "content-encoding" not in headers:
        json.loads(body)


def run(count: int, number: int, strategy: st.SearchStrategy[Any], act: Callable[[Any], None]) -> None:
    """Draw `count` examples and act on each; hypothesis makes the one that fails small."""

    @seed(SEED + number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def ask(example: Any) -> None:
        try:
            act(example)
        except Exception as error:
            error.add_note(f"sent: {example!r}"[:3000])
            raise

    ask()


# --- the kinds of requests --------------------------------------------------------------------------------------------


def fuzz_openapi(target: Target, count: int, number: int) -> None:
    """Ask every operation of the OpenAPI document, as it says and as it does not say."""
    url = target.server.rest_url
    schema = schemathesis.openapi.from_dict(requests.get(f"{url}/openapi.json", timeout=ANSWER_DEADLINE_S).json())
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 20
    with requests.Session() as session:

        def ask(operation: Any, case: Any) -> None:
            named = case.path_parameters or {}
            if operation.path.endswith("load"):  # "unload" as well
                assume(named["name"] not in ("iris", "text", "mixed"))
            elif "name" in named and zlib.crc32(repr(named).encode("utf-8", "surrogatepass")) % 4:
                named |= {"name": "iris"} | ({"version": "1"} if "version" in named else {})
            if operation.path == "/v2/logging" and isinstance(case.body, dict):
                case.body.pop("log_error", None)  # the log is read at the end
            response = case.call(base_url=url, session=session, timeout=ANSWER_DEADLINE_S)
            target.count("openapi", response.status_code)
            headers = {name: values[0] for name, values in response.headers.items()}
            if response.request.method != "HEAD":
                check_answer(response.status_code, headers, response.content)

        modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
        for index, operation in enumerate(operations):
            for mode in modes:
                strategy = operation.as_strategy(generation_mode=mode)
                with contextlib.suppress(Unsatisfiable):  # nothing that could be wrong
                    run(
                        max(1, count // len(operations) // 2),
                        number + index,
                        strategy,
                        functools.partial(ask, operation),
                    )


def fuzz_json(target: Target, count: int, number: int) -> None:
    """Send documents with faults, some of them encoded, rightly or not."""

    @st.composite
    def asked(draw: Any) -> Post:
        path, document = draw(st.sampled_from(DOCUMENTS))
        body, headers = draw(mutated_document(document)), draw(other_headers)
        encoding = draw(st.sampled_from([None] * 8 + ["gzip", "deflate", "identity", "br", "gzip, gzip", "\xff"]))
        if encoding is not None:
            headers["content-encoding"] = encoding
            body = ENCODINGS.get(encoding, bytes)(body)
            if draw(st.booleans()):
                body = draw(mutated_bytes(body))
        # A document over 1 MB is read by another parser.
        is_big = encoding is None and draw(st.integers(0, 29)) == 0
        return Post(path, headers, body, BIG_BODY_BYTES if is_big else 0)

    run(count, number, asked(), functools.partial(target.infer, "json"))


def fuzz_binary(target: Target, count: int, number: int) -> None:
    """Send binary tensors whose header document, bytes or header length have faults."""

    @st.composite
    def asked(draw: Any) -> Post:
        model, document, blobs = draw(st.sampled_from(BINARIES))
        header, headers = json.dumps(document).encode(), draw(other_headers)
        where = draw(st.sampled_from(["document", "blobs", "length", "body", "raw"]))
        if where == "document":
            header = draw(mutated_document(document))
        if where in ("blobs", "raw"):
            blobs = draw(mutated_bytes(blobs))
        body, length = header + blobs, str(len(header))
        if where == "body":
            body = draw(mutated_bytes(body))
        if where == "length":
            length = draw(header_lengths | st.integers(-2, len(body) + 2).map(str))
        if where == "raw":  # without a document: the model's one input
            model, body, length = draw(st.sampled_from(["iris", "text", "mixed"])), blobs, "0"
        return Post(infer_path(model), headers | {"inference-header-content-length": length}, body)

    run(count, number, asked(), functools.partial(target.infer, "binary"))


def raw_requests() -> list[bytes]:
    """Return requests that are right, as bytes on the wire; most of them end their connection."""
    body = json.dumps(IRIS).encode()
    head = b"POST /v2/models/iris/infer HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    plain = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    kept = plain.replace(b"Connection: close\r\n", b"")
    chunks = b"".join(b"%x;e=1\r\n%s\r\n" % (len(part), part) for part in (body[:7], body[7:50], body[50:]))
    _, document, blobs = BINARIES[0]
    header = json.dumps(document).encode()
    binary = b"Inference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n" % (len(header), len(header + blobs))
    get = b"GET /v2/models/iris HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    return [
        plain,
        kept + plain,
        kept + get,
        head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\nTrailer: x\r\n\r\n",
        head + binary + header + blobs,
        plain.replace(b"Host", b"Expect: 100-continue\r\nHost"),
        plain.replace(b"Host", b"Upgrade: websocket\r\nConnection: Upgrade\r\nHost"),
        plain.replace(b"HTTP/1.1", b"HTTP/1.0"),
        get,
        get.replace(b"/v2/models/iris", b"http://x/v2/models/iris?a=b%00#c"),
        b"POST /v2/logging HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\n",
    ]


RAW_BITS = [
    b"\r\n", b"\n", b"\r", b"\x00", b" ", b":", b"\xff", b"\x80", b"%", b"%00", b"%2f", b"/../", b"?",
    b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Content-Length: 99999999999999999999\r\n", b"0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"Host: y\r\n", b"Host:\r\n",
    b" folded\r\n", b"ffffffffffffffffff\r\n", b"-1\r\n",
    b"Connection: close, keep-alive\r\n", b"Expect: 100-continue\r\n", b"HTTP/2.0", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]  # fmt: skip


def broken_request(rng: random.Random) -> bytes:
    """Return a request with one to four faults in its bytes, lines or framing."""
    bases = raw_requests()
    data = bytearray(rng.choice(bases))
    for _ in range(rng.randint(1, 4)):
        at, lines = rng.randint(0, len(data)), bytes(data).split(b"\r\n")
        line = rng.randrange(len(lines))
        match rng.randrange(8):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = rng.choice(RAW_BITS)
            case 3:
                data[at:at] = rng.randbytes(rng.randint(1, 16))
            case 4:
                data = bytearray(b"\r\n".join([*lines[: line + 1], *lines[line:]]))
            case 5:
                data = bytearray(b"\r\n".join([*lines[:line], *lines[line + 1 :]]))
            case 6:
                data[at:] = rng.choice(bases)[at:]
            case _:
                del data[at : at + rng.randint(1, 20)]
    return bytes(data)


def read_responses(data: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Split what came over a connection into responses; fail if it is not a row of whole ones."""
    responses = []
    while data:
        head, separator, rest = data.partition(b"\r\n\r\n")
        assert separator, data[:200]
        first, *lines = head.split(b"\r\n")
        found = re.fullmatch(rb"HTTP/1\.1 ([1-5]\d\d) [ -~]*", first)
        assert found, first
        headers = {
            name.decode().lower(): value.strip().decode("latin-1")
            for name, _, value in (line.partition(b":") for line in lines)
        }
        size = int(headers.get("content-length", 0))
        assert len(rest) >= size, (head, rest)
        if int(found[1]) != 100:
            assert "content-length" in headers, head
            responses.append((int(found[1]), headers, rest[:size]))
        data = rest[size:]
    return responses


def fuzz_raw(target: Target, count: int, number: int) -> None:
    """Send bytes that once were requests, many connections at a time; the server ends each connection itself."""
    rng = random.Random(SEED + number)
    gate = asyncio.Semaphore(500)

    async def ask(data: bytes) -> None:
        async with gate, asyncio.timeout(ANSWER_DEADLINE_S):
            reader, writer = await asyncio.open_connection(*target.address)
            writer.write(data)
            try:
                answer = await reader.read()
            except ConnectionResetError:
                answer = b""
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        try:
            responses = [] if re.match(rb"HEAD ", data) else read_responses(answer)
            target.count("raw", responses[0][0] if responses else "none")
            assert responses or not data.strip(b"\r\n") or data.startswith(b"HEAD "), "no answer"
            for response in responses:
                check_answer(*response)
        except (AssertionError, ValueError) as error:
            error.add_note(f"sent: {data!r}\ngot: {answer[:2000]!r}")
            raise

    async def ask_all() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(ask(broken_request(rng)))

    asyncio.run(ask_all())


GRPC_FAILURES = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNAVAILABLE,
}
OTHER_METHODS = ["ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics", "RepositoryIndex"]
contents = st.builds(
    proto.InferTensorContents,
    bool_contents=st.lists(st.booleans(), max_size=2),
    int_contents=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4),
    int64_contents=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=2),
    uint_contents=st.lists(st.integers(0, 2**32 - 1), max_size=2),
    fp32_contents=st.lists(st.floats(width=32), max_size=8),
    bytes_contents=st.lists(st.binary(max_size=5), max_size=2),
)
parameters = st.dictionaries(
    st.sampled_from(["timeout", "classification", "ä", "shared_memory_region"]),
    st.builds(proto.InferParameter)
    | st.builds(proto.InferParameter, bool_param=st.booleans())
    | st.builds(proto.InferParameter, int64_param=st.integers(-(2**63), 2**63 - 1))
    | st.builds(proto.InferParameter, string_param=st.text(max_size=5) | st.just("1e99"))
    | st.builds(proto.InferParameter, double_param=st.floats()),
    max_size=2,
)
generated = st.builds(
    proto.ModelInferRequest,
    model_name=st.sampled_from(["iris", "iris", "text", "mixed", "", "none", "ä\u0000"]),
    model_version=st.sampled_from(["", "", "1", "2", "\u0000"]),
    id=st.sampled_from(["", "id", "ä" * 300]),
    inputs=st.lists(
        st.builds(
            proto.ModelInferRequest.InferInputTensor,
            name=st.sampled_from(["x", "x", "text", "x_FP32", "", "ä" * 2000]),
            datatype=st.sampled_from(["FP32", "FP32", *MIXED, "BF16", "", "\u0000"]),
            shape=st.lists(st.sampled_from([0, 1, 1, 2, 4, 4, -1, 2**40, 2**62]), max_size=4) | st.just([1] * 70),
            parameters=parameters,
            contents=st.none() | contents,
        ),
        max_size=3,
    ),
    outputs=st.lists(
        st.builds(
            proto.ModelInferRequest.InferRequestedOutputTensor,
            name=st.sampled_from(["label", "probabilities", "", "none"]),
            parameters=parameters,
        ),
        max_size=2,
    ),
    parameters=parameters,
    raw_input_contents=st.lists(st.binary(max_size=20), max_size=3),
)


def fuzz_grpc(target: Target, count: int, number: int) -> None:
    """Call ModelInfer with messages that are odd and bytes that are none, and now and then another method."""

    @st.composite
    def asked(draw: Any) -> tuple[str, bytes]:
        if draw(st.booleans()):
            return "ModelInfer", draw(generated).SerializeToString()
        data = draw(mutated_bytes(draw(st.sampled_from(messages())).SerializeToString()))
        return draw(st.sampled_from(["ModelInfer"] * 6 + OTHER_METHODS)), data

    with grpc.insecure_channel(target.server.grpc_target) as channel:
        calls = {m: channel.unary_unary(f"/{SERVICE}/{m}") for m in ("ModelInfer", *OTHER_METHODS)}

        def ask(request: tuple[str, bytes]) -> None:
            method, payload = request
            try:
                answer = calls[method](payload, timeout=ANSWER_DEADLINE_S)
            except grpc.RpcError as error:
                code, details = error.code(), error.details() or ""  # type: ignore[attr-defined]
                target.count("grpc", code.name)
                assert code in GRPC_FAILURES, (code, details)
                assert details != "Deadline Exceeded", "the client's deadline: the call hung"
                assert details
                assert "Traceback" not in details
            else:
                target.count("grpc", "OK")
                getattr(proto, f"{method}Response").FromString(answer)

        run(count, number, asked(), ask)


# --- the test ---------------------------------------------------------------------------------------------------------

KINDS = {
    "json": fuzz_json,
    "binary": fuzz_binary,
    "raw": fuzz_raw,
    "grpc": fuzz_grpc,
}


def good_answers(target: Target) -> list[bytes]:
    """Return the bytes of the answers to requests that are right, over REST, REST with binary data, and gRPC."""
    answers = []
    model, document, blobs = BINARIES[1]
    header = json.dumps(document).encode()
    for path, headers, body in (
        (infer_path("iris"), {}, json.dumps(IRIS).encode()),
        (infer_path(model), {"inference-header-content-length": str(len(header))}, header + blobs),
    ):
        status, _, answer = target.post(path, headers, body)
        assert status == 200, answer
        answers.append(answer)
    with grpc.insecure_channel(target.server.grpc_target) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        answers.append(call(good_message().SerializeToString(deterministic=True), timeout=ANSWER_DEADLINE_S))
    target.close()
    return answers


def open_files(server: Running) -> int:
    return sum(1 for _ in Path(f"/proc/{server.process.pid}/fd").iterdir())


def resident_bytes(server: Running) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())
    assert found
    return int(found[1]) << 10


def gauges(server: Running, *names: str) -> dict[str, float]:
    text = requests.get(f"{server.rest_url}/metrics", timeout=ANSWER_DEADLINE_S).text
    return {
        name: sum(float(v) for v in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)) for name in names
    }


def check_log(server: Running) -> None:
    """Fail at a line that tells of a failure that nobody foresaw."""
    for line in server.stderr:
        record = json.loads(line)
        assert record["level"] not in ("error", "critical"), line
        assert "exception" not in record, line
        assert "unexpected" not in record["message"], line


@pytest.fixture(params=["native", "grpcio"])
def target(request: pytest.FixtureRequest, models: list[Path]) -> Iterator[Target]:
    with phoenix_process.start(models, ENV | {"PHOENIX_GRPC_ENGINE": request.param}) as server:
        target = Target(server, request.param)
        yield target
        target.close()
        print(*[line for line in server.stderr if '"level": "error"' in line])  # shown where the test failed


def test_fuzzed_requests_get_answers_and_leave_no_trace(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    server = target.server
    before = good_answers(target)
    files = open_files(server)
    for number, (kind, fuzz) in enumerate(KINDS.items()):
        fuzz(target, COUNTS[kind] // 10, 1000 * (number + 1))
    target.close()
    memory = resident_bytes(server)

    if target.engine == "native":  # REST has nothing to do with the engine, and schemathesis takes its time
        fuzz_openapi(target, COUNTS["openapi"], 0)
    for number, (kind, fuzz) in enumerate(KINDS.items()):
        t0 = time.monotonic()
        fuzz(target, COUNTS[kind], 1_000_000 * (number + 1))
        print(kind, time.monotonic() - t0, target.sent[kind])
    target.close()

    assert server.process.poll() is None
    assert good_answers(target) == before
    idle = {"inference_inflight_requests": 0.0, "inference_queued_rows": 0.0}
    wait_until(lambda: gauges(server, *idle) == idle, "no request in flight")
    wait_until(lambda: open_files(server) <= files, f"open files back to {files}, are {open_files(server)}")
    growth = resident_bytes(server) - memory
    assert growth < MAX_GROWTH_BYTES
    check_log(server)
    assert sum(target.sent.values()) >= 5000, target.sent
    with capsys.disabled():
        print(f"\nfuzzed with seed {SEED}: {dict(target.sent)}, memory {growth / 2**20:+.1f} MiB")
        print(f"  {dict(sorted(target.statuses.items()))}")


def test_faults_that_fuzzing_found_stay_mended(models: list[Path]) -> None:
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    name_with_nul = json.dumps(IRIS | {"\0": None}).encode()
    with phoenix_process.start(models, ENV) as server:
        target = Target(server, "native")
        for path, document in (
            (infer_path("iris"), {"inputs": [{"name": "x", "datatype": deep, "shape": [1]}]}),
            (infer_path("iris"), {"inputs": [{"name": "x", "datatype": "FP32", "shape": deep}]}),
            (infer_path("iris"), IRIS | {"parameters": {"timeout": "x" * 5000}}),
            ("/v2/logging", {"log_info": deep}),
            ("/v2/repository/models/none/load", {"parameters": deep}),
        ):
            status, _, answer = target.post(path, {}, json.dumps(document).encode())
            assert status == 400, answer
            assert len(json.loads(answer)["error"]) < 400
        # Over 1 MB another parser reads the document, one that looks names up as C strings.
        target.infer("json", Post(infer_path("iris"), {}, name_with_nul, BIG_BODY_BYTES))
        assert target.statuses["json 200"] == 1
        target.close()
        # A client that leaves, and one that is refused, in the middle of a body that FastAPI reads.
        for is_leaving in (True, False):
            with socket.create_connection(target.address, timeout=ANSWER_DEADLINE_S) as sock:
                sock.sendall(b"POST /v2/logging HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n{")
                if not is_leaving:
                    assert sock.recv(65536).startswith(b"HTTP/1.1 408 ")
        good_answers(target)
    check_log(server)
