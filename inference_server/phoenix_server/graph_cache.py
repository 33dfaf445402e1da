"""Keeps optimised graphs between starts, so that a big model is optimised once for each kind of machine.

Hides the key, the atomic rename and the check of what is read back. `engine` asks for a file and writes one.
"""

import contextlib
import hashlib
import logging
import os
import platform
import threading
from pathlib import Path

_log = logging.getLogger(__name__)


class OptimizedGraph:
    """The place of one optimised graph: `<key>.onnx` with its own digest beside it, both put in place by rename."""

    def __init__(self, cache_dir: Path, key: tuple[object, ...]) -> None:
        """`key` holds all that the graph depends on but the processor, which is added here."""
        name = hashlib.sha256(repr((*key, _processor())).encode()).hexdigest()
        self._path = cache_dir / "optimized" / f"{name}.onnx"
        self._digest = self._path.with_suffix(".sha256")

    def find(self) -> Path | None:
        """Return the file if it is there and whole; one that is damaged is dropped."""
        if not self._path.exists():
            return None
        try:
            if _sha256(self._path) == self._digest.read_text():
                return self._path
            self.drop("its digest differs")
        except OSError as error:
            self.drop(str(error))
        return None

    def drop(self, cause: str) -> None:
        """Delete a file that cannot be used."""
        _log.warning("dropping a damaged optimised graph", extra={"cause": cause})
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
            self._digest.unlink(missing_ok=True)

    def begin(self) -> Path | None:
        """Return a new file to write the graph to; None if the folder cannot be written."""
        partial = self._path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.partial")
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
        except OSError:
            return None
        return partial

    def commit(self, partial: Path) -> None:
        """Put what was written in place."""
        with contextlib.suppress(OSError):
            digest = partial.with_suffix(".digest")
            digest.write_text(_sha256(partial))
            digest.rename(self._digest)
            partial.rename(self._path)


def _processor() -> str:
    """Return the processor's name: an optimised graph may hold layouts for one kind."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
