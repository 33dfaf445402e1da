"""Tensors as JSON, and the JSON around them."""

import json
from typing import Any

import numpy as np
from conformance.datatypes import DATATYPES, INTEGERS, assert_same
from conformance.table import BINARY, JSON, OIP_REST, PHOENIX, REST, rule
from conformance.wire import array_of, data_of, floats, output, tensor, tensor_of
from conformance.wire_rest import HEADER_LENGTH, RestClient

_TENSOR_DATA = f"{OIP_REST}, Tensor Data"
_IN_JSON = [name for name in DATATYPES if name != "FP16"]
# Bodies from here on are parsed off the event loop, by another parser.
_BIG = 1_200_000


def _x(server: RestClient, data: str, datatype: str = "FP32", shape: str = "[1, 2]") -> list[Any]:
    """Send `data`, as text, to the identity of that datatype and return what comes back."""
    item = f'{{"name": "x", "datatype": "{datatype}", "shape": {shape}, "data": {data}}}'
    reply = server.infer_json(f"oip-identity-{datatype.lower()}", f'{{"inputs": [{item}]}}')
    return data_of(reply.document, "y")


@rule("json.round-trip", _TENSOR_DATA, on=REST, each=_IN_JSON)
def round_trip(server: RestClient, datatype: str) -> None:
    """{each} tensors come back bit for bit, extremes included."""
    sample = DATATYPES[datatype].sample
    answer = server.infer(f"oip-identity-{datatype.lower()}", tensor_of("x", sample))
    assert_same(array_of(output(answer, "y")), sample)


@rule("json.flat", _TENSOR_DATA, on=REST)
def flat(server: RestClient) -> None:
    """Data may be flat, in row-major order."""
    assert _x(server, "[1, 2, 3, 4]", shape="[2, 2]") == [1, 2, 3, 4]


@rule("json.nested", _TENSOR_DATA, on=REST)
def nested(server: RestClient) -> None:
    """Data may be nested as the shape is."""
    assert _x(server, "[[1, 2], [3, 4]]", shape="[2, 2]") == [1, 2, 3, 4]
    assert _x(server, '[["a", "b"], ["c", "d"]]', "BYTES", "[2, 2]") == ["a", "b", "c", "d"]


@rule("json.nested-3d", _TENSOR_DATA, on=REST)
def nested_3d(server: RestClient) -> None:
    """Nested data of three dimensions keeps its order."""
    answer = server.infer("oip-cube", tensor("x", "INT32", [2, 1, 2], [[[1, 2]], [[3, 4]]]))
    assert output(answer, "y") == tensor("y", "INT32", [2, 2, 1], [1, 2, 3, 4])


@rule("json.ragged-data", _TENSOR_DATA, on=REST)
def ragged_data(server: RestClient) -> None:
    """Data that is nested unevenly is refused."""
    for data in ("[[1, 2], [3]]", "[[1, 2], 3, 4]", "[1, 2, [3, 4]]", "[[1], [2, 3, 4]]"):
        with server.refused("invalid"):
            _x(server, data, shape="[2, 2]")
    with server.refused("invalid"):
        _x(server, '[["a", "b"], ["c"]]', "BYTES", "[2, 2]")


@rule("json.nested-otherwise", _TENSOR_DATA, on=REST)
def nested_otherwise(server: RestClient) -> None:
    """Data that is nested, but not as the shape says, is refused although the count is right."""
    for data in ("[[1, 2, 3, 4]]", "[[1], [2], [3], [4]]", "[[[1, 2], [3, 4]]]"):
        with server.refused("invalid"):
            _x(server, data, shape="[2, 2]")


@rule("json.integer-for-float", JSON, on=REST)
def integer_for_float(server: RestClient) -> None:
    """JSON has one kind of number: integers are good for floating-point tensors, alone or among others."""
    assert _x(server, "[1, 2.5]") == [1.0, 2.5]
    assert _x(server, "[1, 18446744073709551615]", "FP64") == [1.0, 2.0**64]
    assert _x(server, "[1e400, 1]".replace("1e400", "9" * 30), "FP64") == [1e30, 1.0]


@rule("json.fraction-for-integer", f"{OIP_REST}, Tensor Data Types", on=REST, each=INTEGERS)
def fraction_for_integer(server: RestClient, datatype: str) -> None:
    """A fraction for an {each} is refused, not rounded."""
    with server.refused("invalid"):
        _x(server, "[1, 1.5]", datatype)


@rule("json.boolean-for-number", PHOENIX, on=REST, profile="phoenix", each=("INT32", "UINT8", "FP32"))
def boolean_for_number(server: RestClient, datatype: str) -> None:
    """true for an {each} is refused, alone, among numbers, nested or flat."""
    for data in ("[true, false]", "[1, true]", "[[1, true]]", "[[true, 1]]"):
        with server.refused("invalid"):
            _x(server, data, datatype)


