"""The binary tensor data extension: tensors as bytes behind a JSON header, in both directions."""

import json
import struct
from typing import Any

import numpy as np
from conformance.datatypes import DATATYPES, assert_same, pack
from conformance.table import BINARY, OIP_REST, PHOENIX, REST, rule
from conformance.wire import Document, data_of, tensor_of
from conformance.wire_rest import HEADER_LENGTH, Reply, RestClient, binary_tensor, read_binary

_REQUEST = f"{BINARY}, Binary Tensor Request"
_RESPONSE = f"{BINARY}, Binary Tensor Response"
_RAW = f"{BINARY}, Raw Binary Request"
X = np.array([[1.5, -2.5]], np.float32)
A = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
B = np.full((2, 3), 10, np.float32)


def _infer(server: RestClient, **changes: Any) -> Reply:
    """Send X to `oip-many`, whole or changed: `blobs`, `header_length`, and members of the input's document."""
    item, blob = binary_tensor("x", X)
    blobs = changes.pop("blobs", [blob])
    header_length = changes.pop("header_length", "")
    document = {"inputs": [{**item, **changes}]}
    return server.infer_binary("oip-many", document, blobs, header_length)


def _text(server: RestClient, count: int, blob: bytes) -> list[str]:
    """Send a blob as `count` BYTES elements and return what comes back as JSON."""
    item = {"name": "x", "datatype": "BYTES", "shape": [count], "parameters": {"binary_data_size": len(blob)}}
    return [str(text) for text in data_of(server.infer_binary("oip-text", {"inputs": [item]}, [blob]).document, "y")]


@rule("binary.round-trip", _REQUEST, on=REST, each=DATATYPES)
def round_trip(server: RestClient, datatype: str) -> None:
    """{each} tensors come back bit for bit, extremes included."""
    sample = DATATYPES[datatype].sample
    assert_same(server.infer_arrays(f"oip-identity-{datatype.lower()}", {"x": sample})["y"], sample)


@rule("binary.nan", _REQUEST, on=REST)
def nan(server: RestClient) -> None:
    """NaN of every payload, and the infinities, come back bit for bit."""
    for unsigned, datatype in ((np.uint16, "FP16"), (np.uint32, "FP32"), (np.uint64, "FP64")):
        dtype = DATATYPES[datatype].numpy
        quiet = np.array([np.nan, -np.nan, np.inf, -np.inf], dtype)
        with_payload = (quiet.view(unsigned) | np.array([1, 2, 0, 0], unsigned)).view(dtype).reshape(2, 2)
        assert_same(server.infer_arrays(f"oip-identity-{datatype.lower()}", {"x": with_payload})["y"], with_payload)


@rule("binary.nan-output", _RESPONSE, on=REST)
def nan_output(server: RestClient) -> None:
    """NaN and Infinity that a model makes come back in binary."""
    top, bottom = np.array([0, 1, -1], np.float32), np.zeros(3, np.float32)
    ratio = server.infer_arrays("oip-divide", {"a": top, "b": bottom})["ratio"]
    assert np.isnan(ratio[0])
    assert ratio[1:].tolist() == [np.inf, -np.inf]


@rule("binary.little-endian", _REQUEST, on=REST)
def little_endian(server: RestClient) -> None:
    """Elements are little-endian, in row-major order, without padding."""
    item = {"name": "x", "datatype": "INT32", "shape": [1, 2, 2], "parameters": {"binary_data_size": 16}}
    blob = bytes.fromhex("01000000 02000000 03000000 00010000")
    reply = server.infer_binary("oip-cube", {"inputs": [item]}, [blob])
    assert data_of(reply.document, "y") == [1, 3, 2, 256]


@rule("binary.boolean-byte", _REQUEST, on=REST)
def boolean_byte(server: RestClient) -> None:
    """A BOOL is one byte, 0 or 1, both ways."""
    item = {"name": "x", "datatype": "BOOL", "shape": [1, 2], "parameters": {"binary_data_size": 2}}
    document = {"inputs": [item], "parameters": {"binary_data_output": True}}
    reply = server.infer_binary("oip-identity-bool", document, [b"\x01\x00"])
    assert reply.body.endswith(b"\x01\x00")


