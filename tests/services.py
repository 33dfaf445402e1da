"""Real Redis, PostgreSQL and Kafka for tests: private processes on free ports, ended with the session.

Every test has these fixtures (`tests/conftest.py`). `redis_server`, `postgres_server`, `kafka_broker` and their secure
twins are started once per session, by the first test that asks; a test that lets one of them fail lets it recover. What
a test breaks for good it makes for itself with a factory, or with `running` in a fixture of its own that asks for
`services_here`. All have `start`, `stop`, `kill`, `pause`, `resume` and `remove` of `lab.services.Service`. A test that
uses any of this gets the marker `services`.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import psycopg
import pytest
import redis
from confluent_kafka.admin import AdminClient, NewTopic
from lab import LabError, processes
from lab import services as lab_services
from psycopg import sql

DEADLINE_S = 30
_PREFIX = "phoenix-services-"
_numbers = itertools.count(1)


class RedisServer(lab_services.Redis):
    """A Redis with what tests do to one."""

    @property
    def url(self) -> str:
        """The admin's `redis://` or `rediss://`; `authority` is trusted by who is given it, not by the URL."""
        login = f"{self.admin.username}:{self.admin.password}@" if self.is_secure else ""
        return f"redis{'s' if self.is_secure else ''}://{login}{self.host}:{self.port}/0"

    def client(self, **options: Any) -> redis.Redis:
        """A client of the admin's that trusts the authority; `options` are those of `redis.Redis`."""
        mine: dict[str, Any] = {"host": self.host, "port": self.port, "socket_timeout": DEADLINE_S}
        if self.is_secure:
            mine |= {"ssl": True, "ssl_ca_certs": str(self.authority)}
            mine |= {"username": self.admin.username, "password": self.admin.password}
        return redis.Redis(**(mine | options))

    def flush(self) -> None:
        """Delete every key, and every user but the first ones."""
        with self.client(decode_responses=True) as client:
            client.flushall()
            if others := set(client.acl_users()) - {"default", "admin"}:
                client.acl_deluser(*others)


class PostgresServer(lab_services.Postgres):
    """A PostgreSQL with what tests do to one."""

    def url(self, database: str = "postgres", *, username: str = "", password: str = "") -> str:
        """A libpq URL, of the superuser if no other is named."""
        user = username or self.admin.username
        secret = password or ("" if username else self.admin.password)
        login = f"{user}:{secret}" if secret else user
        trust = f"?sslmode=verify-full&sslrootcert={self.authority}" if self.is_secure else ""
        return f"postgresql://{login}@{self.host}:{self.port}/{database}{trust}"

    def connect(self, database: str = "postgres", **options: Any) -> psycopg.Connection[Any]:
        """A connection of the superuser's, in autocommit."""
        return psycopg.connect(self.url(database), autocommit=True, connect_timeout=DEADLINE_S, **options)

    def fresh_database(self) -> str:
        """Make an empty database; its name."""
        name = f"test_{os.getpid()}_{next(_numbers)}"
        with self.connect() as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return name

    def set_read_only(self, is_read_only: bool) -> None:
        """Refuse every write, as a server does whose disk is full or that is a standby; or allow them again."""
        with self.connect() as connection:
            connection.execute(f"ALTER SYSTEM SET default_transaction_read_only = {is_read_only}")
            connection.execute("SELECT pg_reload_conf()")
        processes.wait_until(
            f"default_transaction_read_only is {is_read_only}",
            lambda: self._is_read_only() == is_read_only,
            deadline_s=DEADLINE_S,
        )

    def _is_read_only(self) -> bool:
        with self.connect() as connection:
            row = connection.execute("SHOW default_transaction_read_only").fetchone()
        return bool(row and row[0] == "on")


