"""The recording rules of autoscaling. Beside them are `alerts` and the boards: nothing else holds PromQL on it.

`tools/generate.py` writes `rules/phoenix.rules.yaml` of it. What each signal means and why is in
docs/autoscaling/signals.md; the promtool tests are in tests/rules. Needs nothing but pyyaml.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import rule_files

GROUP = "phoenix-autoscaling"
INTERVAL = "15s"
# What spec.autoscaling.percentile may be: whole numbers.
PERCENTILES = range(50, 100)
# Fewer requests than this in two minutes say nothing about a percentile.
LEAST_SAMPLES = 20
# From this share of the SLO on, replicas are not removed.
HOLD_FROM = 0.7
# One step of the HPA at most doubles.
HIGHEST_PRESSURE = 2

# What the HPA is told.
CONCURRENCY = "phoenix:inference_concurrency"
LATENCY = "phoenix:inference_latency_seconds"
RATIO = "phoenix:inference_slo_ratio"
PRESSURE = "phoenix:inference_slo_pressure"
# What these are made of.
STUCK = "phoenix:inference_inflight_requests:min1m"
BUSY = "phoenix:inference_latency_seconds_sum:rate1m"
SCRAPED_PODS = "phoenix:inference_pods:scraped"
MISSING_PODS = "phoenix:inference_pods:missing"
SEEN_CONCURRENCY = "phoenix:inference_concurrency:seen"
SLO = "phoenix:model_slo_seconds"
PERCENTILE = "phoenix:model_percentile"
SAMPLES = "phoenix:inference_latency_seconds_count:increase2m"
BUCKETS = "phoenix:inference_latency_seconds_bucket:rate2m"
QUANTILE = "phoenix:inference_latency_seconds:quantile"

_KEY = "namespace, model"
_TARGET = "namespace, job, instance"
# A target label of the scrape configuration. Canary pods are judged apart, and scaled by no HPA.
_STABLE = 'track!="canary"'


@dataclass(frozen=True, slots=True)
class Rule:
    """One recording rule; `labels` are added to what it records."""

    record: str
    expr: str
    labels: Mapping[str, str] = field(default_factory=dict)


def autoscaling_rules() -> list[Rule]:
    """Return the rules for the HPA, each after those that it reads."""
    return [*_concurrency(), *_objective(), *_latency(), *_pressure()]


def _concurrency() -> Iterator[Rule]:
    """Yield what makes the mean number of requests in service or waiting, in all pods together.

    By Little's law that is the rate of the sum of latencies, of whatever outcome. It only knows what has been
    answered, so that a pod that hangs would look idle: what the gauge never went below is there at least. The mean of
    the gauge is not taken: of four scrapes in a minute it is off by half the load of a pod, and the larger of two
    numbers, one of them noisy, is too large. `>= 0 < Inf` drops NaN too.
    """
    inflight = f"inference_inflight_requests{{{_STABLE}}}"
    of_pod = f"sum by ({_KEY}, job, instance)"
    yield Rule(BUSY, f"{of_pod} (rate(inference_latency_seconds_sum{{{_STABLE}}}[1m]) >= 0 < Inf)")
    yield Rule(STUCK, f"{of_pod} (min_over_time({inflight}[1m]) >= 0 < Inf)\nand on ({_TARGET}) up")
    # As soon as no pod answers, nothing is known: what is left of the window would look like load that ends.
    yield Rule(
        SEEN_CONCURRENCY,
        f"sum by ({_KEY}) (({BUSY} > {STUCK}) or {STUCK} or {BUSY})\nand group by ({_KEY}) ({inflight})",
    )
    yield Rule(
        SCRAPED_PODS,
        f"count by ({_KEY}) (\n"
        f"  group by ({_KEY}, job, instance) (count_over_time({inflight}[1m]))\n"
        f"  and on ({_TARGET}) up\n)",
    )
    # Targets still, that served the model and have not answered for a whole minute. A pod that is starting never
    # answered; one that ends is no target any more before the minute is over.
    yield Rule(
        MISSING_PODS,
        f"count by ({_KEY}) (\n"
        f"  group by ({_KEY}, job, instance) (count_over_time({inflight}[10m]))\n"
        f"  and on ({_TARGET}) (up == 0 and max_over_time(up[1m]) == 0)\n)",
    )
    # Pods that do not answer are taken to be as busy as those that do.
    yield Rule(
        CONCURRENCY,
        f"{SEEN_CONCURRENCY} * (1 + {MISSING_PODS} / {SCRAPED_PODS})\nor {SEEN_CONCURRENCY}",
    )


def _objective() -> Iterator[Rule]:
    """Yield the objective of each model. While two versions serve, it is the lower SLO and the higher percentile."""
    yield Rule(SLO, f"min by ({_KEY}) (phoenix_model_slo_seconds{{{_STABLE}}} > 0)")
    ways = [
        f'group by ({_KEY}, percentile) (phoenix_model_slo_seconds{{percentile="{percentile}",{_STABLE}}})'
        for percentile in reversed(PERCENTILES)
    ]
    yield Rule(PERCENTILE, f"\nor on ({_KEY}) ".join(ways))


def _latency() -> Iterator[Rule]:
    """Yield what makes the model's own percentile of the latency of requests that succeeded.

    One rule for each percentile that there may be: its selector finds the buckets of the models that want it, so a
    percentile that nobody wants costs nothing.
    """
    ok = f'outcome="ok",{_STABLE}'
    yield Rule(SAMPLES, f"sum by ({_KEY}) (increase(inference_latency_seconds_count{{{ok}}}[2m]))")
    yield Rule(
        BUCKETS,
        f"sum by ({_KEY}, le) (rate(inference_latency_seconds_bucket{{{ok}}}[2m]))\n"
        f"* on ({_KEY}) group_left (percentile) {PERCENTILE}",
    )
    for percentile in PERCENTILES:
        own = f'{BUCKETS}{{percentile="{percentile}"}}'
        yield Rule(QUANTILE, f"histogram_quantile(0.{percentile}, {own})", {"percentile": str(percentile)})
    # Percentile and SLO are there as long as a pod answers: where none does, nothing is known, which is not 0.
    yield Rule(
        LATENCY,
        f"(max by ({_KEY}) ({QUANTILE} >= 0) and {_ENOUGH})\nor {_IDLE}",
    )


_ENOUGH = f"({SAMPLES} >= {LEAST_SAMPLES})"
_IDLE = f"(0 * {SLO} unless {_ENOUGH})"


def _pressure() -> Iterator[Rule]:
    """Yield how near the latency is to the SLO, and what the HPA is told of it: raise, hold, or nothing."""
    yield Rule(RATIO, f"{LATENCY} / {SLO} and {_ENOUGH}")
    yield Rule(
        PRESSURE,
        f"(clamp_max({RATIO}, {HIGHEST_PRESSURE}) > 1)\n"
        f"or (0 * ({RATIO} >= {HOLD_FROM}) + 1)\n"
        f"or (0 * ({RATIO} >= 0))\n"
        f"or {_IDLE}",
    )


def group(rules: Sequence[Rule], *, interval: str = INTERVAL) -> dict[str, Any]:
    """Return the rules as one group, so that they are evaluated in their order."""
    return {
        "name": GROUP,
        "interval": interval,
        "rules": [
            {"record": rule.record, "expr": rule_files.Block(f"{rule.expr}\n")}
            | ({"labels": dict(rule.labels)} if rule.labels else {})
            for rule in rules
        ],
    }


def rule_file(rules: Sequence[Rule], *, interval: str = INTERVAL) -> str:
    """Return the rules as a rule file of Prometheus."""
    return rule_files.rule_file([group(rules, interval=interval)])