@rule("binary.boolean-other-byte", PHOENIX, on=REST, profile="phoenix")
def boolean_other_byte(server: RestClient) -> None:
    """A BOOL byte that is neither 0 nor 1 is refused: what a model would make of it is undefined."""
    item = {"name": "x", "datatype": "BOOL", "shape": [1, 2], "parameters": {"binary_data_size": 2}}
    with server.refused("invalid"):
        server.infer_binary("oip-identity-bool", {"inputs": [item]}, [b"\x02\x00"])


@rule("binary.unaligned", _REQUEST, on=REST)
def unaligned(server: RestClient) -> None:
    """The length of the header does not matter, although it moves the tensor to any address."""
    sample = DATATYPES["FP64"].sample
    item, blob = binary_tensor("x", sample)
    for padding in range(8):
        document = {"inputs": [item], "parameters": {"binary_data_output": True}, "id": "i" * padding}
        found = read_binary(server.infer_binary("oip-identity-fp64", document, [blob]))
        assert_same(found[0][1], sample)


@rule("binary.several", _REQUEST, on=REST)
def several(server: RestClient) -> None:
    """The blobs stand in the order of the inputs in the header."""
    assert server.infer_arrays("oip-divide", {"a": A[0], "b": B[0]})["ratio"].tolist() == (A[0] / B[0]).tolist()
    assert server.infer_arrays("oip-divide", {"b": B[0], "a": A[0]})["ratio"].tolist() == (A[0] / B[0]).tolist()


@rule("binary.mixed-inputs", _REQUEST, on=REST)
def mixed_inputs(server: RestClient) -> None:
    """One input may be JSON and the other binary, whichever comes first."""
    b_item, b_blob = binary_tensor("b", B)
    for items in ([tensor_of("a", A), b_item], [b_item, tensor_of("a", A)]):
        reply = server.infer_binary("oip-add", {"inputs": items}, [b_blob])
        assert data_of(reply.document, "sum") == (A + B).reshape(-1).tolist()


@rule("binary.one-output", _RESPONSE, on=REST)
def one_output(server: RestClient) -> None:
    """`binary_data: true` of an output makes that output binary and leaves the others JSON."""
    outputs = [{"name": "doubled"}, {"name": "integer", "parameters": {"binary_data": True}}, {"name": "negated"}]
    found = read_binary(server.post(server.infer_path("oip-many"), {"inputs": [tensor_of("x", X)], "outputs": outputs}))
    assert {name: is_binary for name, _, is_binary in found} == {"doubled": False, "integer": True, "negated": False}
    assert {name: array.tolist() for name, array, _ in found} == {
        "doubled": [[3.0, -5.0]], "integer": [[1, -2]], "negated": [[-1.5, 2.5]],
    }  # fmt: skip


@rule("binary.all-outputs", _RESPONSE, on=REST)
def all_outputs(server: RestClient) -> None:
    """`binary_data_output: true` of the request makes all outputs binary."""
    found = read_binary(_ask_json(server, {"binary_data_output": True}))
    assert [is_binary for _, _, is_binary in found] == [True, True, True]


@rule("binary.output-wins", _RESPONSE, on=REST)
def output_wins(server: RestClient) -> None:
    """What an output says of itself wins over `binary_data_output`."""
    outputs = [{"name": "doubled", "parameters": {"binary_data": False}}, {"name": "integer"}]
    found = read_binary(_ask_json(server, {"binary_data_output": True}, outputs))
    assert {name: is_binary for name, _, is_binary in found} == {"doubled": False, "integer": True}


@rule("binary.json-asked", _RESPONSE, on=REST)
def json_asked(server: RestClient) -> None:
    """A binary request that does not ask for binary outputs is answered in JSON."""
    reply = _infer(server)
    assert HEADER_LENGTH.lower() not in reply.headers
    assert data_of(reply.document, "doubled") == [3.0, -5.0]


@rule("binary.response-headers", _RESPONSE, on=REST)
def response_headers(server: RestClient) -> None:
    """With a binary output the answer is application/octet-stream, and the header counts the bytes of the JSON."""
    reply = _ask_json(server, {"binary_data_output": True})
    assert reply.headers["content-type"] == "application/octet-stream"
    assert int(reply.headers["content-length"]) == len(reply.body)
    document = json.loads(reply.body[: int(reply.headers[HEADER_LENGTH.lower()])])
    sizes = [item["parameters"]["binary_data_size"] for item in document["outputs"]]
    assert sizes == [8, 8, 16]
    assert int(reply.headers[HEADER_LENGTH.lower()]) + sum(sizes) == len(reply.body)


