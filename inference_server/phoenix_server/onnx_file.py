"""What Phoenix needs to know of an .onnx file before anything is loaded: opsets, names, and its external data files.

Hides the protobuf wire format. The file is walked field by field through a small window; weights are stepped over, so
memory stays flat and a cold start pays milliseconds, not the import of `onnx`. Called by `model_cache` (which files
belong to the model) and `repository` (facts for the engine). Nothing in the file is executed, and whatever its bytes
are, the only error is `OnnxFileError`.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

# Field numbers of onnx.proto; a test compares them with the descriptors of the onnx package.
FIELDS = {
    "ModelProto": {"ir_version": 1, "producer_name": 2, "graph": 7, "opset_import": 8, "functions": 25},
    "OperatorSetIdProto": {"domain": 1, "version": 2},
    "GraphProto": {"node": 1, "initializer": 5, "input": 11, "output": 12, "sparse_initializer": 15},
    "FunctionProto": {"node": 7, "attribute_proto": 11},
    "NodeProto": {"attribute": 5},
    "AttributeProto": {"t": 5, "g": 6, "tensors": 10, "graphs": 11, "sparse_tensor": 22, "sparse_tensors": 23},
    "SparseTensorProto": {"values": 1, "indices": 2},
    "TensorProto": {"name": 8, "external_data": 13, "data_location": 14},
    "StringStringEntryProto": {"key": 1, "value": 2},
    "ValueInfoProto": {"name": 1},
}
# Where tensors hide: message -> field -> the message found there. Everything else is stepped over.
_INSIDE = {
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto", 6: "GraphProto", 10: "TensorProto", 11: "GraphProto",
        22: "SparseTensorProto", 23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
}  # fmt: skip
_NAMES = {(message, number): name for message, fields in FIELDS.items() for name, number in fields.items()}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_EXTERNAL = 1  # TensorProto.DataLocation
_FIRST_IR_WITH_OPSETS = 3
# Longest string this module reads; names are short, and a forged length must not allocate the file.
_MAX_STRING_BYTES = 65_536
_BLOCK_BYTES = 16_384
_MAX_DEPTH = 100  # protobuf's own limit
_Span = tuple[int, int]


class OnnxFileError(Exception):
    """The file is not a whole, usable ONNX model; the message says what it is instead, or where it breaks off."""


@dataclass(frozen=True, slots=True)
class OnnxFacts:
    """The facts of one model file; `external_files` are sorted, unique, relative POSIX paths beside the model."""

    ir_version: int
    opsets: dict[str, int]
    producer: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    external_files: tuple[str, ...]


def read_facts(path: Path) -> OnnxFacts:
    """Read the facts of the model at `path`. Raises `OnnxFileError`; a missing file is the caller's `OSError`."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise OnnxFileError("the file is empty")
        data = _Window(file.fileno(), size)
        try:
            facts = _Reader(data).read()
        except OnnxFileError as error:
            if kind := _looks_like(os.pread(file.fileno(), 512, 0)):
                raise OnnxFileError(f"not an ONNX model: the file looks like {kind}") from None
            raise error
    for location in facts.external_files:
        _refuse_escape(path, location)
    return facts


class _Window:
    """The bytes of a file, one block in memory at a time.

    Not a memory map: a mapped file that another process cuts short (a copy that starts over) ends this process.
    """

    def __init__(self, file: int, size: int) -> None:
        self._file = file
        self._size = size
        self._block = b""
        self._base = 0

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, at: int) -> int:
        index = at - self._base
        if not 0 <= index < len(self._block):
            self._base = at - at % _BLOCK_BYTES
            self._block = os.pread(self._file, _BLOCK_BYTES, self._base)
            index = at - self._base
            if index >= len(self._block):
                raise OnnxFileError("the file became shorter while it was read")
        return self._block[index]

    def slice(self, start: int, end: int) -> bytes:
        return os.pread(self._file, end - start, start)


