"""The HPAs that are compared: ours, one on the plain percentile and one on CPU, as autoscaling/v2 specs."""

from collections.abc import Callable
from typing import Any

from phoenix_api import PhoenixModel
from phoenix_api.types import API_VERSION, KIND, Autoscaling
from phoenix_operator.simulation.controller import Spec

CONCURRENCY = "inference_latency_seconds_concurrency"
PRESSURE = "inference_latency_seconds_pressure"
LATENCY = "inference_latency_seconds"
TARGET_SHARE = 0.7  # of the measured capacity
_MOST_WINDOW_S = 3600  # that the API allows


def slo_hpa(model: PhoenixModel, asked: Autoscaling, capacity: int, load_s: float) -> Spec:
    """Return our HPA: concurrency scales, pressure holds or raises; up fast, down slowly, or as `behavior` says."""
    per_replica = asked.concurrency_per_replica
    milli = per_replica * 1000 if per_replica is not None else round(TARGET_SHARE * capacity * 1000)
    window_s = min(_MOST_WINDOW_S, max(asked.scale_down_stabilization_seconds, round(2 * load_s)))
    up = [_policy("Percent", 100), _policy("Pods", 4)]
    own = {
        "scaleUp": {"stabilizationWindowSeconds": 0, "selectPolicy": "Max", "policies": up},
        "scaleDown": {
            "stabilizationWindowSeconds": window_s,
            "selectPolicy": "Max",
            "policies": [_policy("Percent", 25)],
        },
    }
    metrics = [
        _object(model, CONCURRENCY, {"type": "AverageValue", "averageValue": f"{milli}m"}),
        _object(model, PRESSURE, {"type": "Value", "value": "1"}),
    ]
    return _hpa(model, asked, metrics, own if asked.behavior is None else asked.behavior)


def latency_hpa(model: PhoenixModel, asked: Autoscaling, capacity: int, load_s: float) -> Spec:
    """Return an HPA on the percentile alone, with Kubernetes' default behaviour."""
    goal = {"type": "Value", "value": str(asked.target_latency)}
    return _hpa(model, asked, [_object(model, LATENCY, goal)], None)


def cpu_hpa(model: PhoenixModel, asked: Autoscaling, capacity: int, load_s: float) -> Spec:
    """Return an HPA on 80 % of the CPU request, with Kubernetes' default behaviour."""
    goal = {"type": "Utilization", "averageUtilization": 80}
    return _hpa(model, asked, [{"type": "Resource", "resource": {"name": "cpu", "target": goal}}], None)


POLICIES: dict[str, Callable[[PhoenixModel, Autoscaling, int, float], Spec]] = {
    "slo": slo_hpa,
    "latency": latency_hpa,
    "cpu": cpu_hpa,
}


def _policy(kind: str, value: int) -> dict[str, Any]:
    return {"type": kind, "value": value, "periodSeconds": 60}


def _object(model: PhoenixModel, metric: str, goal: dict[str, Any]) -> dict[str, Any]:
    described = {"apiVersion": API_VERSION, "kind": KIND, "name": model.metadata.name}
    return {"type": "Object", "object": {"describedObject": described, "metric": {"name": metric}, "target": goal}}


def _hpa(model: PhoenixModel, asked: Autoscaling, metrics: list[dict[str, Any]], behavior: Any) -> Spec:
    spec = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": model.metadata.name},
        "minReplicas": asked.min_replicas,
        "maxReplicas": asked.max_replicas,
        "metrics": metrics,
    }
    return spec if behavior is None else spec | {"behavior": behavior}
