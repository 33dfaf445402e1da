"""Where a test's audit is kept (SQLite, or a schema in a real PostgreSQL), models that have one, and load."""

import contextlib
import http.client
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from phoenix_process import Running, start, wait_until
from psycopg import sql
from services import PostgresServer

EXAMPLES = Path(__file__).parent.parent / "examples"
PASSWORD = "s3cret-of-the-audit"
SCHEMA = "phx_ml_iris_1a2b3c4d"


class SqliteHome:
    """The embedded default."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "state" / "audit.sqlite3"
        self.env = {"PHOENIX_STATE_DIR": str(self.file.parent)}

    def query(self, statement: str) -> list[Any]:
        if not self.file.exists():
            return []
        with contextlib.closing(sqlite3.connect(self.file, timeout=30, isolation_level=None)) as connection:
            return connection.execute(statement).fetchall()

    def tamper(self, *statements: str) -> None:
        """Change what must not be changed, as somebody who owns the file can."""
        with contextlib.closing(sqlite3.connect(self.file, timeout=30, isolation_level=None)) as connection:
            for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
                connection.execute(f"DROP TRIGGER {name}")
            for statement in statements:
                connection.execute(statement)


class PostgresHome:
    """A database with an owner who cannot log in and a login that may become it, as the operator makes them."""

    def __init__(self, server: PostgresServer) -> None:
        self.server = server
        self.database = server.fresh_database()
        self.owner, self.login = f"{self.database}_owner", f"{self.database}_a"
        with self.admin() as connection:
            connection.execute(sql.SQL("CREATE ROLE {} NOLOGIN").format(sql.Identifier(self.owner)))
            connection.execute(
                sql.SQL("CREATE SCHEMA {} AUTHORIZATION {}").format(sql.Identifier(SCHEMA), sql.Identifier(self.owner))
            )
        self.make_login(self.login)
        self.env = self.env_of(self.login, server.port)

    def env_of(self, login: str, port: int) -> dict[str, str]:
        return {
            "DATABASE_URL": f"postgresql+asyncpg://{login}:{PASSWORD}@{self.server.host}:{port}/{self.database}",
            "PHOENIX_DATABASE_SCHEMA": SCHEMA,
        }

    def make_login(self, login: str, *, is_member: bool = True) -> None:
        name = sql.Identifier(login)
        with self.admin() as connection:
            connection.execute(
                sql.SQL("CREATE ROLE {} LOGIN NOINHERIT PASSWORD {}").format(name, sql.Literal(PASSWORD))
            )
            connection.execute(
                sql.SQL("ALTER ROLE {} IN DATABASE {} SET search_path = {}").format(
                    name, sql.Identifier(self.database), sql.Identifier(SCHEMA)
                )
            )
            if is_member:
                connection.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(self.owner), name))

    def admin(self) -> psycopg.Connection[Any]:
        return self.server.connect(self.database)

    def query(self, statement: str) -> list[Any]:
        with self.admin() as connection:
            connection.execute(sql.SQL("SET search_path = {}").format(sql.Identifier(SCHEMA)))
            try:
                return connection.execute(statement).fetchall()  # type: ignore[call-overload, no-any-return]
            except psycopg.errors.UndefinedTable:
                return []

    def tamper(self, *statements: str) -> None:
        """Change what must not be changed, as a superuser can."""
        with self.admin() as connection:
            connection.execute(sql.SQL("SET search_path = {}").format(sql.Identifier(SCHEMA)))
            connection.execute("SET session_replication_role = replica")  # triggers do not fire
            for statement in statements:
                connection.execute(statement)  # type: ignore[call-overload]


Home = SqliteHome | PostgresHome


def write_model(
    folder: Path,
    name: str = "iris",
    *,
    mode: str = "Durable",
    includes_tensors: bool = True,
    has_events: bool = False,
    example: str = "iris",
) -> Path:
    """Write a manifest with an audit, and its model beside it; the manifest's path."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(EXAMPLES / example / "model.onnx", folder / "model.onnx")
    bindings: dict[str, Any] = {
        "postgres": {"backend": "default", "audit": {"mode": mode, "includeTensors": includes_tensors}}
    }
    if has_events:
        bindings["kafka"] = {"backend": "default"}
    document = {
        "apiVersion": "phoenix-ml.io/v1alpha1",
        "kind": "PhoenixModel",
        "metadata": {"name": name, "namespace": "ml"},
        "spec": {"model": {"uri": "model.onnx"}, "batching": {"maxRows": 32}, "bindings": bindings},
    }
    file = folder / f"{name}.json"
    file.write_text(json.dumps(document))
    return file


