"""One simulated run: every 15 s the replicas serve, Prometheus scrapes and evaluates, the HPA controller decides.

Hides the order within a step: what the controller sees is what was answered up to now, and what it decides is there in
the next step; pods that it adds serve after their load time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from phoenix_operator.desired.autoscaling import CONCURRENCY, LATENCY, PRESSURE
from phoenix_operator.simulation.controller import Decision, HorizontalController, Metrics, Spec, Target
from phoenix_operator.simulation.serving import STEP_S, SUB_STEPS, Fleet, Replica, Tally, latency_bounds_s
from phoenix_operator.simulation.signals import ABSENT, Recorder, Scrape, Signals, histogram_quantile
from phoenix_operator.simulation.trace import Trace
from phoenix_operator.simulation.waiting import Table


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is the same for all policies. `blind` are times (from, to) in which no metric is there.

    Without a seed nothing is random: requests come evenly.
    """

    replica: Replica
    slo_s: float
    percentile: int = 95
    replicas: int = 1
    seed: int | None = 1
    blind: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """What happened in 15 s, at their end. `latency_s` is the percentile of the requests answered in them."""

    at_s: float
    per_second: float
    replicas: int
    ready: int
    answered: float
    over: float
    failed: float
    latency_s: float
    signals: Signals
    decision: Decision


@dataclass(frozen=True, slots=True)
class Run:
    """All steps under one HPA, and all requests in one histogram."""

    policy: str
    steps: Sequence[Step]
    answered: Tally
    bounds: Sequence[float]
    percentile: int
    slo_s: float

    @property
    def latency_s(self) -> float:
        """The percentile over all answered requests."""
        return histogram_quantile(self.percentile / 100, self.bounds, self.answered.buckets)

    @property
    def share_over(self) -> float:
        """The share of answered requests that took longer than the objective."""
        return over(self.answered, self.bounds, self.slo_s) / max(sum(self.answered.buckets), 1e-12)

    @property
    def share_failed(self) -> float:
        """The share of all requests that were refused or timed out."""
        failed = self.answered.refused + self.answered.timed_out
        return failed / max(failed + sum(self.answered.buckets), 1e-12)

    @property
    def replica_hours(self) -> float:
        """Hours that pods existed, those that loaded too."""
        return sum(step.replicas for step in self.steps) * STEP_S / 3600

    @property
    def turns_per_hour(self) -> float:
        """How often an hour replicas began to fall after they rose, or to rise after they fell."""
        counts = [step.replicas for step in self.steps]
        moves = [after - before for before, after in pairwise(counts) if after != before]
        turns = sum((one > 0) != (next_one > 0) for one, next_one in pairwise(moves))
        return turns / (len(counts) * STEP_S / 3600)


def table_of(scenario: Scenario) -> Table:
    """Return the steady states of a scenario's replica, to be shared by its runs."""
    return Table(scenario.replica.service, latency_bounds_s(scenario.slo_s), step_s=STEP_S / SUB_STEPS)


def simulate(policy: str, hpa: Spec, trace: Trace, scenario: Scenario, table: Table) -> Run:
    """Run a trace under an HPA. The same seed gives the same run."""
    bounds = latency_bounds_s(scenario.slo_s)
    fleet = Fleet(scenario.replica, table, bounds, None if scenario.seed is None else Random(scenario.seed))
    fleet.resize(scenario.replicas, 0.0, is_loaded=True)
    recorder = Recorder(bounds, scenario.slo_s, scenario.percentile)
    controller = HorizontalController()
    steps, served = [], Tally([0.0] * (len(bounds) + 1))
    uses_cpu = any(metric["type"] == "Resource" for metric in hpa["metrics"])
    for index in range(math.ceil(trace.ends_s / STEP_S)):
        start_s = index * STEP_S
        now_s = start_s + STEP_S
        rates = [trace.at(start_s + (part + 0.5) * STEP_S / SUB_STEPS) for part in range(SUB_STEPS)]
        replicas = len(fleet.pods)
        fleet.advance(start_s, rates)
        counted = fleet.counters
        is_blind = any(since <= now_s < until for since, until in scenario.blind)
        if not is_blind:
            recorder.scrape(Scrape(now_s, counted.buckets, counted.total_s, fleet.inflight))
        signals = ABSENT if is_blind else recorder.evaluate(now_s)
        metrics = Metrics(
            objects={
                CONCURRENCY: _milli(signals.concurrency),
                PRESSURE: _milli(signals.pressure),
                LATENCY: _milli(signals.latency_s),
            },
            resources={"cpu": fleet.cpu(now_s)} if uses_cpu and not is_blind else {},
        )
        decision = controller.step(now_s, hpa, Target(replicas, replicas, fleet.pods), metrics)
        steps.append(_step(now_s, sum(rates) / len(rates), fleet, scenario, signals, decision))
        served.add(fleet.latest)
        fleet.resize(decision.replicas, now_s)
    return Run(policy, steps, served, bounds, scenario.percentile, scenario.slo_s)


def _step(
    now_s: float, per_second: float, fleet: Fleet, scenario: Scenario, signals: Signals, decision: Decision
) -> Step:
    latest = fleet.latest
    return Step(
        at_s=now_s,
        per_second=per_second,
        replicas=len(fleet.pods),
        ready=fleet.ready,
        answered=sum(latest.buckets),
        over=over(latest, fleet.bounds, scenario.slo_s),
        failed=latest.refused + latest.timed_out,
        latency_s=histogram_quantile(scenario.percentile / 100, fleet.bounds, latest.buckets),
        signals=signals,
        decision=decision,
    )


def over(tally: Tally, bounds: Sequence[float], slo_s: float) -> float:
    """Return how many requests took longer than the objective, which is one of the bounds."""
    return sum(tally.buckets[list(bounds).index(round(slo_s, 9)) + 1 :])


def _milli(value: float | None) -> int | None:
    return None if value is None or not math.isfinite(value) else round(value * 1000)
