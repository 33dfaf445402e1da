"""From a prediction to a row. Runs on the writer's thread, so that a request pays for none of it."""

import json
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from phoenix_server.audit import tensor_blob
from phoenix_server.audit.chain import AuditRow
from phoenix_server.dataplane import Prediction
from phoenix_server.engine import RUNTIME_VERSION
from phoenix_server.errors import Outcome
from phoenix_server.event_format import Event

if TYPE_CHECKING:
    from phoenix_server.audit.store import ModelFacts
    from phoenix_server.served_model import ServedModel

_LONGEST_TEXT = 1024
_RUNTIME = f"onnxruntime {RUNTIME_VERSION}"


@dataclass(slots=True, eq=False)
class Record:
    """One prediction on its way to the database.

    `answered` is told, on the event loop, when it is committed (None) or why it is not; absent for `BestEffort`.
    """

    prediction: Prediction
    includes_tensors: bool
    event_id: str | None = None
    event: Event | None = None
    answered: Any = None
    deadline_s: float = 0.0
    size_bytes: int = 0
    tries: int = field(default=0)


def row_of(record: Record, writer: str, sequence: int, written_us: int) -> AuditRow:
    """Return the row of a record."""
    prediction = record.prediction
    model, request, response, error = prediction.model, prediction.request, prediction.response, prediction.error
    inputs = outputs = features = None
    if record.includes_tensors:
        filled = model.spec.features.input if model.spec.features is not None else None
        if filled is None or filled not in request.inputs:
            inputs = tensor_blob.pack(request.inputs.items())
        else:
            inputs = tensor_blob.pack((name, array) for name, array in request.inputs.items() if name != filled)
            features = tensor_blob.pack([(filled, request.inputs[filled])])
        if response is not None:
            outputs = tensor_blob.pack(response.outputs)
    entity = None
    if model.spec.features is not None:
        entity = request.parameters.get(model.spec.features.entity_parameter)
    return AuditRow(
        writer, sequence, written_us, int(prediction.time_s * 1e6), int(prediction.latency_s * 1e6),
        model.manifest.model.metadata.namespace or "", model.name, model.version, model.artifact.sha256,
        model.engine.provider, _RUNTIME, Outcome.OK.value if error is None else error.outcome.value,
        clean(request.id), record.event_id, None if entity is None else clean(str(entity)),
        clean(request.caller) if request.caller else None, None if error is None else clean(error.message),
        inputs, outputs, features,
    )  # fmt: skip


def facts_of(model: "ServedModel") -> "ModelFacts":
    """Return the row of `models` for a version that is served."""
    from phoenix_server.audit.store import ModelFacts

    signature = {
        side: [{"name": spec.name, "datatype": spec.dtype.name, "shape": list(spec.shape)} for spec in specs]
        for side, specs in (("inputs", model.signature.inputs), ("outputs", model.signature.outputs))
    }
    return ModelFacts(
        namespace=model.manifest.model.metadata.namespace or "", name=model.name, version=model.version,
        digest=model.artifact.sha256, uri=model.spec.model.uri, folder=str(model.manifest.file.parent.absolute()),
        signature=json.dumps(signature | {"max_batch_rows": model.max_batch_rows}),
    )  # fmt: skip


@lru_cache(1024)
def clean(text: str) -> str:
    """Return a caller's text as a database can hold it: no NUL, no half of a surrogate pair, of bounded length."""
    if "\0" in text or not text.isascii():
        text = text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"
