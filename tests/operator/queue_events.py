"""An exact simulation of one replica, event by event: what the tests hold the queue model against."""

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from phoenix_operator.simulation.waiting import Service


@dataclass(frozen=True, slots=True)
class Answer:
    """When a request was answered and how long it took, in seconds."""

    at_s: float
    took_s: float


def answers(service: Service, rate_at: Callable[[float], float], ends_s: float, seed: int) -> list[Answer]:
    """Serve Poisson arrivals first come first served until a time; the rate is that at the arrival before."""
    random = Random(seed)
    spread = math.sqrt(math.log1p(service.variation))

    def service_s(in_service: int) -> float:
        mean_s = service.seconds(in_service)
        return mean_s * math.exp(spread * random.gauss(0, 1) - spread * spread / 2) if spread else mean_s

    answered, waiting, busy = [], deque[float](), list[tuple[float, float]]()
    now_s = 0.0
    next_s = random.expovariate(rate_at(0.0))
    while now_s < ends_s:
        if busy and busy[0][0] <= next_s:
            now_s, arrived_s = heapq.heappop(busy)
            answered.append(Answer(now_s, now_s - arrived_s))
            if waiting:
                heapq.heappush(busy, (now_s + service_s(len(busy) + 1), waiting.popleft()))
        else:
            now_s = next_s
            if len(busy) < service.concurrency:
                heapq.heappush(busy, (now_s + service_s(len(busy) + 1), now_s))
            else:
                waiting.append(now_s)
            next_s = now_s + random.expovariate(rate_at(now_s))
    return answered


def percentile(times: list[float], share: float) -> float:
    """Return the time that this share of requests keeps."""
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]
