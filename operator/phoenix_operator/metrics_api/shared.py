"""Answers that are shared: those who ask for the same at once wait for one answer, which then stands for a moment.

Hides the single flight, the lifetimes and the bound. Failures are shared too, so that a backend that hangs is waited
for once and not by each caller in turn. A caller that gives up cancels nothing for the others.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
_MOST = 4096


@dataclass(slots=True)
class _Entry(Generic[V]):
    asking: "asyncio.Task[V]"
    asked_at: float
    until: float = float("inf")  # while it is being asked


class Shared(Generic[K, V]):
    """The answers of `ask` by key. `lifetime_s` says for how long one stands; a failure stands `failure_s`."""

    def __init__(
        self,
        ask: Callable[[K], Awaitable[V]],
        *,
        lifetime_s: Callable[[V], float],
        failure_s: float,
        most: int = _MOST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask, self._lifetime_s, self._failure_s = ask, lifetime_s, failure_s
        self._most, self._clock = most, clock
        self._entries: dict[K, _Entry[V]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    async def get(self, key: K, *, max_age_s: float = float("inf")) -> V:
        """Return the answer, asked at most `max_age_s` ago. Raises what `ask` raises."""
        entry, now = self._entries.get(key), self._clock()
        if entry is None or now >= entry.until or (entry.asking.done() and now - entry.asked_at > max_age_s):
            entry = self._start(key)
        return await asyncio.shield(entry.asking)

    async def close(self) -> None:
        """Ask no more."""
        asking = [entry.asking for entry in self._entries.values()]
        self._entries.clear()
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    def _start(self, key: K) -> _Entry[V]:
        self._make_room()
        entry = _Entry(asyncio.ensure_future(self._asked(key)), self._clock())
        self._entries.pop(key, None)  # the newest is the last
        self._entries[key] = entry
        entry.asking.add_done_callback(lambda task: self._finish(entry, task))
        return entry

    async def _asked(self, key: K) -> V:
        return await self._ask(key)

    def _finish(self, entry: _Entry[V], task: "asyncio.Task[V]") -> None:
        if task.cancelled():
            entry.until = 0.0
            return
        stands_s = self._failure_s if task.exception() else self._lifetime_s(task.result())
        entry.until = self._clock() + stands_s

    def _make_room(self) -> None:
        """Forget the oldest answers; what is being asked is bounded by the requests that are served at once."""
        for key in [key for key, entry in self._entries.items() if entry.asking.done()]:
            if len(self._entries) < self._most:
                return
            del self._entries[key]
