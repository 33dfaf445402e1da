"""The HorizontalPodAutoscaler of a model: targets, pace, and when the latency has no say."""

from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from objects import NOW, SETTINGS, by_place, deployment, hpa, loaded, ready, rendered, seen, subject

from phoenix_operator.desired import autoscaling
from phoenix_operator.desired.config import revision
from phoenix_operator.desired.deployment import template_hash
from phoenix_operator.desired.naming import spec_hash
from phoenix_operator.kinds import DEPLOYMENT, HORIZONTAL_POD_AUTOSCALER, POD_DISRUPTION_BUDGET
from phoenix_operator.observed import GUARD_OFF, Loaded, Object, Observed, Subject, stamp
from phoenix_operator.settings import Settings

SCALING: Object = {"maxReplicas": 8, "targetLatency": "200m"}


def scaled(**scaling: Any) -> Subject:
    return subject(autoscaling=SCALING | scaling)


def around(model: Subject, *told: Loaded, live: Object | None = None, ready_for_s: float = 600, **others: Any) -> Any:
    """Ready pods that say this of themselves, and the HPA as it is."""
    since = stamp(NOW - timedelta(seconds=ready_for_s))
    pods = [ready(model, f"fraud-{number}", since=since) for number in range(max(len(told), 1))]
    observed = seen(model, pods, deployment=deployment(model, is_rolled_out=True), **others)
    children = {place: body for place, body in observed.children.items() if place[0] is not HORIZONTAL_POD_AUTOSCALER}
    if live is not None:
        children[HORIZONTAL_POD_AUTOSCALER, model.name] = live
    named = {pod.uid: each for pod, each in zip(pods, told, strict=False)}
    return Observed(children=children, pods=pods, loaded=named, served_kinds=observed.served_kinds, now=NOW)


def spec_of(model: Subject, observed: Observed) -> Object:
    body = autoscaling.autoscaler(model, observed, SETTINGS)
    assert body is not None
    return dict(body["spec"])


def targets(spec: Object) -> dict[str, Object]:
    assert all(row["type"] == "Object" for row in spec["metrics"])
    rows = [row["object"] for row in spec["metrics"]]
    described = {"apiVersion": "phoenix-ml.io/v1alpha1", "kind": "PhoenixModel", "name": "fraud"}
    assert all(row["describedObject"] == described for row in rows)
    return {row["metric"]["name"]: row["target"] for row in rows}


GUARD = {"inference_latency_seconds_pressure": {"type": "Value", "value": "1"}}


def concurrency(target: str) -> dict[str, Object]:
    return {"inference_latency_seconds_concurrency": {"type": "AverageValue", "averageValue": target}}


def test_it_scales_the_deployment_between_the_bounds() -> None:
    spec = spec_of(scaled(minReplicas=2), Observed())
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "fraud"}
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 8)


def test_objective_alone_guards_until_a_capacity_is_known() -> None:
    model = scaled()
    assert targets(spec_of(model, Observed())) == GUARD
    assert targets(spec_of(model, around(model, loaded()))) == GUARD


@pytest.mark.parametrize(("capacities", "target"), [((1,), "700m"), ((10,), "7"), ((4, 8, 100), "5600m")])
def test_target_is_seven_tenths_of_the_median_capacity(capacities: tuple[int, ...], target: str) -> None:
    model = scaled()
    told = [loaded(capacity=capacity) for capacity in capacities]
    assert targets(spec_of(model, around(model, *told))) == concurrency(target) | GUARD


def test_target_of_the_spec_is_taken_as_it_is() -> None:
    model = scaled(concurrencyPerReplica=3)
    assert targets(spec_of(model, around(model, loaded(capacity=100)))) == concurrency("3") | GUARD


@pytest.mark.parametrize(("capacity", "target"), [(None, "7"), (9, "7"), (12, "7"), (13, "9100m"), (5, "3500m")])
def test_target_stays_while_measurements_differ_little(capacity: int | None, target: str) -> None:
    model = scaled()
    live = hpa(model, targets=concurrency("7"))
    observed = around(model, loaded(capacity=capacity), live=live)
    assert targets(spec_of(model, observed)) == concurrency(target) | GUARD


@pytest.mark.parametrize(
    ("written", "value"),
    [("200m", "200m"), ("0.25", "250m"), ("2", "2"), ("100u", "1m"), ("3000", "3k"), ("1500", "1500")],
)
def test_plain_latency_is_the_one_metric_where_asked_for(written: str, value: str) -> None:
    model = scaled(metric="Latency", targetLatency=written)
    assert targets(spec_of(model, around(model, loaded(capacity=9)))) == {
        "inference_latency_seconds": {"type": "Value", "value": value}
    }


@pytest.mark.parametrize(
    ("load_s", "asked_s", "window_s"),
    [
        (0, 300, 300),
        (12.3, 300, 300),
        (150, 300, 300),
        (151, 300, 310),
        (12.3, 0, 120),
        (100, 0, 200),
        (3000, 300, 3600),
    ],
)
def test_replicas_go_only_after_twice_the_time_that_a_pod_takes_to_load(
    load_s: float, asked_s: int, window_s: int
) -> None:
    model = scaled(scaleDownStabilizationSeconds=asked_s)
    down = spec_of(model, around(model, loaded(load_s=load_s)))["behavior"]["scaleDown"]
    assert down["stabilizationWindowSeconds"] == window_s