@rule("json.text-for-number", f"{OIP_REST}, Tensor Data Types", on=REST, each=("INT64", "FP32", "BOOL"))
def text_for_number(server: RestClient, datatype: str) -> None:
    """A string for an {each} is refused, even one that reads as such."""
    for data in ('["1", "2"]', '[1, "2"]', '["true", "false"]'):
        with server.refused("invalid"):
            _x(server, data, datatype)


@rule("json.number-for-boolean", f"{OIP_REST}, Tensor Data Types", on=REST)
def number_for_boolean(server: RestClient) -> None:
    """0 and 1 for a BOOL are refused."""
    for data in ("[0, 1]", "[true, 1]"):
        with server.refused("invalid"):
            _x(server, data, "BOOL")


@rule("json.number-for-text", f"{OIP_REST}, Tensor Data Types", on=REST)
def number_for_text(server: RestClient) -> None:
    """A number, a boolean or null among BYTES is refused."""
    for data in ("[1, 2]", '["a", 1]', '["a", true]', '["a", null]'):
        with server.refused("invalid"):
            _x(server, data, "BYTES")


@rule("json.null-element", f"{OIP_REST}, Tensor Data Types", on=REST, each=("INT32", "FP32", "BOOL"))
def null_element(server: RestClient, datatype: str) -> None:
    """null for an {each} is refused; it is not NaN."""
    with server.refused("invalid"):
        _x(server, "[null, null]", datatype)
    with server.refused("invalid"):
        _x(server, f"[{'true' if datatype == 'BOOL' else '1'}, null]", datatype)


@rule("json.object-element", f"{OIP_REST}, Tensor Data Types", on=REST)
def object_element(server: RestClient) -> None:
    """An object among the data is refused."""
    for datatype in ("FP32", "BYTES"):
        with server.refused("invalid"):
            _x(server, '[{"a": 1}, {"b": 2}]', datatype)


@rule("json.overflow", f"{OIP_REST}, Tensor Data Types", on=REST, each=INTEGERS)
def overflow(server: RestClient, datatype: str) -> None:
    """A number just outside {each} is refused; it does not wrap around."""
    limits = np.iinfo(DATATYPES[datatype].numpy)
    for number in (int(limits.max) + 1, int(limits.min) - 1):
        with server.refused("invalid"):
            _x(server, f"[0, {number}]", datatype)


@rule("json.64-bit-exact", f"{OIP_REST}, Tensor Data Types", on=REST)
def exact_64_bit(server: RestClient) -> None:
    """Integers of 64 bits are exact both ways, also beside others, and come back as numbers, not as strings."""
    for datatype, numbers in (
        ("INT64", [2**63 - 1, -(2**63)]),
        ("INT64", [2**53 + 1, -(2**53) - 1]),
        ("UINT64", [2**64 - 1, 2**64 - 1]),
        ("UINT64", [2**63, 2**53 + 1]),
        ("UINT64", [2**64 - 1, 0]),
        ("UINT64", [0, 2**63]),
    ):
        assert _x(server, json.dumps(numbers), datatype) == numbers


@rule("json.float-overflow", f"{OIP_REST}, Tensor Data Types", on=REST)
def float_overflow(server: RestClient) -> None:
    """A number that FP32 cannot hold is refused; it does not become Infinity."""
    with server.refused("invalid"):
        _x(server, "[1e39, 0]")
    with server.refused("invalid"):
        _x(server, "[-1e39, 0]")


@rule("json.float-exact", f"{OIP_REST}, Tensor Data Types", on=REST)
def float_exact(server: RestClient) -> None:
    """Random floating-point numbers come back bit for bit."""
    bits = np.random.default_rng(7).integers(0, 2**64, 2000, dtype=np.uint64)
    for datatype in ("FP32", "FP64"):
        array = bits.view(DATATYPES[datatype].numpy)
        array = array[np.isfinite(array)][:1000].reshape(-1, 2)
        answer = server.infer(f"oip-identity-{datatype.lower()}", tensor_of("x", array))
        assert_same(array_of(output(answer, "y")), array)


@rule("json.not-a-number", JSON, on=REST, each=("NaN", "Infinity", "-Infinity"))
def not_a_number(server: RestClient, literal: str) -> None:
    """{each} is not JSON and is refused."""
    with server.refused("invalid"):
        _x(server, f"[1.0, {literal}]")


