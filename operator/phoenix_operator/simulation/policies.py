"""The HPAs that are compared: ours, one on the plain percentile and one on CPU, as autoscaling/v2 specs."""

from collections.abc import Callable
from typing import Any

from phoenix_api import PhoenixModel
from phoenix_api.types import API_VERSION, KIND, Autoscaling
from phoenix_operator.desired.autoscaling import LATENCY, autoscaler
from phoenix_operator.observed import Loaded, Observed, Subject
from phoenix_operator.settings import AutoscalingProvider, AutoscalingSettings, Settings
from phoenix_operator.simulation.controller import Spec

_SETTINGS = Settings(autoscaling=AutoscalingSettings(provider=AutoscalingProvider.BUILTIN))


def slo_hpa(model: PhoenixModel, asked: Autoscaling, capacity: int, load_s: float) -> Spec:
    """Return the HPA that the operator makes for a model whose pods tell this capacity and time to load."""
    pod = Loaded(None, None, None, [], [], load_s=load_s, capacity=capacity)
    made = autoscaler(Subject(model, "", 1, "", {}), Observed(loaded={"pod": pod}), _SETTINGS)
    assert made is not None
    spec: Spec = made["spec"]
    return spec


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
