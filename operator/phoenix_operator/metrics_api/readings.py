"""What Prometheus says of the models of a namespace: one query per metric and namespace, whoever asks.

Hides the sharing and which of the series of a model counts. A value that is no number, infinite, negative or not the
only one is no reading: the autoscaler is told that there is none.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from phoenix_operator.metrics_api.label_selector import Selector
from phoenix_operator.metrics_api.metrics import METRICS, MODEL_LABEL, NAMESPACE_LABEL, Metric, expression
from phoenix_operator.metrics_api.prometheus import PrometheusClient, PrometheusError, Sample
from phoenix_operator.metrics_api.shared import Shared

_log = logging.getLogger(__name__)
_LONGEST_FAILURE_S = 5.0
# As much as a quantity takes in thousandths.
LARGEST = 9.0e15
ABSENCES = ("no_series", "several_series", "not_finite", "negative", "too_large")


@dataclass(frozen=True, slots=True)
class Reading:
    """A value that can be given to the autoscaler, and when it was so (Unix time)."""

    value: float
    at: float


@dataclass(frozen=True, slots=True)
class Absence:
    """Why there is no reading: one of `ABSENCES`, and in words."""

    reason: str
    words: str


Series = Mapping[str, Sequence[Sample]]  # of each model


class Readings:
    """The series of the metrics, by namespace and model."""

    def __init__(self, client: PrometheusClient, *, cache_s: float, max_age_s: float) -> None:
        self._client, self._max_age_s = client, max_age_s
        self._shared: Shared[tuple[str, str], Series] = Shared(
            self._ask, lifetime_s=lambda _: cache_s, failure_s=min(max(cache_s, 1.0), _LONGEST_FAILURE_S)
        )
        self._told = ""

    async def series(self, metric: Metric, namespace: str) -> Series:
        """Return the series of each model of a namespace. Raises `PrometheusError`."""
        return await self._shared.get((metric.name, namespace))

    async def close(self) -> None:
        """Ask no more."""
        await self._shared.close()

    async def _ask(self, key: tuple[str, str]) -> Series:
        name, namespace = key
        samples = await self._query(expression(METRICS[name], namespace, max_age_s=self._max_age_s))
        found: dict[str, list[Sample]] = {}
        for sample in samples:
            if sample.labels.get(NAMESPACE_LABEL) == namespace and (model := sample.labels.get(MODEL_LABEL)):
                found.setdefault(model, []).append(sample)
        return found

    async def _query(self, query: str) -> list[Sample]:
        """Ask, and tell the log once that Prometheus fails, and in which way."""
        try:
            samples = await self._client.query(query)
        except PrometheusError as error:
            if str(error) != self._told:
                self._told = str(error)
                _log.warning("Prometheus does not answer", extra={"cause": self._told})
            raise
        if self._told:
            self._told = ""
            _log.info("Prometheus answers again")
        return samples


def choose(series: Sequence[Sample], metric: Metric, selector: Selector) -> Reading | Absence:
    """Return the reading in the series of one model, of those that the selector matches."""
    matching = [sample for sample in series if selector.matches(sample.labels)]
    if not matching:
        return Absence("no_series", f"{metric.series} has no recent sample")
    if len(matching) > 1:
        return Absence("several_series", f"{metric.series} has {len(matching)} series; expected 1")
    value = matching[0].value
    for reason, is_so, words in _FAULTS:
        if is_so(value):
            return Absence(reason, f"{metric.series} is {value:g}; {words}")
    return Reading(value, matching[0].at)


_FAULTS: Sequence[tuple[str, Callable[[float], bool], str]] = (
    ("not_finite", lambda value: not math.isfinite(value), "expected a number"),
    ("negative", lambda value: value < 0, "expected 0 or more"),
    ("too_large", lambda value: value > LARGEST, f"expected at most {LARGEST:g}"),
)
