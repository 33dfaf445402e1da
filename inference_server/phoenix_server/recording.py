"""Keeps predictions as the manifest says: joins audit and events, so that the two never disagree.

| `bindings.postgres.audit.mode` | a prediction is answered | its event |
|---|---|---|
| `Durable` | when its row is committed, else 503 | in the outbox, in the same transaction; a relay delivers it |
| `BestEffort` | at once; its row waits in a bounded queue | handed to the events at once |
| `Off`, or no `postgres` | at once; there is no row | handed to the events at once |

Implements the data plane's `Recorder`. The audit's thread starts with the first model that has the binding.
"""

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from phoenix_api import AuditMode
from phoenix_server.audit.record import Record
from phoenix_server.audit.relay import Relay
from phoenix_server.audit.writer import Writer
from phoenix_server.binding_state import BindingState
from phoenix_server.dataplane import Prediction
from phoenix_server.event_format import Event
from phoenix_server.metrics import Metrics
from phoenix_server.served_model import ServedModel
from phoenix_server.settings import Settings

if TYPE_CHECKING:
    from phoenix_server.audit.chain import Head

_log = logging.getLogger(__name__)
_HEAD_DEADLINE_S = 10.0


class EventSource(Protocol):
    """What the audit needs of `events.Events`."""

    def event(self, prediction: Prediction) -> Event | None:
        """Return the event of a prediction, if its model declares events and sampling takes it."""

    async def record(self, prediction: Prediction) -> None:
        """Publish the event of a prediction without waiting; losses are counted."""

    async def deliver(self, events: Sequence[Event], *, deadline_s: float) -> None:
        """Return when all are acknowledged; raise otherwise."""


class Recording:
    """The recorder of a process; an async context manager."""

    def __init__(self, settings: Settings, metrics: Metrics, events: EventSource | None = None) -> None:
        self._settings = settings
        self._metrics = metrics
        self._events = events
        self._state: BindingState | None = None
        self._writer: Writer | None = None
        self._relay: Relay | None = None
        self._modes: dict[ServedModel, tuple[AuditMode, bool]] = {}
        self._heads: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        """Start nothing yet."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what waits, for some seconds at most."""
        if self._writer is not None:
            await self._writer.close()
            await asyncio.gather(*self._heads, return_exceptions=True)
        if self._relay is not None:
            await self._relay.close()

    def follow(self, models: "Sequence[ServedModel]") -> None:
        """Learn which models are loaded now; each with a binding to PostgreSQL is noted in the table `models`."""
        for gone in self._modes.keys() - set(models):
            del self._modes[gone]
        for model in models:
            if model not in self._modes:
                self._learn(model)

    async def record(self, prediction: Prediction) -> None:
        """Keep a prediction as declared. Raises `PhoenixError(UNAVAILABLE)` where a row must be and is not."""
        model = prediction.model
        mode, includes_tensors = self._modes.get(model) or self._learn(model)
        if mode is AuditMode.DURABLE:
            assert self._writer is not None
            event = None if self._events is None else self._events.event(prediction)
            record = Record(prediction, includes_tensors, None if event is None else event.id, event)
            await self._writer.write_now(record)
            return
        if mode is AuditMode.BEST_EFFORT:
            assert self._writer is not None
            self._writer.write_later(Record(prediction, includes_tensors))
        if self._events is not None:
            await self._events.record(prediction)

    def _learn(self, model: ServedModel) -> tuple[AuditMode, bool]:
        postgres = model.spec.bindings and model.spec.bindings.postgres
        if not postgres:
            found = (AuditMode.OFF, False)
        else:
            found = (postgres.audit.mode, postgres.audit.include_tensors)
            if self._writer is None:
                self._start()
            assert self._writer is not None
            assert self._state is not None
            self._state.models.add(model.name)
            self._writer.serves(model)
        self._modes[model] = found
        return found

    def _start(self) -> None:
        self._state = BindingState("postgresql")
        self._metrics.bindings.append(self._state)
        self._writer = Writer(self._settings, self._metrics.audit, self._state)
        self._writer.on_head = self._publish_head
        if self._events is not None:
            writer = self._writer

            def on_count(is_full: bool) -> None:
                writer.is_outbox_full = is_full

            self._relay = Relay(self._settings, self._metrics.audit, self._events.deliver, on_count=on_count)
            self._writer.on_events = self._relay.wake

    def _publish_head(self, head: "Head") -> None:
        """Let the head be known where who can change the database cannot: in the log, and a topic if there is one."""
        fields = {"writer": head.writer, "sequence": head.sequence, "hash": head.hash.hex()}
        _log.info("audit chain", extra=fields)
        topic = self._settings.audit_heads_topic
        if topic is not None and self._events is not None:
            document = {"kind": "audit-chain-head", "time": time.time(), **fields}
            event = Event(f"{head.writer}-{head.sequence}", topic, head.writer.encode(), json.dumps(document).encode())
            task = asyncio.create_task(self._deliver_head(self._events, event))
            self._heads.add(task)
            task.add_done_callback(self._heads.discard)

    @staticmethod
    async def _deliver_head(events: EventSource, event: Event) -> None:
        try:
            await events.deliver([event], deadline_s=_HEAD_DEADLINE_S)
        except Exception as error:  # the next head says more than this one did
            _log.warning("the head of the audit chain was not published", extra={"cause": str(error)[:300]})