@rule("json.nan-output", PHOENIX, on=REST, profile="phoenix")
def nan_output(server: RestClient) -> None:
    """An output with NaN or Infinity has no JSON form: the refusal names the output and says to ask for binary."""
    for divisor in (0.0, -0.0):
        for dividend in (0.0, 1.0):
            with server.refused("invalid") as refused:
                server.infer("oip-divide", floats("a", 1.0, dividend), floats("b", 1.0, divisor))
            assert "'ratio'" in refused.message
            assert "binary" in refused.message


@rule("json.fp16-input", BINARY, on=REST, profile="phoenix")
def fp16_input(server: RestClient) -> None:
    """FP16 has no JSON form: the refusal says to send it as binary."""
    with server.refused("invalid") as refused:
        _x(server, "[1.0, 2.0]", "FP16")
    assert "binary" in refused.message


@rule("json.data-missing", f"{OIP_REST}, Request Input", on=REST)
def data_missing(server: RestClient) -> None:
    """An input without data is refused."""
    item = tensor("x", "FP32", [1, 2], None)
    with server.refused("invalid"):
        server.infer("oip-many", item)
    del item["data"]
    with server.refused("invalid"):
        server.infer("oip-many", item)


@rule("json.data-not-list", f"{OIP_REST}, Tensor Data", on=REST)
def data_not_list(server: RestClient) -> None:
    """Data that is not a list is refused."""
    for data in ("1.0", '"12"', "{}", "true"):
        with server.refused("invalid"):
            _x(server, data)


@rule("json.members", f"{OIP_REST}, Request Input", on=REST, each=("name", "shape", "datatype"))
def members(server: RestClient, member: str) -> None:
    """An input without a {each}, or with one of the wrong type, is refused."""
    item = tensor("x", "FP32", [1, 2], [1.0, 2.0])
    for wrong in ({}, {member: None}, {member: 7}, {member: {}}):
        kept = {key: value for key, value in item.items() if key != member}
        with server.refused("invalid"):
            server.infer("oip-many", {**kept, **wrong})


@rule("json.shape-of-integers", f"{OIP_REST}, Request Input", on=REST)
def shape_of_integers(server: RestClient) -> None:
    """A shape holds integers only."""
    for shape in ('["1", 2]', "[1.0, 2]", "[true, 2]", "[[1], 2]", '"1,2"'):
        with server.refused("invalid"):
            _x(server, "[1, 2]", shape=shape)


@rule("json.malformed", JSON, on=REST)
def malformed(server: RestClient) -> None:
    """A body that is not JSON is refused, and the message says so."""
    for body in ("{", '{"inputs": [}', "inputs", "{'inputs': []}", '{"inputs": []} more', '{"inputs": [1,]}'):
        with server.refused("invalid") as refused:
            server.infer_json("oip-many", body)
        if server.is_strict:
            assert "JSON" in refused.message


@rule("json.empty-body", JSON, on=REST)
def empty_body(server: RestClient) -> None:
    """An empty body is refused."""
    with server.refused("invalid"):
        server.infer_json("oip-many", b"")


@rule("json.not-utf-8", JSON, on=REST)
def not_utf_8(server: RestClient) -> None:
    """A body that is not UTF-8 is refused."""
    with server.refused("invalid"):
        server.infer_json("oip-text", b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["\xff\xfe"]}]}')


@rule("json.lone-surrogate", JSON, on=REST)
def lone_surrogate(server: RestClient) -> None:
    """An escape that is half a character is refused: BYTES are UTF-8 and cannot hold it."""
    with server.refused("invalid"):
        server.infer_json("oip-text", r'{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["\ud83d"]}]}')


@rule("json.not-object", f"{OIP_REST}, Inference Request JSON", on=REST)
def not_object(server: RestClient) -> None:
    """A body that is JSON but no object, or whose inputs are no list of objects, is refused."""
    for body in ("[]", "null", "7", '"x"', "{}", '{"inputs": {}}', '{"inputs": [7]}', '{"inputs": null}'):
        with server.refused("invalid"):
            server.infer_json("oip-many", body)


@rule("json.deep-nesting", JSON, on=REST)
def deep_nesting(server: RestClient) -> None:
    """Absurdly deep nesting is refused and harms nobody."""
    for depth in (100, 100_000):
        with server.refused("invalid"):
            _x(server, "[" * depth + "1" + "]" * depth)
    assert server.live()


@rule("json.outputs-not-list", f"{OIP_REST}, Request Output", on=REST)
def outputs_not_list(server: RestClient) -> None:
    """Outputs that are no list of objects with a name are refused."""
    for outputs in ({}, "doubled", ["doubled"], [{}], [{"name": 7}]):
        with server.refused("invalid"):
            server.infer("oip-many", floats("x", 1.0), outputs=outputs)


