"""What one metric of an HPA proposes: a port of Kubernetes' `replica_calculator.go` (v1.36.3).

Hides which pods count, what stands in for a value that is missing, and the rounding. Amounts are whole milli-units, as
the controller handles them; sums, quotients and floats are built in its order, so that they round alike.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1


class MetricsError(Exception):
    """A metric proposes nothing: it is absent, or no pod that counts has it."""


@dataclass(frozen=True, slots=True)
class Tolerances:
    """How far usage may be from its target, as a share of it, before anything is done."""

    down: float = 0.1
    up: float = 0.1

    def hold(self, ratio: float) -> bool:
        """Whether the ratio of usage to target is close enough to 1."""
        return (1.0 - self.down) <= ratio <= (1.0 + self.up)


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod of the target, as far as the controller looks at it. Times are in seconds."""

    name: str
    phase: str = "Running"
    is_ready: bool | None = True  # None: it has no condition Ready
    is_deleting: bool = False
    started_s: float | None = 0.0
    ready_changed_s: float = 0.0  # lastTransitionTime of the condition Ready
    request_milli: int | None = None  # of the resource that is scaled on, over all containers


@dataclass(frozen=True, slots=True)
class PodMetric:
    """A pod's value in milli-units, when it was taken and over how long."""

    milli: int
    taken_s: float = 0.0
    window_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Delays:
    """How long the CPU of a new pod says nothing: flags of kube-controller-manager, in seconds."""

    cpu_initialization_s: float = 300.0
    initial_readiness_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Proposal:
    """Replicas that a metric asks for, and the usage that the status shows: milli-units, or percent of the request."""

    replicas: int
    usage: int


@dataclass(frozen=True, slots=True)
class Groups:
    """Pods by how they count for a metric."""

    ready: int
    unready: frozenset[str]
    missing: frozenset[str]
    ignored: frozenset[str]


def object_value(
    current: int, milli: int | None, target_milli: int, pods: Sequence[Pod], tolerances: Tolerances
) -> Proposal:
    """Propose for an Object or External metric with a `Value` target: it multiplies the pods that are ready."""
    usage = _present(milli)
    ratio = float(usage) / float(target_milli)
    if current == 0:
        return Proposal(_int32(math.ceil(ratio)), usage)
    if tolerances.hold(ratio):
        return Proposal(current, usage)
    _some(pods)
    ready = sum(pod.phase == "Running" and pod.is_ready is True for pod in pods)
    return Proposal(_int32(math.ceil(ratio * float(ready))), usage)


def object_average(status_replicas: int, milli: int | None, target_milli: int, tolerances: Tolerances) -> Proposal:
    """Propose for an Object or External metric with an `AverageValue` target: it does not look at pods.

    Without replicas the controller divides by zero, which is outside of every tolerance; the usage that it then
    shows has no meaning, here it is the whole value.
    """
    usage = _present(milli)
    wanted = float(usage) / float(target_milli)
    if status_replicas == 0:
        return Proposal(_int32(math.ceil(wanted)), usage)
    ratio = float(usage) / (float(target_milli) * float(status_replicas))
    replicas = status_replicas if tolerances.hold(ratio) else _int32(math.ceil(wanted))
    return Proposal(replicas, min(MAX_INT64, math.ceil(float(usage) / float(status_replicas))))


def sum_of_series(values: Iterable[int]) -> int:
    """Add the series of an External metric up; like the controller's, the sum ends at the largest int64."""
    return min(MAX_INT64, sum(values))


def pods_average(
    current: int, metrics: Mapping[str, PodMetric], target_milli: int, pods: Sequence[Pod], tolerances: Tolerances
) -> Proposal:
    """Propose for a Pods metric. A running pod without it counts as on target when usage is low, as 0 when high."""
    if not metrics:
        raise MetricsError("no metrics returned from custom metrics API")
    _some(pods)
    groups = group_pods(pods, metrics, is_cpu=False, now_s=0.0)

    def ratio_of(values: Mapping[str, int]) -> tuple[float, int]:
        mean = _quotient(sum(values.values()), len(values))
        return float(mean) / float(target_milli), mean

    return _over_pods(current, metrics, groups, tolerances, ratio_of, lambda _: target_milli)


