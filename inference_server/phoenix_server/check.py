"""`phoenix-server check`: does everything that serving does before the first request, and prints what it found."""

import asyncio
import logging
import sys
from collections.abc import Iterable

from phoenix_api import Manifest
from phoenix_server.app import new_store
from phoenix_server.artifacts import Progress
from phoenix_server.errors import ModelLoadError, Reason
from phoenix_server.features import Features
from phoenix_server.metrics import Metrics
from phoenix_server.repository import Repository
from phoenix_server.served_model import ServedModel
from phoenix_server.settings import Settings
from phoenix_server.tensors import TensorSpec


def check(settings: Settings, manifests: Iterable[Manifest]) -> int:
    """Check each manifest's model and print a block for it; return 0, or the exit code of the first failure."""
    return asyncio.run(_check(settings, manifests))


async def _check(settings: Settings, manifests: Iterable[Manifest]) -> int:
    logging.getLogger("phoenix_server.repository").setLevel(logging.CRITICAL)  # printed here instead
    quiet = settings.model_copy(update={"measure_capacity": False})
    metrics = Metrics()
    repository = Repository(quiet, metrics, new_store(settings, _print_progress), Features(settings, metrics))
    failures: list[Reason] = []
    for manifest in manifests:
        name, version = manifest.model.metadata.name, manifest.model.spec.model.version
        try:
            await repository.load(manifest)
        except ModelLoadError as error:
            failures.append(error.reason)
            print(f"{name} version {version} ({manifest.file})\n  FAILED    {error.reason}: {error.message}\n")
            continue
        model = repository.get(name, version)
        capacity = await model.measure() if settings.measure_capacity else None
        print(f"{name} version {version} ({manifest.file})")
        for label, value in _facts(model):
            print(f"  {label:9} {value}")
        if capacity is not None:
            print(
                f"  capacity  {capacity.concurrency} concurrent requests, {capacity.rows_per_second:.0f} rows/s, "
                f"p95 {capacity.latency_p95_s * 1000:.3g} ms (alone {capacity.latency_alone_s * 1000:.3g} ms)"
            )
        print()
    await repository.close()
    return failures[0].exit_code if failures else 0


def _facts(model: ServedModel) -> list[tuple[str, str]]:
    signature = model.signature
    batching = f"up to {model.max_batch_rows} rows" if model.max_batch_rows > 1 else "off"
    where = "on the event loop" if model.engine.is_inline else "on a thread of its own"
    run_s = model.engine.run_s
    return [
        *(("input", _tensor(spec)) for spec in signature.inputs),
        *(("output", _tensor(spec)) for spec in signature.outputs),
        ("digest", f"sha256:{model.artifact.sha256} ({model.artifact.size_bytes} bytes)"),
        ("provider", model.engine.provider),
        ("batching", batching),
        ("run", f"{run_s * 1000:.3g} ms for one row, {where}" if run_s is not None else where),
        ("load", f"{model.metrics.load_s:.3f} s"),
    ]


def _print_progress(progress: Progress) -> None:
    """Show a long fetch on stderr: one line that is written over on a terminal, else one line when it is done."""
    is_done = progress.done_bytes == progress.total_bytes
    line = f"fetching {progress.uri}: {progress.done_bytes / 1e6:.1f} of {progress.total_bytes / 1e6:.1f} MB"
    if sys.stderr.isatty():
        print(f"\r{line}", end="\n" if is_done else "", file=sys.stderr, flush=True)
    elif is_done:
        print(line, file=sys.stderr)


def _tensor(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype.name} {list(spec.shape)}"
