"""What the proof of zero loss kills: inference servers beside a private PostgreSQL and a private Kafka broker.

Hides manifest, settings and topics, and what is seen from outside: how full the outbox is, who has events in hand, how
far the consumers have come. All faults are `kill -9`; what was killed comes back on its port with its data.
"""

import contextlib
import hashlib
import http.client
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import services
from confluent_kafka import Consumer, KafkaException, TopicPartition
from lab import services as lab_services

EXAMPLE = Path(__file__).parents[2] / "examples" / "iris"
NAMESPACE, MODEL = "zero-loss", "iris"
_NAME = f"phoenix.{NAMESPACE}.{MODEL}"
EVENTS, REQUESTS, RESULTS, DEAD_LETTERS = (
    f"{_NAME}.{what}" for what in ("predictions", "requests", "results", "dead-letters")
)
PARTITIONS = 3
_ASK_S = 5.0
_MANIFEST = """\
apiVersion: phoenix-ml.io/v1alpha1
kind: PhoenixModel
metadata: {{name: {model}, namespace: {namespace}}}
spec:
  model: {{uri: model.onnx, sha256: {sha256}, version: "1"}}
  bindings:
    kafka: {{backend: default, events: {{samplePercent: 100}}, requests: {{}}, partitions: {partitions}}}
    postgres: {{backend: default, audit: {{mode: Durable}}}}
"""


class InferenceServer(lab_services.Service):
    """A `phoenix-server serve` that is killed and comes back as the fixtures' services do."""

    kind = "phoenix-server"

    def __init__(self, folder: Path, *, name: str, database_url: str, bootstrap: str) -> None:
        super().__init__(folder)
        self.name = name
        self._database_url = f"{database_url}?application_name={name}"
        self._bootstrap = bootstrap

    @classmethod
    def install(cls) -> None:
        """It is installed where this runs."""

    @property
    def admin(self) -> lab_services.Login:
        """Nobody logs in."""
        return lab_services.Login("", "")

    def _binding(self) -> dict[str, str]:
        return {}

    def _prepare(self) -> None:
        models = self.folder / "models"
        models.mkdir()
        data = (EXAMPLE / "model.onnx").read_bytes()
        (models / "model.onnx").write_bytes(data)
        values = {"model": MODEL, "namespace": NAMESPACE, "partitions": PARTITIONS}
        (models / "model.yaml").write_text(_MANIFEST.format(sha256=hashlib.sha256(data).hexdigest(), **values))

    def environment(self) -> dict[str, str]:
        """The settings, which are also those of `phoenix-server audit`."""
        return {
            "PHOENIX_HOST": self.host,
            "PHOENIX_HTTP_PORT": str(self.port),
            "PHOENIX_GRPC_PORT": "0",
            "PHOENIX_STATE_DIR": str(self.folder / "state"),
            "PHOENIX_MEASURE_CAPACITY": "false",
            "PHOENIX_KAFKA_BOOTSTRAP_SERVERS": self._bootstrap,
            "DATABASE_URL": self._database_url,
        }

    def _command(self) -> Sequence[str | Path]:
        settings = [f"{name}={value}" for name, value in self.environment().items()]
        serve = (sys.executable, "-m", "phoenix_server", "serve", self.folder / "models" / "model.yaml")
        return ["env", *settings, *serve]  # `env` becomes the server: the recorded process is the one that is killed

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=_ASK_S)
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        return False


@dataclass(frozen=True)
class Stage:
    """Everything that runs, with the database that holds the audit."""

    postgres: services.PostgresServer
    kafka: services.KafkaBroker
    servers: tuple[InferenceServer, ...]
    database: str

    def outbox_rows(self) -> int:
        """How many events wait for a relay."""
        with self.postgres.connect(self.database) as connection:
            row = connection.execute("SELECT count(*) FROM outbox").fetchone()
            return int(row[0]) if row else 0

    def relaying(self) -> InferenceServer | None:
        """A server whose relay has events in hand: its transaction holds their rows until they are delivered."""
        query = (
            "SELECT a.application_name FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
            " WHERE l.relation = to_regclass('outbox') AND l.mode = 'RowShareLock' AND a.datname = %s"
        )
        with self.postgres.connect(self.database) as connection:
            names = {name for (name,) in connection.execute(query, [self.database])}
        return next((server for server in self.servers if server.name in names and server.is_running), None)

    def lag(self) -> int:
        """How many request records are not yet answered for good. Raises `KafkaException` while the broker is away."""
        consumer = Consumer(self.kafka.config({"group.id": _NAME}))
        try:
            places = [TopicPartition(REQUESTS, number) for number in range(PARTITIONS)]
            behind = 0
            for place in consumer.committed(places, timeout=_ASK_S):
                low, high = consumer.get_watermark_offsets(place, timeout=_ASK_S)
                behind += high - max(low, place.offset)
            return behind
        finally:
            consumer.close()

    def event_records(self) -> int:
        """How many records the topic of events has; 0 while the broker is away."""
        consumer = Consumer(self.kafka.config({"group.id": "zero-loss-watch", "log_level": 0}))
        try:
            places = [TopicPartition(EVENTS, number) for number in range(PARTITIONS)]
            return sum(consumer.get_watermark_offsets(place, timeout=_ASK_S)[1] for place in places)
        except KafkaException:
            return 0
        finally:
            consumer.close()


@contextlib.contextmanager
def stage(servers: int = 2) -> Iterator[Stage]:
    """Everything started, and gone after the block."""
    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(services.running(services.PostgresServer))
        kafka = stack.enter_context(services.running(services.KafkaBroker))
        for topic in (EVENTS, REQUESTS, RESULTS, DEAD_LETTERS):
            kafka.make_topic(topic, partitions=PARTITIONS)
        database = postgres.fresh_database()
        options = {"database_url": postgres.url(database), "bootstrap": kafka.bootstrap}
        running = [
            stack.enter_context(services.running(InferenceServer, name=f"server-{number}", **options))
            for number in range(1, servers + 1)
        ]
        yield Stage(postgres, kafka, tuple(running), database)