@rule("binary.flag-type", PHOENIX, on=REST, profile="phoenix")
def flag_type(server: RestClient) -> None:
    """`binary_data_output` and `binary_data` are booleans; anything else is refused."""
    with server.refused("invalid"):
        _ask_json(server, {"binary_data_output": "yes"})
    with server.refused("invalid"):
        _ask_json(server, {}, [{"name": "doubled", "parameters": {"binary_data": 1}}])


@rule("binary.empty-tensor", _REQUEST, on=REST, profile="phoenix")
def empty_tensor(server: RestClient) -> None:
    """A tensor without elements has a blob of no bytes, both ways."""
    empty = np.empty((0, 2), np.float32)
    found = server.infer_arrays("oip-many", {"x": empty})
    assert_same(found["doubled"], empty)
    assert_same(found["integer"], np.empty((0, 2), np.int64))


@rule("binary.scalar", _REQUEST, on=REST)
def scalar(server: RestClient) -> None:
    """A scalar is one element."""
    assert_same(server.infer_arrays("oip-scalar", {"x": np.array(21, np.float32)})["y"], np.array(42, np.float32))


@rule("binary.large", _REQUEST, on=REST)
def large(server: RestClient) -> None:
    """A tensor of four megabytes comes back bit for bit."""
    sample = np.random.default_rng(7).integers(0, 2**32, (2**19, 2), dtype=np.uint32)
    assert_same(server.infer_arrays("oip-identity-uint32", {"x": sample})["y"], sample)


@rule("binary.empty-text", _REQUEST, on=REST)
def empty_text(server: RestClient) -> None:
    """An empty BYTES element is four zero bytes."""
    assert _text(server, 3, bytes(4) + b"\x01\x00\x00\x00a" + bytes(4)) == ["", "a", ""]


@rule("binary.text-overrun", _REQUEST, on=REST)
def text_overrun(server: RestClient) -> None:
    """A BYTES element whose length runs over the end of the blob is refused."""
    for blob in (b"\x05\x00\x00\x00abcd", b"\xff\xff\xff\xffabcd", b"\x01\x00\x00\x00a\x09\x00\x00\x00b"):
        with server.refused("invalid"):
            _text(server, 2 if len(blob) > 8 else 1, blob)


@rule("binary.text-cut-length", _REQUEST, on=REST)
def text_cut_length(server: RestClient) -> None:
    """A BYTES blob that ends within a length is refused."""
    for blob in (b"\x01\x00\x00", b"\x01\x00\x00\x00a\x00\x00"):
        with server.refused("invalid"):
            _text(server, 1 if len(blob) < 4 else 2, blob)


@rule("binary.text-count", _REQUEST, on=REST)
def text_count(server: RestClient) -> None:
    """A BYTES blob with fewer or more elements than the shape says is refused."""
    for count in (1, 3):
        with server.refused("invalid"):
            _text(server, count, pack(np.array(["a", "b"], dtype=object)))


@rule("binary.text-not-utf-8", PHOENIX, on=REST, profile="phoenix")
def text_not_utf_8(server: RestClient) -> None:
    """A BYTES element that is not UTF-8 is refused, because ONNX strings are UTF-8."""
    with server.refused("invalid"):
        _text(server, 1, b"\x02\x00\x00\x00\xff\xfe")


@rule("binary.truncated-by-1", _REQUEST, on=REST)
def truncated_by_1(server: RestClient) -> None:
    """A body that lacks the last byte is refused, and the message names the input."""
    with server.refused("invalid") as refused:
        _infer(server, blobs=[pack(X)[:-1]])
    assert "x" in refused.message


@rule("binary.extended-by-1", _REQUEST, on=REST)
def extended_by_1(server: RestClient) -> None:
    """A body with a byte behind the last input is refused."""
    with server.refused("invalid"):
        _infer(server, blobs=[pack(X), b"\x00"])


