"""The formulas of the queue against an exact simulation, and the counters of a replica under a load that changes."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from queue_events import answers, percentile

from phoenix_operator.simulation.serving import STEP_S, SUB_STEPS, Fleet, Replica, latency_bounds_s
from phoenix_operator.simulation.signals import histogram_quantile
from phoenix_operator.simulation.waiting import Service, Steady, Table
from phoenix_server import metrics

BOUNDS = latency_bounds_s(0.2)


def service(concurrency: int, alone_ms: float, loaded_ms: float, variation: float) -> Service:
    return Service(concurrency, alone_ms / 1000, loaded_ms / 1000, variation)


def test_buckets_are_those_of_the_server() -> None:
    for slo_s in (0.001, 0.2, 1.0, 30.0):
        assert latency_bounds_s(slo_s) == metrics.latency_bounds_s(slo_s)


REPLICAS = [
    service(1, 50, 50, 0),
    service(1, 50, 50, 1),
    service(4, 50, 50, 0.25),
    service(16, 20, 20, 0),
    service(16, 20, 20, 1),
    service(8, 20, 80, 0.25),  # batching: eight at once take four times as long
]


@pytest.mark.parametrize("utilization", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("replica", REPLICAS, ids=lambda row: f"{row.concurrency}x{row.loaded_s}-{row.variation}")
def test_steady_times_are_within_a_fifth_of_the_exact_ones(replica: Service, utilization: float) -> None:
    rate = utilization * replica.most_per_second
    took = [row.took_s for row in answers(replica, lambda _: rate, 60_000 / rate, seed=11)][5_000:]
    steady = Steady(replica, utilization, BOUNDS)
    for share in (0.5, 0.95):
        assert steady.quantile(share) == pytest.approx(percentile(took, share), rel=0.2)
    assert steady.mean_s == pytest.approx(sum(took) / len(took), rel=0.15)


@given(
    concurrency=st.integers(1, 64),
    alone_ms=st.floats(0.2, 2_000),
    stretch=st.floats(0, 1),
    variation=st.floats(0, 4),
    utilization=st.floats(0.01, 0.95),
)
@settings(max_examples=60, deadline=None)
def test_every_replica_has_a_distribution_of_times(
    concurrency: int, alone_ms: float, stretch: float, variation: float, utilization: float
) -> None:
    replica = service(concurrency, alone_ms, alone_ms * (1 + stretch * (concurrency - 1)), variation)
    steady = Steady(replica, utilization, BOUNDS)
    assert sum(steady.shares) == pytest.approx(1)
    assert min(steady.shares) > -1e-9
    assert steady.quantile(0.5) <= steady.quantile(0.95) <= steady.quantile(0.99)
    assert steady.in_system >= utilization * 0.999  # at least the busy part of one place
    points, cumulative = steady.points
    assert points == sorted(points)
    assert cumulative == sorted(cumulative)
    assert sum(weight for _, weight in steady.weights) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"concurrency": 0}, "concurrency: expected 1 to 10000, got 0"),
        ({"concurrency": 10_001}, "concurrency: expected 1 to 10000, got 10001"),
        ({"alone_s": 0.0}, "service time: expected more than 0 s, got 0.0 s and 0.1 s"),
        ({"alone_s": 0.2}, "loaded service time: expected 0.2 s to 0.8 s, the time alone to 4 times it, got 0.1 s"),
        ({"loaded_s": 0.9}, "loaded service time: expected 0.1 s to 0.4 s, the time alone to 4 times it, got 0.9 s"),
        ({"variation": 5.0}, "variation: expected 0 to 4, got 5.0"),
    ],
)
def test_a_replica_that_cannot_be_is_refused(changed: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match="expected") as error:
        Service(**{"concurrency": 4, "alone_s": 0.1, "loaded_s": 0.1} | changed)  # type: ignore[arg-type]
    assert str(error.value) == told


def fleet(replica: Replica, *, seed: int | None = 3) -> Fleet:
    table = Table(replica.service, BOUNDS, step_s=STEP_S / SUB_STEPS)
    made = Fleet(replica, table, BOUNDS, None if seed is None else Random(seed))
    made.resize(1, 0.0, is_loaded=True)
    return made


@pytest.mark.parametrize("replica", [service(4, 50, 50, 0.25), service(1, 50, 50, 0), service(8, 20, 80, 0.25)])
def test_a_load_test_of_one_replica_gives_the_exact_percentile(replica: Service) -> None:
    rate = 0.7 * replica.most_per_second
    one = fleet(Replica(replica))
    for step in range(40):
        one.advance(step * STEP_S, [rate] * SUB_STEPS)
    took = [row.took_s for row in answers(replica, lambda _: rate, 40 * STEP_S, seed=5)]
    counted = histogram_quantile(0.95, BOUNDS, one.counters.buckets)
    assert counted == pytest.approx(percentile(took, 0.95), rel=0.2)
    assert sum(one.counters.buckets) == pytest.approx(len(took), rel=0.05)


def test_an_overload_builds_a_queue_and_drains_it_as_the_exact_one() -> None:
    replica = service(4, 50, 50, 0.25)  # 80 requests/s at most

    def rate_at(seconds: float) -> float:
        return 40.0 if seconds < 120 or seconds >= 180 else 120.0

    one = fleet(Replica(replica, queue_rows=100_000))
    steps = [(one.advance(step * STEP_S, [rate_at(step * STEP_S)] * SUB_STEPS), one.latest)[1] for step in range(24)]
    exact = [answers(replica, rate_at, 24 * STEP_S, seed) for seed in range(20)]
    for step in range(9, 15):  # overload from step 8, a minute; then 2,400 requests drain in a minute
        of_step = [[row.took_s for row in run if row.at_s // STEP_S == step] for run in exact]
        mean_s = sum(map(sum, of_step)) / sum(map(len, of_step))
        mine = steps[step]
        assert mine.total_s / sum(mine.buckets) == pytest.approx(mean_s, rel=0.2), step
        assert sum(mine.buckets) == pytest.approx(sum(map(len, of_step)) / len(exact), rel=0.1), step
    assert steps[-1].total_s / sum(steps[-1].buckets) < 0.1  # and it is over as it began


def test_what_does_not_fit_into_the_queue_is_refused_and_the_rest_answered() -> None:
    one = fleet(Replica(service(4, 50, 50, 0), queue_rows=96, timeout_s=30))
    for step in range(20):
        one.advance(step * STEP_S, [160.0] * SUB_STEPS)  # twice the most
    answered, refused = sum(one.counters.buckets), one.counters.refused
    assert answered == pytest.approx(80 * 300, rel=0.02)
    assert answered + refused + one.inflight == pytest.approx(160 * 300, rel=0.02)
    assert histogram_quantile(0.95, BOUNDS, one.latest.buckets) == pytest.approx(1.25, rel=0.35)  # a hundred at 80/s


def test_what_waits_longer_than_the_limit_times_out() -> None:
    one = fleet(Replica(service(4, 50, 50, 0), queue_rows=100_000, timeout_s=5))
    for step in range(20):
        one.advance(step * STEP_S, [160.0] * SUB_STEPS)
    assert one.counters.timed_out == pytest.approx(80 * 300 - 5 * 80, rel=0.05)
    assert one.counters.refused == 0
    assert one.counters.total_s > 5 * one.counters.timed_out


def test_pods_serve_after_their_load_time_and_take_their_share() -> None:
    one = fleet(Replica(service(4, 50, 50, 0), load_s=20), seed=None)
    one.resize(3, 0.0)
    one.advance(0.0, [90.0] * SUB_STEPS)
    assert (len(one.pods), one.ready) == (3, 1)
    one.advance(15.0, [90.0] * SUB_STEPS)
    assert one.ready == 3
    assert [pod.ready_changed_s for pod in one.pods] == [0.0, 20.0, 20.0]
    for step in range(2, 30):
        one.advance(step * STEP_S, [90.0] * SUB_STEPS)
    assert one.inflight == pytest.approx(90 * 0.05, rel=0.05)
    used = [metric.milli for metric in one.cpu(450.0).values()]
    assert used == pytest.approx([375] * 3, rel=0.05)  # 30 of 80 requests/s each


def test_pods_that_do_not_serve_yet_go_first_then_the_youngest() -> None:
    one = fleet(Replica(service(4, 50, 50, 0), load_s=20), seed=None)
    one.resize(2, 0.0, is_loaded=True)
    one.resize(4, 0.0)
    one.resize(3, 0.0)
    assert [(pod.name, pod.is_ready) for pod in one.pods] == [("pod-1", True), ("pod-2", True), ("pod-3", False)]
    one.resize(1, 0.0)
    assert ([pod.name for pod in one.pods], one.ready) == (["pod-1"], 1)


def test_requests_without_a_ready_pod_fail() -> None:
    one = fleet(Replica(service(4, 50, 50, 0)), seed=None)
    one.resize(0, 0.0)
    one.advance(0.0, [10.0] * SUB_STEPS)
    assert (one.latest.refused, sum(one.latest.buckets)) == (150.0, 0.0)
