"""The protocol's datatypes as this table knows them: numpy dtype, a sample with the extremes, and the binary form.

Written from the protocol, not from a server's code, so that an error made there is not made here too.
"""

import struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Datatype(NamedTuple):
    """`sample` has shape [2, 2]; BYTES are `str` in object arrays. `contents`: gRPC's typed field, "" if none."""

    numpy: np.dtype[Any]
    sample: Array
    contents: str


def _integers(dtype: Any, contents: str) -> Datatype:
    limits = np.iinfo(dtype)
    return Datatype(np.dtype(dtype), np.array([[limits.min, limits.max], [0, 1]], dtype), contents)


def _floats(dtype: Any, contents: str) -> Datatype:
    limits = np.finfo(dtype)
    sample = np.array([[limits.max, limits.smallest_subnormal], [-0.0, 0.1]], dtype)
    return Datatype(np.dtype(dtype), sample, contents)


DATATYPES = {
    "BOOL": Datatype(np.dtype(bool), np.array([[True, False], [False, False]]), "bool_contents"),
    "UINT8": _integers(np.uint8, "uint_contents"),
    "UINT16": _integers(np.uint16, "uint_contents"),
    "UINT32": _integers(np.uint32, "uint_contents"),
    "UINT64": _integers(np.uint64, "uint64_contents"),
    "INT8": _integers(np.int8, "int_contents"),
    "INT16": _integers(np.int16, "int_contents"),
    "INT32": _integers(np.int32, "int_contents"),
    "INT64": _integers(np.int64, "int64_contents"),
    "FP16": _floats(np.float16, ""),
    "FP32": _floats(np.float32, "fp32_contents"),
    "FP64": _floats(np.float64, "fp64_contents"),
    "BYTES": Datatype(
        np.dtype(object), np.array([["", "plain"], ['zażółć "\\/\n', "🎉\u0000"]], dtype=object), "bytes_contents"
    ),
}
INTEGERS = tuple(name for name, of in DATATYPES.items() if of.numpy.kind in "iu")


def pack(array: Array) -> bytes:
    """Return the binary form: little-endian, row-major; BYTES as a 4-byte length and the bytes, for each element."""
    if array.dtype.kind != "O":
        return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    return b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in array.flat)


def unpack(blob: bytes, datatype: str, shape: list[int]) -> Array:
    """Return the array of a binary form; fail if the bytes are not exactly that array's."""
    dtype = DATATYPES[datatype].numpy
    if dtype.kind != "O":
        return np.frombuffer(blob, dtype.newbyteorder("<")).reshape(shape)
    texts, offset = [], 0
    while offset < len(blob):
        (length,) = struct.unpack_from("<I", blob, offset)
        texts.append(blob[offset + 4 : offset + 4 + length].decode())
        offset += 4 + length
    assert offset == len(blob), "the last BYTES element is longer than the blob"
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    return array.reshape(shape)


def assert_same(got: Array, expected: Array) -> None:
    """Compare dtype, shape and every bit."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert pack(got) == pack(expected)
