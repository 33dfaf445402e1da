"""`phoenix-server audit replay`: runs a logged input on the logged model again and compares bit for bit, on CPU.

A kernel may add numbers in another order when a run has another number of rows, so an answer that came out of a batch
is looked for in batches of each size that the server could have made: the row alone first, then filled up with itself.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np

from phoenix_server import engine
from phoenix_server.artifacts import ArtifactStore
from phoenix_server.audit.chain import AuditRow
from phoenix_server.audit.store import ModelFacts
from phoenix_server.audit.tensor_blob import unpack
from phoenix_server.engine import CPU_PROVIDER, RUNTIME_VERSION, Engine, EngineOptions, ModelFile
from phoenix_server.errors import ModelLoadError, Outcome, PhoenixError, Reason
from phoenix_server.onnx_file import OnnxFileError, read_facts
from phoenix_server.tensors import Array


class Comparison(Enum):
    """What a replay can find."""

    IDENTICAL = "identical"
    DIFFERENT = "different"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of one prediction."""

    row: AuditRow
    comparison: Comparison
    text: str


class Replay:
    """Loads each model once. `store` fetches them, as the server does."""

    def __init__(self, artifacts: ArtifactStore) -> None:
        self._artifacts = artifacts
        self._engines: dict[str, Engine | ModelLoadError] = {}

    async def run(self, row: AuditRow, facts: ModelFacts | None) -> Replayed:
        """Run a prediction again. Raises `ModelLoadError` if its model is not to be had with the logged digest."""
        if row.outcome != Outcome.OK.value:
            return Replayed(row, Comparison.SKIPPED, f"it was not answered: {row.outcome}")
        if row.inputs is None or row.outputs is None:
            return Replayed(row, Comparison.SKIPPED, "its row holds no tensors (includeTensors: false)")
        try:
            inputs = dict(unpack(row.inputs) + (unpack(row.features) if row.features is not None else []))
            logged = unpack(row.outputs)
        except ValueError as error:
            return Replayed(row, Comparison.DIFFERENT, str(error))
        model = await self._engine(row, facts)
        most_rows = json.loads(facts.signature).get("max_batch_rows", 1) if facts else 1
        try:
            found = _compare(model, inputs, logged, most_rows)
        except (PhoenixError, ValueError) as error:
            return Replayed(row, Comparison.DIFFERENT, f"it cannot be run again: {error}")
        notes = []
        if row.provider != CPU_PROVIDER:
            notes.append(f"answered by {row.provider}, run again by {CPU_PROVIDER}")
        if row.runtime != f"onnxruntime {RUNTIME_VERSION}":
            notes.append(f"answered by {row.runtime}, run again by onnxruntime {RUNTIME_VERSION}")
        comparison, text = found
        return Replayed(row, comparison, "; ".join([text, *notes]))

    def close(self) -> None:
        """Free the models."""
        for model in self._engines.values():
            if isinstance(model, Engine):
                model.close()

    async def _engine(self, row: AuditRow, facts: ModelFacts | None) -> Engine:
        known = self._engines.get(row.digest)
        if known is None:
            try:
                known = await self._load(row, facts)
            except ModelLoadError as error:
                known = error
            self._engines[row.digest] = known
        if isinstance(known, ModelLoadError):
            raise known
        return known

    async def _load(self, row: AuditRow, facts: ModelFacts | None) -> Engine:

        if facts is None:
            raise ModelLoadError(
                Reason.NOT_FOUND, f"the table models has no {row.model} version {row.version} with digest {row.digest}"
            )
        artifact = await self._artifacts.fetch(facts.uri, sha256=row.digest, beside=Path(facts.folder))
        try:
            read = read_facts(artifact.path)
        except OnnxFileError as error:
            raise ModelLoadError(Reason.INVALID_MODEL, f"{artifact.path.name}: {error}") from error
        return engine.load(ModelFile(artifact.path, artifact.sha256, read, artifact.size_bytes), EngineOptions())


def _compare(
    model: Engine, inputs: dict[str, Array], logged: list[tuple[str, Array]], most_rows: int
) -> tuple[Comparison, str]:
    names = [name for name, _ in logged]
    rows = next(iter(inputs.values())).shape[0] if model.signature.is_batchable and inputs else 0
    first: str | None = None
    for size in _sizes(rows, most_rows):
        run_on = inputs if size == rows else {name: _filled(array, size) for name, array in inputs.items()}
        outputs = model.run(run_on, names)
        if size != rows:
            outputs = [output[:rows] for output in outputs]
        difference = _difference(logged, outputs)
        if difference is None:
            return Comparison.IDENTICAL, "" if size == rows else f"in a run of {size} rows"
        first = first or difference
    return Comparison.DIFFERENT, str(first)


def _sizes(rows: int, most_rows: int) -> Iterable[int]:
    return (rows, *range(rows + 1, most_rows + 1)) if rows else (0,)


def _filled(array: Array, rows: int) -> Array:
    """Return the rows of an array, again and again up to that many."""
    filled: Array = array[np.arange(rows) % array.shape[0]]
    return filled


def _difference(logged: list[tuple[str, Array]], outputs: Iterable[Array]) -> str | None:
    for (name, was), now in zip(logged, outputs, strict=True):
        if was.dtype != now.dtype or was.shape != now.shape:
            return f"output '{name}' was {was.dtype} {list(was.shape)}, is {now.dtype} {list(now.shape)}"
        is_same = (was == now).all() if was.dtype.kind == "O" else was.tobytes() == now.tobytes()
        if not is_same:
            return f"output '{name}' differs{_distance(was, now)}"
    return None


def _distance(was: Array, now: Array) -> str:
    if was.dtype.kind != "f":
        return ""
    return f" by up to {float(np.nanmax(np.abs(was.astype(np.float64) - now.astype(np.float64)))):.3g}"
