"""The JSON of a prediction event: how it is written, read back, and its JSON Schema.

Pure. Written by hand into bytes, because it happens for each prediction: a third of the time that a dictionary takes.
A tensor is `{"name", "datatype", "shape"}` with its elements flat and row-major as `data`, as in OIP JSON; what JSON
cannot hold (NaN, the infinities, FP16) is `raw`: base64 of the elements as the binary tensor extension lays them out.
Either way every bit comes back (`tensor_from`).
"""

import binascii
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from phoenix_server.codec_binary import array_from, bytes_of
from phoenix_server.errors import Code, Outcome
from phoenix_server.tensors import DTYPES, Array, DType, dtype_of

if TYPE_CHECKING:
    from phoenix_server.dataplane import Prediction
    from phoenix_server.served_model import ServedModel

SCHEMA_VERSION = 1
_CACHED_HEADS = 1024


@dataclass(frozen=True, slots=True)
class Event:
    """A record for the events topic. `value` is JSON; `id` is also in it, and tells a delivery repeated."""

    id: str
    topic: str
    key: bytes
    value: bytes


class EventFormat:
    """Writes the events of one loaded model."""

    def __init__(self, model: "ServedModel", *, include_tensors: bool) -> None:
        metadata = model.manifest.model.metadata
        fixed = {
            "namespace": metadata.namespace,
            "model": model.name,
            "version": model.version,
            "digest": model.artifact.sha256,
            "provider": model.engine.provider,
        }
        fields = orjson.dumps(fixed)[1:-1].replace(b"%", b"%%")
        self._template = (
            b'{"schema_version":%d,"id":"%%b","time":"%%b.%%06dZ","request_id":%%b,"entity":%%b,' % SCHEMA_VERSION
            + fields
            + b',"outcome":"%b","latency_seconds":%.6f%b}'
        )
        self._has_tensors = include_tensors
        self._entity_parameter = model.spec.features.entity_parameter if model.spec.features else None
        self._heads: dict[tuple[str, str, tuple[int, ...]], bytes] = {}
        self._second = 0
        self._second_text = b""

    def key(self, prediction: "Prediction") -> bytes:
        """Return the key of the event's record: the entity where features name one, else the request id."""
        return (self._entity(prediction) or prediction.request.id).encode(errors="replace")

    def encode(self, prediction: "Prediction", event_id: str) -> bytes:
        """Return the event as one line of JSON, without a line end."""
        second = int(prediction.time_s)
        if second != self._second:
            self._second_text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)).encode()
            self._second = second
        request, response, error = prediction.request, prediction.response, prediction.error
        rest = b""
        if self._has_tensors:
            rest = b',"inputs":[%b]' % b",".join([self._tensor(name, a) for name, a in request.inputs.items()])
            if response is not None:
                rest += b',"outputs":[%b]' % b",".join([self._tensor(name, a) for name, a in response.outputs])
        if error is not None:
            rest += b',"error":' + orjson.dumps({"code": error.code.value, "message": error.message})
        entity = None if self._entity_parameter is None else self._entity(prediction)
        return self._template % (
            event_id.encode(),
            self._second_text,
            int((prediction.time_s - second) * 1e6),
            orjson.dumps(request.id),
            b"null" if entity is None else orjson.dumps(entity),
            b"ok" if error is None else error.outcome.value.encode(),
            prediction.latency_s,
            rest,
        )

    def _entity(self, prediction: "Prediction") -> str | None:
        if self._entity_parameter is None:
            return None
        value = prediction.request.parameters.get(self._entity_parameter)
        return value if value is None or isinstance(value, str) else orjson.dumps(value).decode()

    def _tensor(self, name: str, array: Array) -> bytes:
        char, shape = array.dtype.char, array.shape
        head = self._heads.get((name, char, shape))
        if head is None:
            if len(self._heads) >= _CACHED_HEADS:  # shapes are the callers' choice
                self._heads.clear()
            document = {"name": name, "datatype": dtype_of(array).name, "shape": shape}
            head = self._heads[name, char, shape] = orjson.dumps(document)[:-1]
        if char == "O":
            return b'%b,"data":%b}' % (head, orjson.dumps(array.ravel().tolist()))
        if char != "e":
            flat = array if len(shape) == 1 and array.flags.c_contiguous else array.ravel()
            text = orjson.dumps(flat, option=orjson.OPT_SERIALIZE_NUMPY)
            if char not in "fd" or b"null" not in text:  # orjson's word for NaN and the infinities
                return b'%b,"data":%b}' % (head, text)
        return b'%b,"raw":"%b"}' % (head, binascii.b2a_base64(bytes_of(array), newline=False))


