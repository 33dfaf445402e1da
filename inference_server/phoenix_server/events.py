"""Publishes one event for each prediction, off the critical path: bounded, in order, and every loss counted.

Hides where events go (Kafka where the settings name one, else JSON lines in the state folder) and the thread in which
they are written, sent and acknowledged. `DataPlane` records through it, or the audit does: it takes `event` into its
outbox and hands it back to `deliver`.
"""

import asyncio
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Self

from phoenix_server.event_file import EventFiles
from phoenix_server.event_format import Event, size_of
from phoenix_server.event_stream import EventSink, Stream
from phoenix_server.kafka_binding import binding_of
from phoenix_server.metrics import EventCounts, Metrics
from phoenix_server.settings import Settings

if TYPE_CHECKING:
    from phoenix_server.dataplane import Prediction
    from phoenix_server.served_model import ServedModel

_log = logging.getLogger(__name__)
# How long events gather before they are written, and how many at once: the interpreter is held meanwhile.
_GATHER_S = 0.005
_MOST_AT_ONCE = 500
_CLOSE_WITHIN_S = 10.0
_AFTER_FAILURE_S = 1.0


class NotDelivered(Exception):
    """Events that are not known to be safe; deliver them again. The message names no secret."""


class _Delivery:
    """Events that somebody waits for. `settled` is called in the thread, `done` resolves on the loop."""

    def __init__(self, events: Sequence[Event], counts: Mapping[str, EventCounts]) -> None:
        """`counts` are the counters of each topic in use."""
        self.events = events
        self._counts = counts
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self._loop.create_future()
        self._left = len(events)
        self._fault: str | None = None

    def settled(self, fault: str | None) -> None:
        self._left -= 1
        self._fault = self._fault or fault
        if not self._left:
            for event in self.events if self._fault is None else ():
                if (counts := self._counts.get(event.topic)) is not None:
                    counts.published += 1
            self._loop.call_soon_threadsafe(self._resolve)

    def _resolve(self) -> None:
        if not self.done.done():
            if self._fault is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(NotDelivered(self._fault))


