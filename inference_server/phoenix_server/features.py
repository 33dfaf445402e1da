"""Online features: completes requests from Redis, or from a file beside the manifest where no Redis is set.

`Features` owns the connection and outlives every model; `served_model` binds each loaded model to it and `dataplane`
asks `ModelFeatures.fill` of every request. All hashes of a request are read in one round trip. What a Redis that does
not answer means is the manifest's word: `onMissing: Default` goes on with defaults, `Reject` answers 503.
"""

import asyncio
import time
from collections.abc import Sequence

from phoenix_api import Manifest
from phoenix_server.binding_state import BindingState
from phoenix_server.errors import Code, PhoenixError, Reason, StartError, invalid
from phoenix_server.feature_file import FeatureFile
from phoenix_server.feature_rows import Completed, FeaturePlan, Values
from phoenix_server.metrics import Metrics, ModelMetrics
from phoenix_server.redis_address import parse_redis_url
from phoenix_server.redis_link import Fields, RedisLink, RedisUnavailable
from phoenix_server.settings import Settings
from phoenix_server.tensors import InferRequest, Signature

_RETRY_AFTER_S = 1


class Features:
    """The feature store of this process, as an async context manager. Times are in seconds."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        """Connects to nothing yet. Raises `StartError(InvalidSetting)` for a CA file that cannot be used."""
        self._settings = settings
        self._metrics = metrics
        self._link: RedisLink | None = None
        if settings.redis_url is not None:
            self.state = BindingState("redis")
            try:
                self._link = RedisLink(
                    parse_redis_url(settings.redis_url.get_secret_value()),
                    self.state,
                    timeout_s=settings.feature_timeout_seconds,
                    ca_file=settings.redis_ca_file,
                    probe=settings.redis_key_prefix or "",
                )
            except ValueError as error:
                raise StartError(Reason.INVALID_SETTING, f"PHOENIX_REDIS_CA_FILE: {error}") from None

    @property
    def link(self) -> RedisLink | None:
        """The connection, for whatever else is kept in this Redis; None where no Redis is set."""
        return self._link

    async def __aenter__(self) -> "Features":
        if self._link is not None:
            self._metrics.bindings.append(self.state)
            await self._link.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._link is not None:
            await self._link.__aexit__()

    async def bind(self, manifest: Manifest, signature: Signature, metrics: ModelMetrics) -> "ModelFeatures | None":
        """Return what completes the requests of a model; None if its manifest asks for nothing.

        Raises `ModelLoadError`: InvalidSpec where manifest and model do not fit, NotFound without Redis and file.
        """
        spec, metadata = manifest.model.spec.features, manifest.model.metadata
        if spec is None:
            return None
        prefix = self._settings.redis_key_prefix
        if prefix is None:
            prefix = default_prefix(manifest)
        plan = FeaturePlan(spec, signature, prefix=prefix)
        source: _RedisSource | _FileSource
        if self._link is not None:
            self.state.models.add(metadata.name)
            source = _RedisSource(self._link, plan)
        else:
            file = FeatureFile(manifest.file.parent, spec.entity_parameter)
            await file.open()
            source = _FileSource(file, plan)
        return ModelFeatures(
            plan,
            source,
            metrics,
            timeout_s=self._settings.feature_timeout_seconds,
            limit_s=manifest.model.spec.limits.timeout_seconds,
        )


class ModelFeatures:
    """Completes the requests of one loaded model."""

    def __init__(
        self,
        plan: FeaturePlan,
        source: "_RedisSource | _FileSource",
        metrics: ModelMetrics,
        *,
        timeout_s: float,
        limit_s: float,
    ) -> None:
        """`timeout_s` bounds one look-up, `limit_s` is the model's own bound on a request."""
        self.plan = plan
        self._source = source
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._limit_s = limit_s

    async def fill(self, request: InferRequest) -> float | None:
        """Add the declared input to `request`; return the age in seconds of the oldest features, None if unknown.

        Raises `PhoenixError`: INVALID for the caller's faults and for what the manifest rejects, UNAVAILABLE without
        an answer where the manifest wants one, DEADLINE when the request's own time is up.
        """
        entities, rows = self.plan.entities(request)
        left_s = min(request.timeout_us * 1e-6 or self._limit_s, self._limit_s)
        try:
            if left_s >= self._timeout_s:  # the usual case: the source keeps its own bound, without a timer for each
                found = await self._source.read(entities)
            else:
                async with asyncio.timeout(left_s):
                    found = await self._source.read(entities)
        except RedisUnavailable as error:
            completed = self._without_answer(entities, rows, error)
        except TimeoutError:
            raise PhoenixError(
                Code.DEADLINE, f"the deadline passed after {left_s:.3f} s of looking up features"
            ) from None
        else:
            completed = self.plan.complete(entities, found, rows, time.time())
        for reason, count in completed.counts.items():
            self._metrics.features_missing[reason] += count
        if completed.refusal:
            raise invalid(completed.refusal)
        request.inputs[self.plan.spec.input] = completed.array
        return completed.age_s

    def _without_answer(self, entities: Sequence[str], rows: int, error: RedisUnavailable) -> Completed:
        completed = self.plan.defaulted(entities, rows)
        if completed is None:
            self._metrics.features_missing["unavailable"] += rows
            raise PhoenixError(
                Code.UNAVAILABLE, f"features are not available at the moment: {error}", retry_after_s=_RETRY_AFTER_S
            ) from None
        return completed


class _RedisSource:
    def __init__(self, link: RedisLink, plan: FeaturePlan) -> None:
        self._link = link
        self._fields = Fields(plan.fields, plan.key_before, plan.key_after)

    async def read(self, entities: Sequence[str]) -> Sequence[Values]:
        return await self._link.read(self._fields.read(entities))


class _FileSource:
    def __init__(self, file: FeatureFile, plan: FeaturePlan) -> None:
        self._file = file
        self._fields = plan.fields

    async def read(self, entities: Sequence[str]) -> Sequence[Values]:
        return self._file.read(entities, self._fields)


def default_prefix(manifest: Manifest) -> str:
    """Return what goes before the keys of a model where no binding says another."""
    metadata = manifest.model.metadata
    return f"phx:{metadata.namespace}:{metadata.name}:"
