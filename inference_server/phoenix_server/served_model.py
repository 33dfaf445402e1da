"""From a manifest to something that answers: fetch, verify, load, warm up; and what was loaded.

Hides how the manifest's fields become an engine, a batcher and metrics. `repository` loads and keeps `ServedModel`s.
"""

import asyncio
import contextlib
import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from phoenix_api import Manifest, PhoenixModelSpec
from phoenix_server import capacity, engine
from phoenix_server.artifacts import Artifact, ArtifactStore
from phoenix_server.batching import Batcher
from phoenix_server.capacity import Capacity
from phoenix_server.engine import Engine, EngineOptions, ModelFile, Runner
from phoenix_server.errors import ModelLoadError, Reason
from phoenix_server.features import Features, ModelFeatures
from phoenix_server.metrics import Metrics, ModelMetrics, Objective
from phoenix_server.onnx_file import OnnxFileError, read_facts
from phoenix_server.rate_limits import Limit, RateLimits
from phoenix_server.settings import Settings
from phoenix_server.tensors import Signature

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False, weakref_slot=True)
class ServedModel:
    """One loaded version with everything a request needs. `max_request_bytes` bounds the (decompressed) body."""

    name: str
    version: str
    manifest: Manifest
    artifact: Artifact
    engine: Engine
    runner: Runner
    batcher: Batcher
    metrics: ModelMetrics
    signature: Signature
    max_batch_rows: int
    max_request_bytes: int
    loaded_at_s: float
    stamps: tuple[tuple[int, int], ...]
    is_bound: bool = False  # whether the manifest declares features or bindings
    capacity: Capacity | None = None
    features: ModelFeatures | None = None
    limit: Limit | None = None

    @property
    def spec(self) -> PhoenixModelSpec:
        """The manifest's spec."""
        return self.manifest.model.spec

    async def measure(self, *, may_go_on: Callable[[], bool] = lambda: True) -> Capacity | None:
        """Measure the capacity and publish it; None if `may_go_on()` turned false or the model refuses samples."""
        self.capacity = await capacity.measure(
            self.engine,
            lambda metrics: _batcher(self.runner, metrics, self.manifest, self.max_batch_rows),
            slo_s=self.metrics.slo_s,
            may_go_on=may_go_on,
        )
        if self.capacity is not None:
            self.metrics.capacity_concurrency = self.capacity.concurrency
        return self.capacity

    async def retire(self, within_s: float) -> None:
        """Finish what is queued and running, for at most that long; the model is freed with its last holder.

        One who was admitted before may come with the rest of its body, or its features, only now.
        """
        try:
            async with asyncio.timeout(within_s):
                await self.batcher.drain()
        except TimeoutError:
            _log.error("requests still run in a version that is not served any more", extra={"model": self.name})
        weakref.finalize(self, _free, self.runner, self.engine)


def _free(runner: Runner, engine: Engine) -> None:
    runner.close()
    engine.close()


