"""The one thread that writes the audit: whatever waits becomes one transaction (group commit) and lengthens the chain.

`Durable` records are answered after the commit, or with 503 when the database does not take them within the deadline;
`BestEffort` ones wait in a bounded queue for a batch. While the database is down `Durable` records fail at once and a
new connection is tried every second. A connection that breaks ends the chain, because what became of its last
transaction is not known: the next connection begins another, under a new writer's name.

A thread, and not the event loop: building and hashing rows costs as much as answering does, and the drivers' own work
would add to it. Everything that the loop does here is to append to a deque.
"""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from phoenix_server.audit.chain import Head, chained, genesis
from phoenix_server.audit.record import Record, facts_of, row_of
from phoenix_server.binding_state import BindingState
from phoenix_server.errors import Code, PhoenixError, StartError
from phoenix_server.metrics import AuditMetrics
from phoenix_server.settings import Settings

if TYPE_CHECKING:
    from phoenix_server.audit.database import DatabaseError, Link
    from phoenix_server.audit.store import Store
    from phoenix_server.served_model import ServedModel

_log = logging.getLogger(__name__)
# BestEffort waits this long for a batch to fill; Durable never waits.
_LINGER_S = 0.05
_GROUP_ROWS = 1000
_GROUP_BYTES = 16 << 20
_QUEUE_BYTES = 256 << 20
_RETRY_S = 1.0
_HEAD_EVERY_S = 10.0
_SEEN_EVERY_S = 3600.0
_MAINTAIN_EVERY_S = 6 * 3600.0
_WATCH_EVERY_S = 0.1
_DRAIN_S = 10.0


