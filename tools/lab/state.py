"""Where a lab keeps its files, and the few facts about it that outlive a command (`lab.json`)."""

import fcntl
import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import LabError
from .processes import boot_id

HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phoenix" / "lab"
_SHARED_FOLDERS = {"bin", "modules"}
# What each server listens on where nobody else does; else a free port is taken, so that labs run side by side.
_USUAL_PORTS = {
    "apiserver": 6443,
    "etcd": 2379,
    "etcd-peer": 2380,
    "controller-manager": 10257,
    "scheduler": 10259,
    "coredns": 10053,
}


def say(text: str) -> None:
    """Progress, for people: on stderr, since stdout carries the answer."""
    print(text, file=sys.stderr, flush=True)


@dataclass(kw_only=True)
class Facts:
    """What `up` decided once and later commands need. `mode` is `kind`, `full` or `control-plane`."""

    mode: str
    kubernetes: str
    host_ip: str
    ports: dict[str, int]
    components: list[str]
    boot: str = field(default_factory=boot_id)


class Lab:
    """One lab by name: its paths and its facts. Creating this object touches nothing."""

    def __init__(self, name: str) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}", name) or name in _SHARED_FOLDERS:
            raise LabError(
                f"{name!r} cannot name a lab: expected lower-case letters, digits, dashes, and not bin, modules"
            )
        self.name = name
        self.folder = HOME / name
        self.pki = self.folder / "pki"
        self.logs = self.folder / "logs"
        self.records = self.folder / "processes"
        self.node = self.folder / "node"
        self.run = Path("/run/phoenix-lab") / name
        self.kubeconfig = self.folder / "admin.conf"
        self.audit_log = self.logs / "audit.log"

    def facts(self) -> Facts | None:
        """What is recorded of a lab made since the last boot; None where there is none or it was left half made."""
        try:
            facts = Facts(**json.loads((self.folder / "lab.json").read_text()))
        except (FileNotFoundError, json.JSONDecodeError, TypeError):
            return None
        return facts if facts.mode == "kind" or facts.boot == boot_id() else None

    def write(self, facts: Facts) -> None:
        """Record the facts, in one step."""
        draft = self.folder / "lab.json.new"
        draft.write_text(json.dumps(asdict(facts), indent=1))
        draft.replace(self.folder / "lab.json")

    def forget(self) -> None:
        """From here on there is no lab of this name."""
        (self.folder / "lab.json").unlink(missing_ok=True)

    def require(self) -> Facts:
        """The facts, or an error that says how to make a lab."""
        if facts := self.facts():
            return facts
        raise LabError(f"the lab {self.name!r} is not up; start it with: python -m lab up --name {self.name}")


def choose_ports() -> dict[str, int]:
    """A port for each server: its usual one where that is free."""
    with _reserved() as taken:
        return {name: _free_port(usual, taken) for name, usual in _USUAL_PORTS.items()}


@contextmanager
def _reserved() -> Iterator[list[socket.socket]]:
    sockets: list[socket.socket] = []
    try:
        yield sockets
    finally:
        for each in sockets:
            each.close()


def _free_port(usual: int, taken: list[socket.socket]) -> int:
    for port in (usual, 0):
        candidate = socket.socket()
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind(("0.0.0.0", port))
        except OSError:
            candidate.close()
            continue
        taken.append(candidate)
        return int(candidate.getsockname()[1])
    raise LabError("no free port on this machine")


@contextmanager
def only_one(what: str) -> Iterator[None]:
    """Hold the lock `what` (a lab's name, or `bin`) for the block; wait for another command that holds it."""
    HOME.mkdir(parents=True, exist_ok=True)
    with (HOME / f".{what}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another lab command that works on {what!r}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
