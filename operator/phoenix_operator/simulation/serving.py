"""The replicas of a model under load: pods that start, queues that grow and drain, counters as the server keeps them.

Hides how requests are followed without an event for each. Replicas share arrivals at random and evenly, as a Service
does. Replicas with the same queue are one cohort. Its queue is followed in steps of five seconds (`waiting.Table`); an
arrival's time is that of the steady state, plus the wait for what an overload has left in front of it. Requests are
counted when they are answered. Times are in seconds.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from phoenix_operator.simulation.replica_calculator import Pod, PodMetric
from phoenix_operator.simulation.waiting import Service, Steady, Table

STEP_S = 15.0
SUB_STEPS = 3
_DRAWN_SINGLY = 70  # up to so many requests of a cohort and sub-step are drawn one by one; of more the mean is taken
REQUEST_MILLI = 1000
# 0.5 ms … 10 s: the buckets of inference_latency_seconds, of which phoenix_server.metrics is the source
LATENCY_BOUNDS_S = (
    0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05,
    0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0,
)  # fmt: skip
_SLO_MULTIPLES = (0.5, 0.7, 0.85, 1.0, 1.25, 1.5, 2.0, 4.0)


def latency_bounds_s(slo_s: float) -> tuple[float, ...]:
    """Return the buckets of a model with that objective."""
    return tuple(sorted({*LATENCY_BOUNDS_S, *(round(slo_s * multiple, 9) for multiple in _SLO_MULTIPLES)}))


@dataclass(frozen=True, slots=True)
class Replica:
    """What a replica is: how it serves, how long it loads, what it refuses, what CPU it takes at its most."""

    service: Service
    load_s: float = 30.0
    queue_rows: int = 1024
    timeout_s: float = 30.0
    cpu_share: float = 1.0  # of the CPU request, with all places taken

    @property
    def most_requests(self) -> float:
        """Requests that are at a replica at most; beyond it they are refused, or time out."""
        return min(float(self.service.concurrency + self.queue_rows), self.timeout_s * self.service.most_per_second)

    @property
    def times_out(self) -> bool:
        """Whether the time limit is reached before the queue is full."""
        return self.timeout_s * self.service.most_per_second < self.service.concurrency + self.queue_rows


@dataclass(slots=True)
class Tally:
    """Requests by bucket of their time, the last above all bounds, and those that failed."""

    buckets: list[float]
    total_s: float = 0.0
    refused: float = 0.0
    timed_out: float = 0.0

    def add(self, other: "Tally") -> None:
        """Add the counts of another."""
        self.buckets = [mine + its for mine, its in zip(self.buckets, other.buckets, strict=True)]
        self.total_s += other.total_s
        self.refused += other.refused
        self.timed_out += other.timed_out


@dataclass(slots=True)
class _Cohort:
    pods: int
    in_system: float = 0.0
    utilization: float = 0.0


@dataclass(slots=True)
class Fleet:
    """All pods of a model. `advance` serves one step; `counters` only grow, as those of Prometheus do.

    Without `random` arrivals come evenly, and fractions of requests are counted.
    """

    replica: Replica
    table: Table
    bounds: Sequence[float]
    random: Random | None
    counters: Tally = field(init=False)
    latest: Tally = field(init=False)
    pods: list[Pod] = field(default_factory=list)
    inflight: float = 0.0
    _cohorts: list[_Cohort] = field(default_factory=list)
    _pending: dict[int, Tally] = field(default_factory=dict)
    _made: int = 0

    def __post_init__(self) -> None:
        """Begin with nothing counted."""
        self.counters, self.latest = self._tally(), self._tally()

    @property
    def ready(self) -> int:
        """Pods that serve."""
        return sum(cohort.pods for cohort in self._cohorts)

    def resize(self, replicas: int, now_s: float, *, is_loaded: bool = False) -> None:
        """Create or delete pods as a ReplicaSet does: those go first that are not ready, then the youngest."""
        while len(self.pods) < replicas:
            self._made += 1
            pod = Pod(f"pod-{self._made}", is_ready=is_loaded, started_s=now_s, ready_changed_s=now_s)
            self.pods.append(replace(pod, request_milli=REQUEST_MILLI))
            if is_loaded:
                self._join()
        while len(self.pods) > replicas:
            if self.pods.pop().is_ready:  # they become ready in the order of their age
                self._cohorts[-1].pods -= 1
                if not self._cohorts[-1].pods:
                    self._cohorts.pop()

    def advance(self, start_s: float, rates: Sequence[float]) -> None:
        """Serve one step; `rates` are the requests per second of its sub-steps."""
        length_s = STEP_S / SUB_STEPS
        step = round(start_s / STEP_S)
        for index, rate in enumerate(rates):
            now_s = start_s + index * length_s
            self._make_ready(now_s)
            self._serve(now_s, length_s, rate, step)
        self.latest = self._pending.pop(step, self._tally())
        self.counters.add(self.latest)
        self.inflight = sum(self._in_flight(cohort) for cohort in self._cohorts)

    def cpu(self, now_s: float) -> dict[str, PodMetric]:
        """Return what the resource metrics API says of each pod; one that loads takes none in this model."""
        shares = [cohort.utilization for cohort in self._cohorts for _ in range(cohort.pods)]
        shares += [0.0] * (len(self.pods) - len(shares))
        return {
            pod.name: PodMetric(int(REQUEST_MILLI * self.replica.cpu_share * share), now_s, STEP_S)
            for pod, share in zip(self.pods, shares, strict=True)
        }

    def _tally(self) -> Tally:
        return Tally([0.0] * (len(self.bounds) + 1))

    def _make_ready(self, now_s: float) -> None:
        for index, pod in enumerate(self.pods):
            if not pod.is_ready and (pod.started_s or 0.0) + self.replica.load_s <= now_s + 1e-9:
                self.pods[index] = replace(pod, is_ready=True, ready_changed_s=now_s)
                self._join()

    def _join(self) -> None:
        """Put a pod that became ready to the others that have no queue yet."""
        if self._cohorts and self._cohorts[-1].in_system == 0.0:
            self._cohorts[-1].pods += 1
        else:
            self._cohorts.append(_Cohort(1))

    def _serve(self, now_s: float, length_s: float, rate: float, step: int) -> None:
        ready = self.ready
        if not ready:
            refused = self._drawn(rate * length_s)
            self._at(step).refused += refused
            return
        each = rate / ready
        most = self.replica.most_requests
        for cohort in self._cohorts:
            before = cohort.in_system
            after = self.table.settle(before, each)
            arrived = self._drawn(each * length_s * cohort.pods)
            if after > most:
                arrived -= self._turn_away(min(arrived, (after - most) * cohort.pods), step)
                after = most
            cohort.in_system = after
            cohort.utilization = self.table.utilization(after)
            steady, behind_s = self._state((before + after) / 2, each)
            self._count(arrived, steady, behind_s, now_s + length_s / 2)
        self._merge()

    def _turn_away(self, requests: float, step: int) -> float:
        tally = self._at(step)
        if self.replica.times_out:
            tally.timed_out += requests
            tally.total_s += requests * self.replica.timeout_s
        else:
            tally.refused += requests
        return requests

    def _state(self, in_system: float, each: float) -> tuple[Steady, float]:
        """Return the steady state that tells how requests' times spread, and the wait for what is ahead beyond it."""
        steady = min(self.table.at_load(each), self.table.at_requests(in_system), key=lambda row: row.in_system)
        service = self.replica.service
        behind_s = (in_system - steady.in_system) / service.most_per_second
        return steady, behind_s if behind_s > service.alone_s / 10 else 0.0

    def _count(self, requests: float, steady: Steady, behind_s: float, at_s: float) -> None:
        """Count requests in the steps in which they are answered."""
        if requests <= 0:
            return
        first = int(at_s // STEP_S)
        if self.random is not None and requests <= _DRAWN_SINGLY:
            points, cumulative = steady.points
            drawn = self.random.choices(points, cum_weights=cumulative, k=round(requests))
            self._count_each(((seconds, 1.0) for seconds in drawn), behind_s, at_s)
        elif behind_s == 0.0 and at_s + steady.longest_s < (first + 1) * STEP_S:
            tally = self._at(first)
            tally.buckets = [mine + requests * share for mine, share in zip(tally.buckets, steady.shares, strict=True)]
            tally.total_s += requests * steady.mean_s
        else:
            self._count_each(((seconds, requests * share) for seconds, share in steady.weights), behind_s, at_s)

    def _count_each(self, times: Iterable[tuple[float, float]], behind_s: float, at_s: float) -> None:
        bounds = self.bounds
        for seconds, requests in times:
            took_s = seconds + behind_s
            tally = self._at(int((at_s + took_s) // STEP_S))
            tally.buckets[bisect_left(bounds, took_s)] += requests
            tally.total_s += took_s * requests

    def _at(self, step: int) -> Tally:
        tally = self._pending.get(step)
        if tally is None:
            tally = self._pending[step] = self._tally()
        return tally

    def _in_flight(self, cohort: _Cohort) -> float:
        """Return what a scrape would see: the requests of one moment, which is not their mean."""
        usual = min(cohort.in_system, self.table.at_requests(cohort.in_system).in_system)
        return self._drawn(usual * cohort.pods) + (cohort.in_system - usual) * cohort.pods

    def _drawn(self, mean: float) -> float:
        return mean if self.random is None else float(_poisson(self.random, mean))

    def _merge(self) -> None:
        """Join neighbours whose queues have become alike."""
        kept: list[_Cohort] = []
        for cohort in self._cohorts:
            last = kept[-1] if kept else None
            if last is not None and abs(last.in_system - cohort.in_system) <= 0.01 * max(last.in_system, 1e-9):
                pods = last.pods + cohort.pods
                last.in_system = (last.in_system * last.pods + cohort.in_system * cohort.pods) / pods
                last.pods = pods
            else:
                kept.append(cohort)
        self._cohorts = kept


def _poisson(random: Random, mean: float) -> int:
    if mean > 50:
        return max(0, round(random.gauss(mean, math.sqrt(mean))))
    left, count = math.exp(-mean), 0
    product = random.random()
    while product > left:
        count += 1
        product *= random.random()
    return count