@rule("binary.size-not-shape", _REQUEST, on=REST)
def size_not_shape(server: RestClient) -> None:
    """A `binary_data_size` that is not the bytes of shape and datatype is refused, though the body holds as many."""
    for size in (0, 4, 12):
        with server.refused("invalid"):
            _infer(server, parameters={"binary_data_size": size}, blobs=[bytes(size)])


@rule("binary.size-type", _REQUEST, on=REST)
def size_type(server: RestClient) -> None:
    """A `binary_data_size` that is negative or no integer is refused."""
    for size in (-1, -8, "8", 8.0, True, [8], {}):
        with server.refused("invalid"):
            _infer(server, parameters={"binary_data_size": size})


@rule("binary.size-huge", _REQUEST, on=REST)
def size_huge(server: RestClient) -> None:
    """A `binary_data_size` beyond any body is refused."""
    for size in (2**31, 2**63, 2**64 - 1):
        with server.refused("invalid"):
            _infer(server, parameters={"binary_data_size": size})


@rule("binary.data-and-size", _REQUEST, on=REST)
def data_and_size(server: RestClient) -> None:
    """An input with both `data` and `binary_data_size` is refused."""
    with server.refused("invalid"):
        _infer(server, data=[1.5, -2.5])


@rule("binary.size-without-header", _REQUEST, on=REST)
def size_without_header(server: RestClient) -> None:
    """`binary_data_size` without Inference-Header-Content-Length is refused; the message names the header."""
    with server.refused("invalid"):
        _infer(server, header_length=None)
    with server.refused("invalid") as refused:
        _infer(server, header_length=None, blobs=[])
    if server.is_strict:
        assert HEADER_LENGTH in refused.message


@rule("binary.header-without-size", _REQUEST, on=REST)
def header_without_size(server: RestClient) -> None:
    """The header may be there although every input is JSON; bytes behind the JSON are then refused."""
    document = {"inputs": [tensor_of("x", X)]}
    assert data_of(server.infer_binary("oip-many", document).document, "doubled") == [3.0, -5.0]
    with server.refused("invalid"):
        server.infer_binary("oip-many", document, [b"\x00"])


@rule("binary.header-negative", _REQUEST, on=REST)
def header_negative(server: RestClient) -> None:
    """A negative Inference-Header-Content-Length is refused."""
    with server.refused("invalid"):
        _infer(server, header_length="-1")


@rule("binary.header-not-a-number", _REQUEST, on=REST)
def header_not_a_number(server: RestClient) -> None:
    """An Inference-Header-Content-Length that is no decimal integer is refused."""
    for value in ("NaN", "0x10", "1.5", "+5", "1e2", "5,5", "-", "\u00b2", "1_0"):
        with server.refused("invalid"):
            _infer(server, header_length=value)


@rule("binary.header-too-big", _REQUEST, on=REST)
def header_too_big(server: RestClient) -> None:
    """A header length beyond the body is refused; so is one of a thousand digits."""
    for length in ("1000000", "9" * 1000):
        with server.refused("invalid"):
            _infer(server, header_length=length)


@rule("binary.header-zero", _RAW, on=REST)
def header_zero(server: RestClient) -> None:
    """A header length of 0 makes the whole body the tensor, and so a body with JSON in it is refused."""
    with server.refused("invalid"):
        _infer(server, header_length="0")


@rule("binary.header-cuts-json", _REQUEST, on=REST)
def header_cuts_json(server: RestClient) -> None:
    """A header length that ends within the JSON, or a byte behind it, is refused."""
    item, blob = binary_tensor("x", X)
    document = {"inputs": [item]}
    length = len(json.dumps(document))
    for wrong in (length - 1, length + 1, 1):
        with server.refused("invalid"):
            server.infer_binary("oip-many", document, [blob], str(wrong))


@rule("binary.header-whole-body", _REQUEST, on=REST)
def header_whole_body(server: RestClient) -> None:
    """A header length that takes in the blobs is refused."""
    item, blob = binary_tensor("x", X)
    length = len(json.dumps({"inputs": [item]})) + len(blob)
    with server.refused("invalid"):
        server.infer_binary("oip-many", {"inputs": [item]}, [blob], str(length))


