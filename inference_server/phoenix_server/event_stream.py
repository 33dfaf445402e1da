"""What a model's events have in common: topic, sampling, format, counters; and what a place for events must do."""

import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from phoenix_server.event_format import Event, EventFormat
from phoenix_server.metrics import EventCounts

if TYPE_CHECKING:
    from phoenix_server.dataplane import Prediction
    from phoenix_server.served_model import ServedModel

Settled = Callable[[str | None], None]
"""Called with None when an event is safe, else with the reason why it is not."""


class Stream:
    """The events of one loaded model."""

    def __init__(self, model: "ServedModel", counts: EventCounts) -> None:
        """The model must declare events."""
        kafka = model.spec.bindings and model.spec.bindings.kafka
        assert kafka
        self.model = model.name
        self.topic = kafka.events.topic or topic_of(model, "predictions")
        self.counts = counts
        self._format = EventFormat(model, include_tensors=kafka.events.include_tensors)
        self._percent = kafka.events.sample_percent

    def takes(self, request_id: str) -> bool:
        """Whether sampling takes the prediction of that request: always the same answer for the same id."""
        return self._percent == 100 or zlib.crc32(request_id.encode(errors="replace")) % 100 < self._percent

    def event(self, prediction: "Prediction", event_id: str) -> Event:
        """Return the event of a prediction."""
        written = self._format
        return Event(event_id, self.topic, written.key(prediction), written.encode(prediction, event_id))

    def lose(self, reason: str, count: int = 1) -> None:
        """Count events that were lost; `reason` is one of `metrics.EVENT_LOSSES`."""
        self.counts.dropped[reason] += count


class EventSink(Protocol):
    """A place for events. Everything is called from the one thread of `events.Events`."""

    def send(self, events: Sequence[tuple[Stream, Event]]) -> int:
        """Take events in order, count what is lost of them, and return how many were taken; never raises."""

    def deliver(self, events: Sequence[Event], settled: Settled) -> None:
        """Take events for which somebody waits; `settled` is called once for each."""

    def turn(self, wait_s: float) -> bool:
        """Do what is due, for at most about that long; return whether something is still under way."""

    def close(self, within_s: float) -> None:
        """Bring to an end what was taken, within that time, and count what is lost."""


def topic_of(model: "ServedModel", purpose: str) -> str:
    """Return the default topic of a model for "predictions", "requests", "results" or "dead-letters"."""
    return f"phoenix.{model.manifest.model.metadata.namespace}.{model.name}.{purpose}"