class Loader:
    """Loads manifests' models with the settings of this process."""

    def __init__(
        self, settings: Settings, metrics: Metrics, store: ArtifactStore, features: Features | None = None
    ) -> None:
        """`features` completes the requests of models that ask for it; None: such models are refused."""
        self._settings = settings
        self._metrics = metrics
        self._store = store
        self._features = features
        self._limits = RateLimits(settings, features)

    async def load(self, manifest: Manifest) -> ServedModel:
        """Fetch, verify, load and warm up the model of a manifest. Raises `ModelLoadError`."""
        started = time.perf_counter()
        spec = manifest.model.spec
        _refuse_unsupported(spec, can_fill=self._features is not None)
        name, version = manifest.model.metadata.name, spec.model.version
        artifact = await self._store.fetch(
            spec.model.uri,
            sha256=spec.model.sha256,
            beside=manifest.file.parent,
            credentials=self._credentials() if spec.model.credentials else None,
        )
        stamps = stamps_of(artifact)
        loaded = await asyncio.to_thread(self._load_engine, artifact, manifest)
        scaling = spec.autoscaling
        objective = Objective(float(scaling.target_latency.value), scaling.percentile) if scaling else None
        metrics = self._metrics.model(name, version, objective)
        features = await self._bind(manifest, loaded, metrics)
        metrics.load_s = time.perf_counter() - started
        metrics.provider, metrics.digest = loaded.provider, artifact.sha256
        runner = loaded.runner(asyncio.get_running_loop().call_soon_threadsafe)
        max_rows = spec.batching.max_rows if loaded.signature.is_batchable else 1
        batcher = _batcher(runner, metrics, manifest, max_rows)
        metrics.queued_rows = batcher.waiting_rows
        return ServedModel(
            name=name, version=version, manifest=manifest, artifact=artifact, engine=loaded, runner=runner,
            batcher=batcher, metrics=metrics, signature=loaded.signature, max_batch_rows=max_rows,
            max_request_bytes=int(spec.limits.max_request_bytes.value), loaded_at_s=time.time(), stamps=stamps,
            features=features, limit=self._limits.of(manifest, metrics),
            is_bound=spec.features is not None or spec.bindings is not None,
        )  # fmt: skip

    def _load_engine(self, artifact: Artifact, manifest: Manifest) -> Engine:
        spec, accelerator = manifest.model.spec, manifest.model.spec.runtime.accelerator
        try:
            facts = read_facts(artifact.path)
        except OnnxFileError as error:
            raise ModelLoadError(Reason.INVALID_MODEL, f"{artifact.path.name}: {error}") from error
        options = EngineOptions(
            provider=accelerator.provider if accelerator else None,
            provider_options=accelerator.provider_options if accelerator else None,
            must_accelerate=accelerator is not None and accelerator.policy == "Require",
            threads=engine.intra_op_threads(spec.runtime.threads, self._settings.cpus),
            instances=spec.runtime.instances,
            warmup_iterations=spec.warmup.iterations,
            warmup_rows=spec.warmup.rows,
            cache_dir=self._settings.state_dir,
        )
        return engine.load(ModelFile(artifact.path, artifact.sha256, facts, artifact.size_bytes), options)

    async def _bind(self, manifest: Manifest, loaded: Engine, metrics: ModelMetrics) -> ModelFeatures | None:
        if self._features is None:
            return None
        try:
            return await self._features.bind(manifest, loaded.signature, metrics)
        except ModelLoadError:
            loaded.close()
            raise

    def _credentials(self) -> dict[str, str]:
        folder = self._settings.model_credentials_dir
        if not folder.is_dir():
            return {}
        return {file.name: file.read_text().strip() for file in sorted(folder.iterdir()) if file.is_file()}


def stamps_of(artifact: Artifact) -> tuple[tuple[int, int], ...]:
    """Return what changes when a file of the artifact is written or replaced."""
    stamps = []
    for file in artifact.files:
        with contextlib.suppress(OSError):
            stat = file.stat()
            stamps.append((stat.st_mtime_ns, stat.st_size))
    return tuple(stamps)


def _refuse_unsupported(spec: PhoenixModelSpec, *, can_fill: bool) -> None:
    """Nothing that a manifest asks for is dropped in silence."""
    if spec.features and not can_fill:
        raise ModelLoadError(Reason.INVALID_SPEC, "spec.features: nothing completes requests here; remove it")


def _batcher(runner: Runner, metrics: ModelMetrics, manifest: Manifest, max_rows: int) -> Batcher:
    spec = manifest.model.spec
    return Batcher(
        runner,
        metrics,
        max_rows=max_rows,
        max_queued_rows=spec.limits.max_queued_rows,
        max_delay_s=spec.batching.max_delay_milliseconds / 1000,
        timeout_s=spec.limits.timeout_seconds,
    )
