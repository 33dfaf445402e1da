"""What the three services have in common: a folder, a port that stays, a recorded process, faults, TLS material."""

import secrets
import shutil
import signal
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from .. import LabError, certificates, machine, processes

_START_DEADLINE_S = 90.0


@dataclass(frozen=True)
class Login:
    """Who may do everything on a service."""

    username: str
    password: str = field(repr=False)


class Service(ABC):
    """One private server. Creating the object chooses a port and touches nothing else.

    `host` is the address it listens on and is known by. With `is_secure` it speaks TLS only, under a certificate for
    `host` and localhost of the authority in `authority`, and asks for a login: `admin` may do everything. Without, it
    listens on loopback only and `admin` needs no password. `is_expired`: the certificate has ended already.
    """

    kind: ClassVar[str]
    # whether anybody who reaches it may use it, wherever it listens
    needs_no_login: ClassVar[bool] = False

    def __init__(
        self,
        folder: Path,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        is_secure: bool = False,
        is_expired: bool = False,
    ) -> None:
        if not (is_secure or self.needs_no_login) and host != "127.0.0.1":
            raise LabError(f"a {self.kind} without logins listens on 127.0.0.1 only, not on {host}")
        self.folder = folder
        self.host = host
        self.port = port or machine.free_port(host)
        self.is_secure = is_secure
        self.is_expired = is_expired
        self.log = folder / f"{self.kind}.log"
        self.record = folder / f"{self.kind}.json"
        self._pki = folder / "pki"

    @classmethod
    @abstractmethod
    def install(cls) -> None:
        """Have the programs, from Debian or Maven Central where they are missing; raises LabError."""

    @property
    @abstractmethod
    def admin(self) -> Login:
        """The login that may do everything; its password is empty where none is asked for."""

    @abstractmethod
    def _binding(self) -> dict[str, str]:
        """The keys of the admin's service binding that only this kind has."""

    def binding(self) -> dict[str, str]:
        """The admin's credentials in the layout of the Service Binding specification; the service has been started.

        https://servicebinding.io/spec/core/1.1.0/
        """
        login = {"username": self.admin.username, "password": self.admin.password} if self.is_secure else {}
        trust = {"certificates": self.authority.read_text()} if self.authority else {}
        return {"type": self.kind, "provider": "phoenix-lab", **login, **trust, **self._binding()}

    @abstractmethod
    def _prepare(self) -> None:
        """Write configuration and empty data below `folder`, before the first start."""

    @abstractmethod
    def _command(self) -> Sequence[str | Path]:
        """The program that stays in the foreground."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Whether the server that was just started answers requests."""

    @property
    def authority(self) -> Path | None:
        """The file with the authority's certificate (PEM), that clients trust; None without TLS."""
        return self._pki / "ca.crt" if self.is_secure else None

    def client_certificate(self, name: str) -> tuple[Path, Path]:
        """The files (PEM) of a client's certificate and key, made once, for the name `name`; only with `is_secure`."""
        files = self._pki / f"{name}.crt", self._pki / f"{name}.key"
        if not files[0].exists():
            certificates.make_certificate(self._pki, name, subject=f"/CN={name}", authority="ca")
        return files

    @property
    def is_running(self) -> bool:
        """Whether the process is there (a paused one is)."""
        return processes.is_running(self.record)

    def start(self) -> None:
        """Start, for the first time or again with the same port and data; returns when requests are answered."""
        if self.is_running:
            raise LabError(f"the {self.kind} on port {self.port} runs already")
        is_new = not self.folder.exists()
        if is_new:
            self.folder.mkdir(parents=True)
            self.folder.chmod(0o711)  # a server that is not root's passes through
            if self.is_secure:
                self._make_certificates()
            self._prepare()
        self._before_start()
        processes.start(self._command(), record=self.record, log=self.log)
        processes.wait_until(
            f"{self.kind} answers on port {self.port}", self._ready, deadline_s=_START_DEADLINE_S, log=self.log
        )

    def stop(self) -> None:
        """Ask it to end in order, and wait until it has. The data stays."""
        if self.is_running:
            processes.signal_family(self.record, signal.SIGCONT)
        processes.stop([self.record])

    def kill(self) -> None:
        """End it at once, with all its processes, as `kill -9` does. The data stays as it is."""
        processes.kill_family(self.record)

    def pause(self) -> None:
        """Let it hang: connections stay and are still accepted by the kernel, nothing is answered."""
        processes.signal_family(self.record, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        processes.signal_family(self.record, signal.SIGCONT)

    def remove(self) -> None:
        """End it and delete everything it wrote."""
        processes.kill_family(self.record)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _before_start(self) -> None:
        """What a module does before each start."""
        return

    def _ready(self) -> bool:
        if not self.is_running:
            raise LabError(f"{self.kind} has ended; the end of {self.log}:\n{processes.tail(self.log)}")
        return self._is_ready()

    def _make_certificates(self) -> None:
        self._pki.mkdir()
        certificates.make_authority(self._pki, "ca")
        addresses = {f"IP:{address}" for address in (self.host, "127.0.0.1")}
        certificates.make_certificate(
            self._pki,
            "server",
            subject=f"/CN={self.kind}",
            authority="ca",
            names=("DNS:localhost", *sorted(addresses)),
            is_expired=self.is_expired,
        )

    def _password(self) -> str:
        """The admin's password, made once; empty where the service asks for none."""
        if not self.is_secure:
            return ""
        file = self.folder / "admin-password"
        if not file.exists():
            write_secret(file, secrets.token_urlsafe(24))
        return file.read_text()


def write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner reads."""
    path.touch(mode=0o600)
    path.write_text(text)
