"""JSON and binary codecs: what goes in comes out, and every fault is named."""

import json
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from phoenix_server import codec_big_json, codec_binary, codec_json
from phoenix_server.codec_json import OutputForms
from phoenix_server.errors import Code, PhoenixError
from phoenix_server.tensors import DType, InferRequest, InferResponse, Signature, TensorSpec

NUMERIC = [dtype for dtype in DType if dtype is not DType.BYTES]
JSON_NUMERIC = [dtype for dtype in NUMERIC if dtype is not DType.FP16]


@st.composite
def arrays(draw: st.DrawFn, dtypes: list[DType]) -> tuple[DType, np.ndarray[Any, Any]]:
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(nps.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    if dtype is DType.BYTES:
        text = st.text(st.characters(codec="utf-8"), max_size=8)
        return dtype, draw(nps.arrays(object, shape, elements=text, fill=st.nothing()))
    elements = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else {}
    return dtype, draw(nps.arrays(dtype.numpy, shape, elements=elements))


def json_document(array: np.ndarray[Any, Any], dtype: DType, *, flat: bool) -> dict[str, Any]:
    data = array.reshape(-1).tolist() if flat or array.ndim == 0 else array.tolist()
    return {"inputs": [{"name": "x", "datatype": dtype.name, "shape": list(array.shape), "data": data}]}


def both_parsers(document: dict[str, Any]) -> list[Any]:
    text = json.dumps(document).encode()
    return [codec_json.parse(text), codec_big_json.parse(text)]


@settings(max_examples=300, deadline=None)
@given(arrays([*JSON_NUMERIC, DType.BYTES]), st.booleans())
def test_json_round_trips(case: tuple[DType, np.ndarray[Any, Any]], flat: bool) -> None:
    dtype, array = case
    for parsed in both_parsers(json_document(array, dtype, flat=flat)):
        if array.size == 0 and not flat and array.ndim > 1:
            continue  # nested emptiness has no single shape
        request, _ = codec_json.decode(parsed)
        assert request.inputs["x"].dtype == dtype.numpy
        np.testing.assert_array_equal(request.inputs["x"], array)
    encoded = orjson.loads(codec_json.encode(InferResponse("m", "1", "i", [("x", array)])))
    back, _ = codec_json.decode({"inputs": encoded["outputs"]})
    np.testing.assert_array_equal(back.inputs["x"], array)


@settings(max_examples=300, deadline=None)
@given(arrays([*NUMERIC, DType.BYTES]), arrays([*NUMERIC, DType.BYTES]))
def test_binary_round_trips(first: tuple[DType, Any], second: tuple[DType, Any]) -> None:
    outputs = [("a", first[1]), ("b", second[1])]
    body, size = codec_binary.encode(InferResponse("m", "1", "i", outputs), OutputForms(is_binary=True))
    assert size is not None
    header = orjson.loads(body[:size])
    request, _ = codec_binary.decode({"inputs": header["outputs"]}, memoryview(body)[size:], "m")
    for name, array in outputs:
        decoded = request.inputs[name]
        assert decoded.dtype == array.dtype
        assert decoded.shape == array.shape
        assert codec_binary.bytes_of(decoded) == codec_binary.bytes_of(array)


@pytest.mark.parametrize("big", [False, True], ids=["orjson", "simdjson"])
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"data": [1, [2]]}, "nested unevenly"),
        ({"data": [1, 2, 3]}, "needs 2 elements, data has 3"),
        ({"data": [[1], [2]]}, "nested"),
        ({"data": ["1", "2"]}, "not numbers"),
        ({"data": [1, None]}, "not numbers"),
        ({"data": [1, True]}, "not numbers"),
        ({"data": [1, {}]}, "not numbers"),
        ({"data": [1e39, 0]}, "outside FP32"),
        ({"data": 3}, "'data' must be a list, got a number"),
        ({"data": None}, "'data' must be a list, got nothing"),
        ({"data": [1, 2], "datatype": "INT8", "shape": [3]}, "needs 3 elements"),
        ({"data": [1, 128], "datatype": "INT8"}, "128 is outside INT8"),
        ({"data": [-1, 0], "datatype": "UINT64"}, "-1 is outside UINT64"),
        ({"data": [1, 1.5], "datatype": "INT64"}, "not integers"),
        ({"data": [0, 1], "datatype": "BOOL"}, "not true or false"),
        ({"data": [0, 1], "datatype": "BYTES"}, "must be strings"),
        ({"data": [0, 1], "datatype": "FP16"}, "cannot be sent as JSON"),
        ({"data": [0, 1], "datatype": "FLOAT"}, "unknown datatype 'FLOAT'"),
        ({"data": [0, 1], "datatype": ["FP32"]}, "unknown datatype"),
        ({"data": [0, 1], "shape": [-1]}, "'shape' must be a list of integers"),
        ({"data": [0, 1], "shape": [2.0]}, "'shape' must be a list of integers"),
        ({"data": [0, 1], "shape": None}, "'shape' must be a list of integers"),
        ({"data": [0, 1], "name": ""}, "name must be a non-empty string"),
        ({"data": [0, 1], "parameters": []}, "'parameters' must be an object"),
        ({"data": [0, 1], "parameters": {"binary_data_size": 8}}, "both 'data' and 'binary_data_size'"),
        ({"parameters": {"binary_data_size": 8}}, "needs the header Inference-Header-Content-Length"),
        ({}, "'data' is missing"),
    ],
)
def test_json_tensor_fault_is_named(tensor: dict[str, Any], message: str, big: bool) -> None:
    document = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2]} | tensor]}
    with pytest.raises(PhoenixError, match="(?s)" + message.replace("(", r"\(")) as fault:
        codec_json.decode(both_parsers(document)[big])
    assert fault.value.code is Code.INVALID


