"""What pods do, told in a few words, and what the recording rules must say of it.

The series come from the server's own `Metrics`, scraped every 15 seconds of promtool's time: names, labels and buckets
are those of the product. `promtool.py` makes a promtool test file of a scenario.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import queries

from phoenix_server.errors import Outcome
from phoenix_server.metrics import Objective

STEP_S = 15
NAMESPACE = "ml"
# answering; not answering the scrape; no target of Prometheus; target, but Prometheus itself does not run
State = Literal["up", "down", "gone", "unwatched"]
Expected = Mapping[str, float | None]
_OBJECTIVE = Objective(0.1, 95)


@dataclass(frozen=True, slots=True)
class Answers:
    """So many answers in each step, each after so many seconds."""

    count: int
    seconds: float
    outcome: Outcome = Outcome.OK


@dataclass(frozen=True, slots=True)
class Stretch:
    """A pod does the same for some minutes. `is_restart`: the container begins with counters at 0."""

    minutes: float
    answers: tuple[Answers, ...] = ()
    inflight: float = 0
    state: State = "up"
    is_restart: bool = False
    is_loaded: bool = True


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod's life from the first minute on; before and after it is no target."""

    stretches: tuple[Stretch, ...]
    objective: Objective | None = _OBJECTIVE
    version: str = "1"
    track: str = ""
    namespace: str = NAMESPACE


@dataclass(frozen=True, slots=True)
class Scenario:
    """Pods of one model, and at some minutes the values that rules must have; None: no series."""

    name: str
    pods: tuple[Pod, ...]
    expected: Mapping[float, Expected] = field(default_factory=dict)


def _for(minutes: float, *answers: Answers, inflight: float = 0, **others: object) -> Stretch:
    return Stretch(minutes, answers, inflight, **others)  # type: ignore[arg-type]


def _says(concurrency: float | None, latency: float | None, pressure: float | None) -> Expected:
    return {queries.CONCURRENCY: concurrency, queries.LATENCY: latency, queries.PRESSURE: pressure}


LOW, HOLD, HOT = Answers(150, 0.03), Answers(150, 0.08), Answers(150, 0.14)
ABSENT = _says(None, None, None) | {queries.RATIO: None}
_HALF = Answers(75, 0.14)  # of HOT, where two pods share it