def test_window_stays_while_no_pod_answers() -> None:
    model = scaled()
    live = hpa(model, window_s=900)
    assert spec_of(model, around(model, live=live))["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 900


def test_behavior_of_the_spec_is_handed_on_whole() -> None:
    asked = {"scaleDown": {"policies": [{"type": "Pods", "value": 1, "periodSeconds": 15}]}, "scaleUp": {"x": [1]}}
    assert spec_of(scaled(behavior=asked), Observed())["behavior"] == asked


@pytest.mark.parametrize(
    ("asked", "handed_on"),
    [
        ({}, None),
        ({"scaleUp": None, "scaleDown": {}}, None),
        ({"scaleUp": {"selectPolicy": "Disabled", "policies": None}}, {"scaleUp": {"selectPolicy": "Disabled"}}),
        ({"scaleUp": {"policies": []}}, {"scaleUp": {"policies": []}}),
    ],
)
def test_what_is_nothing_in_a_behavior_is_left_to_the_api_server(asked: Object, handed_on: Object | None) -> None:
    assert spec_of(scaled(behavior=asked), Observed()).get("behavior") == handed_on


# --- who owns the number ---------------------------------------------------------------------------------------------


def test_deployment_under_autoscaling_says_nothing_of_replicas() -> None:
    body = by_place(rendered(scaled()))[DEPLOYMENT, "fraud"]
    assert "replicas" not in body["spec"]


def test_pods_are_not_restarted_by_what_only_the_autoscaler_reads() -> None:
    first, second = scaled(), scaled(maxReplicas=9, metric="Latency", concurrencyPerReplica=4, behavior={"a": 1})
    assert revision(first) == revision(second)
    assert template_hash(first, Observed(), SETTINGS) == template_hash(second, Observed(), SETTINGS)
    assert revision(first) != revision(scaled(targetLatency="300m"))  # the server makes its buckets by it


def test_budget_is_there_for_the_most_replicas() -> None:
    assert (POD_DISRUPTION_BUDGET, "fraud") in by_place(rendered(scaled()))
    assert (POD_DISRUPTION_BUDGET, "fraud") not in by_place(rendered(scaled(maxReplicas=1)))


@pytest.mark.parametrize(("fewest", "first"), [(0, 1), (1, 1), (3, 3)])
def test_it_starts_with_the_fewest_replicas_and_then_has_what_the_autoscaler_set(fewest: int, first: int) -> None:
    model = subject(
        autoscaling=SCALING | {"minReplicas": fewest}, bindings={"kafka": {"backend": "default", "requests": {}}}
    )
    assert autoscaling.replicas(model, Observed()) == first
    body = deployment(model)
    body["spec"]["replicas"] = 5
    assert autoscaling.replicas(model, Observed(children={(DEPLOYMENT, "fraud"): body})) == 5


def test_without_a_provider_there_is_no_autoscaler() -> None:
    assert autoscaling.autoscaler(scaled(), Observed(), Settings()) is None
    assert autoscaling.autoscaler(subject(), Observed(), SETTINGS) is None


# --- an objective that cannot be met ---------------------------------------------------------------------------------

OVER = {"inference_latency_seconds_concurrency": "400m", "inference_latency_seconds_pressure": "1500m"}


def test_guard_is_taken_away_where_one_request_alone_is_too_slow_until_the_spec_changes() -> None:
    model = scaled()
    observed = around(model, loaded(capacity=10), live=hpa(model, targets=concurrency("7"), values=OVER))
    body = autoscaling.autoscaler(model, observed, SETTINGS)
    assert body is not None
    assert body["metadata"]["annotations"] == {GUARD_OFF: spec_hash(model)}
    assert targets(body["spec"]) == concurrency("7")
    applied = hpa(model, targets=concurrency("7"), annotations=body["metadata"]["annotations"])
    assert targets(spec_of(model, around(model, loaded(capacity=10), live=applied))) == concurrency("7")
    changed = scaled(targetLatency="300m")
    assert targets(spec_of(changed, around(changed, loaded(capacity=10), live=applied))) == concurrency("7") | GUARD


@pytest.mark.parametrize(
    "values",
    [
        {},
        OVER | {"inference_latency_seconds_concurrency": "1100m"},
        OVER | {"inference_latency_seconds_concurrency": "0"},
        OVER | {"inference_latency_seconds_pressure": "1"},
    ],
)
def test_guard_stays_while_more_replicas_can_help(values: dict[str, str]) -> None:
    model = scaled()
    live = hpa(model, targets=concurrency("7"), values=values)
    assert not autoscaling.is_guard_off(model, around(model, loaded(capacity=10), live=live))


def test_guard_stays_while_pods_or_their_number_are_new() -> None:
    model = scaled()
    live = hpa(model, targets=concurrency("7"), values=OVER)
    assert not autoscaling.is_guard_off(model, around(model, loaded(capacity=10), live=live, ready_for_s=100))
    live["status"]["lastScaleTime"] = stamp(NOW - timedelta(seconds=100))
    assert not autoscaling.is_guard_off(model, around(model, loaded(capacity=10), live=live))
    live["status"]["lastScaleTime"] = stamp(NOW - timedelta(seconds=200))
    assert autoscaling.is_guard_off(model, around(model, loaded(capacity=10), live=live))


@settings(deadline=None)
@given(st.integers(1, 256), st.integers(1, 256))
def test_target_settles_whatever_is_measured(first: int, second: int) -> None:
    """What a measurement leads to, the same measurement leaves alone."""
    model = scaled()
    for capacity in (first, second):
        before = autoscaling.concurrency_target(model, around(model, loaded(capacity=first)))
        assert before is not None
        live = hpa(model, targets=concurrency(str(before)))
        found = autoscaling.concurrency_target(model, around(model, loaded(capacity=capacity), live=live))
        assert found is not None
        settled = hpa(model, targets=concurrency(str(found)))
        assert autoscaling.concurrency_target(model, around(model, loaded(capacity=capacity), live=settled)) == found
        assert found > Decimal(0)