@rule("json.parameters-not-object", f"{OIP_REST}, Parameters", on=REST)
def parameters_not_object(server: RestClient) -> None:
    """Parameters are an object; their values are strings, numbers or booleans, without nesting."""
    item = tensor("x", "FP32", [1, 2], [1.0, 2.0])
    for parameters in ([], "fast", 7, {"a": {}}, {"a": [1]}):
        with server.refused("invalid"):
            server.infer("oip-many", item, parameters=parameters)


@rule("json.null-members", PHOENIX, on=REST, profile="phoenix")
def null_members(server: RestClient) -> None:
    """null for what may be left out means that it is left out: clients that serialise whole objects send it."""
    item = {**tensor("x", "FP32", [1, 2], [1.0, 2.0]), "parameters": None}
    output_of = {"name": "doubled", "parameters": None}
    for outputs in (None, [output_of]):
        answer = server.infer("oip-many", item, id=None, parameters=None, outputs=outputs)
        assert data_of(answer, "doubled") == [2.0, 4.0]
    nothing = {"content_type": "np", "headers": None, "binary_data_output": None}
    answer = server.infer("oip-many", {**item, "parameters": nothing}, parameters=nothing)
    assert data_of(answer, "doubled") == [2.0, 4.0]


@rule("json.id-not-string", f"{OIP_REST}, Inference Request JSON", on=REST)
def id_not_string(server: RestClient) -> None:
    """An id that is not a string is refused."""
    with server.refused("invalid"):
        server.infer("oip-many", tensor("x", "FP32", [1, 2], [1.0, 2.0]), id=42)


@rule("json.content-type-of-request", f"{OIP_REST}, HTTP/REST", on=REST)
def content_type_of_request(server: RestClient) -> None:
    """The request's Content-Type may be missing or anything: stock clients send none or application/octet-stream."""
    body = json.dumps({"inputs": [tensor("x", "FP32", [1, 2], [1.0, 2.0])]})
    for headers in (
        {},
        {"Content-Type": "application/octet-stream"},
        {"Content-Type": "application/json; charset=utf-8"},
    ):
        assert data_of(server.infer_json("oip-many", body, headers).document, "doubled") == [2.0, 4.0]


@rule("json.content-type-of-response", f"{OIP_REST}, HTTP/REST", on=REST)
def content_type_of_response(server: RestClient) -> None:
    """An answer without binary tensors is application/json and has no Inference-Header-Content-Length."""
    reply = server.infer_json("oip-many", json.dumps({"inputs": [tensor("x", "FP32", [1, 2], [1.0, 2.0])]}))
    assert reply.headers["content-type"].startswith("application/json")
    assert HEADER_LENGTH.lower() not in reply.headers


@rule("json.big-body", PHOENIX, on=REST, profile="phoenix", each=("FP64", "INT64", "BYTES"))
def big_body(server: RestClient, datatype: str) -> None:
    """A body of more than a megabyte of {each} is read as a small one is, flat or nested."""
    sample = DATATYPES[datatype].sample
    array = np.tile(sample, (_BIG // len(json.dumps(sample.tolist())) + 1, 1))
    shape = list(array.shape)
    for data in (array.reshape(-1).tolist(), array.tolist()):
        answer = server.infer(f"oip-identity-{datatype.lower()}", tensor("x", datatype, shape, data))
        assert_same(array_of(output(answer, "y")), array)


@rule("json.big-body-faults", PHOENIX, on=REST, profile="phoenix")
def big_body_faults(server: RestClient) -> None:
    """The faults of a big body are refused as those of a small one are."""
    rows = _BIG // 8
    pairs = ", ".join(["[1, 2]"] * (rows - 1))
    for datatype, last in (
        ("FP32", "[3]"), ("FP32", "[3, null]"), ("FP32", '[3, "4"]'), ("FP32", "[3, true]"), ("FP32", "[3, NaN]"),
        ("FP32", "[3, 1e39]"), ("FP32", "[3, [4]]"), ("INT32", "[3, 4.5]"), ("INT32", "[3, 2147483648]"),
        ("INT32", "[3, 4, 5]"), ("INT32", "3, 4"), ("UINT64", "[3, -4]"), ("INT64", "[3, 18446744073709551615]"),
    ):  # fmt: skip
        with server.refused("invalid"):
            _x(server, f"[{pairs}, {last}]", datatype, f"[{rows}, 2]")
    numbers = pairs.replace("[", "").replace("]", "")
    for last in ("3, [4]", "[3], 4", "3, [], 4"):
        with server.refused("invalid"):
            _x(server, f"[{numbers}, {last}]", "FP32", f"[{rows}, 2]")
    with server.refused("invalid"):
        _x(server, f"[{pairs}, [3, 4]", "FP32", f"[{rows}, 2]")
