"""Which metric of the API is which recorded series: the one table. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

# Labels by which the rules record a model's series.
NAMESPACE_LABEL, MODEL_LABEL = "namespace", "model"


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric of the API, and the series that a recording rule writes for it."""

    name: str
    series: str


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("inference_latency_seconds_concurrency", "phoenix:inference_concurrency"),
        Metric("inference_latency_seconds_pressure", "phoenix:inference_slo_pressure"),
        Metric("inference_latency_seconds", "phoenix:inference_latency_seconds"),
    )
}


def expression(metric: Metric, namespace: str, *, max_age_s: float) -> str:
    """Return the query for a metric of all models of a namespace.

    An instant query looks back for minutes, so that a rule that is no longer evaluated would look alive: samples older
    than `max_age_s` are left out. (`last_over_time` would not do: it also finds what has been marked as gone since.)
    """
    selector = f'{metric.series}{{{NAMESPACE_LABEL}="{_escaped(namespace)}"}}'
    return f"{selector} and (time() - timestamp({selector}) < {max_age_s:g})"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