@dataclass(slots=True)
class _Reader:
    """One walk over a model. Every step moves forward, so the walk ends after at most one step a byte."""

    data: _Window
    ir_version: int = 0
    producer: str = ""
    opsets: dict[str, int] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    locations: set[str] = field(default_factory=set)
    has_graph: bool = False

    def read(self) -> OnnxFacts:
        self._model((0, len(self.data)))
        if not self.has_graph:
            raise OnnxFileError("not an ONNX model, or one that breaks off early: it has no graph")
        if self.ir_version < 1:
            raise OnnxFileError("not an ONNX model: it has no ir_version")
        if not self.outputs:
            raise OnnxFileError("the model has no outputs")
        if not self.opsets and self.ir_version >= _FIRST_IR_WITH_OPSETS:
            raise OnnxFileError(f"the model names no opset; the file may break off early, at byte {len(self.data)}")
        return OnnxFacts(
            self.ir_version, self.opsets, self.producer, tuple(self.inputs), tuple(self.outputs),
            tuple(sorted(self.locations)),
        )  # fmt: skip

    def _model(self, span: _Span) -> None:
        for number, value in self._fields(span, "ModelProto"):
            match number, value:
                case 1, int():
                    self.ir_version = value
                case 2, (_, _):
                    self.producer = self._text(value, "producer_name")
                case 7, (_, _):
                    self.has_graph = True
                    self._walk("GraphProto", value, is_main_graph=True)
                case 8, (_, _):
                    self._opset(value)
                case 25, (_, _):
                    self._walk("FunctionProto", value)

    def _walk(self, message: str, span: _Span, depth: int = 0, is_main_graph: bool = False) -> None:
        """Find the tensors in a message, at any depth; of the main graph, the names of inputs and outputs as well."""
        if depth > _MAX_DEPTH:
            raise OnnxFileError(f"the model is nested deeper than {_MAX_DEPTH} messages")
        inside = _INSIDE[message]
        for number, value in self._fields(span, message):
            if isinstance(value, int):
                continue
            kind = inside.get(number)
            if kind == "TensorProto":
                self._tensor(value)
            elif kind is not None:
                self._walk(kind, value, depth + 1)
            elif is_main_graph and number in (11, 12):
                names = self.inputs if number == 11 else self.outputs
                names.append(self._strings(value, "ValueInfoProto").get(1, ""))

    def _opset(self, span: _Span) -> None:
        domain, version = "", 0
        for number, value in self._fields(span, "OperatorSetIdProto"):
            match number, value:
                case 1, (_, _):
                    domain = self._text(value, "domain")
                case 2, int():
                    version = value
        self.opsets["" if domain == "ai.onnx" else domain] = version

    def _tensor(self, span: _Span) -> None:
        name: _Span = (0, 0)
        location: str | None = None
        is_external = False
        for number, value in self._fields(span, "TensorProto"):
            match number, value:
                case 8, (_, _):
                    name = value
                case 13, (_, _):
                    pair = self._strings(value, "StringStringEntryProto")
                    if pair.get(1) == "location":
                        location = pair.get(2, "")
                case 14, int():
                    is_external = value == _EXTERNAL
        if is_external:
            if location is None:
                raise OnnxFileError(f"tensor '{self._text(name, 'name')}' lies outside the file, but says not where")
            self.locations.add(_checked_location(location))

    def _strings(self, span: _Span, message: str) -> dict[int, str]:
        return {
            number: self._text(value, _NAMES[message, number])
            for number, value in self._fields(span, message)
            if not isinstance(value, int) and (message, number) in _NAMES
        }

    def _text(self, span: _Span, what: str) -> str:
        start, end = span
        if end - start > _MAX_STRING_BYTES:
            raise OnnxFileError(
                f"{what} at byte {start} is {end - start} bytes long; at most {_MAX_STRING_BYTES} make sense"
            )
        try:
            return self.data.slice(start, end).decode()
        except UnicodeDecodeError:
            raise OnnxFileError(f"{what} at byte {start} is not UTF-8 text") from None

    def _fields(self, span: _Span, message: str) -> Iterator[tuple[int, int | _Span]]:
        """Yield the fields of one message: number, and the value of a varint or the span of the bytes."""
        data, (at, end) = self.data, span
        while at < end:
            start = at
            tag = data[at]
            at += 1
            if tag > 0x7F:
                tag, at = self._varint(start, end, message)
            number, wire = tag >> 3, tag & 7
            if wire == _BYTES:
                size, at = self._varint(at, end, message, number)
                if size > end - at:
                    raise self._broken(message, number, size, at, end)
                yield number, (at, at + size)
                at += size
            elif wire == _VARINT:
                value, at = self._varint(at, end, message, number)
                yield number, value
            elif wire in (_FIXED64, _FIXED32):
                size = 8 if wire == _FIXED64 else 4
                if size > end - at:
                    raise self._broken(message, number, size, at, end)
                at += size
            else:
                raise OnnxFileError(f"not an ONNX model: byte {start} cannot stand in a {message}")
            if number == 0:
                raise OnnxFileError(f"not an ONNX model: byte {start} cannot stand in a {message}")

    def _varint(self, at: int, end: int, message: str, number: int = 0) -> tuple[int, int]:
        value = shift = 0
        while at < end:
            byte = self.data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, at
            shift += 7
            if shift > 63:
                raise OnnxFileError(f"not an ONNX model: the number at byte {at - 10} is too long")
        raise self._broken(message, number, 1, at, end)

    def _broken(self, message: str, number: int, size: int, at: int, end: int) -> OnnxFileError:
        what = f"{message}.{_NAMES.get((message, number), f'field {number}')}" if number else message
        need = f"{what} at byte {at} needs {size} bytes"
        if end == len(self.data):
            return OnnxFileError(f"the file is truncated: it ends at byte {end}, but {need}, {size - (end - at)} more")
        return OnnxFileError(f"the file is damaged: {need}, but the message around it ends at byte {end}")


