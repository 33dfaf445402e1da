"""Starts programs that outlive the command and stops them again: never by name, only by a record of what was started.

A process id alone is reused by the kernel; with the boot and the process's start time it names one process for ever.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from . import LabError

_STOP_DEADLINE_S = 12.0


def boot_id() -> str:
    """The kernel's name for the time since the last boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_ticks(pid: int, proc: Path = Path("/proc")) -> int | None:
    """When process `pid` started, in clock ticks since boot; None if there is none, or only its zombie."""
    try:
        # The second field is the program's name in parentheses, and may hold spaces and parentheses itself.
        after_name = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if after_name[0] in "ZX" else int(after_name[19])


@dataclass(frozen=True)
class Record:
    """Names one process, also after this machine reused its id."""

    pid: int
    start_ticks: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> "Record | None":
        """The record of a process that runs now."""
        ticks = start_ticks(pid)
        return None if ticks is None else cls(pid, ticks, boot_id())

    def is_running(self) -> bool:
        """Whether exactly this process still runs."""
        return self.boot == boot_id() and start_ticks(self.pid) == self.start_ticks

    def handle(self) -> int | None:
        """A pidfd of exactly this process: a signal sent through it cannot hit another one."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if self.is_running():  # checked after opening: the handle is of the process that was just looked at
            return pidfd
        os.close(pidfd)
        return None


def read(record: Path) -> Record | None:
    """The record in that file; None where there is none or it was cut off by a crash."""
    try:
        return Record(**json.loads(record.read_text()))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None


def is_running(record: Path) -> bool:
    """Whether the process recorded in that file runs."""
    found = read(record)
    return found is not None and found.is_running()


def start(command: Sequence[str | Path], *, record: Path, log: Path) -> None:
    """Start a program in a session of its own, its output appended to `log`, and record it.

    It gets no proxy settings: a proxy cannot reach the addresses of Services and pods.
    """
    for folder in (record.parent, log.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        child = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd="/",
            env={name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        )
    child.returncode = 0  # it is meant to outlive us: no warning when the object goes
    found = Record.of(child.pid)
    if found is None:
        raise LabError(f"{record.stem} ended at once; its log is {log}:\n{tail(log)}")
    record.write_text(json.dumps(asdict(found)))


def stop(records: Iterable[Path]) -> None:
    """Ask the recorded processes to end, all at once; after a deadline, end them. The records go away."""
    handles: dict[int, int] = {}
    for path in records:
        if (found := read(path)) and (pidfd := found.handle()) is not None:
            handles[pidfd] = found.pid
        path.unlink(missing_ok=True)
    end(handles)


def end(handles: dict[int, int], *, first_signal: signal.Signals = signal.SIGTERM) -> None:
    """End the processes behind these pidfds (pidfd to pid), reap those that are ours, close the handles."""
    waiting = set(handles)
    for signum, patience_s in ((first_signal, _STOP_DEADLINE_S), (signal.SIGKILL, _STOP_DEADLINE_S)):
        for pidfd in waiting:
            _send(pidfd, signum)
        deadline = time.monotonic() + patience_s
        while waiting and (left_s := deadline - time.monotonic()) > 0:
            waiting -= set(select.select(list(waiting), [], [], left_s)[0])
    for pidfd, pid in handles.items():
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        os.close(pidfd)
    if waiting:
        raise LabError(f"processes {sorted(handles[pidfd] for pidfd in waiting)} do not end, not even by SIGKILL")


def signal_family(record: Path, signum: signal.Signals) -> None:
    """Send a signal to the recorded process and to all that descend from it."""
    found = read(record)
    if found is None or not found.is_running():
        raise LabError(f"{record.stem} does not run")
    handles = _family(found)
    try:
        for pidfd in handles:
            _send(pidfd, signum)
    finally:
        for pidfd in handles:
            os.close(pidfd)


def kill_family(record: Path) -> None:
    """End the recorded process and all that descend from it at once, without a chance to clean up."""
    found = read(record)
    record.unlink(missing_ok=True)
    if found is not None and found.is_running():
        end(_family(found), first_signal=signal.SIGKILL)


def _family(first: Record) -> dict[int, int]:
    """Handles of a process and of its descendants (pidfd to pid); the eldest comes first."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    family = [first.pid]
    for pid in family:  # grows on the way
        family += [child for child, parent in parents.items() if parent == pid]
    handles: dict[int, int] = {}
    for pid in family:
        if (record := first if pid == first.pid else Record.of(pid)) and (pidfd := record.handle()) is not None:
            handles[pidfd] = pid
    return handles


def _send(pidfd: int, signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signum)


def wait_until(what: str, condition: Callable[[], bool], *, deadline_s: float, log: Path | None = None) -> None:
    """Ask `condition` until it holds; after `deadline_s`, an error that shows the end of `log`."""
    end_at = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end_at:
            shown = f"; the end of {log}:\n{tail(log)}" if log else ""
            raise LabError(f"{what}: not within {deadline_s:.0f} s{shown}")
        time.sleep(0.1)


def tail(log: Path, lines: int = 12) -> str:
    """The last lines of a log."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return "(no log)"
