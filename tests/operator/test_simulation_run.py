"""Whole runs: what our autoscaling promises under any load, and what it does beside the two others."""

import json
import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phoenix_api import PhoenixModel, parse_manifests
from phoenix_operator.simulation.policies import POLICIES
from phoenix_operator.simulation.run import Run, Scenario, simulate, table_of
from phoenix_operator.simulation.serving import STEP_S, Replica
from phoenix_operator.simulation.trace import Trace
from phoenix_operator.simulation.waiting import Service

HOUR_S = 3600.0
WINDOW_S = 300


def model_of(slo_ms: int, least: int = 1, most: int = 40, **more: Any) -> PhoenixModel:
    autoscaling = {"minReplicas": least, "maxReplicas": most, "targetLatency": f"{slo_ms}m"} | more
    document = {
        "apiVersion": "phoenix-ml.io/v1alpha1",
        "kind": "PhoenixModel",
        "metadata": {"name": "fraud", "namespace": "ml"},
        "spec": {"model": {"uri": "fraud/model.onnx"}, "autoscaling": autoscaling},
    }
    return parse_manifests(json.dumps(document), file="model.json")[0].model


def run(
    policy: str,
    trace: Trace,
    service: Service,
    slo_ms: int,
    *,
    load_s: float = 30.0,
    seed: int | None = 1,
    replicas: int = 1,
    blind: tuple[tuple[float, float], ...] = (),
    **asked: Any,
) -> Run:
    model = model_of(slo_ms, **asked)
    scenario = Scenario(Replica(service, load_s), slo_ms / 1000, replicas=replicas, seed=seed, blind=blind)
    autoscaling = model.spec.autoscaling
    assert autoscaling is not None
    hpa = POLICIES[policy](model, autoscaling, service.concurrency, load_s)
    return simulate(policy, hpa, trace, scenario, table_of(scenario))


def constant(per_second: float, seconds: float) -> Trace:
    return Trace((0.0, seconds), (per_second, per_second))


def counts(of: Run, since_s: float = 0.0) -> list[int]:
    return [step.replicas for step in of.steps if step.at_s > since_s]


def turns(replicas: list[int]) -> int:
    moves = [after - before for before, after in pairwise(replicas) if after != before]
    return sum((one > 0) != (other > 0) for one, other in pairwise(moves))


services = st.builds(
    lambda concurrency, alone_ms, variation: Service(concurrency, alone_ms / 1000, alone_ms / 1000, variation),
    st.sampled_from([1, 2, 4, 8, 16]),
    st.sampled_from([10, 50, 200]),
    st.sampled_from([0.0, 0.25, 1.0]),
)
loads_s = st.sampled_from([10.0, 45.0, 120.0])
PROPERTY = settings(max_examples=15, deadline=None)


@given(
    st.sampled_from([8, 16]),
    st.sampled_from([10, 50, 200]),
    st.sampled_from([0.0, 0.25]),
    loads_s,
    st.sampled_from([1.5, 2, 3, 4, 8]),
    st.floats(0.1, 8),
)
@PROPERTY
def test_constant_load_never_flaps(
    concurrency: int, alone_ms: int, variation: float, load_s: float, stretch: float, share: float
) -> None:
    """Requests that come evenly: after it has settled the number of replicas does not turn, whatever the objective."""
    service = Service(concurrency, alone_ms / 1000, alone_ms / 1000, variation)
    of = run("slo", constant(share * service.most_per_second, 2 * HOUR_S), service, round(stretch * alone_ms),
             load_s=load_s, seed=None)  # fmt: skip
    assert turns(counts(of, HOUR_S)) == 0


def test_few_places_may_go_to_and_fro_at_some_loads_unless_up_is_tolerant() -> None:
    """Waiting counts as concurrency: with one replica fewer there is so much more of it that one has to come back."""
    service = Service(2, 0.01, 0.01, 1.0)
    trace = constant(1.125 * service.most_per_second, 2 * HOUR_S)
    down = {"stabilizationWindowSeconds": WINDOW_S, "policies": [{"type": "Percent", "value": 25, "periodSeconds": 60}]}
    tolerant = {"scaleUp": {"tolerance": "300m"}, "scaleDown": down}
    assert 10 < turns(counts(run("slo", trace, service, 80, seed=None), HOUR_S)) <= 2 * HOUR_S / WINDOW_S
    assert turns(counts(run("slo", trace, service, 80, seed=None, behavior=tolerant), HOUR_S)) == 0