class Writer:
    """The audit's thread, its queue and its chain. Methods are for the event loop unless they say otherwise."""

    def __init__(self, settings: Settings, metrics: AuditMetrics, state: BindingState) -> None:
        self._settings = settings
        self._metrics = metrics
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Record] = deque()
        self._queue_bytes = 0
        self._durable: set[Record] = set()
        self._models: deque[ServedModel] = deque()
        self._wake = threading.Event()
        self._urgent = threading.Event()
        self._is_stopping = False
        self._busy_since: float | None = None
        self._link: Link | None = None
        # Told on the loop: events are in the outbox; how far the chain has come.
        self.on_events: Callable[[], None] = lambda: None
        self.on_head: Callable[[Head], None] = lambda head: None
        self.is_outbox_full = False
        metrics.queue_rows = lambda: len(self._queue)
        self._watching = self._loop.create_task(self._watch())
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    # --- the event loop's side -------------------------------------------------------------------------------------

    def serves(self, model: "ServedModel") -> None:
        """Note in `models` that a version is served."""
        self._models.append(model)
        self._wake.set()

    def write_later(self, record: Record) -> None:
        """Take a `BestEffort` record, or lose and count it where the queue is full. Never waits."""
        if len(self._queue) >= self._settings.audit_queue_rows or self._queue_bytes > _QUEUE_BYTES:
            self._metrics.dropped["queue_full"] += 1
            return
        self._put(record)

    async def write_now(self, record: Record) -> None:
        """Return when a `Durable` record is committed. Raises `PhoenixError(UNAVAILABLE)` if that is not certain."""
        if self._state.is_up is False:
            raise self._unavailable("the audit database is down")
        if len(self._durable) >= self._settings.audit_queue_rows:
            raise self._unavailable("too many predictions wait for it")
        if record.event is not None and self.is_outbox_full:
            raise self._unavailable(
                f"the outbox holds {self._settings.audit_outbox_rows} events that are not delivered"
            )
        record.answered = self._loop.create_future()
        record.deadline_s = time.monotonic() + self._settings.audit_deadline_seconds
        self._durable.add(record)
        try:
            self._put(record, is_urgent=True)
            failure = await record.answered
        finally:
            self._durable.discard(record)
        if failure is not None:
            raise self._unavailable(failure)

    async def close(self) -> None:
        """Write what waits, for some seconds at most, and end the thread."""
        self._is_stopping = True
        self._urgent.set()
        self._wake.set()
        await asyncio.to_thread(self._thread.join, _DRAIN_S)
        if self._thread.is_alive() and self._link is not None:
            self._link.abort()
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        if self._queue:
            self._metrics.dropped["shutdown"] += len(self._queue)
            _log.error("predictions were not recorded when the process ended", extra={"rows": len(self._queue)})

    def _put(self, record: Record, *, is_urgent: bool = False) -> None:
        if record.includes_tensors:
            record.size_bytes = sum([array.nbytes for array in record.prediction.request.inputs.values()])
        self._queue_bytes += record.size_bytes
        self._queue.append(record)
        if is_urgent:
            self._urgent.set()
        if not self._wake.is_set():
            self._wake.set()

    async def _watch(self) -> None:
        """Answer what waited too long, and break a connection that hangs."""
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            now = time.monotonic()
            for record in self._durable:
                if record.deadline_s < now and not record.answered.done():
                    record.answered.set_result("it did not answer in time")
            busy, link = self._busy_since, self._link
            if busy is not None and now - busy > self._settings.audit_deadline_seconds:
                self._state.fails(f"no answer within {self._settings.audit_deadline_seconds:g} s")
                if link is not None:
                    link.abort()

    def _unavailable(self, cause: str) -> PhoenixError:
        return PhoenixError(Code.UNAVAILABLE, f"the prediction could not be recorded: {cause}", retry_after_s=1)

    # --- the thread's side -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            from phoenix_server.audit.database import Database
            from phoenix_server.audit.store import Store

            thread = _Thread(self, Store(Database(self._settings)), self._metrics)
        except StartError as error:
            self.tell(self._state.fails, error.message)
            _log.error("the audit cannot start", extra={"cause": error.message})
            return
        except Exception:
            _log.exception("the audit cannot start")
            self.tell(self._state.fails, "the audit cannot start; the log says why")
            return
        thread.run()

    def tell(self, callback: Callable[..., object], *arguments: object) -> None:
        """Call back on the event loop, from the thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(callback, *arguments)

    def is_over(self) -> bool:
        """Whether there is nothing left to do (thread)."""
        return self._is_stopping and not self._queue

    def is_stopping(self) -> bool:
        """Whether the process is on its way out (thread)."""
        return self._is_stopping

    def wait(self, timeout_s: float) -> None:
        """Sleep until there is work; give `BestEffort` a moment to become a batch (thread)."""
        if self._wake.wait(timeout_s):
            self._urgent.wait(_LINGER_S)
        self._urgent.clear()
        self._wake.clear()

    def take(self) -> list[Record]:
        """Return the next group (thread)."""
        group: list[Record] = []
        size = 0
        while self._queue and len(group) < _GROUP_ROWS and size < _GROUP_BYTES:
            record = self._queue.popleft()
            size += record.size_bytes
            if record.answered is None or not record.answered.done():  # who was told 503 is not recorded any more
                group.append(record)
        self.tell(self._add_bytes, -size)
        return group

    def _add_bytes(self, change: int) -> None:
        self._queue_bytes += change

    def put_back(self, records: list[Record]) -> None:
        """Queue records again, before the others (thread)."""
        self._queue.extendleft(reversed(records))
        self.tell(self._add_bytes, sum(record.size_bytes for record in records))

    def next_models(self) -> "list[ServedModel]":
        """Return versions that were loaded since the last call (thread)."""
        models = []
        while self._models:
            models.append(self._models.popleft())
        return models

    def models_again(self, models: "list[ServedModel]") -> None:
        """Return versions whose row could not be written (thread)."""
        self._models.extend(models)

    def works_on(self, link: "Link | None") -> None:
        """Note that the thread waits for the database from now on, with that connection or for one (thread)."""
        self._link = link
        self._busy_since = time.monotonic()

    def is_done(self) -> None:
        """Note that the database answered (thread)."""
        self._busy_since = None

    def works(self) -> None:
        """The database answers (thread)."""
        if not self._state.is_up:
            self.tell(self._state.works)

    def fails(self, cause: str) -> None:
        """The database does not answer, or refuses (thread)."""
        self.tell(self._state.fails, cause)

    def answer(self, records: list[Record], failure: str | None) -> None:
        """Let requests go on that wait for these records (thread)."""
        waiting = [record for record in records if record.answered is not None]
        if waiting:
            self.tell(_answer, waiting, failure)


def _answer(records: list[Record], failure: str | None) -> None:
    for record in records:
        if not record.answered.done():
            record.answered.set_result(failure)


class _Thread:
    """What the audit's thread knows: connection, chain, times."""

    def __init__(self, writer: Writer, store: "Store", metrics: AuditMetrics) -> None:
        self._writer = writer
        self._store = store
        self._metrics = metrics
        self._link: Link | None = None
        self._doubtful: tuple[str, int, list[Record]] | None = None
        self._served: dict[int, ServedModel] = {}
        self._begin_chain()
        self._next_head = self._next_seen = self._next_maintenance = 0.0

    def run(self) -> None:
        """Write until the writer is closed and nothing waits, or the database does not take it any more."""
        while True:
            if self._link is not None and not self._writer.is_stopping():
                self._writer.wait(_HEAD_EVERY_S)
            try:
                self._turn()
            except Exception as error:
                self._lost(error)
                if self._writer.is_stopping():
                    break
                self._pause()
            if self._writer.is_over():
                break
        self._end()

    def _turn(self) -> None:
        link = self._connected()
        self._writer.works_on(link)
        self._settle(link)
        self._note_models(link)
        while True:
            group = self._writer.take()
            if not group:
                break
            self._writer.works_on(link)
            self._write(link, group)
        self._housekeeping(link)
        self._writer.is_done()

    def _pause(self) -> None:
        """Wait for a while before the next try; whatever comes meanwhile is answered at once by `write_now`."""
        end = time.monotonic() + _RETRY_S
        while (left := end - time.monotonic()) > 0 and not self._writer.is_stopping():
            time.sleep(min(left, 0.05))

    # --- connection ------------------------------------------------------------------------------------------------

    def _connected(self) -> "Link":
        if self._link is not None:
            return self._link
        from phoenix_server.audit import migrate

        self._writer.works_on(None)
        link = self._store.database.connect()
        self._writer.works_on(link)
        try:
            migrate.ensure(link)
            self._check_writable(link)
        except Exception:
            link.close()
            raise
        self._link = link
        self._next_maintenance = 0.0
        return link

    def _check_writable(self, link: "Link") -> None:
        """Say that the database is up only when it takes writes: a head of length 0 begins the chain."""
        self._store.add_head(link, Head(self._name, 0, genesis(self._name)), datetime.now(UTC))
        self._writer.works()
        self._writer.tell(self._writer.on_events)  # a process that is gone may have left some

    def _lost(self, error: Exception) -> None:
        from phoenix_server.audit.database import DatabaseError

        link, self._link = self._link, None
        self._writer.works_on(None)
        self._writer.is_done()
        if isinstance(error, DatabaseError):
            self._writer.fails(error.message)
        else:
            _log.error("unexpected failure of the audit", exc_info=error)
            self._writer.fails(f"unexpected: {type(error).__name__}; the log says more")
        if link is not None:
            link.close()
        self._begin_chain()
        # Nobody waits for an answer longer than for this news.
        kept = []
        for record in self._drained():
            if record.answered is not None:
                self._writer.answer([record], "the audit database is down")
            else:
                kept.append(record)
        self._writer.put_back(kept)

    def _drained(self) -> list[Record]:
        records: list[Record] = []
        while group := self._writer.take():
            records += group
        return records

    # --- rows ------------------------------------------------------------------------------------------------------

    def _begin_chain(self) -> None:
        self._name = os.urandom(16).hex()
        self._hash = genesis(self._name)
        self._sequence = self._head_noted = 0
        self._written_us = 0
        self._metrics.chain_length = 0

    def _write(self, link: "Link", group: list[Record]) -> None:
        from phoenix_server.audit.database import DatabaseError

        started = time.perf_counter()
        written_us = max(self._written_us, time.time_ns() // 1000)
        sequence, last, rows, events = self._sequence, self._hash, [], []
        for record in group:
            sequence += 1
            row = chained(last, row_of(record, self._name, sequence, written_us))
            last = row.hash
            rows.append(row)
            if record.event is not None:
                events.append(record.event)
        try:
            self._store.add(link, rows, events)
        except DatabaseError as error:
            if error.is_refusal:
                self._refused(link, group, error)
                return
            lasting = [record for record in group if record.answered is None]
            self._writer.answer(group, "the audit database does not answer")
            if lasting:
                self._doubtful = (self._name, sequence, lasting)
            raise
        self._sequence, self._hash, self._written_us = sequence, last, written_us
        self._writer.answer(group, None)
        self._writer.works()
        self._metrics.rows += len(rows)
        self._metrics.chain_length = sequence
        self._metrics.commit.observe(time.perf_counter() - started)
        if events:
            self._writer.tell(self._writer.on_events)

    def _refused(self, link: "Link", group: list[Record], error: "DatabaseError") -> None:
        """One row cannot be stored; the others of its group must not suffer."""
        if len(group) > 1:
            for record in group:
                self._write(link, [record])
            return
        _log.error("the audit database refuses a prediction", extra={"cause": error.message})
        if group[0].answered is None:
            self._metrics.dropped["refused"] += 1
        self._writer.answer(group, "the audit database refuses this prediction")

    def _settle(self, link: "Link") -> None:
        """Find out what became of the batch whose transaction was not heard of, and write it again if it was lost."""
        if self._doubtful is None:
            return
        name, sequence, records = self._doubtful
        if not self._store.has_row(link, name, sequence):
            self._writer.put_back(records)
        else:
            self._metrics.rows += len(records)
        self._doubtful = None

    # --- everything else -------------------------------------------------------------------------------------------

    def _note_models(self, link: "Link") -> None:
        models = self._writer.next_models()
        try:
            for model in models:
                self._store.see_model(link, facts_of(model), datetime.now(UTC))
                self._served[id(model)] = model
        except Exception:
            self._writer.models_again(models)
            raise

    def _housekeeping(self, link: "Link") -> None:
        now = time.monotonic()
        if now >= self._next_head:
            self._next_head = now + _HEAD_EVERY_S
            self._note_head(link)
        if now >= self._next_seen:
            self._next_seen = now + _SEEN_EVERY_S
            for model in self._served.values():
                self._store.see_model(link, facts_of(model), datetime.now(UTC))
        if now >= self._next_maintenance:
            self._next_maintenance = now + _MAINTAIN_EVERY_S
            self._maintain()

    def _note_head(self, link: "Link") -> None:
        if self._sequence > self._head_noted:
            head = Head(self._name, self._sequence, self._hash)
            self._store.add_head(link, head, datetime.now(UTC))
            self._head_noted = self._sequence
            self._writer.tell(self._writer.on_head, head)

    def _maintain(self) -> None:
        """Partitions and retention, on a connection of its own: what fails there is tried again, and stops nothing."""
        from phoenix_server.audit import migrate
        from phoenix_server.audit.database import DatabaseError

        try:
            with self._store.database.connect() as link:
                self._writer.works_on(link)
                dropped = migrate.maintain(link, datetime.now(UTC))
        except DatabaseError as error:
            _log.warning("partitions and retention have to wait", extra={"cause": error.message})
            return
        if dropped:
            _log.info("retention dropped predictions", extra={"dropped": dropped})

    def _end(self) -> None:
        if self._link is None:
            return
        with contextlib.suppress(Exception):
            self._writer.works_on(self._link)
            self._note_head(self._link)
            for model in self._served.values():
                self._store.see_model(self._link, facts_of(model), datetime.now(UTC))
        self._writer.is_done()
        self._link.close()
