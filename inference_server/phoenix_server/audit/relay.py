"""Takes events out of the outbox and delivers them: at least once, whoever dies in between.

An event leaves the outbox only after the broker has acknowledged it. On PostgreSQL the relays of all replicas share the
work (`FOR UPDATE SKIP LOCKED`): what one has in hand the others pass over, and what it had in hand when it died they
take. Delivered twice is possible, under the same event id.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from phoenix_server.event_format import Event
from phoenix_server.metrics import AuditMetrics
from phoenix_server.settings import Settings

if TYPE_CHECKING:
    from phoenix_server.audit.database import Link
    from phoenix_server.audit.store import Store

_log = logging.getLogger(__name__)
_BATCH = 500
_POLL_S = 2.0
_DELIVER_S = 10.0
_LAST_ROUND_S = 2.0
_LONGEST_PAUSE_S = 10.0
T = TypeVar("T")


class Deliver(Protocol):
    """Where events go."""

    def __call__(self, events: Sequence[Event], *, deadline_s: float) -> Awaitable[None]:
        """Return when all are acknowledged; raise otherwise."""


class Relay:
    """One process's relay. `on_count` is told whether the outbox is full."""

    def __init__(
        self, settings: Settings, metrics: AuditMetrics, deliver: Deliver, *, on_count: Callable[[bool], None]
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._deliver = deliver
        self._on_count = on_count
        self._wake = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._pause_s = 0.0
        self._task = asyncio.create_task(self._run())

    def wake(self) -> None:
        """Say that there is something in the outbox."""
        self._wake.set()

    async def close(self) -> None:
        """Deliver what is there, for a moment, and stop; the rest stays in the outbox for the next relay."""
        self._is_idle.clear()
        self._wake.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_ROUND_S):
                await self._is_idle.wait()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        store = await asyncio.to_thread(_new_store, self._settings)
        link: Link | None = None
        next_count = 0.0
        now = asyncio.get_running_loop().time
        await self._wake.wait()  # the tables may have to be made first
        try:
            while True:
                try:
                    if link is None:
                        link = await asyncio.to_thread(store.database.connect)
                    while await self._one_batch(store, link):
                        if now() > next_count:
                            break
                    else:
                        self._is_idle.set()
                    self._pause_s = 0.0
                except Exception as error:
                    # The database's outage is the writer's news, the broker's the events'.
                    _log.info("events stay in the outbox", extra={"cause": str(error)[:300]})
                    self._pause_s = min(max(2 * self._pause_s, 0.25), _LONGEST_PAUSE_S)
                    if link is not None:
                        link.close()
                        link = None
                if now() > next_count:
                    next_count = now() + _POLL_S
                    await self._count(store)
                if self._pause_s:
                    await asyncio.sleep(self._pause_s)
                elif self._is_idle.is_set():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_POLL_S):
                            await self._wake.wait()
                self._is_idle.clear()
                self._wake.clear()
        finally:
            if link is not None:
                link.abort()
                link.close()

    async def _one_batch(self, store: "Store", link: "Link") -> int:
        """Deliver the oldest events that are free; return how many."""
        batch = await self._on_thread(link, lambda: _claim(store, link))
        if not batch:
            return 0
        await self._deliver([event for _, event in batch], deadline_s=_DELIVER_S)
        await self._on_thread(link, lambda: _release(store, link, [number for number, _ in batch]))
        self._metrics.delivered += len(batch)
        return len(batch)

    async def _count(self, store: "Store") -> None:
        """Learn how full the outbox is; what fails here is tried again."""
        limit = self._settings.audit_outbox_rows
        with contextlib.suppress(Exception):
            link = await asyncio.to_thread(store.database.connect)
            try:
                count = await self._on_thread(link, lambda: store.count_outbox(link, limit))
            finally:
                link.close()
            self._metrics.outbox_rows = count
            self._on_count(count >= limit)

    async def _on_thread(self, link: "Link", work: Callable[[], T]) -> T:
        """Run a statement beside the event loop, and break the connection if it takes too long."""
        abort = asyncio.get_running_loop().call_later(self._settings.audit_deadline_seconds, link.abort)
        try:
            return await asyncio.to_thread(work)
        finally:
            abort.cancel()


def _new_store(settings: Settings) -> "Store":
    from phoenix_server.audit.database import Database
    from phoenix_server.audit.store import Store

    return Store(Database(settings))


def _claim(store: "Store", link: "Link") -> list[tuple[int, Event]]:
    """Take events in hand: on PostgreSQL their transaction stays open until they are delivered."""
    connection = link.connection
    with store.database.errors():
        transaction: Any = connection.begin()
        batch = store.claim(connection, _BATCH)
        if store.database.is_sqlite or not batch:
            transaction.rollback()  # SQLite would lock the writer out
        return batch


def _release(store: "Store", link: "Link", numbers: list[int]) -> None:
    connection = link.connection
    with store.database.errors():
        transaction: Any = connection.get_transaction() or connection.begin()
        store.release(connection, numbers)
        transaction.commit()
