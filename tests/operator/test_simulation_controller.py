"""One look at an HPA: reasons and conditions, after cases of Kubernetes' horizontal_test.go (v1.36.3)."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix_operator.simulation.behavior import History, Recommendation
from phoenix_operator.simulation.controller import (
    Condition,
    Decision,
    Flags,
    HorizontalController,
    Metrics,
    Target,
    milli,
)  # fmt: skip
from phoenix_operator.simulation.replica_calculator import Delays, Pod, PodMetric

NOW_S = 1_000_000.0
FLAGS = Flags(delays=Delays(120, 10))
TO_ZERO = Flags(scale_to_zero=True)


def cpu(target: int) -> dict[str, Any]:
    goal = {"type": "Utilization", "averageUtilization": target}
    return {"type": "Resource", "resource": {"name": "cpu", "target": goal}}


def one_object(name: str, **goal: str) -> dict[str, Any]:
    kind = "Value" if "value" in goal else "AverageValue"
    described = {"apiVersion": "phoenix-ml.io/v1alpha1", "kind": "PhoenixModel", "name": "fraud"}
    target = {"type": kind, **goal}
    return {"type": "Object", "object": {"describedObject": described, "metric": {"name": name}, "target": target}}


def hpa(least: int | None, most: int, *metrics: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"minReplicas": least, "maxReplicas": most, "metrics": list(metrics), **more}


def target(replicas: int, *, ready: int | None = None, requests: tuple[int, ...] = ()) -> Target:
    ready = replicas if ready is None else ready
    pods = [
        Pod(f"pod-{index}", is_ready=index < ready, request_milli=requests[index] if index < len(requests) else None)
        for index in range(replicas)
    ]
    return Target(replicas, replicas, pods)


def usage(*levels: int) -> Metrics:
    return Metrics(resources={"cpu": {f"pod-{index}": PodMetric(level) for index, level in enumerate(levels)}})


def told(decision: Decision) -> dict[str, tuple[bool, str]]:
    return {name: (condition.is_true, condition.reason) for name, condition in decision.conditions.items()}


def look(
    spec: Mapping[str, Any], at: Target, metrics: Metrics, *, flags: Flags = FLAGS, history: History | None = None
) -> Decision:
    """One look of a controller that has no recommendations of before."""
    return HorizontalController(flags, history or History()).step(NOW_S, spec, at, metrics)


RESCALED = {"AbleToScale": (True, "SucceededRescale"), "ScalingActive": (True, "ValidMetricFound")}
WITHIN = {"ScalingLimited": (False, "DesiredWithinRange")}
HUNDREDS = (100, 300, 500, 250, 250)
SMALL = (900, 1000, 1100)


@pytest.mark.parametrize(
    ("spec", "at", "metrics", "wanted", "conditions"),
    [
        pytest.param(
            hpa(2, 6, cpu(30)), target(3, requests=(1000,) * 3), usage(300, 500, 700), 5, RESCALED | WITHIN, id="up"
        ),
        pytest.param(
            hpa(2, 6, cpu(50)), target(5, requests=(1000,) * 5), usage(*HUNDREDS), 3, RESCALED | WITHIN, id="down"
        ),
        pytest.param(
            hpa(2, 5, cpu(90)), target(3, requests=SMALL), usage(10, 95, 10), 2,
            RESCALED | {"ScalingLimited": (True, "TooFewReplicas")}, id="to the minimum",
        ),
        pytest.param(hpa(0, 5, cpu(90)), target(3, requests=SMALL), usage(0, 0, 0), 0, RESCALED | WITHIN, id="to zero"),
        pytest.param(
            hpa(2, 5, cpu(90)), target(3, requests=SMALL), usage(0, 0, 0), 2,
            RESCALED | {"ScalingLimited": (True, "TooFewReplicas")}, id="zero is under the minimum",
        ),
        pytest.param(
            hpa(2, 5, cpu(90)), target(3, requests=SMALL), usage(8000, 9500, 1000), 5,
            RESCALED | {"ScalingLimited": (True, "TooManyReplicas")}, id="to the maximum",
        ),
        pytest.param(
            hpa(1, 100, cpu(10)), target(3, requests=(100,) * 3), usage(100, 200, 300), 6,
            RESCALED | {"ScalingLimited": (True, "ScaleUpLimit")}, id="twice as many at most",
        ),
        pytest.param(
            hpa(1, 100, cpu(10), behavior={"scaleUp": {"policies": [
                {"type": "Percent", "value": 700, "periodSeconds": 60}]}}),
            target(3, requests=(100,) * 3), usage(100, 200, 300), 24,
            RESCALED | {"ScalingLimited": (True, "ScaleUpLimit")}, id="as many as behavior allows",
        ),
        pytest.param(
            hpa(1, 20, cpu(10), behavior={"scaleUp": {"policies": [
                {"type": "Percent", "value": 700, "periodSeconds": 60}]}}),
            target(3, requests=(100,) * 3), usage(100, 200, 300), 20,
            RESCALED | {"ScalingLimited": (True, "TooManyReplicas")}, id="behavior allows more than the maximum",
        ),
        pytest.param(
            hpa(2, 6, cpu(100)), target(4, requests=(1000,) * 4), usage(400, 95), 3, RESCALED | WITHIN, id="two missing"
        ),
        pytest.param(
            hpa(1, 5, cpu(50)), target(2, requests=(400, 400)), usage(200, 200), 2,
            {"AbleToScale": (True, "ReadyForNewScale"), "ScalingActive": (True, "ValidMetricFound")} | WITHIN,
            id="on target",
        ),
        pytest.param(
            hpa(1, 8, cpu(50)), Target(4, 5, target(5, requests=(1000,) * 5).pods), usage(*(500,) * 5), 4,
            {"AbleToScale": (True, "ReadyForNewScale"), "ScalingActive": (True, "ValidMetricFound")} | WITHIN,
            id="a pod too many in a rollout",
        ),
        pytest.param(
            hpa(3, 5, cpu(90)), target(2), Metrics(), 3, {"AbleToScale": (True, "SucceededRescale")},
            id="under the minimum, without metrics",
        ),
        pytest.param(
            hpa(3, 5, cpu(90)), target(10), Metrics(), 5, {"AbleToScale": (True, "SucceededRescale")},
            id="over the maximum, without metrics",
        ),
        pytest.param(
            hpa(3, 5, cpu(90)), target(0), Metrics(), 0,
            {"AbleToScale": (True, "SucceededGetScale"), "ScalingActive": (False, "ScalingDisabled")},
            id="switched off by zero replicas",
        ),
        pytest.param(
            hpa(2, 6, cpu(100)), target(4, requests=(1000,) * 4), Metrics(), 4,
            {"AbleToScale": (True, "SucceededGetScale"), "ScalingActive": (False, "FailedGetResourceMetric")},
            id="no metrics of pods",
        ),
        pytest.param(
            hpa(1, 5, cpu(100)), target(1), usage(200), 1,
            {"AbleToScale": (True, "SucceededGetScale"), "ScalingActive": (False, "FailedGetResourceMetric")},
            id="no CPU request",
        ),
        pytest.param(
            hpa(1, 5, one_object("qps", value="15")), target(3), Metrics(), 3,
            {"AbleToScale": (True, "SucceededGetScale"), "ScalingActive": (False, "FailedGetObjectMetric")},
            id="no metric of the object",
        ),
        pytest.param(
            hpa(2, 6, {"type": "CheddarCheese"}), target(3), Metrics(), 3,
            {"AbleToScale": (True, "SucceededGetScale"), "ScalingActive": (False, "InvalidMetricSourceType")},
            id="an unknown kind of metric",
        ),
    ],
)  # fmt: skip
def test_one_look(
    spec: dict[str, Any], at: Target, metrics: Metrics, wanted: int, conditions: dict[str, tuple[bool, str]]
) -> None:
    decision = look(spec, at, metrics)
    assert (decision.replicas, told(decision)) == (wanted, conditions)
    assert decision.rescaled == (wanted != at.spec_replicas)


A, B = one_object("a", averageValue="1"), one_object("b", value="1")


@pytest.mark.parametrize(
    ("values", "wanted", "active"),
    [
        pytest.param({"a": 6_000, "b": 1_000}, 6, (True, "ValidMetricFound"), id="the larger proposal wins"),
        pytest.param({"a": 6_000}, 6, (True, "ValidMetricFound"), id="one absent, the other proposes up"),
        pytest.param({"b": 2_000}, 8, (True, "ValidMetricFound"), id="the other absent, the one proposes up"),
        pytest.param({"a": 1_000}, 4, (False, "FailedGetObjectMetric"), id="one absent, the other proposes down"),
        pytest.param({"b": 0}, 4, (False, "FailedGetObjectMetric"), id="the other absent, the one proposes down"),
        pytest.param({"a": 4_000}, 4, (True, "ValidMetricFound"), id="one absent, the other is on target"),
        pytest.param({}, 4, (False, "FailedGetObjectMetric"), id="all absent: frozen"),
        pytest.param({"a": 0, "b": 0}, 1, (True, "ValidMetricFound"), id="both zero: the minimum"),
        pytest.param({"a": 1_000, "b": 1_000}, 4, (True, "ValidMetricFound"), id="pressure of one holds"),
    ],
)
def test_two_metrics_of_the_model(values: dict[str, int], wanted: int, active: tuple[bool, str]) -> None:
    decision = look(hpa(1, 10, A, B), target(4), Metrics(objects=values))
    assert (decision.replicas, told(decision)["ScalingActive"]) == (wanted, active)
    assert bool(decision.error) == (len(values) < 2)


def test_events_and_usages_are_those_of_the_controller() -> None:
    spec = hpa(1, 10, A, B)
    decision = look(spec, target(4, ready=2), Metrics(objects={"a": 7_001, "b": 2_000}))
    assert (decision.replicas, decision.reason) == (8, "external metric a(nil) above target")
    assert decision.usages == (1751, 2000)
    decision = look(spec, target(4), Metrics(objects={"a": 4_000, "b": 2_000}))
    assert (decision.replicas, decision.reason) == (8, "PhoenixModel metric b above target")
    assert look(spec, target(4), Metrics(objects={"a": 0, "b": 0})).reason == "All metrics below target"
    assert look(spec, target(20), Metrics()).reason == "Current number of replicas above Spec.MaxReplicas"
    decision = look(spec, target(4), Metrics(objects={"a": 7_000}))
    assert decision.usages == (1750, None)
    assert decision.error.startswith("invalid metrics (1 invalid out of 2), first error is: unable to fetch metrics")


def test_averages_are_over_the_replicas_of_the_status_and_values_over_ready_pods() -> None:
    rollout = Target(4, 5, target(5, ready=3).pods)
    assert look(hpa(1, 10, A), rollout, Metrics(objects={"a": 5_400})).replicas == 5  # 1.08 for each of five
    assert look(hpa(1, 10, B), rollout, Metrics(objects={"b": 2_000})).replicas == 6


def test_metrics_of_pods_and_external_ones_are_read_from_the_spec() -> None:
    goal = {"type": "AverageValue", "averageValue": "15"}
    of_pods = {"type": "Pods", "pods": {"metric": {"name": "qps"}, "target": goal}}
    values = {f"pod-{index}": PodMetric(level) for index, level in enumerate((20_000, 10_000, 30_000))}
    decision = look(hpa(1, 10, of_pods), target(3), Metrics(pods={"qps": values}))
    assert (decision.replicas, decision.reason) == (4, "pods metric qps above target")
    assert told(look(hpa(1, 10, of_pods), target(3), Metrics()))["ScalingActive"] == (False, "FailedGetPodsMetric")
    lag = {"type": "External", "external": {"metric": {"name": "lag"}, "target": goal}}
    assert look(hpa(1, 10, lag), target(3), Metrics(external={"lag": [40_000, 50_000]})).replicas == 6
    assert told(look(hpa(1, 10, lag), target(3), Metrics()))["ScalingActive"] == (False, "FailedGetExternalMetric")


def test_an_hpa_without_metrics_is_on_cpu() -> None:
    spec = {"maxReplicas": 10}
    assert look(spec, target(2, requests=(1000, 1000)), usage(1600, 1600)).replicas == 4


def test_what_was_there_first_counts_as_a_recommendation() -> None:
    controller, spec = HorizontalController(FLAGS), hpa(2, 6, cpu(50))
    at, low = target(5, requests=(1000,) * 5), usage(*HUNDREDS)
    decision = controller.step(NOW_S, spec, at, low)
    assert (decision.replicas, told(decision)["AbleToScale"]) == (5, (True, "ScaleDownStabilized"))
    decision = controller.step(NOW_S + 301, spec, at, low)
    assert (decision.replicas, told(decision)["AbleToScale"]) == (3, (True, "SucceededRescale"))


def test_a_window_of_the_spec_wins_over_that_of_the_controller() -> None:
    before = [Recommendation(10, NOW_S - 600), Recommendation(4, NOW_S - 60)]
    at, low = target(4, requests=(100,) * 4), usage(50, 50, 50)
    decision = look(hpa(1, 5, cpu(100)), at, low, history=History(list(before)))
    assert (decision.replicas, told(decision)["AbleToScale"]) == (4, (True, "ScaleDownStabilized"))
    soon = {"scaleDown": {"stabilizationWindowSeconds": 30}}
    assert look(hpa(1, 5, cpu(100), behavior=soon), at, low, history=History(list(before))).replicas == 3


def test_tolerance_of_each_direction() -> None:
    at = target(10)
    near = {"scaleUp": {"tolerance": "20m"}, "scaleDown": {"tolerance": "500m", "stabilizationWindowSeconds": 0}}
    for value, by_default, by_spec in ((10_500, 10, 11), (6_000, 6, 10), (4_900, 5, 5)):
        metrics = Metrics(objects={"a": value})
        assert look(hpa(1, 20, A), at, metrics).replicas == by_default
        assert look(hpa(1, 20, A, behavior=near), at, metrics).replicas == by_spec


def test_policies_count_what_was_scaled_before() -> None:
    slowly = {"scaleUp": {"policies": [{"type": "Pods", "value": 2, "periodSeconds": 60}]}}
    controller, spec, replicas, seen = HorizontalController(FLAGS), hpa(1, 20, A, behavior=slowly), 2, []
    for step in range(9):
        decision = controller.step(NOW_S + 15 * step, spec, target(replicas), Metrics(objects={"a": 20_000}))
        replicas = decision.replicas
        seen.append(replicas)
    assert seen == [4, 4, 4, 4, 6, 6, 6, 6, 8]
    assert told(decision)["ScalingLimited"] == (True, "ScaleUpLimit")


@pytest.mark.parametrize("flags", [Flags(), TO_ZERO], ids=["gate off", "gate on"])
def test_zero_is_left_only_where_the_controller_went_there(flags: Flags) -> None:
    controller, spec = HorizontalController(flags), hpa(0, 6, one_object("qps", value="15"))
    down = controller.step(NOW_S, spec, target(3), Metrics(objects={"qps": 0}))
    assert down.replicas == 3  # what was there first
    down = controller.step(NOW_S + 301, spec, target(3), Metrics(objects={"qps": 0}))
    assert (down.replicas, "ScaledToZero" in down.conditions) == (0, flags.scale_to_zero)
    back = controller.step(NOW_S + 316, spec, target(0), Metrics(objects={"qps": 20_000}))
    if flags.scale_to_zero:
        assert (back.replicas, told(back)["ScaledToZero"]) == (2, (False, "NotScaledToZero"))
    else:
        assert (back.replicas, told(back)["ScalingActive"]) == (0, (False, "ScalingDisabled"))


def test_zero_is_left_for_a_minimum_that_was_raised() -> None:
    controller = HorizontalController(TO_ZERO, History())
    controller.conditions["ScaledToZero"] = Condition(True, "ScaledToZero")
    spec = hpa(2, 6, one_object("qps", value="15"))
    decision = controller.step(NOW_S, spec, target(0), Metrics(objects={"qps": 10_000}))
    assert (decision.replicas, told(decision)["ScalingLimited"]) == (2, (True, "TooFewReplicas"))
    assert told(decision)["ScaledToZero"] == (False, "NotScaledToZero")


def test_zero_that_somebody_else_made_stays() -> None:
    spec = hpa(0, 6, one_object("qps", value="15"))
    decision = look(spec, target(0), Metrics(objects={"qps": 20_000}), flags=TO_ZERO)
    assert (decision.replicas, told(decision)["ScalingActive"]) == (0, (False, "ScalingDisabled"))


@pytest.mark.parametrize(("quantity", "amount"), [("1", 1000), (3, 3000), ("2800m", 2800), ("1k", 10**6), ("1u", 1)])
def test_quantities_are_rounded_up_to_milli_units(quantity: str | int, amount: int) -> None:
    assert milli(quantity) == amount


@given(
    values=st.lists(
        st.tuples(st.none() | st.integers(0, 200_000), st.none() | st.integers(0, 2_000), st.integers(0, 50)),
        min_size=1,
        max_size=60,
    ),
    bounds=st.tuples(st.integers(1, 10), st.integers(10, 40)),
)
def test_replicas_stay_in_bounds_and_freeze_without_metrics(
    values: list[tuple[int | None, int | None, int]], bounds: tuple[int, int]
) -> None:
    controller, replicas = HorizontalController(), bounds[0]
    for step, (one, other, ready) in enumerate(values):
        metrics = Metrics(objects={"a": one, "b": other})
        at = target(replicas, ready=min(ready, replicas))
        decision = controller.step(NOW_S + 15 * step, hpa(*bounds, A, B), at, metrics)
        assert bounds[0] <= decision.replicas <= bounds[1]
        if one is None and other is None:
            assert (decision.replicas, decision.rescaled) == (replicas, False)
        if one is None or other is None:
            assert decision.replicas >= replicas
        replicas = decision.replicas
