"""Logging: one JSON object a line on stderr, in the same shape as the server's."""

import logging
import sys
from datetime import UTC, datetime

from pythonjsonlogger.json import JsonFormatter

_FIELDS = ("asctime", "levelname", "name", "message")
_NAMES = {"asctime": "time", "levelname": "level", "name": "logger", "exc_info": "exception"}


class _Formatter(JsonFormatter):
    """Times in RFC 3339, UTC."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def configure(level: str) -> None:
    """Send every logger of the process to stderr as JSON lines of at least `level`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(_FIELDS, rename_fields=_NAMES))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    # kopf's debug log prints whole objects, and its info log every event: neither is wanted
    for noisy in ("kopf", "asyncio", "aiohttp", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
