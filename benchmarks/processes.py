"""Starts the programs under measurement on one core, keeps the load on another, and reads what a program costs.

Linux only: affinity, process groups and `/proc` are what makes the figures comparable. Each server is the leader of a
process group of its own, so that its workers are counted with it and stopped with it, by id.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_STOP_S = 15.0


class BenchError(Exception):
    """Something is wrong, so that figures would mean nothing: wrong answers, a server that died or never came up."""


@dataclass(frozen=True, slots=True)
class Cores:
    """The core that servers run on and the core that makes the load."""

    server: int
    load: int


def choose_cores() -> Cores:
    """Pick two cores that share no execution units, if there are two."""
    allowed = sorted(os.sched_getaffinity(0))
    server = allowed[0]
    siblings = _siblings(server)
    others = [core for core in allowed[1:] if core not in siblings] or allowed[1:] or [server]
    return Cores(server, others[0])


def _siblings(core: int) -> set[int]:
    """Return the logical CPUs on the same physical core, as the kernel lists them (`0,64` or `0-1`)."""
    try:
        text = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text()
    except OSError:
        return {core}
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


@contextlib.contextmanager
def on_core(core: int) -> Iterator[None]:
    """Run the block, and every child started in it, on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def free_port() -> int:
    """Return a port of the loopback interface that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Process:
    """A server on the measured core; its output goes to `log`, which is shown if it fails."""

    def __init__(
        self, command: Sequence[str], *, core: int, log: Path, env: Mapping[str, str] | None = None, cwd: Path
    ) -> None:
        self._log = log
        with on_core(core), log.open("wb") as output:
            self.started_s = time.perf_counter()
            self._popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env={**_surroundings(), **(env or {})}, cwd=cwd, start_new_session=True,
            )  # fmt: skip

    @property
    def output(self) -> str:
        """What the program has written so far."""
        return self._log.read_text(errors="replace")

    def wait_until(self, is_up: Callable[[], bool], *, deadline_s: float, interval_s: float = 0.002) -> float:
        """Poll until the program is up and return the seconds since it was started; raise `BenchError` if it fails."""
        while not is_up():
            self.check_alive()
            if time.perf_counter() - self.started_s > deadline_s:
                raise BenchError(f"not ready after {deadline_s:g} s; its last words:\n{self._last_words()}")
            time.sleep(interval_s)
        return time.perf_counter() - self.started_s

    def check_alive(self) -> None:
        """Raise `BenchError` if the program has ended."""
        if self._popen.poll() is not None:
            raise BenchError(
                f"the server ended with code {self._popen.returncode}; its last words:\n{self._last_words()}"
            )

    def cpu_s(self) -> float:
        """User and system time of the program and its workers so far, in seconds (resolution 10 ms)."""
        return sum(user + system for user, system in map(_cpu_ticks, self._members())) / _TICKS_PER_SECOND

    def memory_mb(self) -> tuple[float, float]:
        """Proportional and resident set size in MB; equal if nothing else on the machine maps the same files."""
        pss = rss = 0
        for pid in self._members():
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    pss += int(line.split()[1])
                elif line.startswith("Rss:"):
                    rss += int(line.split()[1])
        return pss * 1024 / 1e6, rss * 1024 / 1e6

    def stop(self) -> None:
        """End the program and its workers: SIGTERM, and SIGKILL for what is left after a while."""
        for signum, wait_s in ((signal.SIGTERM, _STOP_S), (signal.SIGKILL, _STOP_S)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(wait_s)
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)  # workers that outlived their parent

    def _members(self) -> list[int]:
        members = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(ProcessLookupError):
                    if os.getpgid(int(entry.name)) == self._popen.pid:
                        members.append(int(entry.name))
        return members

    def _last_words(self) -> str:
        return "\n".join(self.output.splitlines()[-15:])


def _surroundings() -> dict[str, str]:
    """Return the environment without settings of Phoenix, which would change what is measured."""
    own = ("PHOENIX_", "DATABASE_URL", "SERVICE_BINDING_ROOT", "OTEL_")
    return {name: value for name, value in os.environ.items() if not name.startswith(own)}


def _cpu_ticks(pid: int) -> tuple[int, int]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    return int(fields[11]), int(fields[12])


def answers(url: str) -> Callable[[], bool]:
    """Return a check whether a GET of `url` gives 200."""

    def is_up() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=2) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    return is_up