@pytest.mark.parametrize("parse", [codec_json.parse, codec_big_json.parse])
@pytest.mark.parametrize("number", ["18446744073709551616", "1e400", "-9223372036854775809"])
def test_number_that_no_datatype_holds_is_refused(parse: Any, number: str) -> None:
    for datatype in ("UINT64", "INT64", "FP32"):
        tensor = f'{{"name": "x", "datatype": "{datatype}", "shape": [2], "data": [1, {number}]}}'
        text = '{"inputs": [' + tensor + "]}"
        if datatype == "FP32" and "e" not in number:
            continue  # a float holds it, rounded
        with pytest.raises(PhoenixError):
            codec_json.decode(parse(text.encode()))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"inputs": None}, "'inputs' must be a list of tensors, got nothing"),
        ({"inputs": {}}, "'inputs' must be a list of tensors, got an object"),
        ({"inputs": [1]}, "inputs[0] must be an object, got a number"),
        ({"id": 5}, "'id' must be a string"),
        ({"outputs": {}}, "'outputs' must be a list"),
        ({"outputs": [{"name": 1}]}, "outputs[0] must be an object with a 'name'"),
        ({"outputs": [{"name": "y"}, {"name": "y"}]}, "output 'y' is asked for twice"),
        ({"outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}, "binary_data must be true or false"),
        ({"outputs": [{"name": "y", "parameters": {"classification": 3}}]}, "classification"),
        ({"parameters": {"binary_data_output": "yes"}}, "binary_data_output must be true or false"),
        ({"parameters": {"timeout": -1}}, "'timeout' must be microseconds"),
        ({"parameters": {"nested": {}}}, "wrong: nested"),
        ({"parameters": []}, "'parameters' must be an object"),
    ],
)
def test_json_request_fault_is_named(document: dict[str, Any], message: str) -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
    with pytest.raises(PhoenixError) as fault:
        codec_json.decode({"inputs": [tensor]} | document)
    assert message in fault.value.message


def test_all_faults_come_in_one_message() -> None:
    bad = {"datatype": "FP32", "shape": [2], "data": [1]}
    document = {"inputs": [{"name": "a"} | bad, {"name": "b"} | bad], "id": 1, "parameters": {"timeout": "x"}}
    with pytest.raises(PhoenixError) as fault:
        codec_json.decode(document)
    for part in ("input 'a'", "input 'b'", "'id'", "'timeout'"):
        assert part in fault.value.message


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"NaN", b'{"a": NaN}', b'{"a": Infinity}', b"\xff\xfe", b"1"])
def test_broken_json_is_refused(text: bytes) -> None:
    for parse in (codec_json.parse, codec_big_json.parse):
        with pytest.raises(PhoenixError, match="JSON"):
            parse(text)


@pytest.mark.parametrize("nested", [False, True])
def test_big_numbers_never_become_python_objects(nested: bool) -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    parsed = codec_big_json.parse(json.dumps(json_document(array, DType.FP32, flat=not nested)).encode())
    assert isinstance(parsed["inputs"][0]["data"], np.ndarray)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1, 4000])
def test_output_that_json_cannot_hold_asks_for_binary(value: float, size: int) -> None:
    array = np.zeros(size, dtype=np.float32)
    array[-1] = value
    with pytest.raises(PhoenixError, match="binary_data: true"):
        codec_json.encode(InferResponse("m", "1", "i", [("y", array)]))


def binary(tensors: list[dict[str, Any]], blobs: bytes) -> tuple[InferRequest, OutputForms]:
    return codec_binary.decode({"inputs": tensors}, memoryview(blobs), "m")


