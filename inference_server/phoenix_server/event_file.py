"""Events as JSON lines in the state folder: the embedded stand-in for a broker, in the same format.

One file a topic, `events/<topic>.jsonl`. A file that has grown to its limit becomes `.1` and a new one begins. What
somebody waits for is synced to the disk. A line cut short by a crash is left as it is, on a line of its own.
"""

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from phoenix_server.event_format import Event
from phoenix_server.event_stream import Settled, Stream

_log = logging.getLogger(__name__)


class EventFiles:
    """Writes events to files; see `event_stream.EventSink`."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._files: dict[str, _File] = {}
        self._fault = ""

    def send(self, events: Sequence[tuple[Stream, Event]]) -> int:
        """Write events; those that cannot be written are lost."""
        of_topic: dict[str, list[tuple[Stream, Event]]] = {}
        for stream, event in events:
            of_topic.setdefault(event.topic, []).append((stream, event))
        for topic, group in of_topic.items():
            is_written = self._write(topic, [event.value for _, event in group], is_synced=False) is None
            for stream, _ in group:
                if is_written:
                    stream.counts.published += 1
                else:
                    stream.lose("file")
        return len(events)

    def deliver(self, events: Sequence[Event], settled: Settled) -> None:
        """Write events and sync them to the disk."""
        of_topic: dict[str, list[bytes]] = {}
        for event in events:
            of_topic.setdefault(event.topic, []).append(event.value)
        for topic, lines in of_topic.items():
            fault = self._write(topic, lines, is_synced=True)
            for _ in lines:
                settled(fault)

    def turn(self, wait_s: float) -> bool:
        """Wait, so that events gather and share a write."""
        time.sleep(wait_s)
        return False

    def close(self, within_s: float) -> None:
        """Sync and close the files."""
        for file in self._files.values():
            file.close()

    def _write(self, topic: str, lines: Sequence[bytes], *, is_synced: bool) -> str | None:
        try:
            file = self._files.get(topic)
            if file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                file = self._files[topic] = _File(self._folder / f"{topic}.jsonl", self._max_bytes)
            file.append(b"\n".join([*lines, b""]))
            if is_synced:
                os.fsync(file.descriptor)
        except OSError as error:
            fault = f"{self._folder / topic}.jsonl: {error.strerror}"
            if fault != self._fault:
                _log.error("events cannot be written", extra={"cause": fault})
            self._fault = fault
            return fault
        self._fault = ""
        return None


class _File:
    """One file that is appended to in whole lines."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self.descriptor = self._open()

    def append(self, text: bytes) -> None:
        """Write whole lines, or nothing."""
        size = os.fstat(self.descriptor).st_size
        if size and size + len(text) > self._max_bytes:
            os.fsync(self.descriptor)
            os.close(self.descriptor)
            os.replace(self._path, self._path.with_suffix(".jsonl.1"))
            self.descriptor, size = self._open(), 0
        written = os.write(self.descriptor, text)
        if written < len(text):  # the disk is full
            os.ftruncate(self.descriptor, size)
            raise OSError(28, "No space left on device")

    def close(self) -> None:
        """Sync and close."""
        os.fsync(self.descriptor)
        os.close(self.descriptor)

    def _open(self) -> int:
        descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            os.write(descriptor, b"\n")
        return descriptor
