"""Models with events and requests for tests of Kafka: their manifests, what they are asked and what came of it."""

import contextlib
import json
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from confluent_kafka import Consumer, Message, Producer
from faulty_proxy import FaultyProxy, proxy_to
from lab import machine
from onnx import TensorProto, helper
from phoenix_process import Running, wait_until
from services import DEADLINE_S, KafkaBroker

IRIS = Path(__file__).parents[2] / "examples" / "iris" / "model.onnx"


def doubling() -> onnx.ModelProto:
    """A model that doubles its input `x` of shape [n, 1]."""
    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1]) for name in "xy"]
    constant = helper.make_tensor("k", TensorProto.FLOAT, [1], [2])
    graph = helper.make_graph([helper.make_node("Mul", ["x", "k"], ["y"])], "double", io[:1], io[1:], [constant])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@dataclass(frozen=True)
class Topics:
    """A model's topics; the names are as the operator makes them."""

    model: str
    namespace: str = "default"

    def _of(self, purpose: str) -> str:
        return f"phoenix.{self.namespace}.{self.model}.{purpose}"

    @property
    def events(self) -> str:
        return self._of("predictions")

    @property
    def requests(self) -> str:
        return self._of("requests")

    @property
    def results(self) -> str:
        return self._of("results")

    @property
    def dead_letters(self) -> str:
        return self._of("dead-letters")

    def make(self, broker: KafkaBroker, *, partitions: int = 3) -> "Topics":
        """Have all of them."""
        for name in (self.events, self.requests, self.results, self.dead_letters):
            broker.make_topic(name, partitions=partitions)
        return self


def write_model(folder: Path, name: str, *, kafka: dict[str, Any] | None = None, **spec: Any) -> Path:
    """Write the doubling model and a manifest with that Kafka binding."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(doubling().SerializeToString())
    document = {
        "apiVersion": "phoenix-ml.io/v1alpha1",
        "kind": "PhoenixModel",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": "model.onnx"},
            "bindings": {"kafka": {"backend": "default", **(kafka or {})}},
            **spec,
        },
    }
    (folder / "model.yaml").write_text(json.dumps(document))
    return folder


def settings_of(broker: KafkaBroker, **others: str) -> dict[str, str]:
    """The environment of a server that uses that broker without logins."""
    return {"PHOENIX_KAFKA_BOOTSTRAP_SERVERS": broker.bootstrap, "PHOENIX_MEASURE_CAPACITY": "0", **others}


@contextlib.contextmanager
def behind_a_proxy(kafka_factory: Callable[..., KafkaBroker]) -> Iterator[tuple[KafkaBroker, FaultyProxy]]:
    """A broker that everybody reaches through the proxy only."""
    port = machine.free_port("127.0.0.1")
    with proxy_to(port) as proxy:
        yield kafka_factory(port=port, advertised_port=proxy.port), proxy


def is_ready(server: Running) -> bool:
    """Whether the server would be sent requests in a cluster."""
    with urllib.request.urlopen(f"{server.rest_url}/v2/health/ready", timeout=DEADLINE_S) as response:
        return bool(response.status == 200)


def body(value: float, request_id: str | None = None, **parameters: Any) -> bytes:
    """A request of one row."""
    document: dict[str, Any] = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [value]}]}
    if request_id is not None:
        document["id"] = request_id
    if parameters:
        document["parameters"] = parameters
    return json.dumps(document).encode()


def ask(server: Running, model: str, value: float, request_id: str | None = None, **parameters: Any) -> float:
    """Infer over REST."""
    request = urllib.request.Request(
        f"{server.rest_url}/v2/models/{model}/infer", body(value, request_id, **parameters), method="POST"
    )
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
        return float(json.loads(response.read())["outputs"][0]["data"][0])


def binding(server: Running, model: str) -> dict[str, Any]:
    """What `/state` says of Kafka; empty until it is known."""
    with urllib.request.urlopen(f"{server.rest_url}/v2/models/{model}/state", timeout=DEADLINE_S) as response:
        found: dict[str, Any] = json.loads(response.read())["bindings"].get("kafka", {})
        return found


def metric(server: Running, name: str) -> float:
    """The value of a series, labels and all; 0 if it is not there."""
    with urllib.request.urlopen(f"{server.rest_url}/metrics", timeout=DEADLINE_S) as response:
        for line in response.read().decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.rsplit(" ", 1)[1])
    return 0.0


def await_state(server: Running, model: str, *, up: bool, saying: str = "", deadline_s: float = 40) -> None:
    """Wait until the binding is up, or down with that in its error."""

    def holds() -> bool:
        time.sleep(0.05)
        state = binding(server, model)
        return state.get("up") is up and saying in state.get("error", "")

    wait_until(holds, f"kafka of {model} {'up' if up else f'down, saying {saying!r}'}", deadline_s)


def send(broker: KafkaBroker, topic: str, records: Iterable[tuple[bytes | None, bytes | None]], **headers: Any) -> None:
    """Produce records of key and value and wait until the broker has them, restarts included."""
    producer = Producer(broker.config({"enable.idempotence": True, "linger.ms": 5}))
    for key, value in records:
        producer.produce(topic, value, key, headers=dict(headers))
        producer.poll(0)
    assert producer.flush(60) == 0


@dataclass
class Reader:
    """Reads committed records of some topics from their beginning."""

    broker: KafkaBroker
    topics: Sequence[str]
    records: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = {
            "group.id": f"reader-{time.monotonic_ns()}",
            "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "reconnect.backoff.max.ms": 500,
        }
        self._consumer = Consumer(self.broker.config(config))
        self._consumer.subscribe(list(self.topics))

    def close(self) -> None:
        self._consumer.close()

    def read(self) -> list[Message]:
        """Read what is there; everything that was read so far."""
        for message in self._consumer.consume(5000, 0.2):
            if message.error() is None:
                self.records.append(message)
        return self.records

    def read_until(
        self, is_enough: Callable[[list[Message]], bool], what: str, deadline_s: float = 60
    ) -> list[Message]:
        """Read until it is enough."""
        wait_until(lambda: is_enough(self.read()), f"{what}; there are {len(self.records)} records", deadline_s)
        return self.records


def records_of(broker: KafkaBroker, *topics: str, count: int, deadline_s: float = 60) -> list[Message]:
    """Return the first `count` committed records of the topics, and whatever came with them."""
    reader = Reader(broker, topics)
    try:
        return reader.read_until(lambda records: len(records) >= count, f"{count} records", deadline_s)
    finally:
        reader.close()
