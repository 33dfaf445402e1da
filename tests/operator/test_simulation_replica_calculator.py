"""What one metric proposes: the cases of Kubernetes' replica_calculator_test.go (v1.36.3), as data."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix_operator.simulation import replica_calculator as calculator
from phoenix_operator.simulation.replica_calculator import (
    MAX_INT32,
    MAX_INT64,
    Delays,
    MetricsError,
    Pod,
    PodMetric,
    Proposal,
    Tolerances,
    group_pods,
)  # fmt: skip

NOW_S = 1_000_000.0
# of the tests there, not of the controller
DELAYS = Delays(cpu_initialization_s=120, initial_readiness_s=10)
HOT, COOL = NOW_S, 0.0  # a pod that has just started, one that has run for long


@dataclass(frozen=True)
class Case:
    """Pods have two containers each, which ask for and use the same: levels and requests of one are in milli-units."""

    current: int
    wanted: int
    usage: int
    levels: tuple[int, ...] = ()
    target: int = 0
    requests: tuple[int, ...] = ()
    containers: int = 2
    ready: tuple[bool, ...] = ()
    started: tuple[float, ...] = ()
    phases: tuple[str, ...] = ()
    deleting: tuple[bool, ...] = ()
    tolerances: Tolerances = field(default_factory=Tolerances)

    def pods(self) -> list[Pod]:
        def at(values: tuple[Any, ...], index: int, default: Any) -> Any:
            return values[index] if index < len(values) else default

        return [
            Pod(
                f"pod-{index}",
                phase=at(self.phases, index, "Running"),
                is_ready=at(self.ready, index, True),
                is_deleting=at(self.deleting, index, False),
                started_s=at(self.started, index, COOL),
                request_milli=self.containers * self.requests[index] if index < len(self.requests) else None,
            )
            for index in range(max(self.current, len(self.phases)))
        ]

    def metrics(self) -> dict[str, PodMetric]:
        return {
            f"pod-{index}": PodMetric(self.containers * level, COOL, 60.0) for index, level in enumerate(self.levels)
        }


def ones(count: int) -> tuple[int, ...]:
    return (1000,) * count


FIVE = (100, 300, 500, 250, 250)
UNEQUAL = (900, 1000, 1100)
ALMOST_NOTHING_OVER = tuple(300 + more for more in (100, -100, 10, -10, 2, -2, 1, -1, 0, 0))

CPU = {
    "up": Case(3, 5, 50, (300, 500, 700), 30, ones(3)),
    "up, one container": Case(3, 5, 50, (300, 500, 700), 30, ones(3), containers=1),
    "up less for an unready pod": Case(3, 4, 60, (300, 500, 700), 30, ones(3), ready=(False, True, True)),
    "up less for a pod that has just started": Case(3, 4, 60, (300, 500, 700), 30, ones(3), started=(HOT, COOL, COOL)),
    "not up for two unready pods": Case(3, 3, 40, (400, 500, 700), 30, ones(3), ready=(True, False, False)),
    "not up for two pods that have just started": Case(
        3, 3, 40, (400, 500, 700), 30, ones(3), ready=(True, False, False), started=(COOL, HOT, HOT)
    ),
    "up without failed pods": Case(
        2, 4, 60, (500, 700), 30, ones(4), ready=(True, True, False, False),
        phases=("Running", "Running", "Failed", "Failed"),
    ),
    "up without pods that are deleted": Case(
        2, 4, 60, (500, 700), 30, ones(4), ready=(True, True, False, False),
        phases=("Running",) * 4, deleting=(False, False, True, True),
    ),
    "down": Case(5, 3, 28, FIVE, 50, ones(5)),
    "down without unready pods": Case(5, 2, 30, FIVE, 50, ones(5), ready=(True, True, True, False, False)),
    "down without pods that no node has": Case(
        5, 1, 10, (100,), 50, ones(5), ready=(True, False, False, False, False),
        phases=("Running", "Pending", "Pending", "Pending", "Pending"),
    ),
    "down without pods that have just started": Case(5, 2, 30, FIVE, 50, ones(5), started=(COOL, COOL, COOL, HOT, HOT)),
    "down without failed pods": Case(
        5, 3, 28, FIVE, 50, ones(7), ready=(True,) * 5 + (False,) * 2, phases=("Running",) * 5 + ("Failed",) * 2
    ),
    "down without pods that are deleted": Case(
        5, 3, 28, FIVE, 50, ones(7), ready=(True,) * 5 + (False,) * 2, phases=("Running",) * 7,
        deleting=(False,) * 5 + (True,) * 2,
    ),
    "within tolerance": Case(3, 3, 102, (1010, 1030, 1020), 100, UNEQUAL),
    "no tolerance": Case(3, 4, 101, (909, 1010, 1111), 100, UNEQUAL, tolerances=Tolerances(0, 0)),
    "tolerance of 200 % upwards": Case(3, 3, 190, (1890, 1910, 1900), 100, UNEQUAL, tolerances=Tolerances(0.1, 2)),
    "over 8 % upwards": Case(3, 4, 109, (1100, 1080, 1090), 100, UNEQUAL, tolerances=Tolerances(2, 0.08)),
    "tolerance of 36 % downwards": Case(3, 3, 65, (660, 640, 650), 100, UNEQUAL, tolerances=Tolerances(0.36, 0.1)),
    "over 34 % downwards": Case(3, 2, 65, (660, 640, 650), 100, UNEQUAL, tolerances=Tolerances(0.34, 0.1)),
    "metrics of pods that are not there": Case(4, 24, 587, (4000, 9500, 3000, 7000, 3200, 2000), 100, ones(4)),
    "missing metrics, down": Case(4, 3, 24, (400, 95), 100, ones(4)),
    "missing metrics, on target": Case(2, 2, 100, (1000,), 100, ones(2)),
    "missing metrics, a little over": Case(2, 2, 190, (1900,), 100, ones(2)),
    "missing metrics, under": Case(2, 2, 60, (600,), 100, ones(2)),
    "missing and unready, no change": Case(3, 3, 45, (100, 450), 50, ones(3), ready=(False, True, True)),
    "missing and just started, no change": Case(3, 3, 45, (100, 450), 50, ones(3), started=(HOT, COOL, COOL)),
    "missing and unready, up": Case(3, 4, 200, (100, 2000), 50, ones(3), ready=(False, True, True)),
    "missing and just started, up": Case(
        3, 4, 200, (100, 2000), 50, ones(3), ready=(False, True, True), started=(HOT, COOL, COOL)
    ),
    "missing and unready, down": Case(4, 3, 10, (100, 100, 100), 50, ones(4), ready=(False, True, True, True)),
    "missing, down, target over 100 %": Case(
        4, 2, 6, (200, 100, 100), 300, (1000, 1000, 2000, 2000), ready=(False, True, True, True)
    ),
    "rolling update with a pod too many": Case(2, 2, 10, (100, 100), 50, ones(3), phases=("Running",) * 3),
    "missing pods would turn it upwards": Case(3, 3, 30, (300,), 50, ones(3)),
    "fewer pods than replicas would turn it downwards": Case(
        4, 4, 120, (1200,), 50, ones(4), phases=("Running", "Pending", "Running", "Running"),
        deleting=(False, False, True, True),
    ),
    "just over the tolerance, down": Case(10, 9, 50, (150,) * 10, 56, ALMOST_NOTHING_OVER),
    "just within the tolerance": Case(10, 10, 50, (150,) * 10, 55, ALMOST_NOTHING_OVER),
}  # fmt: skip


@pytest.mark.parametrize("case", CPU.values(), ids=CPU)
def test_cpu(case: Case) -> None:
    proposal = calculator.cpu_utilization(
        case.current, case.metrics(), case.target, case.pods(), case.tolerances, now_s=NOW_S, delays=DELAYS
    )
    assert proposal == Proposal(case.wanted, case.usage)


CPU_FAILURES = {
    "no metrics returned from resource metrics API": (Case(4, 0, 0, (), 100, ones(3)), {}),
    "missing request for the resource in Pod pod-0": (Case(1, 0, 0, (200,), 100), {}),
    "no metrics returned matched known pods": (Case(1, 0, 0, (), 100, ones(1)), {"older-pod": PodMetric(100)}),
    "did not receive metrics for targeted pods (pods might be unready)": (
        Case(2, 0, 0, (100, 100), 50, ones(2), ready=(False, False)),
        {},
    ),
    "no pods returned by selector while calculating replica count": (Case(0, 0, 0, (100,), 50), {}),
}


@pytest.mark.parametrize("told", CPU_FAILURES)
def test_cpu_that_says_nothing(told: str) -> None:
    case, others = CPU_FAILURES[told]
    with pytest.raises(MetricsError) as error:
        calculator.cpu_utilization(
            case.current, case.metrics() | others, case.target, case.pods(), Tolerances(), now_s=NOW_S, delays=DELAYS
        )
    assert str(error.value) == told


PODS = {
    "up": Case(3, 4, 20000, (20000, 10000, 30000), 15000),
    "up: readiness and age do not matter": Case(
        3, 6, 30000, (50000, 10000, 30000), 15000, ready=(True, True, False), started=(COOL, COOL, HOT)
    ),
    "up: nor where it would turn for CPU": Case(
        3, 7, 31666, (50000, 15000, 30000), 15000, ready=(False, True, False), started=(HOT, COOL, HOT)
    ),
    "one pod": Case(1, 2, 8600, (8600,), 4400),
    "down": Case(5, 3, 12000, (12000,) * 5, 20000),
    "within tolerance": Case(3, 3, 20666, (20000, 21000, 21000), 20000),
    "over 1 % upwards": Case(3, 4, 20666, (20000, 21000, 21000), 20000, tolerances=Tolerances(0.1, 0.01)),
    "missing, on target": Case(5, 5, 20000, (20000, 19000, 21000), 20000),
    "rolling update with a pod too many": Case(2, 2, 10000, (10000, 10000), 17000, phases=("Running",) * 3),
}


@pytest.mark.parametrize("case", PODS.values(), ids=PODS)
def test_metric_of_pods(case: Case) -> None:
    metrics = {f"pod-{index}": PodMetric(level) for index, level in enumerate(case.levels)}
    proposal = calculator.pods_average(case.current, metrics, case.target, case.pods(), case.tolerances)
    assert proposal == Proposal(case.wanted, case.usage)


ONE_PERCENT = Tolerances(0.1, 0.01)
VALUES = {
    # current, value, target, ready pods, tolerances, wanted
    "up": (3, 20000, 15000, 3, Tolerances(), 4),
    "up: only ready pods are multiplied": (3, 50000, 10000, 1, Tolerances(), 5),
    "down": (5, 12000, 20000, 5, Tolerances(), 3),
    "within tolerance": (3, 20666, 20000, 3, Tolerances(), 3),
    "over 1 % upwards": (3, 20666, 20000, 3, ONE_PERCENT, 4),
    "external, only ready pods": (3, 8600, 4400, 1, Tolerances(), 2),
    "external, down": (5, 8600, 14334, 5, Tolerances(), 3),
    "external, within tolerance": (3, 8600, 8888, 3, Tolerances(), 3),
    "external, over 1 % upwards": (3, 8900, 8800, 3, ONE_PERCENT, 4),
    "more than an int32": (3, MAX_INT64, 1, 3, Tolerances(), MAX_INT32),
    "from zero: the ratio alone": (0, 20000, 15000, 0, Tolerances(), 2),
    "from zero: no tolerance": (0, 1000, 1000, 0, Tolerances(), 1),
    "from zero: stays": (0, 0, 1000, 0, Tolerances(), 0),
}


@pytest.mark.parametrize("row", VALUES.values(), ids=VALUES)
def test_value_of_an_object(row: tuple[int, int, int, int, Tolerances, int]) -> None:
    current, value, target, ready, tolerances, wanted = row
    pods = [Pod(f"pod-{index}", is_ready=index < ready) for index in range(current)]
    assert calculator.object_value(current, value, target, pods, tolerances) == Proposal(wanted, value)


def test_only_running_pods_are_multiplied() -> None:
    pods = [Pod("a"), Pod("b"), Pod("c", phase="Succeeded"), Pod("d", phase="Pending"), Pod("e", is_ready=None)]
    assert calculator.object_value(5, 3000, 1000, pods, Tolerances()).replicas == 6


@pytest.mark.parametrize(("value", "wanted"), [(8_999, 9), (9_000, 10), (11_000, 10), (11_001, 12)])
def test_the_ends_of_the_tolerance_belong_to_it(value: int, wanted: int) -> None:
    assert calculator.object_average(10, value, 1000, Tolerances()).replicas == wanted
    pods = [Pod(f"pod-{index}") for index in range(10)]
    assert calculator.object_value(10, value, 10_000, pods, Tolerances()).replicas == wanted


AVERAGES = {
    # replicas of the status, value, target, tolerances, wanted, usage per replica
    "up": (3, 20000, 5000, Tolerances(), 4, 6667),
    "down": (5, 6000, 2000, Tolerances(), 3, 1200),
    "within tolerance": (4, 20166, 5000, Tolerances(), 4, 5042),
    "over 1 % upwards": (4, 20208, 5000, ONE_PERCENT, 5, 5052),
    "external, up": (3, 8600, 2150, Tolerances(), 4, 2867),
    "external, down": (5, 8600, 2867, Tolerances(), 3, 1720),
    "external, within tolerance": (3, 8600, 2900, Tolerances(), 3, 2867),
    "external, over 1 % upwards": (3, 8600, 2800, ONE_PERCENT, 4, 2867),
    "more than an int32": (1, MAX_INT64, 1, Tolerances(), MAX_INT32, MAX_INT64),
    "as much as an int64 on target": (1, MAX_INT64, MAX_INT64, Tolerances(), 1, MAX_INT64),
    "no replicas": (0, 7000, 2000, Tolerances(), 4, 7000),
}


@pytest.mark.parametrize("row", AVERAGES.values(), ids=AVERAGES)
def test_average_value_of_an_object(row: tuple[int, int, int, Tolerances, int, int]) -> None:
    replicas, value, target, tolerances, wanted, usage = row
    assert calculator.object_average(replicas, value, target, tolerances) == Proposal(wanted, usage)


def test_absent_metrics_propose_nothing() -> None:
    for propose in (
        lambda: calculator.object_value(3, None, 1000, [Pod("a")], Tolerances()),
        lambda: calculator.object_average(3, None, 1000, Tolerances()),
        lambda: calculator.pods_average(3, {}, 1000, [Pod("a")], Tolerances()),
    ):
        with pytest.raises(MetricsError, match="metrics API"):
            propose()


def test_series_are_added_up_to_the_largest_int64() -> None:
    assert calculator.sum_of_series([MAX_INT64 // 2 + 1] * 2) == MAX_INT64
    assert calculator.sum_of_series([3, 4]) == 7


MINUTE = 60.0
GROUPS = {
    "void": ([], {}, True, (0, set(), set(), set())),
    "memory: readiness does not matter": (
        [Pod("a", is_ready=None)], {"a": PodMetric(1)}, False, (1, set(), set(), set()),
    ),
    "cpu: no condition Ready": ([Pod("a", is_ready=None)], {"a": PodMetric(1)}, True, (0, {"a"}, set(), set())),
    "cpu: not started": ([Pod("a", started_s=None)], {"a": PodMetric(1)}, True, (0, {"a"}, set(), set())),
    "cpu: new, with a metric of its time as ready": (
        [Pod("a", started_s=NOW_S - MINUTE, ready_changed_s=NOW_S - 30)],
        {"a": PodMetric(1, NOW_S, 30.0)}, True, (1, set(), set(), set()),
    ),
    "cpu: new, with a metric from before it was ready": (
        [Pod("a", started_s=NOW_S - MINUTE, ready_changed_s=NOW_S - 30)],
        {"a": PodMetric(1, NOW_S, 60.0)}, True, (0, {"a"}, set(), set()),
    ),
    "cpu: never ready": (
        [Pod("a", is_ready=False, started_s=NOW_S - 10 * MINUTE, ready_changed_s=NOW_S - 10 * MINUTE + 6)],
        {"a": PodMetric(1)}, True, (0, {"a"}, set(), set()),
    ),
    "cpu: ready for long, with an old metric": (
        [Pod("a", started_s=NOW_S - 3 * MINUTE, ready_changed_s=NOW_S - 3 * MINUTE)],
        {"a": PodMetric(1, NOW_S - 2 * MINUTE, 60.0)}, True, (1, set(), set(), set()),
    ),
    "cpu: unready again after it was ready": (
        [Pod("a", is_ready=False, started_s=NOW_S - 10 * MINUTE, ready_changed_s=NOW_S - 9 * MINUTE)],
        {"a": PodMetric(1)}, True, (1, set(), set(), set()),
    ),
    "missing": ([Pod("a")], {}, True, (0, set(), {"a"}, set())),
    "several": (
        [Pod("a", is_ready=None, started_s=NOW_S), Pod("b", started_s=NOW_S - 3 * MINUTE), Pod("c")],
        {"a": PodMetric(1), "b": PodMetric(1)}, True, (1, {"a"}, {"c"}, set()),
    ),
    "pending": ([Pod("a", phase="Pending")], {}, True, (0, {"a"}, set(), set())),
    "deleted, even when pending": (
        [Pod("a", phase="Pending", is_deleting=True)], {"a": PodMetric(1)}, True, (0, set(), set(), {"a"}),
    ),
    "failed": ([Pod("a", phase="Failed")], {"a": PodMetric(1)}, True, (0, set(), set(), {"a"})),
}  # fmt: skip


@pytest.mark.parametrize("row", GROUPS.values(), ids=GROUPS)
def test_groups_of_pods(
    row: tuple[list[Pod], dict[str, PodMetric], bool, tuple[int, set[str], set[str], set[str]]],
) -> None:
    pods, metrics, is_cpu, expected = row
    found = group_pods(pods, metrics, is_cpu=is_cpu, now_s=NOW_S, delays=DELAYS)
    assert (found.ready, found.unready, found.missing, found.ignored) == expected


@given(
    current=st.integers(1, 50),
    levels=st.lists(st.integers(0, 10_000), min_size=1, max_size=50),
    target=st.integers(1, 10_000),
    ready=st.lists(st.booleans(), min_size=50, max_size=50),
)
def test_missing_and_unready_pods_never_turn_a_proposal(
    current: int, levels: list[int], target: int, ready: list[bool]
) -> None:
    """Usage over the target never takes replicas away where pods are missing, and under it adds none."""
    pods = [Pod(f"pod-{index}", is_ready=ready[index]) for index in range(current)]
    metrics = {f"pod-{index}": PodMetric(level) for index, level in enumerate(levels[: current - 1])}
    if not metrics:
        return
    proposal = calculator.pods_average(current, metrics, target, pods, Tolerances())
    if proposal.usage > target:
        assert proposal.replicas >= current
    if proposal.usage < target:
        assert proposal.replicas <= current
