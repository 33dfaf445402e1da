"""What one model knows of its Kafka: events and asynchronous inference report, one state tells.

Free of the client library, so that nothing is imported where no broker is used.
"""

from collections.abc import Callable
from typing import Any

from phoenix_server.binding_state import BindingState


class KafkaBinding(BindingState):
    """The `BindingState` of one model. `report` may be called from any thread and passes on only what is news."""

    def __init__(self, model: str, call_soon_threadsafe: Callable[..., Any]) -> None:
        super().__init__("kafka")
        self.models.add(model)
        self._call = call_soon_threadsafe
        self._reported: dict[str, str | None] = {}
        self._faults: dict[str, str] = {}

    def is_well(self, part: str) -> bool:
        """Whether the last report of that part was good."""
        return self._reported.get(part, "unknown") is None

    def report(self, part: str, fault: str | None) -> None:
        """Say that `part` ("events" or "requests") works, or why not."""
        if part not in self._reported or self._reported[part] != fault:
            self._reported[part] = fault
            try:
                self._call(self._settle, part, fault)
            except RuntimeError:  # the loop is closed: nobody asks any more
                return

    def forget(self, part: str) -> None:
        """Take back what `part` said, because it ended. To be called on the event loop."""
        if self._reported.pop(part, None) is not None:
            self._settle(part, None)

    def _settle(self, part: str, fault: str | None) -> None:
        self._faults.pop(part, None)
        if fault is not None:
            self._faults[part] = fault
        if self._faults:
            self.fails("; ".join(f"{name}: {text}" for name, text in sorted(self._faults.items())))
        else:
            self.works()


def binding_of(model: str, states: list[BindingState], call_soon_threadsafe: Callable[..., Any]) -> KafkaBinding:
    """Return the binding of that model among `states`, where it is put if there is none. Call on the event loop."""
    for state in states:
        if isinstance(state, KafkaBinding) and model in state.models:
            return state
    binding = KafkaBinding(model, call_soon_threadsafe)
    states.append(binding)
    return binding