class KafkaBroker(lab_services.Kafka):
    """A Kafka broker with what tests do to one."""

    def config(self, others: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The admin's settings for a confluent-kafka client, and over them `others`."""
        found: dict[str, Any] = {"bootstrap.servers": self.bootstrap}
        if self.is_secure:
            found |= {
                "security.protocol": "SASL_SSL",
                "sasl.mechanism": "SCRAM-SHA-512",
                "sasl.username": self.admin.username,
                "sasl.password": self.admin.password,
                "ssl.ca.location": str(self.authority),
            }
        return found | dict(others or {})

    def admin_client(self) -> AdminClient:
        """A client that may do everything."""
        return AdminClient(self.config())

    def make_topic(self, name: str, *, partitions: int = 1, config: dict[str, str] | None = None) -> str:
        """Make a topic and wait for it; its name."""
        topic = NewTopic(name, num_partitions=partitions, replication_factor=1, config=config or {})
        admin = self.admin_client()  # kept until it is answered: what it was asked ends with it
        admin.create_topics([topic], operation_timeout=DEADLINE_S)[name].result(DEADLINE_S)
        return name

    def fresh_topic(self, *, partitions: int = 1, config: dict[str, str] | None = None) -> str:
        """Make an empty topic; its name."""
        return self.make_topic(f"test-{os.getpid()}-{next(_numbers)}", partitions=partitions, config=config)

    def delete_topic(self, name: str) -> None:
        """Delete a topic and wait until the broker did."""
        admin = self.admin_client()
        admin.delete_topics([name], operation_timeout=DEADLINE_S)[name].result(DEADLINE_S)


S = TypeVar("S", bound=lab_services.Service)


def have(kind: type[lab_services.Service]) -> None:
    """Have the programs of a service, or skip with the reason; fail where PHOENIX_REQUIRE forbids to skip."""
    try:
        kind.install()
    except LabError as error:
        skip_or_fail(f"no {kind.kind}: {error}")


def skip_or_fail(reason: str) -> NoReturn:
    """Skip with the reason; fail where PHOENIX_REQUIRE forbids to skip."""
    if {"services", "cluster"} & set(os.environ.get("PHOENIX_REQUIRE", "").split(",")):
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def running(kind: type[S], **options: Any) -> Iterator[S]:
    """A started service of its own for the block; `options` are those of `lab.services.Service`."""
    have(kind)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    folder.chmod(0o711)  # PostgreSQL runs as another user, and must reach its files
    owner = processes.Record.of(os.getpid())
    assert owner is not None
    (folder / "owner.json").write_text(json.dumps(dataclasses.asdict(owner)))
    service = kind(folder / "service", **options)
    try:
        service.start()
        yield service
    finally:
        service.remove()
        shutil.rmtree(folder)


def _end_orphans() -> None:
    """End what sessions left that were killed: their services outlived them."""
    for owner in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/owner.json"):
        found = processes.read(owner)
        if found is None or found.is_running():
            continue
        for record in owner.parent.glob("service/*.json"):
            processes.kill_family(record)
        shutil.rmtree(owner.parent, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if services_here.__name__ in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.services)


@pytest.fixture(scope="session")
def services_here() -> None:
    """For fixtures that start services."""
    _end_orphans()


@pytest.fixture(scope="session")
def redis_server(services_here: None) -> Iterator[RedisServer]:
    """A Redis that asks for no password."""
    with running(RedisServer) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server(services_here: None) -> Iterator[PostgresServer]:
    """A PostgreSQL whose superuser needs no password."""
    with running(PostgresServer) as server:
        yield server


@pytest.fixture(scope="session")
def kafka_broker(services_here: None) -> Iterator[KafkaBroker]:
    """A Kafka without logins; topics must be made before they are used."""
    with running(KafkaBroker) as broker:
        yield broker


@pytest.fixture(scope="session")
def secure_redis(services_here: None) -> Iterator[RedisServer]:
    """A Redis behind TLS and ACL."""
    with running(RedisServer, is_secure=True) as server:
        yield server


@pytest.fixture(scope="session")
def secure_postgres(services_here: None) -> Iterator[PostgresServer]:
    """A PostgreSQL behind TLS and scram-sha-256."""
    with running(PostgresServer, is_secure=True) as server:
        yield server


@pytest.fixture(scope="session")
def secure_kafka(services_here: None) -> Iterator[KafkaBroker]:
    """A Kafka behind TLS, SCRAM-SHA-512 and ACLs."""
    with running(KafkaBroker, is_secure=True) as broker:
        yield broker


@contextlib.contextmanager
def _making(kind: type[S]) -> Iterator[Callable[..., S]]:
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(running(kind, **options))


@pytest.fixture
def redis_factory(services_here: None) -> Iterator[Callable[..., RedisServer]]:
    """Makes Redis servers that end with the test: `redis_factory(is_secure=True, is_expired=True)`."""
    with _making(RedisServer) as make:
        yield make


@pytest.fixture
def postgres_factory(services_here: None) -> Iterator[Callable[..., PostgresServer]]:
    """Makes PostgreSQL servers that end with the test."""
    with _making(PostgresServer) as make:
        yield make


@pytest.fixture
def kafka_factory(services_here: None) -> Iterator[Callable[..., KafkaBroker]]:
    """Makes Kafka brokers that end with the test."""
    with _making(KafkaBroker) as make:
        yield make
