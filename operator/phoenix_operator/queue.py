"""Which models to look at next: a queue of keys with the semantics of client-go's workqueue.

A key that is added twice is handled once; a key that is added while it is handled is handled once more afterwards;
no key is ever with two workers. A handling that raises comes back after 1 s, 2 s, 4 s … 300 s with jitter.
"""

import asyncio
import heapq
import itertools
import random
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 1.0, 300.0


class KeyedQueue(Generic[K]):
    """Keys to be handled. Not safe for threads; one event loop uses it."""

    def __init__(self, *, jitter: Callable[[], float] = lambda: random.uniform(0.8, 1.2)) -> None:
        self._ready: deque[K] = deque()  # in order; `_dirty` has the same keys
        self._dirty: dict[K, float] = {}  # when it became due, by the loop's clock
        self._processing: dict[K, float] = {}
        self._again: set[K] = set()
        self._delayed: list[tuple[float, int, K]] = []
        self._due: dict[K, float] = {}  # the earliest delayed entry of each key that still counts
        self._failures: dict[K, int] = {}
        self._number = itertools.count()
        self._changed = asyncio.Event()
        self._is_closed = False
        self._jitter = jitter

    def add(self, key: K) -> None:
        """Handle a key soon."""
        self._due.pop(key, None)
        if key in self._processing:
            self._again.add(key)
        elif key not in self._dirty:
            self._dirty[key] = asyncio.get_running_loop().time()
            self._ready.append(key)
            self._changed.set()

    def add_after(self, key: K, delay_s: float) -> None:
        """Handle a key in `delay_s` seconds, or earlier if something else asks for it."""
        at = asyncio.get_running_loop().time() + delay_s
        if key in self._dirty or self._due.get(key, at + 1) <= at:
            return
        self._due[key] = at
        heapq.heappush(self._delayed, (at, next(self._number), key))
        self._changed.set()

    def forget(self, key: K) -> None:
        """Drop a key with its backoff and its delayed entry: the model is gone."""
        self._failures.pop(key, None)
        self._due.pop(key, None)

    async def work(self, handle: Callable[[K], Awaitable[float | None]]) -> None:
        """Handle keys until closed; run several for more workers. `handle` returns seconds until the next time."""
        while (key := await self._next()) is not None:
            try:
                delay_s = await handle(key)
            except asyncio.CancelledError:
                raise
            except Exception:
                # the handler has told what is wrong; here it only matters that it did not succeed
                failures = self._failures[key] = self._failures.get(key, 0) + 1
                delay_s = min(_FIRST_BACKOFF_S * 2 ** min(failures - 1, 20), _LAST_BACKOFF_S) * self._jitter()
            else:
                self._failures.pop(key, None)
            finally:
                self._done(key)
            if delay_s is not None and key not in self._dirty:
                self.add_after(key, delay_s)

    def close(self) -> None:
        """Hand out no more keys; workers end when they are done with theirs."""
        self._is_closed = True
        self._changed.set()

    @property
    def depth(self) -> int:
        """Keys that wait for a worker."""
        return len(self._dirty)

    def oldest_s(self) -> float:
        """Return for how long the key that waits or is handled longest does so."""
        now = asyncio.get_running_loop().time()
        return max((now - since for since in (*self._dirty.values(), *self._processing.values())), default=0.0)

    def retries(self) -> int:
        """Return how many keys failed last time."""
        return len(self._failures)

    async def _next(self) -> K | None:
        while not self._is_closed:
            now = asyncio.get_running_loop().time()
            while self._delayed and self._delayed[0][0] <= now:
                at, _, key = heapq.heappop(self._delayed)
                if self._due.get(key) == at:
                    self.add(key)
            if self._ready:
                key = self._ready.popleft()
                del self._dirty[key]
                self._processing[key] = now
                return key
            self._changed.clear()
            timeout = self._delayed[0][0] - now if self._delayed else None
            try:
                await asyncio.wait_for(self._changed.wait(), timeout)
            except TimeoutError:
                continue
        return None

    def _done(self, key: K) -> None:
        del self._processing[key]
        if key in self._again:
            self._again.discard(key)
            self.add(key)