def settings(home: Home, **more: str) -> dict[str, str]:
    """The environment of a server with that audit."""
    return {"PHOENIX_MEASURE_CAPACITY": "false", **home.env, **more}


def cli(home: Home, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `phoenix-server ARGUMENTS` on that audit."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PHOENIX_")}
    return subprocess.run(
        [sys.executable, "-m", "phoenix_server", *arguments],
        env=inherited | home.env | more, capture_output=True, text=True, timeout=90,
    )  # fmt: skip


@contextlib.contextmanager
def serving(home: Home, *paths: Path, **more: str) -> Iterator[Running]:
    """A server whose audit is connected."""
    with start(paths, settings(home, **more)) as server:
        wait_until(lambda: metric(server, "phoenix_binding_up") > 0, "the audit is connected")
        yield server


@dataclass
class Answers:
    """What a load got: ids of the requests by status."""

    ids: dict[int, list[str]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def of(self, status: int) -> list[str]:
        return self.ids.get(status, [])


def infer(
    server: Running, request_id: str, *, model: str = "iris", body: Any = None, timeout_s: float = 30.0
) -> tuple[int, Any]:
    """Send one request; the status and the body."""
    connection = http.client.HTTPConnection(server.rest_url.removeprefix("http://"), timeout=timeout_s)
    try:
        return _send(connection, request_id, model, body)
    finally:
        connection.close()


def metric(server: Running, name: str) -> float:
    """The sum of a metric's series."""
    with urllib.request.urlopen(f"{server.rest_url}/metrics", timeout=30) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def state(server: Running, model: str = "iris") -> dict[str, Any]:
    """What `/state` says of the binding."""
    with urllib.request.urlopen(f"{server.rest_url}/v2/models/{model}/state", timeout=30) as page:
        return dict(json.loads(page.read())["bindings"]["postgresql"])


def is_ready(server: Running) -> bool:
    with urllib.request.urlopen(f"{server.rest_url}/v2/health/ready", timeout=30) as page:
        return bool(page.status == 200)


@contextlib.contextmanager
def load(server: Running, *, model: str = "iris", connections: int = 8, name: str = "load") -> Iterator[Answers]:
    """Send requests over that many connections until the block ends."""
    answers, stop, lock = Answers(), threading.Event(), threading.Lock()

    def run(number: int) -> None:
        connection = http.client.HTTPConnection(server.rest_url.removeprefix("http://"), timeout=30)
        count = 0
        while not stop.is_set():
            request_id = f"{name}-{number}-{count}"
            count += 1
            try:
                status, _ = _send(connection, request_id, model, None)
            except (OSError, http.client.HTTPException):
                with lock:
                    answers.broken.append(request_id)
                connection.close()
                stop.wait(0.02)
                continue
            with lock:
                answers.ids.setdefault(status, []).append(request_id)
        connection.close()

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(connections)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def _send(connection: http.client.HTTPConnection, request_id: str, model: str, body: Any) -> tuple[int, Any]:
    if body is None:
        seed = sum(request_id.encode())
        rows = 1 + seed % 3
        data = [((seed * 31 + i * 17) % 97) / 13 for i in range(rows * 4)]
        body = {"inputs": [{"name": "x", "shape": [rows, 4], "datatype": "FP32", "data": data}]}
    connection.request("POST", f"/v2/models/{model}/infer", json.dumps({"id": request_id, **body}))
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def row_ids(home: Home) -> list[str]:
    """The ids of all requests that are recorded, as often as they are."""
    return [row[0] for row in home.query("SELECT request_id FROM predictions")]
