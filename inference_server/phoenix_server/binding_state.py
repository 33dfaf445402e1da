"""Whether a backend service (Redis, Kafka, PostgreSQL) answers, for `/state`, metrics and the log: one truth for all.

An outage never changes readiness: features degrade as declared, events and audit as their mode says, and this tells.
Everything here runs on the event loop; threads hand over with `call_soon_threadsafe`.
"""

import logging
import time
from typing import Any, Literal

_log = logging.getLogger(__name__)

BindingKind = Literal["redis", "kafka", "postgresql"]


class BindingState:
    """One backend as this process sees it. Unknown until the first `works` or `fails`."""

    def __init__(self, kind: BindingKind) -> None:
        self.kind = kind
        self.models: set[str] = set()
        self.is_up: bool | None = None
        self._since_s = time.time()
        self._error = ""

    @property
    def error(self) -> str:
        """Why the backend does not answer; empty while it does or nothing is known."""
        return self._error

    def works(self) -> None:
        """Record that the backend answered; logged when that is news."""
        if not self.is_up:
            self._change(is_up=True, error="")
            _log.info("binding is up", extra={"binding": self.kind})

    def fails(self, error: str) -> None:
        """Record that the backend did not answer, or refused; `error` names no secret. Logged when that is news."""
        if self.is_up is not False or error != self._error:
            self._change(is_up=False, error=error)
            _log.warning("binding is down", extra={"binding": self.kind, "cause": error})

    def _change(self, *, is_up: bool, error: str) -> None:
        if is_up is not self.is_up:
            self._since_s = time.time()
        self.is_up, self._error = is_up, error

    def as_state(self) -> dict[str, Any]:
        """Return the entry of `/state`: `up` is null until it is known, `since` in unix seconds."""
        return {"up": self.is_up, "since": self._since_s, "error": self._error}