def _checked_location(location: str) -> str:
    """Return an external location that stays beside the model, else raise."""
    parts = location.split("/")
    if location.startswith("/") or ".." in parts or "\\" in location or not location.isprintable():
        raise OnnxFileError(f"external data location {location!r} is not a relative path inside the model's folder")
    name = str(PurePosixPath(location))
    if name == ".":
        raise OnnxFileError(f"external data location {location!r} names no file")
    return name


def _refuse_escape(model: Path, location: str) -> None:
    """Refuse a link that leads out of the model's folder.

    Two folders count: the one that the path names (a ConfigMap mount links into its own `..data`), and the one that
    the model file really lies in (a download cache links every file of a model into one folder of blobs).
    """
    target = os.path.realpath(model.parent / location)
    folders = {os.path.realpath(model.parent), os.path.dirname(os.path.realpath(model))}
    if not any(os.path.commonpath([folder, target]) == folder for folder in folders):
        raise OnnxFileError(f"external data location {location!r} is a link that leads out of the model's folder")


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # a character cut by the end of the sample is fine
            return False
        text = head[: error.start].decode()
    return all(char.isprintable() or char in "\r\n\t\ufeff" for char in text)


_LOOKS: tuple[tuple[str, Callable[[bytes], bool]], ...] = (
    ("a Git LFS pointer; fetch the real file with `git lfs pull`", lambda b: b.startswith(b"version https://git-lfs")),
    (
        "an HTML page; the address may need a login, or shows the file instead of serving it",
        lambda b: b.lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith((b"<!doctype html", b"<html")),
    ),
    ("an XML document", lambda b: b.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<?xml")),
    ("a JSON document", lambda b: b.lstrip(b"\xef\xbb\xbf \r\n\t").startswith((b"{", b"[")) and _is_text(b)),
    ("a zip archive, as PyTorch and Keras save them; export the model to ONNX", lambda b: b.startswith(b"PK\x03\x04")),
    ("a Python pickle; export the model to ONNX", lambda b: b[0] == 0x80 and 2 <= b[1] <= 5 if len(b) > 1 else False),
    ("a TensorFlow Lite model; convert it to ONNX", lambda b: b[4:8] == b"TFL3"),
    ("an ORT format model; use the .onnx file it was made from", lambda b: b[4:8] == b"ORTM"),
    ("an HDF5 file, as Keras saves them; convert it to ONNX", lambda b: b.startswith(b"\x89HDF\r\n")),
    ("a GGUF model", lambda b: b.startswith(b"GGUF")),
    ("a safetensors file: weights without a graph", lambda b: b[8:10] == b'{"'),
    ("a gzip archive; unpack it first", lambda b: b.startswith(b"\x1f\x8b")),
    ("text", _is_text),
)


def _looks_like(head: bytes) -> str | None:
    return next((kind for kind, matches in _LOOKS if matches(head)), None)
