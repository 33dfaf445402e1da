"""What the recording rules make of the counters: the three signals, in Python.

Hides the arithmetic of PromQL that they need: `rate` with its extrapolation, `min_over_time`, `histogram_quantile`, and
what `or` and comparisons do to series that are missing. Windows are open at their old end, as in Prometheus 3.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

CONCURRENCY_WINDOW_S = 60.0
LATENCY_WINDOW_S = 120.0
LEAST_REQUESTS = 20  # fewer in the window say nothing about a percentile
HOLD_FROM = 0.7
MOST_PRESSURE = 2.0


@dataclass(frozen=True, slots=True)
class Scrape:
    """The counters at one time, summed over pods: answered requests by bucket, the last above all bounds.

    `total_s` is the sum of the times of all outcomes, as in `inference_latency_seconds_sum`.
    """

    at_s: float
    buckets: Sequence[float]
    total_s: float
    inflight: float


@dataclass(frozen=True, slots=True)
class Signals:
    """The values for the HPA; None is absent. `latency_s` is the percentile where enough requests were seen, else 0."""

    concurrency: float | None = None
    pressure: float | None = None
    latency_s: float | None = None
    ratio: float | None = None


ABSENT = Signals()


@dataclass(slots=True)
class Recorder:
    """Keeps the scrapes of the longest window and evaluates the rules over them."""

    bounds: Sequence[float]
    slo_s: float
    percentile: int = 95
    _scrapes: deque[Scrape] = field(default_factory=deque)

    def scrape(self, scrape: Scrape) -> None:
        """Take in one scrape; those older than every window are dropped."""
        self._scrapes.append(scrape)
        while self._scrapes[0].at_s <= scrape.at_s - LATENCY_WINDOW_S:
            self._scrapes.popleft()

    def evaluate(self, now_s: float) -> Signals:
        """Evaluate all rules at a time."""
        recent = [scrape for scrape in self._scrapes if now_s - CONCURRENCY_WINDOW_S < scrape.at_s <= now_s]
        if not recent:
            return ABSENT
        ratio, latency_s = None, 0.0
        seen = [scrape for scrape in self._scrapes if now_s - LATENCY_WINDOW_S < scrape.at_s <= now_s]
        rates = bucket_rates(seen, now_s, LATENCY_WINDOW_S)
        if rates is not None and sum(rates) * LATENCY_WINDOW_S >= LEAST_REQUESTS:
            latency_s = histogram_quantile(self.percentile / 100, self.bounds, rates)
            ratio = latency_s / self.slo_s
        return Signals(concurrency(recent, now_s), pressure(ratio), latency_s, ratio)


def concurrency(scrapes: Sequence[Scrape], now_s: float) -> float | None:
    """Return the mean requests in service or queue: the rate of time spent, or the lowest the gauge was, if larger."""
    if not scrapes:
        return None
    gauge = min(scrape.inflight for scrape in scrapes)
    spent = rate([(scrape.at_s, scrape.total_s) for scrape in scrapes], now_s, CONCURRENCY_WINDOW_S)
    return spent if spent is not None and spent > gauge else gauge


def pressure(ratio: float | None) -> float:
    """Return how far the percentile is over the objective: 1…2 above it, exactly 1 to hold, 0 for no opinion.

    None stands for a ratio that is missing, of too few requests for example, while the objective itself is there.
    """
    if ratio is None or math.isnan(ratio):
        return 0.0
    if ratio > 1:
        return min(ratio, MOST_PRESSURE)
    return 1.0 if ratio >= HOLD_FROM else 0.0


def rate(samples: Sequence[tuple[float, float]], now_s: float, window_s: float) -> float | None:
    """Return PromQL's `rate` of a counter over its samples in the window; None for fewer than two."""
    if len(samples) < 2:
        return None
    gained, previous = 0.0, samples[0][1]
    for _, value in samples[1:]:
        gained += value if value < previous else value - previous  # a smaller value is one after a reset
        previous = value
    times = (samples[0][0], samples[-1][0], len(samples))
    return gained * _extrapolation(times, now_s, window_s, samples[0][1], gained) / window_s


def bucket_rates(scrapes: Sequence[Scrape], now_s: float, window_s: float) -> list[float] | None:
    """Return `rate` of every bucket, each counted alone; None for fewer than two scrapes. They are never reset here."""
    if len(scrapes) < 2:
        return None
    first, last = scrapes[0], scrapes[-1]
    times = (first.at_s, last.at_s, len(scrapes))
    usual = _extrapolation(times, now_s, window_s, math.inf, 1.0)
    below_first = below_gain = before = 0.0
    rates = []
    for start, end in zip(first.buckets, last.buckets, strict=True):
        # Prometheus extrapolates the cumulative series
        below_first += start
        below_gain += end - start
        is_young = below_gain > 0 and below_first < below_gain * 2
        factor = _extrapolation(times, now_s, window_s, below_first, below_gain) if is_young else usual
        cumulative = below_gain * factor / window_s
        rates.append(max(0.0, cumulative - before))
        before = max(before, cumulative)
    return rates


def _extrapolation(
    times: tuple[float, float, int], now_s: float, window_s: float, first_value: float, gained: float
) -> float:
    """Return what a gain between samples is multiplied with: `extrapolatedRate` of Prometheus."""
    first_s, last_s, count = times
    sampled_s = last_s - first_s
    mean_s = sampled_s / (count - 1)
    to_start_s, to_end_s = first_s - (now_s - window_s), now_s - last_s
    if to_start_s >= mean_s * 1.1:
        to_start_s = mean_s / 2
    if gained > 0 and first_value >= 0:
        to_start_s = min(to_start_s, sampled_s * (first_value / gained))  # a counter begins at 0
    if to_end_s >= mean_s * 1.1:
        to_end_s = mean_s / 2
    return (sampled_s + to_start_s + to_end_s) / sampled_s


def histogram_quantile(share: float, bounds: Sequence[float], counts: Sequence[float]) -> float:
    """Return PromQL's `histogram_quantile` of buckets that are counted each alone; NaN without observations."""
    total = sum(counts)
    if total <= 0:
        return math.nan
    rank, below = share * total, 0.0
    for index, bound in enumerate(bounds):
        if below + counts[index] >= rank and counts[index] > 0:
            start = bounds[index - 1] if index else 0.0
            return start + (bound - start) * (rank - below) / counts[index]
        below += counts[index]
    return bounds[-1]
