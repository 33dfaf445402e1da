"""What the group `bindings` needs beside the models: Redis, PostgreSQL and Kafka, and Phoenix with one binding each.

The services are private ones of `tools/lab`, installed and started when they are first asked for, on the core that
makes the load; so the measured core has the server's own work and nothing else. Each subject is iris with one thing
more.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import time
import urllib.request
import uuid
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from load import HttpRequest
from processes import BenchError
from subjects import ROOT, Running, Subject, phoenix
from workloads import Form, Workload

sys.path.append(str(ROOT / "tools"))

from lab import LabError

if TYPE_CHECKING:
    from lab import services as lab_services

_NAMESPACE = "bench"
_MANIFEST = """\
apiVersion: phoenix-ml.io/v1alpha1
kind: PhoenixModel
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  model: {{uri: model.onnx, sha256: {sha256}, version: "1"}}
"""
_FEATURES = """\
  features: {entityParameter: entity, keyTemplate: "row:{entity}", input: x, names: [a, b, c, d]}
  bindings: {redis: {backend: default}}
"""
_EVENTS = "  bindings: {kafka: {backend: default, events: {samplePercent: 100}}}\n"
_ASYNC = "  bindings: {kafka: {backend: default, events: {samplePercent: 0}, requests: {}}}\n"
_AUDIT = "  bindings: {{postgres: {{backend: default, audit: {{mode: {mode}}}}}}}\n"
_PARTITIONS = 3
_ANSWER_S = 10
_SETTLE_WITHIN_S = 60.0
_LOST = re.compile(r"^phoenix_(?:events|audit)_dropped_total(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


class Services:
    """The three services, each started when it is first asked for. Their folder ends with them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def redis(self) -> lab_services.Redis:
        """A Redis without a password."""
        from lab.services import Redis

        return self._started(Redis)

    @cached_property
    def postgres(self) -> lab_services.Postgres:
        """A PostgreSQL that syncs every commit to disk."""
        from lab.services import Postgres

        return self._started(Postgres)

    @cached_property
    def kafka(self) -> lab_services.Kafka:
        """One Kafka broker."""
        from lab.services import Kafka

        return self._started(Kafka)

    def close(self) -> None:
        """End those that run and delete what they wrote."""
        for name in ("redis", "postgres", "kafka"):
            if service := self.__dict__.pop(name, None):
                service.remove()

    def database(self) -> str:
        """Make an empty database; its URL."""
        import psycopg
        from psycopg import sql

        server = f"postgresql://postgres@{self.postgres.host}:{self.postgres.port}"
        name = f"bench_{uuid.uuid4().hex}"
        with psycopg.connect(f"{server}/postgres", autocommit=True, connect_timeout=_ANSWER_S) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return f"{server}/{name}"

    def topic(self, name: str) -> None:
        """Make a topic, unless it is there."""
        from confluent_kafka import KafkaError, KafkaException
        from confluent_kafka.admin import AdminClient, NewTopic

        admin = AdminClient({"bootstrap.servers": self.kafka.bootstrap, "log_level": 3})
        wanted = NewTopic(name, num_partitions=_PARTITIONS, replication_factor=1)
        try:
            admin.create_topics([wanted], operation_timeout=_ANSWER_S)[name].result(_ANSWER_S)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise BenchError(f"topic {name}: {error}") from error

    def rows(self, workload: Workload) -> None:
        """Keep the rows of the workload's input in Redis, as features."""
        import redis

        with redis.Redis(host=self.redis.host, port=self.redis.port, socket_timeout=_ANSWER_S) as client:
            for number, row in enumerate(np.load(workload.inputs)):
                key = f"phx:{_NAMESPACE}:{workload.name}:row:{number}"
                client.hset(key, mapping=dict(zip("abcd", map(float, row), strict=True)))

    def _started(self, kind: type[Any]) -> Any:
        self._folder.chmod(0o711)  # PostgreSQL runs as another user, and must reach its files
        try:
            kind.install()
            service = kind(self._folder / kind.kind)
            service.start()
        except LabError as error:
            raise BenchError(f"{kind.kind}: {error}") from error
        return service


def topic(workload: Workload, what: str) -> str:
    """Return the name of a topic of the model."""
    return f"phoenix.{_NAMESPACE}.{workload.name}.{what}"


def _start(
    services: Services, bindings: str, needs: tuple[str, ...], workload: Workload, folder: Path, core: int
) -> Running:
    model = folder / "model"
    model.mkdir()
    shutil.copy(workload.model, model / "model.onnx")
    sha256 = hashlib.sha256(workload.model.read_bytes()).hexdigest()
    text = _MANIFEST.format(name=workload.name, namespace=_NAMESPACE, sha256=sha256) + bindings
    (model / "model.yaml").write_text(text)
    env = {}
    if "redis" in needs:
        services.rows(workload)
        env["PHOENIX_REDIS_URL"] = f"redis://{services.redis.host}:{services.redis.port}/0"
    if "postgres" in needs:
        env["DATABASE_URL"] = services.database()
    if "kafka" in needs:
        for what in ("predictions", "requests", "results", "dead-letters"):
            services.topic(topic(workload, what))
        env["PHOENIX_KAFKA_BOOTSTRAP_SERVERS"] = services.kafka.bootstrap
    return phoenix(model, folder, core, env)


def _by_entity(workload: Workload, form: Form) -> HttpRequest:
    """Name the rows in place of sending them."""
    count = len(np.load(workload.inputs))
    entity: Any = "0" if count == 1 else json.dumps([str(number) for number in range(count)])
    body = orjson.dumps({"inputs": [], "parameters": {"entity": entity}})
    return HttpRequest(f"/v2/models/{workload.name}/infer", body)


def bound_subjects(services: Services) -> list[Subject]:
    """Return Phoenix with one binding each."""
    json_only = frozenset[Form]({"json"})
    return [
        Subject(name, title, json_only, partial(_start, services, bindings, needs), request)
        for name, title, bindings, needs, request in (
            ("features", "Phoenix, features from Redis", _FEATURES, ("redis",), _by_entity),
            ("events", "Phoenix, events to Kafka", _EVENTS, ("kafka",), None),
            ("best-effort", "Phoenix, BestEffort audit", _AUDIT.format(mode="BestEffort"), ("postgres",), None),
            ("durable", "Phoenix, Durable audit", _AUDIT.format(mode="Durable"), ("postgres",), None),
            ("async", "Phoenix, requests from Kafka", _ASYNC, ("kafka",), None),
        )
    ]


def lost(server: Running) -> float:
    """Return how many events and rows the server has lost so far, by its own metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics", timeout=_ANSWER_S) as reply:
        return sum(map(float, _LOST.findall(reply.read().decode())))


def settle(server: Running) -> None:
    """Wait until the server has nothing left to send or to write: until it takes less than 5 % of its core."""
    end = time.perf_counter() + _SETTLE_WITHIN_S
    while time.perf_counter() < end:
        before_s, at = server.process.cpu_s(), time.perf_counter()
        time.sleep(0.4)
        if server.process.cpu_s() - before_s < 0.05 * (time.perf_counter() - at):
            return
    raise BenchError(f"the server is still busy {_SETTLE_WITHIN_S:g} s after the load has ended")