@pytest.mark.parametrize(
    ("tensor", "blob", "message"),
    [
        ({"parameters": {"binary_data_size": 8}}, b"\0" * 7, "expecting 1 additional bytes for model 'm'"),
        ({"parameters": {"binary_data_size": 8}}, b"\0" * 9, "unexpected additional input data for model 'm'"),
        ({"parameters": {"binary_data_size": 12}}, b"\0" * 12, "needs 8 bytes, got 12"),
        ({"parameters": {"binary_data_size": -1}}, b"", "must be an integer of at least 0"),
        ({"parameters": {"binary_data_size": "8"}}, b"\0" * 8, "must be an integer of at least 0"),
        ({"datatype": "BOOL", "parameters": {"binary_data_size": 2}}, b"\0\2", "one byte, 0 or 1"),
        ({"datatype": "BYTES", "parameters": {"binary_data_size": 4}}, b"\xff\0\0\0", "runs over the end"),
        ({"datatype": "BYTES", "parameters": {"binary_data_size": 2}}, b"\0\0", "runs over the end"),
        ({"datatype": "BYTES", "parameters": {"binary_data_size": 4}}, b"\0\0\0\0", "expected 2 BYTES elements, got 1"),
        ({"datatype": "BYTES", "parameters": {"binary_data_size": 12}}, b"\0" * 12, "left after 2 BYTES elements"),
        (
            {"datatype": "BYTES", "parameters": {"binary_data_size": 9}},
            b"\0\0\0\0\1\0\0\0\xff",
            "element 1 is not UTF-8",
        ),
    ],
)
def test_binary_fault_is_named(tensor: dict[str, Any], blob: bytes, message: str) -> None:
    with pytest.raises(PhoenixError) as fault:
        binary([{"name": "x", "datatype": "FP32", "shape": [2]} | tensor], blob)
    assert message in fault.value.message


@pytest.mark.parametrize("value", [b"-1", b"nan", b"11", b"1.0", b"", b" 1", b"+1", "²".encode()])
def test_header_size_out_of_range_is_refused(value: bytes) -> None:
    with pytest.raises(PhoenixError, match="should be in range"):
        codec_binary.header_size(value, 10)


def signature(dtype: DType, *shape: int, batchable: bool = True) -> Signature:
    spec = TensorSpec("x", dtype, shape)
    return Signature((spec,), (spec,), is_batchable=batchable)


def test_raw_request_takes_its_shape_from_the_size() -> None:
    body = np.arange(6, dtype=np.float32).tobytes()
    request, forms = codec_binary.decode_raw(memoryview(body), signature(DType.FP32, -1, -1), "m")
    assert request.inputs["x"].shape == (1, 6)
    assert forms.is_binary
    request, _ = codec_binary.decode_raw(memoryview("é".encode()), signature(DType.BYTES, -1), "m")
    assert request.inputs["x"].tolist() == ["é"]


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (signature(DType.FP32, -1, -1, -1), "more than one variable dimension"),
        (signature(DType.FP32, -1, 4), "needs 16 bytes, got 6"),
        (signature(DType.FP32, 2, -1, batchable=False), "no multiple of 8"),
        (signature(DType.BYTES, -1, 2), "one BYTES element"),
        (Signature((TensorSpec("a", DType.FP32, (1,)), TensorSpec("b", DType.FP32, (1,))), ()), "one input"),
    ],
)
def test_raw_request_fault_is_named(of: Signature, message: str) -> None:
    with pytest.raises(PhoenixError, match=message):
        codec_binary.decode_raw(memoryview(b"abcdef"), of, "m")


def test_signature_lists_every_fault() -> None:
    specs = (TensorSpec("a", DType.FP32, (-1, 2)), TensorSpec("b", DType.INT64, (-1,)), TensorSpec("c", DType.BOOL, ()))
    of = Signature(specs, (TensorSpec("y", DType.FP32, (-1,)),))
    request = InferRequest(
        {"a": np.zeros((1, 3), np.float32), "b": np.zeros(1, np.int32), "d": np.zeros(1)}, outputs=("z",)
    )
    with pytest.raises(PhoenixError) as fault:
        of.validate(request)
    for part in (
        "input 'a' has shape [1, 3], the model expects [-1, 2]",
        "input 'b' has datatype INT32, the model expects INT64",
        "input 'c' is missing",
        "unknown input 'd'",
        "unknown output 'z'",
    ):
        assert part in fault.value.message


def test_batchable_inputs_must_agree_in_rows() -> None:
    specs = (TensorSpec("a", DType.FP32, (-1,)), TensorSpec("b", DType.FP32, (-1,)))
    of = Signature(specs, specs, is_batchable=True)
    assert of.validate(InferRequest({"a": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)})) == 3
    with pytest.raises(PhoenixError, match="differ in their number of rows: 'a' 3, 'b' 2"):
        of.validate(InferRequest({"a": np.zeros(3, np.float32), "b": np.zeros(2, np.float32)}))
