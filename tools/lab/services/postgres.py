"""PostgreSQL: one cluster of databases, run by the user `postgres` where we are root, since it refuses to be root."""

import os
import pwd
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .. import LabError, machine, processes
from .service import Login, Service, write_secret

_DEBIAN = Path("/usr/lib/postgresql")
_SETTINGS = """\
listen_addresses = '{host}'
port = {port}
unix_socket_directories = ''
max_connections = 200
shared_buffers = 64MB
password_encryption = 'scram-sha-256'
log_line_prefix = '%m [%p] %u@%d '
"""
_TLS = """\
ssl = on
ssl_cert_file = 'server.crt'
ssl_key_file = 'server.key'
"""
# The superuser needs no password on loopback; everybody else does, or a wrong one could not be told from a right one.
_PLAIN_ACCESS = """\
host all postgres 127.0.0.1/32 trust
host all all 127.0.0.1/32 scram-sha-256
"""
_SECURE_ACCESS = "hostssl all all all scram-sha-256\n"


class Postgres(Service):
    """A PostgreSQL server whose superuser is `postgres`. It syncs to disk as in production."""

    kind = "postgresql"

    @classmethod
    def install(cls) -> None:
        """Debian's postgresql."""
        if cls._programs() is None:
            machine.install(["postgresql"])

    @property
    def admin(self) -> Login:
        """The superuser."""
        return Login("postgres", self._password())

    @staticmethod
    def _programs() -> Path | None:
        """The folder with the newest PostgreSQL's programs."""
        found = sorted(_DEBIAN.glob("[0-9]*/bin/postgres"), key=lambda path: int(re.sub(r"\D", "", path.parts[-3])))
        if found:
            return found[-1].parent
        on_path = shutil.which("postgres")
        return Path(on_path).resolve().parent if on_path else None

    def _program(self, name: str) -> list[str | Path]:
        """The start of a command line."""
        folder = self._programs()
        if folder is None:
            raise LabError("PostgreSQL is not installed")
        program = folder / name
        if os.geteuid() != 0:
            return [program]
        # unlike su and runuser it stays the same process, whose id is recorded
        return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", program]

    def _binding(self) -> dict[str, str]:
        login = f"{self.admin.username}:{self.admin.password}" if self.is_secure else self.admin.username
        address = f"{self.host}:{self.port}"
        return {
            "host": self.host,
            "port": str(self.port),
            "database": "postgres",
            "username": self.admin.username,
            "sslmode": "verify-full" if self.is_secure else "disable",
            "uri": f"postgresql://{login}@{address}/postgres",
        }

    def _prepare(self) -> None:
        data = self.folder / "data"
        data.mkdir(mode=0o700)
        self._give(data)
        password = self.folder / "initdb-password"
        # initdb refuses an empty one; where the superuser is trusted it is never asked for
        write_secret(password, self.admin.password or "postgres")
        self._give(password)
        done = subprocess.run(
            [
                *self._program("initdb"),
                *("--pgdata", data, "--username=postgres", "--pwfile", password, "--auth=scram-sha-256"),
                *("--encoding=UTF8", "--locale=C", "--no-sync"),
            ],
            capture_output=True,
            text=True,
            cwd="/",
        )
        password.unlink()
        if done.returncode:
            raise LabError(f"initdb failed:\n{done.stderr.strip()}")
        settings = _SETTINGS.format(host=self.host, port=self.port)
        if self.is_secure:
            settings += _TLS
            for name in ("server.crt", "server.key"):
                shutil.copy(self._pki / name, data / name)
                (data / name).chmod(0o600)
                self._give(data / name)
        with (data / "postgresql.conf").open("a") as file:
            file.write(settings)
        (data / "pg_hba.conf").write_text(_SECURE_ACCESS if self.is_secure else _PLAIN_ACCESS)

    def _command(self) -> Sequence[str | Path]:
        return [*self._program("postgres"), "-D", self.folder / "data"]

    def _is_ready(self) -> bool:
        asked = [*self._program("pg_isready"), "--quiet", "--host", self.host, "--port", str(self.port)]
        return subprocess.run(asked, cwd="/").returncode == 0

    def stop(self) -> None:
        """End it without waiting for clients that are still connected (PostgreSQL's fast shutdown)."""
        found = processes.read(self.record)
        if found and (pidfd := found.handle()) is not None:
            processes.signal_family(self.record, signal.SIGCONT)
            processes.end({pidfd: found.pid}, first_signal=signal.SIGINT)
        self.record.unlink(missing_ok=True)

    @staticmethod
    def _give(path: Path) -> None:
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(path, user.pw_uid, user.pw_gid)
