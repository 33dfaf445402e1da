"""The HPAs that are compared, as they are given to the controller."""

from typing import Any

import pytest
import yaml

from phoenix_api import PhoenixModel, parse_manifests
from phoenix_operator.simulation.policies import POLICIES


def hpa(policy: str, *, capacity: int = 4, load_s: float = 30.0, **asked: Any) -> dict[str, Any]:
    autoscaling = {"minReplicas": 2, "maxReplicas": 9, "targetLatency": "200m"} | asked
    document = {
        "apiVersion": "phoenix-ml.io/v1alpha1",
        "kind": "PhoenixModel",
        "metadata": {"name": "fraud", "namespace": "ml"},
        "spec": {"model": {"uri": "fraud/model.onnx"}, "autoscaling": autoscaling},
    }
    model: PhoenixModel = parse_manifests(yaml.safe_dump(document), file="model.yaml")[0].model
    assert model.spec.autoscaling is not None
    return dict(POLICIES[policy](model, model.spec.autoscaling, capacity, load_s))


def described(metric: str, goal: dict[str, str]) -> dict[str, Any]:
    of = {"apiVersion": "phoenix-ml.io/v1alpha1", "kind": "PhoenixModel", "name": "fraud"}
    return {"type": "Object", "object": {"describedObject": of, "metric": {"name": metric}, "target": goal}}


def test_ours_scales_on_concurrency_and_holds_by_pressure() -> None:
    minute = {"periodSeconds": 60}
    assert hpa("slo") == {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "fraud"},
        "minReplicas": 2,
        "maxReplicas": 9,
        "metrics": [
            described("inference_latency_seconds_concurrency", {"type": "AverageValue", "averageValue": "2800m"}),
            described("inference_latency_seconds_pressure", {"type": "Value", "value": "1"}),
        ],
        "behavior": {
            "scaleUp": {
                "stabilizationWindowSeconds": 0,
                "selectPolicy": "Max",
                "policies": [{"type": "Percent", "value": 100} | minute, {"type": "Pods", "value": 4} | minute],
            },
            "scaleDown": {
                "stabilizationWindowSeconds": 300,
                "selectPolicy": "Max",
                "policies": [{"type": "Percent", "value": 25} | minute],
            },
        },
    }


@pytest.mark.parametrize(
    ("asked_s", "load_s", "window_s"), [(300, 100.0, 300), (300, 200.0, 400), (0, 0.0, 120), (600, 5000.0, 3600)]
)
def test_the_window_down_is_twice_the_load_time_at_least(asked_s: int, load_s: float, window_s: int) -> None:
    spec = hpa("slo", load_s=load_s, scaleDownStabilizationSeconds=asked_s)
    assert spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == window_s


def test_behavior_and_concurrency_of_the_manifest_win() -> None:
    behavior = {"scaleUp": {"stabilizationWindowSeconds": 30}}
    spec = hpa("slo", behavior=behavior, concurrencyPerReplica=7)
    assert spec["behavior"] == behavior
    assert spec["metrics"][0]["object"]["target"]["averageValue"] == "7"


def test_the_others_have_the_default_behavior() -> None:
    latency, cpu = hpa("latency"), hpa("cpu")
    assert latency["metrics"] == [described("inference_latency_seconds", {"type": "Value", "value": "200m"})]
    goal = {"type": "Utilization", "averageUtilization": 80}
    assert cpu["metrics"] == [{"type": "Resource", "resource": {"name": "cpu", "target": goal}}]
    assert "behavior" not in latency
    assert "behavior" not in cpu
