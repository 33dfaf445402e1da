"""Redis: one server with an append-only file and an ACL file, so that data and users survive its end."""

import contextlib
import shutil
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path

from .. import machine
from .service import Login, Service, write_secret

_ANSWERS = (b"+PONG", b"-NOAUTH")


class Redis(Service):
    """A Redis server. Without TLS the user `default` may do everything; with it, only the user `admin` may."""

    kind = "redis"

    @classmethod
    def install(cls) -> None:
        """Debian's redis-server."""
        if not shutil.which("redis-server"):
            machine.install(["redis-server"])

    @property
    def admin(self) -> Login:
        """`default` without a password, or `admin`."""
        return Login("admin" if self.is_secure else "default", self._password())

    def _binding(self) -> dict[str, str]:
        login = f"{self.admin.username}:{self.admin.password}@" if self.is_secure else ""
        scheme = "rediss" if self.is_secure else "redis"
        return {
            "host": self.host,
            "port": str(self.port),
            "ssl": str(self.is_secure).lower(),
            "uri": f"{scheme}://{login}{self.host}:{self.port}/0",
        }

    def _prepare(self) -> None:
        (self.folder / "data").mkdir()
        rights = "~* &* +@all"
        admin = self.admin
        users = ["user default off"] if self.is_secure else [f"user default on nopass {rights}"]
        if self.is_secure:
            users.append(f"user {admin.username} on >{admin.password} {rights}")
        write_secret(self.folder / "users.acl", "\n".join(users) + "\n")
        lines = [
            f"bind {self.host}",
            f"dir {self.folder / 'data'}",
            f"aclfile {self.folder / 'users.acl'}",
            "appendonly yes",
            'save ""',
            "maxmemory 256mb",
        ]
        if self.is_secure:
            lines += [
                "port 0",
                f"tls-port {self.port}",
                f"tls-cert-file {self._pki / 'server.crt'}",
                f"tls-key-file {self._pki / 'server.key'}",
                f"tls-ca-cert-file {self._pki / 'ca.crt'}",
                "tls-auth-clients no",
            ]
        else:
            lines.append(f"port {self.port}")
        (self.folder / "redis.conf").write_text("\n".join(lines) + "\n")

    def _command(self) -> Sequence[str | Path]:
        return [shutil.which("redis-server") or "redis-server", self.folder / "redis.conf"]

    def _is_ready(self) -> bool:
        # until its data is loaded it answers -LOADING
        with contextlib.suppress(OSError), self._connect() as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(_ANSWERS)
        return False

    def _connect(self) -> socket.socket:
        connection = socket.create_connection((self.host, self.port), timeout=1)
        if not self.is_secure:
            return connection
        context = ssl.create_default_context()
        # only whether it answers is asked, and it may have been given an expired certificate
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context.wrap_socket(connection)
