"""The protobuf codec alone: what the gRPC transport turns into arrays and back, and every fault it must name."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phoenix_server import codec_proto
from phoenix_server._proto import inference as proto
from phoenix_server.codec_binary import bytes_of
from phoenix_server.errors import Code, PhoenixError
from phoenix_server.tensors import DTYPES, Array, InferResponse

ROOT = Path(__file__).resolve().parents[2]
# datatype -> the field of its typed contents, and elements at the ends of its range.
TYPED: dict[str, tuple[str, list[Any]]] = {
    "BOOL": ("bool_contents", [True, False, True]),
    "INT8": ("int_contents", [-128, 0, 127]),
    "INT16": ("int_contents", [-(2**15), 0, 2**15 - 1]),
    "INT32": ("int_contents", [-(2**31), 0, 2**31 - 1]),
    "INT64": ("int64_contents", [-(2**63), 0, 2**63 - 1]),
    "UINT8": ("uint_contents", [0, 1, 255]),
    "UINT16": ("uint_contents", [0, 1, 2**16 - 1]),
    "UINT32": ("uint_contents", [0, 1, 2**32 - 1]),
    "UINT64": ("uint64_contents", [0, 1, 2**64 - 1]),
    "FP32": ("fp32_contents", [-1.5, 0.0, 3.25]),
    "FP64": ("fp64_contents", [-1.5, math.inf, 1e300]),
    "BYTES": ("bytes_contents", [b"", "grün".encode(), b"a\0b"]),
}


def tensor(name: str = "x", datatype: str = "FP32", shape: tuple[int, ...] = (3,), **fields: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, **fields}


def request(*tensors: dict[str, Any], **fields: Any) -> Any:
    """A request that has been over the wire."""
    message = proto.ModelInferRequest(model_name="m", inputs=tensors, **fields)
    return proto.ModelInferRequest.FromString(message.SerializeToString())


def expected(datatype: str) -> Array:
    elements = TYPED[datatype][1]
    if datatype == "BYTES":
        return np.array([element.decode() for element in elements], dtype=object)
    return np.array(elements, dtype=DTYPES[datatype].numpy)


def fault(message: Any) -> str:
    with pytest.raises(PhoenixError) as caught:
        codec_proto.decode(message)
    assert caught.value.code is Code.INVALID
    return caught.value.message


@pytest.mark.parametrize("datatype", TYPED)
def test_decode_reads_typed_contents_of_each_datatype(datatype: str) -> None:
    field, elements = TYPED[datatype]
    decoded, is_raw = codec_proto.decode(request(tensor(datatype=datatype, contents={field: elements})))
    assert not is_raw
    assert decoded.inputs["x"].dtype == DTYPES[datatype].numpy
    np.testing.assert_array_equal(decoded.inputs["x"], expected(datatype))


@pytest.mark.parametrize("datatype", [*TYPED, "FP16"])
def test_decode_reads_raw_contents_of_each_datatype(datatype: str) -> None:
    array = np.array([1.5, -2, 0], np.float16) if datatype == "FP16" else expected(datatype)
    message = request(tensor(datatype=datatype), raw_input_contents=[bytes(bytes_of(array))])
    decoded, is_raw = codec_proto.decode(message)
    assert is_raw
    assert decoded.inputs["x"].dtype == array.dtype
    np.testing.assert_array_equal(decoded.inputs["x"], array)


@pytest.mark.parametrize("datatype", TYPED)
@pytest.mark.parametrize("is_raw", [False, True])
def test_encode_is_the_inverse_of_decode(datatype: str, is_raw: bool) -> None:
    array = expected(datatype).reshape(3, 1)
    response = InferResponse("m", "1", "7", [("y", array)], {"a": 1, "b": "c", "d": True, "e": 0.5})
    reply = proto.ModelInferResponse.FromString(codec_proto.encode(response, is_raw=is_raw).SerializeToString())
    assert (reply.model_name, reply.model_version, reply.id) == ("m", "1", "7")
    assert reply.parameters["a"].int64_param == 1
    assert reply.parameters["b"].string_param == "c"
    assert reply.parameters["d"].bool_param is True
    assert reply.parameters["e"].double_param == 0.5
    output = reply.outputs[0]
    again = {"name": "y", "datatype": output.datatype, "shape": output.shape}
    if is_raw:
        message = request(again, raw_input_contents=reply.raw_output_contents)
        assert not output.HasField("contents")
    else:
        message = request(again | {"contents": output.contents})
        assert not reply.raw_output_contents
    np.testing.assert_array_equal(codec_proto.decode(message)[0].inputs["y"], array)


def test_encode_answers_all_outputs_raw_when_one_is_fp16() -> None:
    outputs: list[tuple[str, Array]] = [("a", np.ones(2, np.float32)), ("b", np.ones(2, np.float16))]
    reply = codec_proto.encode(InferResponse("m", "1", "7", outputs), is_raw=False)
    assert [len(raw) for raw in reply.raw_output_contents] == [8, 4]
    assert not any(output.HasField("contents") for output in reply.outputs)


def test_encode_copies_an_output_that_is_a_view_with_strides() -> None:
    array = np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2]
    reply = codec_proto.encode(InferResponse("m", "1", "7", [("y", array)]), is_raw=True)
    assert reply.raw_output_contents[0] == array.copy().tobytes()


def test_decode_takes_empty_tensors_and_scalars() -> None:
    empty, scalar = tensor("e", shape=(0, 4)), tensor("s", "INT64", (), contents={"int64_contents": [5]})
    inputs = codec_proto.decode(request(empty, scalar))[0].inputs
    assert inputs["e"].shape == (0, 4)
    assert inputs["s"].shape == ()
    assert inputs["s"] == 5
    assert codec_proto.decode(request(empty, raw_input_contents=[b""]))[0].inputs["e"].shape == (0, 4)


def test_decode_keeps_id_outputs_and_parameters() -> None:
    parameters = {"b": {"bool_param": True}, "i": {"int64_param": -1}, "u": {"uint64_param": 2**63},
                  "s": {"string_param": "x"}, "d": {"double_param": 0.5}}  # fmt: skip
    message = request(
        tensor(shape=(0,)),
        id="42",
        outputs=[{"name": "z"}, {"name": "y"}],
        parameters={name: proto.InferParameter(**value) for name, value in parameters.items()},
    )
    decoded, _ = codec_proto.decode(message)
    assert decoded.id == "42"
    assert decoded.outputs == ("z", "y")
    assert decoded.parameters == {"b": True, "i": -1, "u": 2**63, "s": "x", "d": 0.5}
    assert decoded.timeout_us == 0


@pytest.mark.parametrize("value", [{"int64_param": 2500}, {"uint64_param": 2500}, {"string_param": "2500"}])
def test_decode_reads_the_timeout_of_a_request(value: dict[str, Any]) -> None:
    message = request(tensor(shape=(0,)), parameters={"timeout": proto.InferParameter(**value)})
    assert codec_proto.decode(message)[0].timeout_us == 2500


@pytest.mark.parametrize(
    "value",
    [{"int64_param": -1}, {"uint64_param": 2**63}, {"string_param": "soon"}, {"double_param": 2.0},
     {"bool_param": True}, {"string_param": "9" * 5000}],
)  # fmt: skip
def test_decode_refuses_a_timeout_that_is_none(value: dict[str, Any]) -> None:
    text = fault(request(tensor(shape=(0,)), parameters={"timeout": proto.InferParameter(**value)}))
    assert "parameter 'timeout' must be microseconds" in text
    assert len(text) < 200


FAULTS: dict[str, tuple[Any, str]] = {
    "both_forms": (
        request(tensor(contents={"fp32_contents": [1, 2, 3]}), raw_input_contents=[bytes(12)]),
        "input 'x': has both 'contents' and 'raw_input_contents'; give one",
    ),
    "raw_for_some_inputs": (
        request(tensor(), tensor("y"), raw_input_contents=[bytes(12)]),
        "raw_input_contents has 1 entries for 2 inputs; it must hold every input in order",
    ),
    "raw_too_short": (
        request(tensor(), raw_input_contents=[bytes(11)]),
        "input 'x': shape [3] of FP32 needs 12 bytes, got 11",
    ),
    "raw_strings_cut": (
        request(tensor(datatype="BYTES", shape=(1,)), raw_input_contents=[b"\x05\0\0\0abc"]),
        "input 'x': BYTES element 0 runs over the end of the data",
    ),
    "too_few_elements": (
        request(tensor(contents={"fp32_contents": [1, 2]})),
        "input 'x': shape [3] needs 3 elements, fp32_contents has 2",
    ),
    "no_elements": (request(tensor()), "input 'x': shape [3] needs 3 elements, fp32_contents has 0"),
    "huge_shape": (
        request(tensor(shape=(2**40, 2**40), contents={"fp32_contents": [1]})),
        f"input 'x': shape [{2**40}, {2**40}] needs {2**80} elements, fp32_contents has 1",
    ),
    "wrong_field": (
        request(tensor(datatype="INT64", contents={"int_contents": [1, 2, 3]})),
        "input 'x': INT64 belongs in int64_contents, got int_contents",
    ),
    "two_fields": (
        request(tensor(contents={"int_contents": [1, 2, 3], "fp32_contents": [1, 2, 3]})),
        "input 'x': FP32 belongs in fp32_contents, got int_contents",
    ),
    "out_of_range": (
        request(tensor(datatype="INT8", contents={"int_contents": [1, 128, 3]})),
        "input 'x': 128 is outside INT8 (-128 to 127)",
    ),
    "unsigned_out_of_range": (
        request(tensor(datatype="UINT16", contents={"uint_contents": [1, 2, 65536]})),
        "input 'x': 65536 is outside UINT16 (0 to 65535)",
    ),
    "half_floats_typed": (
        request(tensor(datatype="FP16", contents={"fp32_contents": [1, 2, 3]})),
        "input 'x': FP16 has no typed contents; send it in raw_input_contents",
    ),
    "not_utf8": (
        request(tensor(datatype="BYTES", shape=(2,), contents={"bytes_contents": [b"ok", b"\xff"]})),
        "input 'x': BYTES element 1 is not UTF-8: invalid start byte at byte 0",
    ),
    "unknown_datatype": (request(tensor(datatype="FP8")), "input 'x': unknown datatype 'FP8'; known: BOOL, "),
    "negative_shape": (
        request(tensor(shape=(-1, 3))),
        "input 'x': 'shape' must be a list of integers of at least 0, got [-1, 3]",
    ),
    "no_name": (request(tensor(name="")), "an input has no name"),
    "given_twice": (request(tensor(shape=(0,)), tensor(shape=(0,))), "input 'x' is given twice"),
    "asked_for_twice": (
        request(tensor(shape=(0,)), outputs=[{"name": "y"}, {"name": "y"}]),
        "output 'y' is asked for twice",
    ),
    "classification": (
        request(
            tensor(shape=(0,)),
            outputs=[{"name": "y", "parameters": {"classification": proto.InferParameter(int64_param=3)}}],
        ),
        "output 'y': 'classification' belongs to an extension that is not served",
    ),
    "shared_memory": (
        request(tensor(parameters={"shared_memory_region": proto.InferParameter(string_param="r")})),
        "input 'x': 'shared_memory_region' belongs to an extension that is not served",
    ),
    "parameter_without_value": (
        request(tensor(shape=(0,)), parameters={"p": proto.InferParameter()}),
        "parameter 'p' has no value",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_decode_names_the_fault(case: str) -> None:
    message, text = FAULTS[case]
    assert fault(message).startswith(text)


def test_decode_lists_every_fault_in_one_message() -> None:
    message = request(
        tensor("a", datatype="FP8"),
        tensor("b", contents={"fp32_contents": [1]}),
        outputs=[{"name": "y"}, {"name": "y"}],
        parameters={"timeout": proto.InferParameter(int64_param=-5)},
    )
    text = fault(message)
    assert [part in text for part in ("'a'", "'b'", "'y'", "'timeout'")] == [True] * 4


def test_parse_refuses_bytes_that_are_no_message() -> None:
    with pytest.raises(PhoenixError, match=r"not an inference\.ModelInferRequest message") as caught:
        codec_proto.parse(proto.ModelInferRequest, b"\xff\xff\xff")
    assert caught.value.code is Code.INVALID


def test_generated_messages_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "generate_proto.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# In a process of its own: tritonclient and kserve both put `inference.*` into the process-wide pool, so that only one
# of them fits into a process. Ours fits beside either, which this shows too.
_COMPARE = """
import warnings; warnings.simplefilter("ignore")
import tritonclient.grpc.service_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import Default
from phoenix_server._proto.inference import FILES, POOL