# 150 answers of 0.14 s in 15 s are 1.4 requests at once. Their p95 lies in the bucket from 0.125 to 0.15 s: 0.14875.
SCENARIOS = (
    Scenario(
        "idle for long is 0 and not absent",
        (Pod((_for(10),)),),
        {9: _says(0, 0, 0) | {queries.RATIO: None}},
    ),
    Scenario(
        "low load has no pressure",
        (Pod((_for(10, LOW, inflight=0.3),)),),
        {9: _says(0.3, 0.0295, 0) | {queries.RATIO: 0.295}},
    ),
    Scenario(
        "near the objective the replicas are held",
        (Pod((_for(10, HOLD, inflight=0.8),)),),
        {9: _says(0.8, 0.0845, 1) | {queries.RATIO: 0.845}},
    ),
    Scenario(
        "over the objective the pressure is the ratio",
        (Pod((_for(10, HOT, inflight=1.4),)),),
        {9: _says(1.4, 0.1488, 1.4875) | {queries.RATIO: 1.4875}},
    ),
    Scenario(
        "far over the objective the pressure is 2",
        (Pod((_for(10, Answers(150, 0.39), inflight=3),)),),
        {9: _says(3.9, 0.395, 2) | {queries.RATIO: 3.95}},
    ),
    Scenario(
        "few samples say nothing of a percentile",
        (Pod((_for(10, Answers(1, 0.39)),)),),
        {9: _says(0.026, 0, 0) | {queries.RATIO: None}},
    ),
    Scenario(
        "a pod that hangs answers nothing and is busy",
        (Pod((_for(5, HOT, inflight=1.4), _for(5, inflight=8))),),
        {9: _says(8, 0, 0)},
    ),
    Scenario(
        "no pod answers the scrape",
        (Pod((_for(5, HOT, inflight=1.4), _for(5, state="down"))),),
        {5: _says(1.4, 0.1488, 1.4875), 5.25: ABSENT, 5.75: ABSENT, 6.25: ABSENT, 9: ABSENT},
    ),
    Scenario(
        "the only pod of a quiet model ends: unknown is not idle",
        (Pod((_for(5, Answers(6, 0.14)), _for(5, state="down"))),),
        # of the windows less and less is left: little load, and at last too few samples
        {minute: ABSENT for minute in (5.25, 5.75, 6.25, 6.5, 6.75, 7)},
    ),
    Scenario(
        "all pods are gone",
        (Pod((_for(5, HOT, inflight=1.4), _for(5, state="gone"))),),
        {6.25: ABSENT, 9: ABSENT},
    ),
    Scenario(
        "a container that restarts resets its counters",
        (Pod((_for(8, HOT, inflight=1.4), _for(2, HOT, inflight=1.4, is_restart=True))),),
        {minute: _says(1.4, 0.1488, 1.4875) for minute in (8.25, 8.5, 9)},
    ),
    Scenario(
        "Prometheus was away for two minutes",
        (Pod((_for(6, HOT, inflight=1.4), _for(2, HOT, inflight=1.4, state="unwatched"), _for(2, HOT, inflight=1.4))),),
        {9.5: _says(1.4, 0.1488, 1.4875)},
    ),
    Scenario(
        "two versions with different objectives: the lower SLO and the higher percentile",
        (
            # by itself p90 of 0.0845 s in 0.2 s, and by itself p99 over the SLO of 0.1 s
            Pod((_for(10, Answers(100, 0.08), inflight=0.5),), Objective(0.2, 90), version="1"),
            Pod((_for(10, Answers(95, 0.08), Answers(5, 0.145), inflight=0.5),), Objective(0.1, 99), version="2"),
        ),
        # the 198th of 200, in the bucket from 0.14 (version 1's only) to 0.15 s (both)
        {9: _says(1.0883, 0.146, 1.46) | {queries.SLO: 0.1}},
    ),
    Scenario(
        "a rollout has ended: only the new objective counts",
        (
            Pod((_for(5, HOT, inflight=1.4), _for(5, state="gone")), Objective(0.1, 99), version="1"),
            Pod((_for(4, state="gone"), _for(6, HOT, inflight=1.4)), Objective(0.4, 90), version="2"),
        ),
        {9: _says(1.4, 0.145, 0) | {queries.SLO: 0.4, queries.RATIO: 0.3625}},
    ),
    Scenario(
        "canary pods are left out",
        (
            Pod((_for(10, LOW, inflight=0.3),)),
            Pod((_for(10, Answers(150, 0.39), inflight=8),), Objective(0.01, 99), version="2", track="canary"),
            Pod((_for(5, LOW, inflight=1), _for(5, state="down")), track="canary"),
        ),
        {8: _says(0.3, 0.0295, 0)},
    ),
    Scenario(
        "several pods are one model",
        (
            Pod((_for(10, Answers(150, 0.03), inflight=0.2),)),
            Pod((_for(10, Answers(140, 0.03), Answers(10, 0.39), inflight=0.5),)),
            Pod((_for(10, Answers(125, 0.03), Answers(25, 0.39), inflight=1.5),)),
        ),
        # Of each pod the larger number: 0.3 and 0.54 by rate, 1.5 by gauge. 35 of 450 are slow: the 427.5th is the
        # 12.5th of them, in the bucket from 0.3 to 0.4 s.
        {9: _says(2.34, 0.3357, 2)},
    ),
    Scenario(
        "a model of the same name in another namespace is another",
        (
            Pod((_for(10, LOW, inflight=0.3),)),
            Pod((_for(10, Answers(150, 0.39), inflight=8),), namespace="other"),
        ),
        {9: _says(0.3, 0.0295, 0)},
    ),
    Scenario(
        "one pod of two does not answer the scrape: it is taken to be as busy as the other",
        (
            Pod((_for(10, _HALF, inflight=0.7),)),
            Pod((_for(5, _HALF), _for(5, state="down"))),
        ),
        {
            5: _says(1.4, 0.1488, 1.4875),
            # until a whole minute has passed it counts for less and less
            5.5: {queries.CONCURRENCY: 1.1375},
            6: {queries.CONCURRENCY: 0.7},
            6.25: {queries.CONCURRENCY: 1.4},
            6.5: _says(1.4, 0.1488, 1.4875),
            9: _says(1.4, 0.1488, 1.4875),
        },
    ),
    Scenario(
        "a pod that has not answered for long is forgotten",
        (
            Pod((_for(18, _HALF, inflight=0.7),)),
            Pod((_for(5, _HALF, inflight=0.7), _for(13, state="down"))),
        ),
        {14.5: {queries.CONCURRENCY: 1.4}, 16: {queries.CONCURRENCY: 0.7}},
    ),
    Scenario(
        "a pod that is starting is not counted",
        (
            Pod((_for(10, HOT, inflight=1.4),)),
            Pod((_for(4, state="gone"), _for(6, state="down"))),
            Pod((_for(4, state="gone"), _for(6, is_loaded=False))),
        ),
        {minute: _says(1.4, 0.1488, 1.4875) for minute in (4.25, 6, 9)},
    ),
    Scenario(
        "a pod that was removed is not counted beside those that took over its load",
        (
            Pod((_for(5, _HALF, inflight=0.7), _for(5, HOT, inflight=1.4))),
            Pod((_for(5, _HALF, inflight=0.7), _for(5, state="gone"))),
        ),
        {
            5: {queries.CONCURRENCY: 1.4},
            # rate() takes the window of the one that is gone for full once, then for half a step more than it is
            5.25: {queries.CONCURRENCY: 1.575},
            5.5: {queries.CONCURRENCY: 1.4875},
            5.75: {queries.CONCURRENCY: 1.4875},
            6: {queries.CONCURRENCY: 1.4},
            9: {queries.CONCURRENCY: 1.4},
        },
    ),
    Scenario(
        "a gauge that jumps about adds nothing to a load that is constant",
        (Pod((_for(0.25, HOT, inflight=4), _for(0.25, HOT, inflight=1)) * 20),),
        {minute: {queries.CONCURRENCY: 1.4} for minute in (5, 7.25, 9)},
    ),
    Scenario(
        "one pod hangs beside one that works",
        (
            Pod((_for(10, _HALF, inflight=0),)),
            Pod((_for(5, _HALF, inflight=1), _for(5, inflight=8))),
        ),
        {9: _says(8.7, 0.1488, 1.4875)},
    ),
    Scenario(
        "a pod that hung is forgotten as soon as it is gone",
        (
            Pod((_for(10, HOT),)),
            Pod((_for(5, inflight=8), _for(5, state="gone"))),
        ),
        {5: {queries.CONCURRENCY: 9.4}, 5.25: {queries.CONCURRENCY: 1.4}},
    ),
    Scenario(
        "a gauge that is no number is left out",
        (
            Pod((_for(10, LOW, inflight=0.3),)),
            Pod((_for(10, inflight=float("nan")),)),
            Pod((_for(10, inflight=float("inf")),)),
        ),
        {9: _says(0.3, 0.0295, 0)},
    ),
    Scenario(
        "a percentile beyond the last bucket is that bucket's bound",
        (Pod((_for(10, Answers(15, 20.0), inflight=20),)),),
        {9: _says(20, 10, 2) | {queries.RATIO: 100}},
    ),
    Scenario(
        "fast failures do not make the latency look good",
        (Pod((_for(10, HOT, Answers(1500, 0.001, Outcome.ERROR), inflight=1.5),)),),
        {9: _says(1.5, 0.1488, 1.4875)},
    ),
    Scenario(
        "requests that fail are load, and no latency",
        (Pod((_for(10, Answers(150, 0.5, Outcome.TIMEOUT)),)),),
        {9: _says(5, 0, 0)},
    ),
    Scenario(
        "the percentile is the model's: p50",
        (Pod((_for(10, Answers(120, 0.03), Answers(30, 0.39)),), Objective(0.1, 50)),),
        {9: _says(1.02, 0.0263, 0)},
    ),
    Scenario(
        "the percentile is the model's: p99",
        (Pod((_for(10, Answers(120, 0.03), Answers(30, 0.39)),), Objective(0.1, 99)),),
        {9: _says(1.02, 0.395, 2)},
    ),
    Scenario(
        "without an objective there is concurrency and no pressure",
        (Pod((_for(10, HOT, inflight=1.4),), objective=None),),
        {9: ABSENT | {queries.CONCURRENCY: 1.4}},
    ),
    Scenario(
        "slow requests count before they are answered",
        (Pod((_for(5, LOW, inflight=0.3), _for(5, Answers(1, 9.0), inflight=4))),),
        {6.25: {queries.CONCURRENCY: 4}},
    ),
    Scenario(
        "load that ended is forgotten within two minutes",
        (Pod((_for(5, HOT, inflight=1.4), _for(5))),),
        {6.25: {queries.CONCURRENCY: 0}, 7.25: _says(0, 0, 0)},
    ),
)
