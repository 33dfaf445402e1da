"""The binary tensor data extension: tensors as raw bytes behind the JSON header, and the raw binary request.

Numbers are little-endian, row-major, without padding; a BYTES element is a 4-byte little-endian length and its UTF-8.
Decoded arrays are views over the body, not copies. gRPC's raw contents have the same element format.
"""

import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from phoenix_server import codec_json
from phoenix_server.codec_json import OutputForms
from phoenix_server.errors import invalid, shown
from phoenix_server.tensors import Array, DType, InferRequest, InferResponse, Signature, dtype_of

_LENGTH = struct.Struct("<I")


def header_size(value: bytes, body_size: int) -> int:
    """Return the header `Inference-Header-Content-Length` as a number of bytes within the body (0: raw request)."""
    try:
        size = int(value) if value.isdigit() else -1
    except ValueError:
        size = -1
    if not 0 <= size <= body_size:
        got = value.decode("latin-1")
        raise invalid(f"inference header size should be in range (0, {body_size}), got: {got}")
    return size


def decode(document: Mapping[str, Any], blobs: memoryview, model_name: str) -> tuple[InferRequest, OutputForms]:
    """Return the request of a parsed JSON header and the bytes behind it."""
    taken = 0

    def blob(name: str, size: Any, dtype: DType, shape: tuple[int, ...]) -> Array:
        nonlocal taken
        if type(size) is not int or size < 0:
            raise invalid(f"input '{name}': 'binary_data_size' must be an integer of at least 0, got {shown(size)}")
        data = blobs[taken : taken + size]
        if len(data) < size:
            raise invalid(
                f"unexpected size for input '{name}', expecting {size - len(data)} additional bytes "
                f"for model '{model_name}'"
            )
        taken += size
        return array_from(data, dtype, shape, f"input '{name}'")

    request, forms = codec_json.decode(document, blob)
    if taken != len(blobs):
        raise invalid(f"unexpected additional input data for model '{model_name}': {len(blobs) - taken} bytes are left")
    return request, forms


def decode_raw(body: memoryview, signature: Signature, model_name: str) -> tuple[InferRequest, OutputForms]:
    """Return the request whose whole body is the data of the model's one input; batch size 1 is implied."""
    if len(signature.inputs) != 1:
        raise invalid(f"a raw binary request needs a model with one input; '{model_name}' has {len(signature.inputs)}")
    spec = signature.inputs[0]
    shape = list(spec.shape)
    where = f"input '{spec.name}'"
    if signature.is_batchable:
        shape[0] = 1
    variable = [axis for axis, size in enumerate(shape) if size == -1]
    if spec.dtype is DType.BYTES:
        shape = [1 if size == -1 else size for size in shape]
        if math.prod(shape) != 1:
            raise invalid(
                f"{where}: a raw binary request needs one BYTES element, the model expects {list(spec.shape)}"
            )
        # The whole body is the one element; without the length in front, as Triton has it.
        array: Array = np.array([_text(bytes(body), where)], dtype=object).reshape(shape)
        return InferRequest({spec.name: array}), OutputForms(is_binary=True)
    if len(variable) > 1:
        raise invalid(f"{where}: shape {list(spec.shape)} has more than one variable dimension; send the shape")
    if variable:
        row_bytes = spec.dtype.size * math.prod(size for size in shape if size != -1)
        if not row_bytes or len(body) % row_bytes:
            raise invalid(f"{where}: {len(body)} bytes are no multiple of {row_bytes} for shape {list(spec.shape)}")
        shape[variable[0]] = len(body) // row_bytes
    return InferRequest({spec.name: array_from(body, spec.dtype, tuple(shape), where)}), OutputForms(is_binary=True)


def encode(response: InferResponse, forms: OutputForms) -> tuple[bytes, int | None]:
    """Return the body and the size of its JSON header; None as size: the whole body is JSON."""
    if not forms.is_binary and True not in forms.of_output.values():
        return codec_json.encode(response), None
    document = codec_json.envelope(response)
    outputs: list[dict[str, Any]] = []
    blobs: list[bytes | memoryview] = []
    for name, array in response.outputs:
        if forms.of_output.get(name, forms.is_binary):
            blob = bytes_of(array)
            blobs.append(blob)
            size = blob.nbytes if isinstance(blob, memoryview) else len(blob)
            outputs.append(
                {
                    "name": name,
                    "datatype": dtype_of(array).name,
                    "shape": array.shape,
                    "parameters": {"binary_data_size": size},
                }
            )
        else:
            outputs.append(codec_json.json_output(name, array))
    document["outputs"] = outputs
    header = codec_json.dump(document)
    return (b"".join([header, *blobs]), len(header)) if blobs else (header, None)


def array_from(data: memoryview, dtype: DType, shape: tuple[int, ...], where: str) -> Array:
    """Return bytes as an array of `shape`: a view for numbers; raise INVALID if the size differs."""
    count = math.prod(shape)
    if dtype is DType.BYTES:
        return _strings_from(data, count, where).reshape(shape)
    if len(data) != count * dtype.size:
        raise invalid(f"{where}: shape {list(shape)} of {dtype.name} needs {count * dtype.size} bytes, got {len(data)}")
    array: Array = np.frombuffer(data, dtype=dtype.little_endian, count=count).reshape(shape)
    if not array.flags.aligned:  # the length of the JSON header decides; kernels may rely on alignment
        array = array.copy()
    if dtype is DType.BOOL and count and array.view(np.uint8).max() > 1:
        raise invalid(f"{where}: a BOOL is one byte, 0 or 1")
    return array


def bytes_of(array: Array) -> bytes | memoryview:
    """Return an array as the extension's bytes; a view where the memory already has that layout."""
    if array.dtype.kind != "O":
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""
    parts: list[bytes] = []
    for element in array.flat:
        text = str(element).encode()
        parts += (_LENGTH.pack(len(text)), text)
    return b"".join(parts)


def _strings_from(data: memoryview, count: int, where: str) -> Array:
    array = np.empty(min(count, len(data) // 4 + 1), dtype=object)
    offset = found = 0
    size = len(data)
    while offset < size:
        if found == count:
            raise invalid(f"{where}: {size - offset} bytes are left after {count} BYTES elements")
        begin = offset + 4
        end = begin + (_LENGTH.unpack_from(data, offset)[0] if begin <= size else size)
        if end > size:
            raise invalid(f"{where}: BYTES element {found} runs over the end of the data")
        array[found] = _text(bytes(data[begin:end]), f"{where}: BYTES element {found}")
        offset = end
        found += 1
    if found != count:
        raise invalid(f"{where}: expected {count} BYTES elements, got {found}")
    return array[:count]


def _text(data: bytes, where: str) -> str:
    """ONNX strings are UTF-8 (onnx.proto, TensorProto.string_data)."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise invalid(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from None