faults, checked, theirs = [], 0, Default()

def facts(field):
    of, oneof = field.message_type or field.enum_type, field.containing_oneof
    return field.number, field.type, field.is_repeated, of and of.full_name, oneof and oneof.name

def compare(message):
    global checked
    for field in message.fields:
        if field.full_name == "inference.ModelMetadataResponse.properties":
            continue  # the specification's own, which Triton has not
        checked += 1
        if facts(field) != facts(theirs.FindFieldByName(field.full_name)):
            faults.append(field.full_name)
        if field.message_type and field.message_type.containing_type is message:
            compare(field.message_type)
    for enum in message.enum_types:
        compare_enum(enum)

def compare_enum(enum):
    numbers = {value.name: value.number for value in theirs.FindEnumTypeByName(enum.full_name).values}
    if any(numbers[value.name] != value.number for value in enum.values):
        faults.append(enum.full_name)

def signature(method):
    streaming = method.client_streaming, method.server_streaming
    return method.input_type.full_name, method.output_type.full_name, *streaming

for data in FILES:
    file = POOL.FindFileByName(FileDescriptorProto.FromString(data).name)
    for message in file.message_types_by_name.values():
        compare(message)
    for enum in file.enum_types_by_name.values():
        compare_enum(enum)
    for service in file.services_by_name.values():
        for method in service.methods:
            if signature(method) != signature(theirs.FindMethodByName(method.full_name)):
                faults.append(method.full_name)
print(checked, *faults)
"""


def test_messages_have_the_field_numbers_and_types_of_tritonclient() -> None:
    done = subprocess.run([sys.executable, "-c", _COMPARE], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    checked, *faults = done.stdout.split()
    assert int(checked) > 80
    assert faults == []
