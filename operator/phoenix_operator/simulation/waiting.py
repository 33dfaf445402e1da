"""How long requests wait and take at one replica under steady load: the formulas of an M/G/c queue, tabulated.

Hides the approximations. The chance to wait is that of a birth-death process (Erlang's C). The mean wait is that of
M/M/c, corrected for the variation of service times (Allen and Cunneen) and, where they hardly vary, with Cosmetatos'
factor for M/D/c. A wait is spread as a Weibull variable whose variation is that of the M/G/1 queue of the same load
(Takacs). Times are in seconds.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

_GRID = [step / 200 for step in range(200)] + [0.997, 0.998, 0.999, 0.9995]
STEADY_MOST = 0.95  # beyond it a queue takes longer to settle than load stays the same
_MOST_CONCURRENCY = 10_000  # of one replica; tables of more take long to make
_SERVICE_POINTS = 15
_POINTS = 60


@dataclass(frozen=True, slots=True)
class Service:
    """What one replica does: `concurrency` requests at once.

    A request takes `alone_s` when it is the only one and `loaded_s` when all places are taken, in between in
    proportion: that is what batching and shared cores come to. `variation` is the squared coefficient of variation of
    a lognormal service time; 0 is a fixed one.
    """

    concurrency: int
    alone_s: float
    loaded_s: float
    variation: float = 0.0

    def __post_init__(self) -> None:
        """Raise `ValueError` for what no server does."""
        if not 1 <= self.concurrency <= _MOST_CONCURRENCY:
            raise ValueError(f"concurrency: expected 1 to {_MOST_CONCURRENCY}, got {self.concurrency}")
        if not 0 < self.alone_s < math.inf or not 0 < self.loaded_s < math.inf:
            raise ValueError(f"service time: expected more than 0 s, got {self.alone_s} s and {self.loaded_s} s")
        if self.loaded_s < self.alone_s or self.loaded_s > self.alone_s * self.concurrency:
            raise ValueError(
                f"loaded service time: expected {self.alone_s} s to {self.alone_s * self.concurrency} s, the time "
                f"alone to {self.concurrency} times it, got {self.loaded_s} s"
            )
        if not 0 <= self.variation <= 4:
            raise ValueError(f"variation: expected 0 to 4, got {self.variation}")

    def seconds(self, in_service: float) -> float:
        """Return the mean service time with that many requests in service."""
        if self.concurrency == 1:
            return self.loaded_s
        share = (max(in_service, 1.0) - 1.0) / (self.concurrency - 1.0)
        return self.alone_s + (self.loaded_s - self.alone_s) * share

    @property
    def most_per_second(self) -> float:
        """Requests per second that one replica answers at most."""
        return self.concurrency / self.loaded_s


class Steady:
    """Response times at one utilisation: arrivals as a share of the most that the replica answers."""

    def __init__(self, service: Service, utilization: float, bounds: Sequence[float]) -> None:
        self._bounds, self._variation = bounds, service.variation
        self.per_second = utilization * service.most_per_second
        self._found, self._waits = _states(service, self.per_second)
        places, wait_s = service.concurrency, 0.0
        if self._waits:
            wait_s = _mean_wait(places, utilization, service.variation) / service.most_per_second
        in_service = sum(chance * count for count, chance in enumerate(self._found)) + self._waits * places
        self.in_system = in_service + self.per_second * self._waits * wait_s
        self._shape = _weibull_shape(_wait_variation(utilization, service.variation))
        self._scale = max(wait_s, 1e-12) / math.gamma(1 + 1 / self._shape)
        self._at_once = _classes(service, self._found)
        self._after_wait = _lognormal_points(service.loaded_s, service.variation)

    def within(self, seconds: float) -> float:
        """Return the share of requests that take no longer."""
        if seconds <= 0:
            return 0.0
        total = sum(chance * _lognormal_within(seconds, mean_s, self._variation) for mean_s, chance in self._at_once)
        if self._waits:
            each = self._waits / len(self._after_wait)
            for service_s in self._after_wait:
                if service_s < seconds:
                    total += each * (1 - math.exp(-(((seconds - service_s) / self._scale) ** self._shape)))
        return min(1.0, total)

    @cached_property
    def shares(self) -> list[float]:
        """The share of requests in each bucket, the one above all bounds last."""
        cumulative = [0.0, *(self.within(bound) for bound in self._bounds), 1.0]
        return [above - below for below, above in pairwise(cumulative)]

    @cached_property
    def points(self) -> tuple[list[float], list[float]]:
        """Response times that stand for all, and their cumulative weights."""
        low = self._least()
        high = max(self._upper(), low)
        edges = [low + (high - low) * (index / _POINTS) ** 2 for index in range(_POINTS + 1)]
        shares = [self.within(edge) for edge in edges[:-1]] + [1.0]
        middles = [low, *((below + above) / 2 for below, above in pairwise(edges))]
        return middles, shares

    @cached_property
    def weights(self) -> list[tuple[float, float]]:
        """The same points with the weight of each, without those that weigh nothing."""
        middles, cumulative = self.points
        single = [above - below for below, above in zip([0.0, *cumulative], cumulative, strict=False)]
        return [pair for pair in zip(middles, single, strict=True) if pair[1] > 1e-9]

    @property
    def mean_s(self) -> float:
        """The mean response time."""
        return self.in_system / self.per_second if self.per_second else self._at_once[0][0]

    @cached_property
    def longest_s(self) -> float:
        """A time that hardly any request exceeds."""
        return self._upper()

    def quantile(self, share: float) -> float:
        """Return the response time that this share of requests keeps."""
        low, high = 0.0, self._upper()
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self.within(middle) < share else (low, middle)
        return high

    def _least(self) -> float:
        """The time of a request at an idle replica, or one that hardly any keeps where service times vary."""
        low, high = 0.0, min(mean_s for mean_s, _ in self._at_once)
        if self._variation == 0:
            return high
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if self.within(middle) < 0.0005 else (low, middle)
        return high

    def _upper(self) -> float:
        """A time that hardly any request exceeds."""
        tail = math.exp(3.3 * math.sqrt(math.log1p(self._variation))) if self._variation else 1.0
        wait_s = self._scale * 7.6 ** (1 / self._shape) if self._waits > 0.0005 else 0.0  # 99.95 % of the waits
        return max(mean_s for mean_s, _ in self._at_once) * tail + wait_s


class Table:
    """A replica's steady states by utilisation, made when they are asked for."""

    def __init__(self, service: Service, bounds: Sequence[float], *, step_s: float) -> None:
        """`step_s` is the length of the steps in which a queue is followed by `settle`."""
        self.service = service
        self._steady = [Steady(service, utilization, bounds) for utilization in _GRID]
        self._step_s = step_s
        self._in_system = [row.in_system for row in self._steady]
        self._per_second = [row.per_second for row in self._steady]
        self._ahead = [row.in_system + step_s * row.per_second for row in self._steady]
        self._last_steady = bisect_right(_GRID, STEADY_MOST) - 1

    def settle(self, in_system: float, per_second: float) -> float:
        """Return the requests at a replica one step later.

        One implicit step of the pointwise stationary fluid flow: requests leave as fast as in the steady state that has
        as many. It is stable however short a service time is, and above capacity it is the fluid limit.
        """
        ahead = in_system + self._step_s * per_second
        if ahead >= self._ahead[-1]:
            return ahead - self._step_s * self.service.most_per_second
        return _between(self._ahead, self._in_system, ahead)

    def at_load(self, per_second: float) -> Steady:
        """Return the steady state for a rate of arrivals, at most that at 95 %."""
        return self._steady[min(self._last_steady, _nearest(self._per_second, per_second))]

    def at_requests(self, in_system: float) -> Steady:
        """Return the steady state with that many requests at the replica, at most that at 95 %."""
        return self._steady[min(self._last_steady, _nearest(self._in_system, in_system))]

    def utilization(self, in_system: float) -> float:
        """Return the share of its most that a replica with that many requests answers."""
        return min(1.0, _between(self._in_system, _GRID, in_system))


