"""examples/fraud on a real Redis, Kafka and PostgreSQL, behind TLS and logins: what its README says of a cluster."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import confluent_kafka
import httpx
import phoenix_process
import psycopg
import pytest
from phoenix_process import Running, wait_until
from services import DEADLINE_S, KafkaBroker, PostgresServer, RedisServer

ROOT = Path(__file__).parents[2]
FRAUD = ROOT / "examples/fraud"
REQUEST = json.loads((FRAUD / "request.json").read_text())
EXPECTED = json.loads((FRAUD / "response.json").read_text())
TOPICS = {end: f"phoenix.default.fraud.{end}" for end in ("predictions", "requests", "results", "dead-letters")}


@pytest.fixture(scope="module")
def bindings(
    secure_redis: RedisServer,
    secure_postgres: PostgresServer,
    secure_kafka: KafkaBroker,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A SERVICE_BINDING_ROOT, and what the operator would have made: topics and a database."""
    for topic in TOPICS.values():
        secure_kafka.make_topic(topic, partitions=2)
    root = tmp_path_factory.mktemp("bindings")
    database = secure_postgres.fresh_database()
    for service in (secure_redis, secure_postgres, secure_kafka):
        keys = service.binding()
        if service is secure_postgres:
            keys["uri"] = keys["uri"].removesuffix("/postgres") + f"/{database}"
        (root / service.kind).mkdir()
        for key, text in keys.items():
            (root / service.kind / key).write_text(text)
    return root


@pytest.fixture(scope="module")
def environment(bindings: Path) -> dict[str, str]:
    return {"SERVICE_BINDING_ROOT": str(bindings)}


@pytest.fixture(scope="module")
def imported(environment: dict[str, str]) -> str:
    return phoenix("features", "import", "examples/fraud/features.csv", "--manifest", "examples/fraud", **environment)


@pytest.fixture(scope="module")
def server(environment: dict[str, str], imported: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    state = str(tmp_path_factory.mktemp("state"))
    with phoenix_process.start([FRAUD], {**environment, "PHOENIX_STATE_DIR": state}) as running:
        yield running


def phoenix(*arguments: str, **environment: str) -> str:
    """Run phoenix-server; return what it printed."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PHOENIX_")}
    command = [sys.executable, "-m", "phoenix_server", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def infer(server: Running) -> dict[str, Any]:
    answer = httpx.post(f"{server.rest_url}/v2/models/fraud/infer", json=REQUEST)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def consumed(broker: KafkaBroker, topic: str, wanted: Sequence[str], field: str) -> dict[str, dict[str, Any]]:
    """Read a topic until `field` of its records has had all of `wanted`; the records by that field."""
    config = {"group.id": f"test-{topic}", "auto.offset.reset": "earliest", "isolation.level": "read_committed"}
    consumer = confluent_kafka.Consumer(broker.config(config))
    found: dict[str, dict[str, Any]] = {}

    def has_all() -> bool:
        record = consumer.poll(0.5)
        if record is not None and not record.error():
            body = json.loads(record.value())
            found[body.get(field)] = body
        return set(wanted) <= set(found)

    try:
        consumer.subscribe([topic])
        wait_until(has_all, f"{wanted} in {topic}")
    finally:
        consumer.close()
    return found


def test_features_are_imported_into_redis_and_complete_requests(server: Running, secure_redis: RedisServer) -> None:
    answer = infer(server)
    assert answer["parameters"]["feature_age_seconds"] >= 0
    assert answer["outputs"][0]["data"] == EXPECTED["outputs"][0]["data"]
    assert answer["outputs"][1]["data"] == pytest.approx(EXPECTED["outputs"][1]["data"], abs=1e-6)
    with (FRAUD / "features.csv").open(newline="") as file, secure_redis.client(decode_responses=True) as client:
        keys = set(client.scan_iter("*card:*"))
        assert {key.rpartition("card:")[2] for key in keys} == {row["card"] for row in csv.DictReader(file)}


def test_prediction_is_a_row_in_postgresql_and_an_event_in_kafka(
    server: Running, environment: dict[str, str], secure_kafka: KafkaBroker, bindings: Path
) -> None:
    answer = infer(server)
    folder = bindings / "postgresql"
    trust = f"?sslmode=verify-full&sslrootcert={folder / 'certificates'}"
    with psycopg.connect((folder / "uri").read_text() + trust) as connection:
        rows = connection.execute("SELECT request_id FROM predictions WHERE request_id = %s", [answer["id"]]).fetchall()
    assert rows == [(answer["id"],)]
    event = consumed(secure_kafka, TOPICS["predictions"], [answer["id"]], "request_id")[answer["id"]]
    assert (event["model"], event["outcome"]) == ("fraud", "ok")
    assert event["outputs"][0]["data"] == EXPECTED["outputs"][0]["data"]
    assert "0 broken" in phoenix("audit", "verify", **environment)
    assert "1 identical, 0 different" in phoenix("audit", "replay", answer["id"], **environment)


def test_request_through_kafka_gets_its_result_there(server: Running, secure_kafka: KafkaBroker) -> None:
    producer = confluent_kafka.Producer(secure_kafka.config())
    for number in range(3):
        body = json.dumps(REQUEST | {"id": f"async-{number}"})
        producer.produce(TOPICS["requests"], body, key=f"card-100{number}")
    producer.produce(TOPICS["requests"], b"{}", key="poisoned")
    assert producer.flush(DEADLINE_S) == 0
    results = consumed(secure_kafka, TOPICS["results"], [f"async-{number}" for number in range(3)], "id")
    assert {tuple(result["outputs"][0]["data"]) for result in results.values()} == {(0, 1, 0)}
    assert consumed(secure_kafka, TOPICS["dead-letters"], [None], "id") == {None: {}}


def test_redis_that_is_away_refuses_and_comes_back_without_a_restart(
    server: Running, secure_redis: RedisServer
) -> None:
    infer(server)
    secure_redis.kill()
    try:
        refused = httpx.post(f"{server.rest_url}/v2/models/fraud/infer", json=REQUEST)
        assert refused.status_code == 503, refused.text
        assert httpx.get(f"{server.rest_url}/v2/health/ready").status_code == 200
    finally:
        secure_redis.start()

    def answers() -> bool:
        return httpx.post(f"{server.rest_url}/v2/models/fraud/infer", json=REQUEST).status_code == 200

    wait_until(answers, "Redis is back")
