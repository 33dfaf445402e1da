"""A model's whole life on the real Redis, Kafka and PostgreSQL, each with TLS and logins; the cluster is in memory."""

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import redis
from confluent_kafka import KafkaException, Producer
from objects import NAMESPACE, OPERATOR_NAMESPACE, loaded
from psycopg import sql
from services import KafkaBroker, PostgresServer, RedisServer
from world import KEY, World

from phoenix_operator.backends import make_backend
from phoenix_operator.kinds import PHOENIX_MODEL, SECRET
from phoenix_operator.observed import Object
from phoenix_operator.settings import Settings

KINDS = ("redis", "kafka", "postgresql")
ALL: Object = {"redis": {"backend": "default"}, "kafka": {"backend": "default"}, "postgres": {"backend": "default"}}
SETTINGS = Settings.model_validate(
    {
        "backends": [
            {"name": "default", "kind": kind, "adminSecretRef": {"name": f"{kind}-admin"}, "timeoutSeconds": 30}
            for kind in KINDS
        ]
    },
    by_alias=True,
    by_name=False,
)
TOPIC = f"phoenix.{NAMESPACE}.fraud.predictions"


class Real:
    """A world whose backends are the real ones, and clients that know what the pods know."""

    def __init__(self, redis_server: RedisServer, broker: KafkaBroker, postgres: PostgresServer) -> None:
        self.redis_server, self.broker, self.postgres = redis_server, broker, postgres
        self.database = postgres.fresh_database()
        self.world = World(SETTINGS, make=make_backend)
        self.world.secret(
            "redis-admin",
            OPERATOR_NAMESPACE,
            host=redis_server.host,
            port=str(redis_server.port),
            ssl="true",
            **login(redis_server),
        )
        self.world.secret(
            "kafka-admin",
            OPERATOR_NAMESPACE,
            bootstrap_servers=broker.bootstrap,
            security_protocol="SASL_SSL",
            sasl_mechanism="SCRAM-SHA-512",
            **login(broker),
        )
        self.world.secret(
            "postgresql-admin",
            OPERATOR_NAMESPACE,
            host=postgres.host,
            port=str(postgres.port),
            database=self.database,
            **login(postgres),
        )

    def given(self) -> dict[str, dict[str, str]]:
        """Return what a pod that starts now is given."""
        found = {}
        for kind in KINDS:
            data = self.world.child(SECRET, f"fraud-{kind}")["data"]
            found[kind] = {key: base64.b64decode(text).decode() for key, text in data.items()}
        return found

    def works(self, given: dict[str, dict[str, str]]) -> dict[str, bool]:
        """Return which of these bindings let a pod do its work."""
        return {
            "redis": self._redis_works(given["redis"]),
            "kafka": self._kafka_works(given["kafka"]),
            "postgresql": self._postgres_works(given["postgresql"]),
        }

    def _redis_works(self, values: dict[str, str]) -> bool:
        client = redis.Redis.from_url(values["uri"], ssl_ca_data=values["certificates"])
        try:
            client.hset(f"{values['key-prefix']}user:1", "amount", "1")
            return client.hget(f"{values['key-prefix']}user:1", "amount") == b"1"
        except (redis.AuthenticationError, redis.ConnectionError):
            return False
        finally:
            client.close()

    def _kafka_works(self, values: dict[str, str]) -> bool:
        told: list[Any] = []
        config: dict[str, Any] = {
            "bootstrap.servers": values["bootstrap-servers"],
            "security.protocol": values["security-protocol"],
            "sasl.mechanism": values["sasl-mechanism"],
            "sasl.username": values["username"],
            "sasl.password": values["password"],
            "ssl.ca.pem": values["certificates"],
            "message.timeout.ms": 8000,
            "log_level": 0,
        }
        producer = Producer(config)
        try:
            producer.list_topics(TOPIC, timeout=8)
        except KafkaException:
            return False
        producer.produce(TOPIC, b"{}", on_delivery=lambda error, _: told.append(error))
        producer.flush(20)
        return told == [None]

    def _postgres_works(self, values: dict[str, str]) -> bool:
        try:
            address = f"{values['uri']}&sslrootcert={self.postgres.authority}"
            with psycopg.connect(address, connect_timeout=10) as connection:
                row = connection.execute("SELECT current_schema()").fetchone()
                return row is not None
        except psycopg.OperationalError:
            return False

    def left(self) -> dict[str, bool]:
        """Return where data of the model is left."""
        with self.redis_server.client() as client:
            keys = list(client.scan_iter(f"phx:{NAMESPACE}:fraud:*"))
        topics = self.broker.admin_client().list_topics(timeout=30).topics
        with self.postgres.connect(self.database) as connection:
            schemas = connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = 'phx_ml_fraud'").fetchall()
        return {"redis": bool(keys), "kafka": TOPIC in topics, "postgresql": bool(schemas)}


def login(service: Any) -> dict[str, str]:
    return {
        "username": service.admin.username,
        "password": service.admin.password,
        "certificates": service.authority.read_text(),
    }


@pytest.fixture
def real(secure_redis: RedisServer, secure_kafka: KafkaBroker, secure_postgres: PostgresServer) -> Iterator[Real]:
    """Real backends, cleaned of what other tests have left in them."""
    secure_redis.flush()
    made = Real(secure_redis, secure_kafka, secure_postgres)
    yield made
    secure_redis.flush()
    with secure_postgres.connect() as connection:  # roles are of all databases
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(made.database)))
        left = connection.execute("SELECT rolname FROM pg_roles WHERE rolname LIKE 'phx\\_%'").fetchall()
        for (role,) in left:
            connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


EVERY, NONE = dict.fromkeys(KINDS, True), dict.fromkeys(KINDS, False)


@pytest.mark.parametrize("policy", ["Retain", "Delete"])
def test_model_is_given_access_rotated_and_released(real: Real, policy: str) -> None:
    async def main() -> None:
        world = real.world
        world.states.loaded = loaded()
        world.create(bindings=ALL | {"deletionPolicy": policy})
        await world.reconcile()
        assert world.condition("BindingsReady")[:2] == ("True", "Bound"), world.condition("BindingsReady")
        first = real.given()
        assert real.works(first) == EVERY
        world.roll_out()
        await world.reconcile()
        world.cluster.take_writes()
        await world.pool.close()
        world.start()
        await world.reconcile()
        assert world.cluster.writes == []

        world.annotate(rotate="1")
        await world.reconcile()
        second = real.given()
        assert real.works(second) == EVERY
        assert real.works(first) == EVERY, "pods of the template before go on"
        world.roll_out()
        await world.reconcile()
        assert real.works(second) == EVERY
        assert real.works(first) == NONE

        world.delete()
        await world.reconcile()
        assert (PHOENIX_MODEL, *KEY) not in world.cluster.objects, world.condition("BindingsReady")
        assert real.works(second) == NONE
        assert real.left() == (EVERY if policy == "Retain" else NONE)
        await world.pool.close()

    asyncio.run(main())


def test_backend_that_is_killed_blocks_deletion_until_it_is_back(real: Real) -> None:
    async def main() -> None:
        world = real.world
        world.create(bindings={"redis": {"backend": "default"}})
        await world.reconcile()
        real.redis_server.kill()
        world.delete()
        await world.reconcile()
        assert world.condition("BindingsReady")[:2] == ("False", "DeletionBlocked")
        real.redis_server.start()
        await world.pool.close()
        world.start()
        await world.reconcile()
        assert (PHOENIX_MODEL, *KEY) not in world.cluster.objects
        await world.pool.close()

    asyncio.run(main())