@given(services, loads_s, st.sampled_from([4, 8]), st.floats(0.5, 8), st.integers(0, 1000))
@PROPERTY
def test_random_arrivals_never_take_replicas_that_the_load_needs(
    service: Service, load_s: float, stretch: float, share: float, seed: int
) -> None:
    """Chance may add replicas and take them away again after the window, but not those that the load fills."""
    slo_ms = round(stretch * service.alone_s * 1000)
    of = run("slo", constant(share * service.most_per_second, 2 * HOUR_S), service, slo_ms, load_s=load_s, seed=seed)
    settled = counts(of, HOUR_S)
    assert min(settled) > share  # one more than what would be full
    assert turns(settled) <= 2 * HOUR_S / WINDOW_S + 1


traces = st.lists(st.tuples(st.integers(1, 80), st.floats(0, 12)), min_size=2, max_size=12).map(
    lambda rows: ([0.0, *(15.0 * sum(length for length, _ in rows[: end + 1]) for end in range(len(rows)))], rows)
)


def trace_of(shape: tuple[list[float], list[tuple[int, float]]], service: Service) -> Trace:
    seconds, rows = shape
    rates = [share * service.most_per_second for _, share in rows]
    return Trace(tuple(seconds), (*rates, rates[-1]))


@given(
    services,
    traces,
    st.sampled_from(list(POLICIES)),
    st.integers(0, 1000),
    st.tuples(st.integers(1, 5), st.integers(5, 20)),
)
@PROPERTY
def test_replicas_stay_between_minimum_and_maximum(
    service: Service,
    shape: tuple[list[float], list[tuple[int, float]]],
    policy: str,
    seed: int,
    bounds: tuple[int, int],
) -> None:
    least, most = bounds
    of = run(policy, trace_of(shape, service), service, 200, seed=seed, replicas=least, least=least, most=most)
    assert least <= min(counts(of)) <= max(counts(of)) <= most


@given(services, traces, loads_s, st.sampled_from([1.5, 2, 4]), st.integers(0, 1000))
@PROPERTY
def test_replicas_never_go_while_the_percentile_is_over_the_objective(
    service: Service, shape: tuple[list[float], list[tuple[int, float]]], load_s: float, stretch: float, seed: int
) -> None:
    slo_ms = round(stretch * service.alone_s * 1000)
    of = run("slo", trace_of(shape, service), service, slo_ms, load_s=load_s, seed=seed)
    for step in of.steps:
        if step.signals.ratio is not None and step.signals.ratio > 1:
            assert step.decision.replicas >= step.replicas, step


def test_the_objective_is_over_for_long_enough_to_tell() -> None:
    """The property above would hold for an empty reason if no load ever went over the objective."""
    service = Service(4, 0.05, 0.05, 0.25)
    of = run("slo", Trace((0, 600, 1200, 3600), (40, 400, 20, 20)), service, 200)
    over = [step for step in of.steps if step.signals.ratio is not None and step.signals.ratio > 1]
    falls = [step for step in of.steps if step.decision.replicas < step.replicas]
    assert len(over) > 10
    assert falls


@given(services, traces, st.sampled_from(list(POLICIES)), st.integers(0, 1000))
@PROPERTY
def test_replicas_are_frozen_while_no_metric_is_there(
    service: Service, shape: tuple[list[float], list[tuple[int, float]]], policy: str, seed: int
) -> None:
    trace = trace_of(shape, service)
    blind = (trace.ends_s / 3, 2 * trace.ends_s / 3)
    of = run(policy, trace, service, 200, seed=seed, blind=(blind,))
    unseen = [step for step in of.steps if blind[0] <= step.at_s < blind[1]]
    assert len({step.decision.replicas for step in unseen}) <= 1
    for step in unseen:
        assert not step.decision.conditions["ScalingActive"].is_true
        assert step.signals.concurrency is None


