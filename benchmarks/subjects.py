"""What is measured: how each server is started, and which forms of the protocol it speaks."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from load import HttpRequest
from processes import Process, answers, free_port
from workloads import Form, Workload

_READY_S = 60.0
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers: its process, its ports, and the seconds from exec to ready."""

    process: Process
    http_port: int
    grpc_port: int
    ready_s: float


@dataclass(frozen=True, slots=True)
class Subject:
    """A server under measurement. `start(workload, folder, core)` returns once it is ready.

    `request` makes the HTTP request where it is not the workload's own.
    """

    name: str
    title: str
    forms: frozenset[Form]
    start: Callable[[Workload, Path, int], Running]
    request: Callable[[Workload, Form], HttpRequest] | None = None


def phoenix(served: Path, folder: Path, core: int, settings: dict[str, str]) -> Running:
    """Start Phoenix on the manifests in `served`; its state and log are kept in `folder`."""
    env = {
        "PHOENIX_HOST": "127.0.0.1", "PHOENIX_HTTP_PORT": "0", "PHOENIX_GRPC_PORT": "0", "PHOENIX_CPUS": "1",
        "PHOENIX_STATE_DIR": str(folder / "state"), "PHOENIX_MEASURE_CAPACITY": "false", **settings,
    }  # fmt: skip
    command = [sys.executable, "-m", "phoenix_server", "serve", str(served)]
    process = Process(command, core=core, log=folder / "log", env=env, cwd=ROOT)
    try:
        ready_s = process.wait_until(lambda: '"message": "ready"' in process.output, deadline_s=_READY_S)
        line = next(line for line in process.output.splitlines() if '"message": "ready"' in line)
        fields = json.loads(line)
        return Running(process, _port(fields["rest"]), _port(fields["grpc"]), ready_s)
    except BaseException:
        process.stop()
        raise


def _phoenix(engine: str) -> Callable[[Workload, Path, int], Running]:
    return lambda workload, folder, core: phoenix(workload.folder, folder, core, {"PHOENIX_GRPC_ENGINE": engine})


def _port(address: str) -> int:
    found = re.search(r":(\d+)$", address)
    assert found is not None, address
    return int(found[1])


def started(process: Process, http_port: int, grpc_port: int, url: str) -> Running:
    """Wait until a GET of `url` gives 200."""
    try:
        return Running(process, http_port, grpc_port, process.wait_until(answers(url), deadline_s=_READY_S))
    except BaseException:
        process.stop()
        raise


def _naive(workload: Workload, folder: Path, core: int) -> Running:
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("naive.py")), str(workload.model), "--name", workload.name,
               "--port", str(port)]  # fmt: skip
    process = Process(command, core=core, log=folder / "log", cwd=ROOT)
    return started(process, port, 0, f"http://127.0.0.1:{port}/v2/health/ready")


SUBJECTS = [
    Subject("phoenix", "Phoenix", frozenset({"json", "binary", "grpc"}), _phoenix("native")),
    Subject("grpcio", "Phoenix on grpc.aio", frozenset({"grpc"}), _phoenix("grpcio")),
    Subject("naive", "FastAPI endpoint", frozenset({"json"}), _naive),
]


class Fleet:
    """The servers that run now, each started when it is first asked for."""

    def __init__(self, subjects: list[Subject], folder: Path, core: int) -> None:
        self._subjects = {subject.name: subject for subject in subjects}
        self._folder = folder
        self._core = core
        self._count = 0
        self._running: dict[tuple[str, str], Running] = {}

    def subject(self, name: str) -> Subject | None:
        """Return the subject of that name, if it takes part."""
        return self._subjects.get(name)

    def request(self, subject: str, workload: Workload, form: Form) -> HttpRequest:
        """Return the request that a subject answers."""
        make = self._subjects[subject].request
        return workload.request(form) if make is None else make(workload, form)

    def server(self, subject: str, workload: Workload) -> Running:
        """Return a subject that serves `workload`."""
        key = subject, workload.key
        if key not in self._running:
            self._running[key] = self.start(subject, workload)
        running = self._running[key]
        running.process.check_alive()
        return running

    def start(self, subject: str, workload: Workload) -> Running:
        """Start a subject that the caller stops."""
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        return self._subjects[subject].start(workload, folder, self._core)

    def stop_all(self) -> None:
        """Stop everything that `server` started."""
        while self._running:
            _, running = self._running.popitem()
            running.process.stop()
        for folder in self._folder.glob("*/state"):
            shutil.rmtree(folder, ignore_errors=True)
