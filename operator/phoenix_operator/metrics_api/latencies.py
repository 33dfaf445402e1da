"""The latency of models, for their status: what the metrics API would answer, without asking it.

One query for each namespace, shared by its models for a while. What cannot be had is None: the status is no alarm.
"""

import asyncio

from phoenix_operator.metrics_api.label_selector import Selector
from phoenix_operator.metrics_api.metrics import METRICS
from phoenix_operator.metrics_api.prometheus import PrometheusClient, PrometheusError
from phoenix_operator.metrics_api.readings import Reading, Readings, choose
from phoenix_operator.observed import Subject
from phoenix_operator.settings import AutoscalingSettings

_METRIC = METRICS["inference_latency_seconds"]
_PATIENCE_S = 0.5  # no reconcile waits longer
_STANDS_S = 15.0  # the interval of the rules


class Latencies:
    """Asks the Prometheus of the settings; without an address nothing is known of anybody."""

    def __init__(self, settings: AutoscalingSettings) -> None:
        self._client = PrometheusClient(settings.prometheus) if settings.prometheus.url else None
        self._readings = (
            Readings(self._client, cache_s=_STANDS_S, max_age_s=settings.max_age_seconds) if self._client else None
        )

    async def of(self, subject: Subject) -> float | None:
        """Return the latency in seconds that was recorded last; None where there is none, or nobody answers."""
        if self._readings is None:
            return None
        try:
            # an answer that comes later is there for the next one who asks
            async with asyncio.timeout(_PATIENCE_S):
                series = await self._readings.series(_METRIC, subject.namespace)
        except (PrometheusError, TimeoutError):
            return None
        found = choose(series.get(subject.name, ()), _METRIC, Selector())
        return found.value if isinstance(found, Reading) else None

    async def close(self) -> None:
        """Ask no more."""
        if self._readings is not None and self._client is not None:
            await self._readings.close()
            await self._client.close()
