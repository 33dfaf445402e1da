"""The protobuf form of requests and responses (OIP v2 gRPC): bytes in, `InferRequest`; `InferResponse` in, message out.

Hides which field of `InferTensorContents` holds which datatype, and the rules of raw contents. Like `codec_json` it
knows nothing of the model and lists every fault of a request in one error. `grpc_service` calls it; the messages are
generated (`tools/generate_proto.py`).
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from phoenix_server._proto import inference as proto
from phoenix_server.codec_binary import array_from, bytes_of
from phoenix_server.codec_json import shape_of
from phoenix_server.errors import PhoenixError, invalid
from phoenix_server.tensors import (
    UNSERVED_PARAMETERS,
    Array,
    DType,
    InferRequest,
    InferResponse,
    Parameter,
    dtype_named,
    dtype_of,
)

# Where the elements of each datatype travel; FP16 has no field and so travels only as raw bytes.
_CONTENTS = {
    DType.BOOL: "bool_contents",
    DType.INT8: "int_contents",
    DType.INT16: "int_contents",
    DType.INT32: "int_contents",
    DType.INT64: "int64_contents",
    DType.UINT8: "uint_contents",
    DType.UINT16: "uint_contents",
    DType.UINT32: "uint_contents",
    DType.UINT64: "uint64_contents",
    DType.FP32: "fp32_contents",
    DType.FP64: "fp64_contents",
    DType.BYTES: "bytes_contents",
}
# These share a field with a wider datatype, which numpy reads first: its type, and the range that is allowed.
_NARROW = {
    DType.INT8: (np.int32, -(2**7), 2**7 - 1),
    DType.INT16: (np.int32, -(2**15), 2**15 - 1),
    DType.UINT8: (np.uint32, 0, 2**8 - 1),
    DType.UINT16: (np.uint32, 0, 2**16 - 1),
}
_MAX_TIMEOUT_US = 2**63 - 1
# Tensor parameters of extensions that are not served; to drop them would give a wrong answer.


def parse(message_type: Any, payload: bytes) -> Any:
    """Return `payload` as a message of that type; raise INVALID for bytes that are none."""
    try:
        return message_type.FromString(payload)
    except DecodeError as error:
        raise invalid(f"the request is not an {message_type.DESCRIPTOR.full_name} message: {error}") from None


def decode(message: Any) -> tuple[InferRequest, bool]:
    """Return the request of a `ModelInferRequest`, and whether its tensors came as raw contents.

    Raises `PhoenixError(INVALID)` that lists every fault.
    """
    faults: list[str] = []
    inputs: dict[str, Array] = {}
    tensors, raws = message.inputs, message.raw_input_contents
    is_raw = len(raws) > 0
    has_all_raw = len(raws) == len(tensors)
    if is_raw and not has_all_raw:
        faults.append(
            f"raw_input_contents has {len(raws)} entries for {len(tensors)} inputs; it must hold every input in order"
        )
    for index, tensor in enumerate(tensors):
        name = tensor.name
        if is_raw and tensor.HasField("contents"):
            faults.append(f"input '{name}': has both 'contents' and 'raw_input_contents'; give one")
        elif has_all_raw or not is_raw:
            try:
                array = _decode_input(tensor, raws[index] if is_raw else None)
            except PhoenixError as error:
                faults.append(error.message)
                continue
            if name in inputs:
                faults.append(f"input '{name}' is given twice")
            inputs[name] = array
    outputs = _decode_outputs(message.outputs, faults) if message.outputs else ()
    parameters: dict[str, Parameter] = {}
    timeout_us = 0
    if message.parameters:
        parameters = _parameters(message.parameters, faults)
        timeout_us = _timeout_us(parameters.get("timeout", 0), faults)
    if faults:
        raise invalid("; ".join(faults))
    return InferRequest(inputs, outputs, message.id, parameters, timeout_us), is_raw


def encode(response: InferResponse, *, is_raw: bool) -> Any:
    """Return the `ModelInferResponse`: raw contents if `is_raw` or if an output is FP16, else typed contents."""
    reply = proto.ModelInferResponse(
        model_name=response.model_name, model_version=response.model_version, id=response.id
    )
    for key, value in response.parameters.items():
        _set_parameter(reply.parameters[key], value)
    is_raw = is_raw or any(array.dtype == np.float16 for _, array in response.outputs)
    for name, array in response.outputs:
        dtype = dtype_of(array)
        output = reply.outputs.add(name=name, datatype=dtype.name, shape=array.shape)
        if is_raw:
            reply.raw_output_contents.append(array.tobytes() if dtype.size else bytes(bytes_of(array)))
        else:
            elements = array.reshape(-1).tolist()
            if dtype is DType.BYTES:
                elements = [element.encode() if isinstance(element, str) else bytes(element) for element in elements]
            getattr(output.contents, _CONTENTS[dtype]).extend(elements)
    return reply


def _decode_input(tensor: Any, raw: bytes | None) -> Array:
    name = tensor.name
    where = f"input '{name}'"
    if not name:
        raise invalid("an input has no name")
    dtype = dtype_named(tensor.datatype, where)
    shape = shape_of(tensor.shape[:], where)
    if tensor.parameters:
        _refuse_unserved(tensor.parameters, where)
    if raw is not None:
        return array_from(memoryview(raw), dtype, shape, where)
    return _from_contents(tensor.contents, dtype, shape, where)


def _from_contents(contents: Any, dtype: DType, shape: tuple[int, ...], where: str) -> Array:
    """Return typed contents as an array; raise INVALID unless the one right field has the right count."""
    expected = _CONTENTS.get(dtype)
    if expected is None:
        raise invalid(f"{where}: {dtype.name} has no typed contents; send it in raw_input_contents")
    filled = contents.ListFields()
    others = [field.name for field, _ in filled if field.name != expected]
    if others:
        raise invalid(f"{where}: {dtype.name} belongs in {expected}, got {' and '.join(others)}")
    elements = filled[0][1] if filled else ()
    found, count = len(elements), math.prod(shape)
    if found != count:
        raise invalid(f"{where}: shape {list(shape)} needs {count} elements, {expected} has {found}")
    if dtype is DType.BYTES:
        return _strings(elements, count, where).reshape(shape)
    if dtype not in _NARROW:
        return np.fromiter(elements, dtype.numpy, count).reshape(shape)
    wide_type, low, high = _NARROW[dtype]
    wide = np.fromiter(elements, wide_type, count)
    if count and (wide.min() < low or wide.max() > high):
        culprit = next(number for number in elements if not low <= number <= high)
        raise invalid(f"{where}: {culprit} is outside {dtype.name} ({low} to {high})")
    return wide.astype(dtype.numpy).reshape(shape)


def _strings(elements: Iterable[bytes], count: int, where: str) -> Array:
    """Decode BYTES elements: ONNX strings are UTF-8."""
    array = np.empty(count, dtype=object)
    for index, element in enumerate(elements):
        try:
            array[index] = element.decode()
        except UnicodeDecodeError as error:
            raise invalid(
                f"{where}: BYTES element {index} is not UTF-8: {error.reason} at byte {error.start}"
            ) from None
    return array


def _decode_outputs(outputs: Any, faults: list[str]) -> tuple[str, ...]:
    names: list[str] = []
    for output in outputs:
        name = output.name
        if name in names:
            faults.append(f"output '{name}' is asked for twice")
        names.append(name)
        try:
            _refuse_unserved(output.parameters, f"output '{name}'")
        except PhoenixError as error:
            faults.append(error.message)
    return tuple(names)


def _refuse_unserved(parameters: Any, where: str) -> None:
    for key in UNSERVED_PARAMETERS:
        if key in parameters:
            raise invalid(f"{where}: '{key}' belongs to an extension that is not served")


def _parameters(messages: Any, faults: list[str]) -> dict[str, Parameter]:
    parameters: dict[str, Parameter] = {}
    for key, message in messages.items():
        choice = message.WhichOneof("parameter_choice")
        if choice is None:
            faults.append(f"parameter '{key}' has no value")
        else:
            parameters[key] = getattr(message, choice)
    return parameters


def _timeout_us(value: Parameter, faults: list[str]) -> int:
    number = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 20 else value
    if type(number) is int and 0 <= number <= _MAX_TIMEOUT_US:
        return number
    faults.append(f"parameter 'timeout' must be microseconds, an integer of at least 0, got {value!r:.80}")
    return 0


def _set_parameter(message: Any, value: Parameter) -> None:
    if isinstance(value, bool):
        message.bool_param = value
    elif isinstance(value, int):
        message.int64_param = value
    elif isinstance(value, float):
        message.double_param = value
    else:
        message.string_param = value