def _nearest(values: Sequence[float], value: float) -> int:
    index = bisect_left(values, value)
    if index == 0:
        return 0
    if index == len(values):
        return index - 1
    return index if values[index] - value < value - values[index - 1] else index - 1


def _between(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    index = min(max(bisect_right(xs, x), 1), len(xs) - 1)
    share = (x - xs[index - 1]) / (xs[index] - xs[index - 1])
    return ys[index - 1] + (ys[index] - ys[index - 1]) * share


def _states(service: Service, per_second: float) -> tuple[list[float], float]:
    """Return the chances that an arrival finds 0 … c-1 requests in service, and that it finds all places taken.

    A birth-death process: with one service time for all loads this is Erlang's C.
    """
    weights = [1.0]
    for count in range(1, service.concurrency + 1):
        weights.append(weights[-1] * per_second * service.seconds(count) / count)
        if weights[-1] > 1e200:
            weights = [weight * 1e-200 for weight in weights]
    weights[-1] /= 1 - per_second / service.most_per_second  # and all states with a queue
    total = sum(weights)
    return [weight / total for weight in weights[:-1]], weights[-1] / total


def _classes(service: Service, found: Sequence[float]) -> list[tuple[float, float]]:
    """Return mean service times of requests that start at once, with the chance of each; few for short sums."""
    if service.loaded_s == service.alone_s or len(found) == 1:
        return [(service.loaded_s, sum(found))]
    rows = []
    size = math.ceil(len(found) / _SERVICE_POINTS)
    for start in range(0, len(found), size):
        chances = found[start : start + size]
        chance = sum(chances) or 1e-300
        mean_count = sum((start + index + 1) * each for index, each in enumerate(chances)) / chance
        rows.append((service.seconds(mean_count or start + 1.0), chance))
    return rows


def _mean_wait(places: int, utilization: float, variation: float) -> float:
    """Return the mean wait of those that wait, in mean times between two departures of a full replica."""
    markov = 1 / (1 - utilization)
    if variation >= 1:
        return markov * (1 + variation) / 2
    factor = (1 - utilization) * (places - 1) * (math.sqrt(4 + 5 * places) - 2) / (16 * max(utilization, 0.05) * places)
    fixed = markov * (1 + min(factor, 1.0)) / 2
    return variation * markov + (1 - variation) * fixed


def _wait_variation(utilization: float, variation: float) -> float:
    """Return the squared coefficient of variation of the waits that are not 0, in the M/G/1 queue."""
    mean = (1 + variation) / (2 * (1 - utilization))
    square = 2 * utilization * mean**2 + (1 + variation) ** 3 / (3 * (1 - utilization))
    return square / mean**2 - 1


def _weibull_shape(variation: float) -> float:
    low, high = 0.3, 4.0
    for _ in range(40):
        shape = (low + high) / 2
        log_ratio = math.lgamma(1 + 2 / shape) - 2 * math.lgamma(1 + 1 / shape)
        low, high = (shape, high) if math.exp(log_ratio) - 1 > variation else (low, shape)
    return (low + high) / 2


def _lognormal_points(mean_s: float, variation: float) -> list[float]:
    """Return service times of equal weight with that mean and variation."""
    if variation == 0:
        return [mean_s]
    sigma = math.sqrt(math.log1p(variation))
    ranks = [(index + 0.5) / _SERVICE_POINTS for index in range(_SERVICE_POINTS)]
    values = [math.exp(sigma * _normal_quantile(rank)) for rank in ranks]
    scale = mean_s * len(values) / sum(values)
    return [value * scale for value in values]


def _lognormal_within(seconds: float, mean_s: float, variation: float) -> float:
    if variation == 0:
        return 1.0 if seconds >= mean_s else 0.0
    square = math.log1p(variation)
    return 0.5 * (1 + math.erf((math.log(seconds / mean_s) + square / 2) / math.sqrt(2 * square)))


def _normal_quantile(share: float) -> float:
    low, high = -8.0, 8.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * (1 + math.erf(middle / math.sqrt(2))) < share else (low, middle)
    return (low + high) / 2