class Events:
    """The events of all models; an async context manager. Satisfies `dataplane.Recorder`."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._streams: dict[ServedModel, Stream | None] = {}
        self._reports: dict[str, Callable[[str, str | None], None]] = {}
        self._counts: dict[str, EventCounts] = {}
        self._queue: deque[tuple[Stream, Prediction | Event, int]] = deque()
        self._urgent: deque[_Delivery] = deque()
        self._ready: list[tuple[Stream, Event]] = []  # out of the queue and not yet sent; the thread's own
        # Each is written by one side only: the loop accepts, the thread takes.
        self._accepted_bytes = self._taken_bytes = 0
        self._wake = threading.Event()
        self._is_idle = False
        self._close_by_s: float | None = None
        self._thread: threading.Thread | None = None
        self._id_prefix = os.urandom(8).hex()
        self._id_count = itertools.count(1)

    async def __aenter__(self) -> Self:
        """Check the settings; raises `StartError(InvalidSetting)`. The thread starts with the first model or event."""
        self._loop = asyncio.get_running_loop()
        settings = self._settings
        self._sink: EventSink
        if settings.kafka_bootstrap_servers is None:
            self._sink = EventFiles(settings.state_dir / "events", max_bytes=settings.events_file_bytes)
        else:
            from phoenix_server.event_broker import EventBroker  # 20 MB that only users of Kafka need
            from phoenix_server.kafka_client import KafkaLink

            self._sink = EventBroker(KafkaLink(settings), self._reports)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Send what waits, for at most some seconds, and count what is lost."""
        within_s = min(_CLOSE_WITHIN_S, self._settings.shutdown_seconds)
        self._close_by_s = time.monotonic() + within_s
        self._wake.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, within_s + 5)

    def follow(self, models: Iterable["ServedModel"]) -> None:
        """Learn which models are loaded now, before any of them is asked: their topics are checked at once."""
        models = set(models)
        for gone in self._streams.keys() - models:
            del self._streams[gone]
        for model in models:
            self._stream(model)
        for topic in self._reports.keys() - {stream.topic for stream in self._streams.values() if stream}:
            del self._reports[topic]

    async def record(self, prediction: "Prediction") -> None:
        """Publish the event of a prediction, where its model declares events."""
        stream = self._stream(prediction.model)
        if stream is not None and stream.takes(prediction.request.id):
            size = 500 + size_of(prediction.request.inputs.values())
            if prediction.response is not None:
                size += size_of([array for _, array in prediction.response.outputs])
            self._accept(stream, prediction, size)

    def event(self, prediction: "Prediction") -> Event | None:
        """Return the event of a prediction; None where its model declares none or sampling leaves it out."""
        stream = self._stream(prediction.model)
        if stream is None or not stream.takes(prediction.request.id):
            return None
        return stream.event(prediction, self._new_id())

    def publish(self, event: Event, model: "ServedModel") -> None:
        """Send an event when there is time; never raises, losses are counted."""
        stream = self._stream(model)
        if stream is not None:
            self._accept(stream, event, len(event.value))

    async def deliver(self, events: Sequence[Event], *, deadline_s: float) -> None:
        """Return when the broker has acknowledged every event, or the file is synced.

        Raises `NotDelivered` if one is refused or `deadline_s` seconds pass; some may be delivered then, or later.
        """
        if not events:
            return
        if self._close_by_s is not None:
            raise NotDelivered("the server is shutting down")
        delivery = _Delivery(events, self._counts)
        self._urgent.append(delivery)
        self._start()
        try:
            async with asyncio.timeout(deadline_s):
                await delivery.done
        except TimeoutError:
            raise NotDelivered(f"not acknowledged within {deadline_s:g} s") from None

    def _new_id(self) -> str:
        return f"{self._id_prefix}-{next(self._id_count):x}"

    def _stream(self, model: "ServedModel") -> Stream | None:
        try:
            return self._streams[model]
        except KeyError:
            pass
        stream = None
        kafka = model.spec.bindings and model.spec.bindings.kafka
        if kafka:
            counts = self._metrics.events.setdefault(model.name, EventCounts())
            if kafka.events.sample_percent:
                stream = Stream(model, counts)
                self._counts[stream.topic] = counts
                if self._settings.kafka_bootstrap_servers is not None:
                    binding = binding_of(model.name, self._metrics.bindings, self._loop.call_soon_threadsafe)
                    self._reports[stream.topic] = binding.report
                self._start()
        self._streams[model] = stream
        return stream

    def _accept(self, stream: Stream, item: "Prediction | Event", size: int) -> None:
        settings = self._settings
        if self._close_by_s is not None:
            stream.lose("shutdown")
            return
        if (
            len(self._queue) >= settings.events_queue_records
            or self._accepted_bytes - self._taken_bytes + size > settings.events_queue_bytes
        ):
            stream.lose("queue_full")
            return
        self._accepted_bytes += size
        self._queue.append((stream, item, size))
        if self._is_idle:
            self._wake.set()

    # --- the thread ------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="events", daemon=True)
            self._thread.start()
        elif self._is_idle:
            self._wake.set()

    def _run(self) -> None:
        while True:
            try:
                self._work()
                break
            except Exception:
                _log.exception("the thread of events failed and goes on", extra={"lost": len(self._ready)})
                for stream, _ in self._ready:
                    stream.lose("failed")
                self._ready.clear()
                time.sleep(_AFTER_FAILURE_S)
        close_by_s = self._close_by_s or 0.0
        self._sink.close(max(0.0, close_by_s - time.monotonic()))
        for stream in [stream for stream, _ in self._ready] + [stream for stream, _, _ in self._queue]:
            stream.lose("shutdown")

    def _work(self) -> None:
        """Send what comes, until the server shuts down."""
        sink, ready = self._sink, self._ready
        while True:
            while self._urgent:
                delivery = self._urgent.popleft()
                sink.deliver(delivery.events, delivery.settled)
            if not ready:
                self._take(ready)
            if ready:
                del ready[: sink.send(ready)]
            is_busy = sink.turn(_GATHER_S if ready or self._queue else 0.0)
            if self._close_by_s is not None and (
                time.monotonic() >= self._close_by_s or not (ready or self._queue or self._urgent)
            ):
                break
            if is_busy and not self._queue:
                sink.turn(_GATHER_S)
            elif not (ready or self._queue or self._urgent):
                self._sleep()

    def _take(self, ready: list[tuple[Stream, Event]]) -> None:
        """Move items from the queue, written as events."""
        queue = self._queue
        for _ in range(min(len(queue), _MOST_AT_ONCE)):
            stream, item, size = queue.popleft()
            self._taken_bytes += size
            try:
                ready.append((stream, item if isinstance(item, Event) else stream.event(item, self._new_id())))
            except Exception:
                stream.lose("failed")
                _log.exception("an event cannot be written", extra={"model": stream.model})

    def _sleep(self) -> None:
        self._is_idle = True
        if not (self._queue or self._urgent or self._close_by_s is not None):
            self._wake.wait(0.5)
        self._is_idle = False
        self._wake.clear()
        time.sleep(_GATHER_S if self._close_by_s is None and not self._urgent else 0.0)
