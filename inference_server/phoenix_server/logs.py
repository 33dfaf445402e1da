"""Logging: one JSON object a line on stderr, with whatever a call put into `extra`."""

import contextlib
import io
import json
import logging
import sys
from typing import Any

from phoenix_server.errors import shown

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON with `time` (RFC 3339, UTC), `level`, `logger`, `message` and the extras."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        seconds = self.formatTime(record, "%Y-%m-%dT%H:%M:%S")
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def configure(level: str) -> None:
    """Send every logger of the process to stderr as JSON lines of at least `level`."""
    import time

    formatter = JsonFormatter()
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=LEVELS[level], handlers=[handler], force=True)
    logging.captureWarnings(True)
    for noisy in ("alembic", "asyncio", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with contextlib.suppress(AttributeError, io.UnsupportedOperation):
        sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]


class LogSettings:
    """The settings of the protocol's logging extension, applied to the process's log."""

    _LEVELS = (("log_info", logging.INFO), ("log_warning", logging.WARNING), ("log_error", logging.ERROR))

    def __init__(self) -> None:
        level = logging.getLogger().getEffectiveLevel()
        self._on = {name: level <= own for name, own in self._LEVELS}
        self._verbose = 0

    def get(self) -> dict[str, Any]:
        """Return the settings as the extension spells them."""
        return {"log_file": "", **self._on, "log_verbose_level": self._verbose, "log_format": "default"}

    def faults(self, wanted: dict[str, Any]) -> list[str]:
        """Return what is wrong with settings that a caller wants."""
        faults = []
        for name, value in wanted.items():
            if name in self._on:
                if not isinstance(value, bool):
                    faults.append(f"'{name}' must be true or false, got {shown(value)}")
            elif name == "log_verbose_level":
                if type(value) is not int or value < 0:
                    faults.append(f"'{name}' must be an integer of at least 0, got {shown(value)}")
            elif name == "log_file":
                if value != "":
                    faults.append("'log_file' cannot be set: logs go to stderr")
            elif name == "log_format":
                if value != "default":
                    faults.append(f"'log_format' must be 'default', got {shown(value)}")
            else:
                faults.append(f"unknown setting '{name}'; known: {', '.join(self.get())}")
        return faults

    def update(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Apply settings without faults and return all of them."""
        for handler in logging.getLogger().handlers:
            handler.addFilter(self._passes)  # once, however often: it is the same bound method
        self._verbose = wanted.get("log_verbose_level", self._verbose)
        self._on = {name: wanted.get(name, is_on) for name, is_on in self._on.items()}
        least = next((own for name, own in self._LEVELS if self._on[name]), logging.CRITICAL)
        logging.getLogger().setLevel(logging.DEBUG if self._verbose else least)
        return self.get()

    def _passes(self, record: logging.LogRecord) -> bool:
        """Whether the kind of a record is on; beneath the kinds, the verbose level decides."""
        kind = next((name for name, own in reversed(self._LEVELS) if record.levelno >= own), None)
        return self._verbose > 0 if kind is None else self._on[kind]
