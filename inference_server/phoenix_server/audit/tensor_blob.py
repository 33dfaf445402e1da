"""Tensors as one value of a row, and back, bit for bit.

The form: the size of the header in bytes (4 bytes, little-endian), the header, and the data of each tensor one after
the other. The header is JSON: a list of `{"name", "datatype", "shape", "size"}`, `size` in bytes. Numbers are in C
order, little-endian; a BYTES element is its length (4 bytes, little-endian) and its UTF-8, as in the binary tensor
extension of the Open Inference Protocol.
"""

import json
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from phoenix_server.codec_binary import array_from, bytes_of
from phoenix_server.tensors import DTYPES, Array, dtype_of

_SIZE_BYTES = 4


def pack(tensors: Iterable[tuple[str, Array]]) -> bytes:
    """Return named arrays as one value."""
    keys: list[tuple[str, str, tuple[int, ...], int]] = []
    parts: list[bytes | memoryview] = [b""]
    for name, array in tensors:
        char = array.dtype.char
        data = bytes_of(array) if char == "O" else array.tobytes()
        keys.append((name, char, array.shape, len(data)))
        parts.append(data)
    parts[0] = _header(tuple(keys))
    return b"".join(parts)


def unpack(blob: bytes) -> list[tuple[str, Array]]:
    """Return what `pack` was given. Raises `ValueError` if the value is not of this form."""
    start = _SIZE_BYTES + int.from_bytes(blob[:_SIZE_BYTES], "little")
    view = memoryview(blob)
    tensors: list[tuple[str, Array]] = []
    try:
        for entry in json.loads(blob[_SIZE_BYTES:start]):
            end = start + entry["size"]
            dtype, shape = DTYPES[entry["datatype"]], tuple(entry["shape"])
            tensors.append((entry["name"], array_from(view[start:end], dtype, shape, entry["name"])))
            start = end
    except Exception as error:  # whatever is wrong with bytes that somebody else may have written
        raise ValueError(f"tensors that cannot be read: {error}") from error
    if start != len(blob):
        raise ValueError(f"{len(blob) - start} bytes are left behind the last tensor")
    return tensors


@lru_cache(1024)
def _header(keys: tuple[tuple[str, str, tuple[int, ...], int], ...]) -> bytes:
    """Return size and header; requests of one model share a few."""
    entries = [
        {"name": name, "datatype": dtype_of(np.empty(0, char)).name, "shape": list(shape), "size": size}
        for name, char, shape, size in keys
    ]
    text = json.dumps(entries, separators=(",", ":")).encode()
    return len(text).to_bytes(_SIZE_BYTES, "little") + text