@rule("binary.content-type", _REQUEST, on=REST)
def content_type(server: RestClient) -> None:
    """A binary request is known by its header, whatever its Content-Type says."""
    item, blob = binary_tensor("x", X)
    for kind in ("application/octet-stream", "application/json", "text/plain"):
        reply = server.infer_binary("oip-many", {"inputs": [item]}, [blob], headers={"Content-Type": kind})
        assert data_of(reply.document, "doubled") == [3.0, -5.0]


@rule("binary.fp16-as-json", PHOENIX, on=REST, profile="phoenix")
def fp16_as_json(server: RestClient) -> None:
    """An FP16 output that is asked for as JSON is refused, and the message says to ask for binary."""
    item, blob = binary_tensor("x", DATATYPES["FP16"].sample)
    with server.refused("invalid") as refused:
        server.infer_binary("oip-identity-fp16", {"inputs": [item]}, [blob])
    assert "binary" in refused.message


@rule("binary.chunked", OIP_REST, on=REST)
def chunked(server: RestClient) -> None:
    """A body in chunks is read as one with a Content-Length, wherever the chunks are cut."""
    item, blob = binary_tensor("x", X)
    header = json.dumps({"inputs": [item]}).encode()
    body = header + blob
    parts = [body[index : index + 7] for index in range(0, len(body), 7)]
    reply = server.http("POST", server.infer_path("oip-many"), iter(parts), {HEADER_LENGTH: str(len(header))})
    assert data_of(reply.accepted().document, "doubled") == [3.0, -5.0]


@rule("raw.one-input", _RAW, on=REST)
def raw_one_input(server: RestClient) -> None:
    """With a header length of 0 the body is the one input's data, of batch size 1, and all outputs come back binary."""
    found = read_binary(_raw(server, "oip-many", pack(X)))
    assert [(name, is_binary) for name, _, is_binary in found] == [
        ("doubled", True), ("negated", True), ("integer", True),
    ]  # fmt: skip
    assert_same(found[0][1], X * 2)


@rule("raw.text", _RAW, on=REST)
def raw_text(server: RestClient) -> None:
    """A BYTES input of one element is the body itself, without a length before it."""
    found = read_binary(_raw(server, "oip-text", "zażółć".encode()))
    assert found[0][1].tolist() == ["zażółć"]


@rule("raw.text-empty", _RAW, on=REST, profile="phoenix")
def raw_text_empty(server: RestClient) -> None:
    """An empty body is an empty BYTES element."""
    assert read_binary(_raw(server, "oip-text", b""))[0][1].tolist() == [""]


@rule("raw.several-inputs", _RAW, on=REST)
def raw_several_inputs(server: RestClient) -> None:
    """A raw request to a model of two inputs is refused."""
    with server.refused("invalid"):
        _raw(server, "oip-add", pack(A))


@rule("raw.wrong-size", _RAW, on=REST)
def raw_wrong_size(server: RestClient) -> None:
    """A raw body that is not exactly one row is refused."""
    for body in (pack(X)[:-1], pack(X) + b"\x00", pack(X) * 2, b""):
        with server.refused("invalid"):
            _raw(server, "oip-many", body)


@rule("raw.several-variable-dimensions", _RAW, on=REST)
def raw_several_variable_dimensions(server: RestClient) -> None:
    """A raw body for a model with two variable dimensions beside the batch is refused: its shape is unknown."""
    with server.refused("invalid"):
        _raw(server, "oip-cube", struct.pack("<4i", 1, 2, 3, 4))


@rule("raw.variable-dimension", _RAW, on=REST)
def raw_variable_dimension(server: RestClient) -> None:
    """One variable dimension is found from the size of the body."""
    found = read_binary(_raw(server, "oip-total", struct.pack("<3f", 1, 2, 3.5)))
    assert_same(found[0][1], np.array(6.5, np.float32))


def _raw(server: RestClient, model: str, body: bytes) -> Reply:
    return server.http("POST", server.infer_path(model), body, {HEADER_LENGTH: "0"}).accepted()


def _ask_json(server: RestClient, parameters: Document, outputs: list[Document] | None = None) -> Reply:
    """Send X as JSON to `oip-many`."""
    document: Document = {"inputs": [tensor_of("x", X)], "parameters": parameters}
    if outputs is not None:
        document["outputs"] = outputs
    return server.post(server.infer_path("oip-many"), document)
