"""Events as Kafka records: an idempotent producer, its delivery reports, and what they say of the cluster.

Lives in the thread of `events.Events`. librdkafka sends again by itself for as long as `_DELIVERY_TIMEOUT_MS`, so a
broker that restarts costs nothing; what is lost is counted by its reason. A cluster that is in doubt is asked every
other second, until it answers, so that a fault is told and taken back also where no prediction is made.
"""

import logging
import time
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


class EventBroker:
    """Sends events to Kafka; see `event_stream.EventSink`.

    `reports` gives for each topic that is in use what tells its model's binding of a fault, or of None.
    """

    def __init__(self, link: KafkaLink, reports: Mapping[str, Callable[[str, str | None], None]]) -> None:
        self._link = link
        self._reports = reports
        self._known: set[str] = set()  # topics that were found well, and not doubted since
        self._next_probe_s = 0.0
        self._last_error = LastError(link)
        self._fatal: KafkaError | None = None
        self._broken_since_s = 0.0
        self._producer = self._new_producer()

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
            if accepted < len(messages):
                break
        return taken

    def deliver(self, events: Sequence[Event], settled: Settled) -> None:
        """Hand events to the client, to be told of each when the broker has acknowledged it."""

        def reported(error: KafkaError | None, _: object) -> None:
            settled(None if error is None else self._link.words(error))

        for event in events:
            try:
                self._producer.produce(event.topic, event.value, event.key, on_delivery=reported)
            except BufferError:
                settled("the client's buffer is full")
            except KafkaException as failure:
                settled(self._link.words(failure.args[0]))

    def turn(self, wait_s: float) -> bool:
        """Serve delivery reports; ask the cluster where it is in doubt."""
        self._poll(wait_s)
        if self._fatal is not None and time.monotonic() >= self._broken_since_s + _PROBE_EVERY_S:
            self._replace(self._fatal)
        if len(self._known) < len(self._reports) and time.monotonic() >= self._next_probe_s:
            self._probe()
        return len(self._producer) > 0

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
        counts = stream.counts

        def reported(error: KafkaError | None, _: object) -> None:
            if error is None:
                counts.published += 1
            else:
                self._lost(stream, error)

        return reported

    def _lost(self, stream: Stream, error: KafkaError) -> None:
        error = self._fatal or error  # which a purged record does not know
        reason = loss_reason(error)
        stream.lose(reason)
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
        self._producer = self._new_producer()
        self._fatal = None

    def _new_producer(self) -> Producer:
        return self._link.producer(
            {
                "linger.ms": 10,
                "queue.buffering.max.messages": 100_000,
                "queue.buffering.max.kbytes": 65_536,
                "message.timeout.ms": _DELIVERY_TIMEOUT_MS,
            },
            self._on_error,
        )