def size_of(arrays: Iterable[Array]) -> int:
    """Return about how many bytes the tensors hold in memory."""
    size = 0
    for array in arrays:
        size += array.nbytes
        if array.dtype.kind == "O":
            size += sum(map(len, array.flat))
    return size


def tensor_from(document: Mapping[str, Any]) -> Array:
    """Return a tensor of an event as the array that was recorded, bit for bit."""
    dtype, shape = DTYPES[document["datatype"]], tuple(document["shape"])
    if "raw" in document:
        raw = memoryview(binascii.a2b_base64(document["raw"]))
        return array_from(raw, dtype, shape, f"tensor '{document['name']}'")
    return np.array(document["data"], dtype=dtype.numpy).reshape(shape)


def schema() -> dict[str, Any]:
    """Return the JSON Schema of an event."""
    text = {"type": "string"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"https://phoenix-ml.io/schemas/event-{SCHEMA_VERSION}.json",
        "title": "Prediction event",
        "description": "One prediction of a model that phoenix-server served. Consumers ignore fields that they do not "
        "know; `schema_version` counts up when a field changes its meaning or goes.",
        "type": "object",
        "required": [
            "schema_version", "id", "time", "request_id", "entity", "namespace", "model", "version", "digest",
            "provider", "outcome", "latency_seconds",
        ],
        "properties": {
            "schema_version": {"const": SCHEMA_VERSION},
            "id": text
            | {"minLength": 1, "description": "Unique to the event; delivered twice after a failure, it is the same."},
            "time": text | {"format": "date-time", "description": "When the request was taken up, in UTC."},
            "request_id": text | {"description": "The id of the OIP request, or the one that the server gave it."},
            "entity": {
                "type": ["string", "null"],
                "description": "The value of the request parameter that `spec.features.entityParameter` names.",
            },
            "namespace": text | {"description": "Namespace of the PhoenixModel."},
            "model": text | {"description": "Name of the PhoenixModel."},
            "version": text | {"description": "Version that answered."},
            "digest": text | {"pattern": "^[0-9a-f]{64}$", "description": "SHA-256 of the model."},
            "provider": text | {"description": "ONNX Runtime's execution provider."},
            "outcome": {"enum": [outcome.value for outcome in Outcome], "description": "As the label of the metrics."},
            "latency_seconds": {"type": "number", "minimum": 0, "description": "Features and queue included."},
            "inputs": {"type": "array", "items": {"$ref": "#/$defs/tensor"},
                       "description": "With `includeTensors`: what the model was given, features included."},
            "outputs": {"type": "array", "items": {"$ref": "#/$defs/tensor"},
                        "description": "With `includeTensors`: what the model answered; absent if it did not."},
            "error": {
                "type": "object",
                "description": "Present unless the outcome is `ok`.",
                "required": ["code", "message"],
                "properties": {"code": {"enum": [code.value for code in Code]}, "message": text},
            },
        },
        "$defs": {
            "tensor": {
                "type": "object",
                "required": ["name", "datatype", "shape"],
                "oneOf": [{"required": ["data"]}, {"required": ["raw"]}],
                "properties": {
                    "name": text,
                    "datatype": {"enum": [dtype.name for dtype in DType]},
                    "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                    "data": {
                        "type": "array",
                        "items": {"type": ["number", "boolean", "string"]},
                        "description": "The elements, flat and row-major. FP32 is written with as many digits as FP32 "
                        "needs; integers may exceed 2^53.",
                    },
                    "raw": text
                    | {
                        "contentEncoding": "base64",
                        "description": "In place of `data` for what JSON cannot hold: little-endian elements; of "
                        "BYTES, each a 4-byte length and UTF-8.",
                    },
                },
            }
        },
    }  # fmt: skip