def test_an_objective_near_the_service_time_keeps_every_replica_that_came() -> None:
    """At a p95 over 0.7 of the objective pressure holds, with however many replicas: choose a wider objective."""
    service = Service(4, 0.05, 0.05, 0.25)  # p95 alone: 99 ms
    spike = Trace((0, 600, 1200, 7200), (40, 400, 40, 40))
    near, wide = (run("slo", spike, service, slo_ms) for slo_ms in (110, 200))
    assert counts(near)[-1] == max(counts(near)) > 8
    assert counts(wide)[-1] <= 2 < max(counts(wide))


def test_scaling_goes_on_when_metrics_are_back() -> None:
    service = Service(4, 0.05, 0.05, 0.25)
    of = run("slo", Trace((0, 600, 3600), (40, 300, 300)), service, 200, seed=None, blind=((450, 1200),))
    by_time = {step.at_s: step for step in of.steps}
    assert by_time[1185].replicas == by_time[450].replicas == 1
    assert by_time[1185].decision.conditions["ScalingActive"].reason == "FailedGetObjectMetric"
    assert by_time[1500].replicas >= 300 / 80 / 0.7
    assert by_time[3600].latency_s < 0.2


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_gives_the_same_run(policy: str) -> None:
    service, trace = Service(4, 0.05, 0.05, 0.25), Trace((0, 900, 1800, 3600), (20, 150, 30, 30))
    one, other = (run(policy, trace, service, 200, seed=7) for _ in range(2))
    assert [repr(step) for step in one.steps] == [repr(step) for step in other.steps]
    assert [step.answered for step in run(policy, trace, service, 200, seed=8).steps] != [
        step.answered for step in one.steps
    ]


def test_every_request_is_answered_or_failed() -> None:
    service, trace = Service(4, 0.05, 0.05, 0.25), Trace((0, 900, 1800, 7200), (20, 150, 30, 30))
    for policy in POLICIES:
        of = run(policy, trace, service, 200)
        asked = 20 * 900 + 150 * 900 + 30 * 5400
        got = sum(of.answered.buckets) + of.answered.refused + of.answered.timed_out
        assert got == pytest.approx(asked, rel=0.01)
        assert sum(step.answered for step in of.steps) == pytest.approx(sum(of.answered.buckets))


def test_a_step_of_load_ends_within_the_objective() -> None:
    service = Service(4, 0.05, 0.05, 0.25)
    of = run("slo", Trace((0, 1800, 5400, 9000), (20, 300, 20, 20)), service, 200, load_s=45)
    by_time = {step.at_s: step for step in of.steps}
    assert by_time[1800].replicas == 1
    assert by_time[2700].replicas >= 300 / 80 / 0.7
    assert by_time[2700].latency_s < 0.2
    assert by_time[9000].replicas == 1
    risen = next(step.at_s for step in of.steps if step.decision.replicas > 1)
    assert risen <= 1800 + 4 * STEP_S


def test_slow_pods_make_the_plain_percentile_overshoot_and_ours_not() -> None:
    """The percentile multiplies what is ready: while pods load it asks for ever more of them."""
    service, trace = Service(1, 0.2, 0.2, 0.25), Trace((0, 1800, 7200), (2, 12, 12))
    ours, plain = (run(policy, trace, service, 800, load_s=60) for policy in ("slo", "latency"))
    assert max(counts(plain)) > max(counts(ours))
    assert plain.share_over > ours.share_over


def test_the_numbers_of_a_run_are_those_of_its_steps() -> None:
    service = Service(4, 0.05, 0.05, 0.0)
    of = run("slo", constant(40, HOUR_S), service, 200, seed=None)
    assert of.replica_hours == pytest.approx(1.0)
    assert of.turns_per_hour == 0
    assert of.share_failed == 0
    assert 0.05 <= of.latency_s <= 0.075
    assert of.share_over == pytest.approx(0, abs=1e-6)
    assert math.isnan(run("slo", constant(0, 600), service, 200).latency_s)
