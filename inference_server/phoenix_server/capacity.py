"""Measures how much concurrency one replica of a model takes before more of it only waits longer.

Closed loops of 1, 2, 4 … callers send one-row requests through the model's own batcher. The capacity is the last
concurrency that still gained `_GAIN` in throughput and kept its p95 within the objective. Autoscaling uses it as the
default target. Synthetic runs are not counted in the model's metrics.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from phoenix_server.batching import Batcher
from phoenix_server.engine import Engine
from phoenix_server.errors import PhoenixError
from phoenix_server.metrics import ModelMetrics

_GAIN = 1.10
_MAX_CONCURRENCY = 256
_LEAST_REQUESTS = 4


@dataclass(frozen=True, slots=True)
class Capacity:
    """What was measured: the concurrency, and throughput (rows/s) and p95 latency (s) at it and alone."""

    concurrency: int
    rows_per_second: float
    latency_p95_s: float
    latency_alone_s: float


async def measure(
    engine: Engine,
    new_batcher: Callable[[ModelMetrics], Batcher],
    *,
    slo_s: float | None,
    step_s: float = 0.2,
    may_go_on: Callable[[], bool] = lambda: True,
) -> Capacity | None:
    """Measure a loaded engine; None if `may_go_on()` turned false (real traffic came) or the model refuses samples."""
    batcher = new_batcher(ModelMetrics("", ""))
    inputs, names = engine.sample_inputs(1), engine.signature.output_names
    best: Capacity | None = None
    concurrency = 1
    while concurrency <= _MAX_CONCURRENCY:
        latencies: list[float] = []
        started = time.perf_counter()
        until = started + step_s

        async def caller() -> None:
            while (now := time.perf_counter()) < until or len(latencies) < _LEAST_REQUESTS:  # noqa: B023
                await batcher.submit(inputs, names, 1)
                latencies.append(time.perf_counter() - now)  # noqa: B023
                if not may_go_on():
                    return

        try:
            await asyncio.gather(*(caller() for _ in range(concurrency)))
        except PhoenixError:
            return None
        if not may_go_on():
            return None
        latencies.sort()
        p95_s = latencies[min(len(latencies) - 1, int(0.95 * len(latencies)))]
        rate = len(latencies) / (time.perf_counter() - started)
        if best is None:
            best = Capacity(1, rate, p95_s, latencies[len(latencies) // 2])
        elif rate < best.rows_per_second * _GAIN or (slo_s is not None and p95_s > slo_s):
            return best
        else:
            best = Capacity(concurrency, rate, p95_s, best.latency_alone_s)
        concurrency *= 2
    return best