def cpu_utilization(
    current: int,
    metrics: Mapping[str, PodMetric],
    target_percent: int,
    pods: Sequence[Pod],
    tolerances: Tolerances,
    *,
    now_s: float,
    delays: Delays = Delays(),
    is_cpu: bool = True,
) -> Proposal:
    """Propose for a Resource metric with a `Utilization` target in percent of the requests.

    A pod without the metric counts as using all of its request when usage is low, as 0 when high; so do new pods.
    """
    if not metrics:
        raise MetricsError("no metrics returned from resource metrics API")
    _some(pods)
    groups = group_pods(pods, metrics, is_cpu=is_cpu, now_s=now_s, delays=delays)
    requests = {}
    for pod in pods:
        if pod.request_milli is None:
            raise MetricsError(f"missing request for the resource in Pod {pod.name}")
        requests[pod.name] = pod.request_milli

    def ratio_of(values: Mapping[str, int]) -> tuple[float, int]:
        known = [name for name in values if name in requests]
        asked = sum(requests[name] for name in known)
        if asked == 0:
            raise MetricsError("no metrics returned matched known pods")
        percent = _quotient(sum(values[name] for name in known) * 100, asked)
        return float(percent) / float(target_percent), percent

    fallback = max(100, target_percent)
    return _over_pods(current, metrics, groups, tolerances, ratio_of, lambda name: requests[name] * fallback // 100)


def group_pods(
    pods: Sequence[Pod],
    metrics: Mapping[str, PodMetric],
    *,
    is_cpu: bool,
    now_s: float,
    delays: Delays = Delays(),
) -> Groups:
    """Sort pods by how they count. Readiness matters for CPU only, of which starting up takes much."""
    ready, unready, missing, ignored = 0, set(), set(), set()
    for pod in pods:
        if pod.is_deleting or pod.phase == "Failed":
            ignored.add(pod.name)
        elif pod.phase == "Pending":
            unready.add(pod.name)
        elif pod.name not in metrics:
            missing.add(pod.name)
        elif is_cpu and _is_new(pod, metrics[pod.name], now_s, delays):
            unready.add(pod.name)
        else:
            ready += 1
    return Groups(ready, frozenset(unready), frozenset(missing), frozenset(ignored))


def _is_new(pod: Pod, metric: PodMetric, now_s: float, delays: Delays) -> bool:
    if pod.is_ready is None or pod.started_s is None:
        return True
    if pod.started_s + delays.cpu_initialization_s > now_s:
        return not pod.is_ready or metric.taken_s < pod.ready_changed_s + metric.window_s
    # after that only a pod that was never ready
    return not pod.is_ready and pod.started_s + delays.initial_readiness_s > pod.ready_changed_s


def _over_pods(
    current: int,
    metrics: Mapping[str, PodMetric],
    groups: Groups,
    tolerances: Tolerances,
    ratio_of: Callable[[Mapping[str, int]], tuple[float, int]],
    missing_when_low: Callable[[str], int],
) -> Proposal:
    left_out = groups.ignored | groups.unready
    values = {name: metric.milli for name, metric in metrics.items() if name not in left_out}
    if not values:
        raise MetricsError("did not receive metrics for targeted pods (pods might be unready)")
    ratio, usage = ratio_of(values)
    up_with_unready = bool(groups.unready) and ratio > 1.0
    if not up_with_unready and not groups.missing:
        if tolerances.hold(ratio):
            return Proposal(current, usage)
        return Proposal(_int32(math.ceil(ratio * float(groups.ready))), usage)
    if ratio < 1.0:
        values |= {name: missing_when_low(name) for name in groups.missing}
    elif ratio > 1.0:
        values |= dict.fromkeys(groups.missing, 0)
    if up_with_unready:
        values |= dict.fromkeys(groups.unready, 0)
    again, _ = ratio_of(values)
    if tolerances.hold(again) or (ratio < 1.0 < again) or (ratio > 1.0 > again):
        return Proposal(current, usage)  # too small a change, or one that would turn
    replicas = _int32(math.ceil(again * float(len(values))))
    if (again < 1.0 and replicas > current) or (again > 1.0 and replicas < current):
        return Proposal(current, usage)
    return Proposal(replicas, usage)


def _present(milli: int | None) -> int:
    if milli is None:
        raise MetricsError("unable to fetch metrics from custom metrics API")
    return milli


def _some(pods: Sequence[Pod]) -> None:
    if not pods:
        raise MetricsError("no pods returned by selector while calculating replica count")


def _quotient(amount: int, by: int) -> int:
    """Divide as Go does: towards zero."""
    whole = abs(amount) // by
    return whole if amount >= 0 else -whole


def _int32(replicas: int) -> int:
    return min(replicas, MAX_INT32)
