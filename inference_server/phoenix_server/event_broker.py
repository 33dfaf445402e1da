"""Events as Kafka records: an idempotent producer, its delivery reports, and what they say of the cluster.

Lives in the thread of `events.Events`. librdkafka sends again by itself for as long as `_DELIVERY_TIMEOUT_MS`, so a
broker that restarts costs nothing; what is lost is counted by its reason. A cluster that is in doubt is asked every
other second, until it answers, so that a fault is told and taken back also where no prediction is made.
"""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from phoenix_server.event_format import Event
from phoenix_server.event_stream import Settled, Stream
from phoenix_server.kafka_client import KafkaError, KafkaException, KafkaLink, LastError, Producer, loss_reason

_log = logging.getLogger(__name__)
_PROBE_EVERY_S = 2.0
_DELIVERY_TIMEOUT_MS = 120_000
# How long a refusal stands before the topic is asked for again, which may be allowed where writing is not.
_DENIED_FOR_S = 10.0
_PART = "events"
# To compress and send a batch costs half a millisecond of the CPU that serves, however few events are in it.
_LINGER_MS = 100
_WAITED_FOR_LINGER_MS = 2


class EventBroker:
    """Sends events to Kafka; see `event_stream.EventSink`.

    `reports` gives for each topic that is in use what tells its model's binding of a fault, or of None.
    """

    def __init__(self, link: KafkaLink, reports: Mapping[str, Callable[[str, str | None], None]]) -> None:
        self._link = link
        self._reports = reports
        self._account = _Account()
        self._known: set[str] = set()  # topics that were found well, and not doubted since
        self._next_probe_s = 0.0
        self._last_error = LastError(link)
        self._fatal: KafkaError | None = None
        self._broken_since_s = 0.0
        self._is_waited_for_broken = False
        self._producer = self._new_producer(_LINGER_MS, self._on_error, {"delivery.report.only.error": True})
        # Another one for events that somebody waits for, which must not linger. Made when it is needed.
        self._waited_for: Producer | None = None

    def send(self, events: Sequence[tuple[Stream, Event]]) -> int:
        """Hand events to the client; those after the first that its buffer has no room for are left."""
        taken = 0
        while taken < len(events) and self._fatal is None:
            stream, first = events[taken]
            end = taken + 1
            while end < len(events) and events[end][0] is stream:
                end += 1
            messages: list[dict[str, Any]] = [{"value": e.value, "key": e.key} for _, e in events[taken:end]]
            accepted = self._produce(first.topic, messages, self._reporter(stream))
            for message in messages[:accepted]:
                if (error := message.get("_error")) is not None:
                    self._lost(stream, error)
            taken += accepted
            self._account.sent(stream, accepted)
            if accepted < len(messages):
                break
        return taken

    def deliver(self, events: Sequence[Event], settled: Settled) -> None:
        """Hand events to the client, to be told of each when the broker has acknowledged it."""

        def reported(error: KafkaError | None, _: object) -> None:
            settled(None if error is None else self._link.words(error))

        if self._waited_for is None:
            self._waited_for = self._new_producer(_WAITED_FOR_LINGER_MS, self._on_error_waited_for)
        for event in events:
            try:
                self._waited_for.produce(event.topic, event.value, event.key, on_delivery=reported)
            except BufferError:
                settled("the client's buffer is full")
            except KafkaException as failure:
                settled(self._link.words(failure.args[0]))

    def turn(self, wait_s: float) -> bool:
        """Serve delivery reports; ask the cluster where it is in doubt."""
        if self._waited_for is not None and len(self._waited_for):
            self._waited_for = self._serve_waited_for(self._waited_for, wait_s)
            wait_s = 0.0
        self._poll(wait_s)
        if self._fatal is not None and time.monotonic() >= self._broken_since_s + _PROBE_EVERY_S:
            self._replace(self._fatal)
        if len(self._known) < len(self._reports) and time.monotonic() >= self._next_probe_s:
            self._probe()
        return len(self._producer) > 0 or (self._waited_for is not None and len(self._waited_for) > 0)

    def close(self, within_s: float) -> None:
        """Send what is buffered; what is not acknowledged in time is lost for `shutdown`."""
        until_s = time.monotonic() + within_s
        while len(self._producer) and self._fatal is None and (left_s := until_s - time.monotonic()) > 0:
            self._poll(min(left_s, 0.1))
        self._purge()

    def _poll(self, wait_s: float) -> None:
        try:
            self._producer.poll(wait_s)
        except KafkaException as failure:  # of a fatal error
            self._on_error(failure.args[0])
        self._account.settle(len(self._producer))

    def _purge(self) -> None:
        """Give up what the client holds, and count it."""
        if len(self._producer):
            self._producer.purge()
            until_s = time.monotonic() + 1.0
            while len(self._producer) and time.monotonic() < until_s:
                self._poll(0.05)

    def _produce(self, topic: str, messages: list[dict[str, Any]], reported: Callable[..., None]) -> int:
        """Return how many messages from the front are done with: accepted, or refused for good (`_error`)."""
        try:
            self._producer.produce_batch(topic, messages, on_delivery=reported)
        except BufferError:
            return 0
        except KafkaException as failure:
            for message in messages:
                message["_error"] = failure.args[0]
        for index, message in enumerate(messages):
            error = message.get("_error")
            if error is not None and error.code() == KafkaError._QUEUE_FULL:
                return index
        return len(messages)

    def _reporter(self, stream: Stream) -> Callable[[KafkaError | None, object], None]:
        def reported(error: KafkaError | None, _: object) -> None:
            if error is not None:
                self._lost(stream, error)

        return reported

    def _lost(self, stream: Stream, error: KafkaError) -> None:
        error = self._fatal or error  # which a purged record does not know
        reason = loss_reason(error)
        stream.lose(reason)
        self._account.lost(stream)
        if reason in ("denied", "no_topic", "timeout", "failed"):
            self._known.discard(stream.topic)
            if reason == "denied":  # asking for the topic may be allowed where writing is not
                self._report(stream.topic, f"topic '{stream.topic}': {self._link.words(error)}")
                self._next_probe_s = time.monotonic() + _DENIED_FOR_S

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal() and self._fatal is None:
            self._fatal, self._broken_since_s = error, time.monotonic()
            for topic in list(self._reports):
                self._report(topic, self._link.words(error))
            self._next_probe_s = self._broken_since_s + _DENIED_FOR_S
        self._last_error.take(error)
        self._known.clear()

    def _probe(self) -> None:
        for topic in [topic for topic in list(self._reports) if topic not in self._known]:
            fault = self._link.topic_fault(self._producer, topic)
            self._poll(0)
            if fault is None:
                self._known.add(topic)
                self._last_error.text = ""
            self._report(topic, fault and (self._last_error.text or fault))
        self._next_probe_s = time.monotonic() + _PROBE_EVERY_S

    def _report(self, topic: str, fault: str | None) -> None:
        report = self._reports.get(topic)
        if report is not None:
            report(_PART, fault)

    def _replace(self, fatal: KafkaError) -> None:
        """Make a new producer where the old one can go on no more, which loses what it holds."""
        _log.debug("the producer of events failed and is replaced", extra={"cause": self._link.words(fatal)})
        self._purge()
        self._account.settle(0)
        self._producer = self._new_producer(_LINGER_MS, self._on_error, {"delivery.report.only.error": True})
        self._fatal = None

    def _serve_waited_for(self, producer: Producer, wait_s: float) -> Producer | None:
        """Serve delivery reports; return the producer if it can go on. One that cannot has settled everything."""
        try:
            producer.poll(wait_s)
        except KafkaException as failure:
            self._on_error_waited_for(failure.args[0])
        if not self._is_waited_for_broken:
            return producer
        self._is_waited_for_broken = False
        producer.purge()
        with contextlib.suppress(KafkaException):
            producer.flush(1.0)
        return None

    def _on_error_waited_for(self, error: KafkaError) -> None:
        self._is_waited_for_broken = self._is_waited_for_broken or error.fatal()
        self._last_error.take(error)
        self._known.clear()

    def _new_producer(
        self, linger_ms: int, on_error: Callable[[KafkaError], None], others: Mapping[str, Any] | None = None
    ) -> Producer:
        return self._link.producer(
            {
                "linger.ms": linger_ms,
                "queue.buffering.max.messages": 100_000,
                "queue.buffering.max.kbytes": 65_536,
                "message.timeout.ms": _DELIVERY_TIMEOUT_MS,
                **(others or {}),
            },
            on_error,
        )


class _Account:
    """Counts what the broker acknowledged without a report of each record, which would cost a microsecond.

    The client tells of losses, and how many records it still holds: what it neither holds nor lost is published. That
    is set against what was sent, in its order; for one model this is exact, for several it is in the end.
    """

    def __init__(self) -> None:
        self._sent: deque[tuple[Stream, int]] = deque()
        self._open = 0
        self._lost: dict[Stream, int] = {}

    def sent(self, stream: Stream, count: int) -> None:
        """Take note of records that the client was given, refused ones included."""
        if count:
            self._sent.append((stream, count))
            self._open += count

    def lost(self, stream: Stream) -> None:
        """Take note of a record that is not going to be acknowledged."""
        self._lost[stream] = self._lost.get(stream, 0) + 1

    def settle(self, held: int) -> None:
        """Count as published what was sent, is not lost and not among the `held` records of the client."""
        done = self._open - held
        while done > 0 and self._sent:
            stream, count = self._sent.popleft()
            if count > done:
                self._sent.appendleft((stream, count - done))
                count = done
            done -= count
            self._open -= count
            lost = min(count, self._lost.get(stream, 0))
            if lost:
                self._lost[stream] -= lost
            stream.counts.published += count - lost
