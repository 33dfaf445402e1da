"""examples/fraud on the cluster, bound to a real Redis, Kafka and PostgreSQL behind TLS and logins."""

import base64
import json
from pathlib import Path
from typing import Any

import cluster as tools
import confluent_kafka
import psycopg
import pytest
import redis
import yaml
from confluent_kafka.admin import AdminClient
from phoenix_cluster import Phoenix

FRAUD = tools.ROOT / "examples/fraud"
EXPECTED = json.loads((FRAUD / "response.json").read_text())
ENDS = ("predictions", "requests", "results", "dead-letters")
Keys = dict[str, str]


def serve_fraud(phoenix: Phoenix, namespace: str) -> dict[str, Keys]:
    """Apply the example as it is, wait for it; the bindings that the operator made, by kind."""
    manifest = yaml.safe_load((FRAUD / "model.yaml").read_text())
    phoenix.apply(namespace, manifest)
    phoenix.wait_condition(namespace, "fraud", "BindingsReady", "True")
    phoenix.wait_ready(namespace, "fraud", deadline_s=180)
    return {kind: secret(phoenix, namespace, f"fraud-{kind}") for kind in ("redis", "kafka", "postgresql")}


def secret(phoenix: Phoenix, namespace: str, name: str) -> Keys:
    found = phoenix.get(namespace, f"secret/{name}")
    assert found is not None
    return {key: base64.b64decode(text).decode() for key, text in found["data"].items()}


def redis_client(keys: Keys) -> redis.Redis:
    return redis.Redis.from_url(keys["uri"], ssl_ca_data=keys["certificates"], decode_responses=True, retry=None)


def kafka_config(keys: Keys, **others: Any) -> dict[str, Any]:
    return {
        "bootstrap.servers": keys["bootstrap-servers"],
        "security.protocol": keys["security-protocol"],
        "sasl.mechanism": keys["sasl-mechanism"],
        "sasl.username": keys["username"],
        "sasl.password": keys["password"],
        "ssl.ca.pem": keys["certificates"],
        **{name.replace("_", "."): value for name, value in others.items()},
    }


def postgres_connect(keys: Keys, tmp_path: Path) -> psycopg.Connection[Any]:
    authority = tmp_path / "ca.crt"
    authority.write_text(keys["certificates"])
    return psycopg.connect(
        host=keys["host"],
        port=keys["port"],
        dbname=keys["database"],
        user=keys["username"],
        password=keys["password"],
        sslmode="verify-full",
        sslrootcert=str(authority),
        autocommit=True,
    )


def records(keys: Keys, topic: str, group: str, count: int) -> list[Any]:
    """Read `count` committed records of a topic from its beginning; fail where they do not come."""
    reset = {"auto.offset.reset": "earliest", "isolation.level": "read_committed"}
    consumer = confluent_kafka.Consumer(kafka_config(keys, group_id=group) | reset)
    found: list[Any] = []
    try:
        consumer.subscribe([topic])
        for _ in range(60):
            record = consumer.poll(1)
            if record is not None and record.error():
                raise confluent_kafka.KafkaException(record.error())
            found += [record] if record is not None else []
            if len(found) >= count:
                return found
    finally:
        consumer.close()
    raise AssertionError(f"{len(found)} records of {count} in {topic}")


def test_manifest_of_the_laptop_is_provisioned_and_served_with_everything_it_asks_for(
    phoenix: Phoenix, namespace: str, admin: dict[str, Keys], tmp_path: Path
) -> None:
    given = serve_fraud(phoenix, namespace)
    topics = {end: f"phoenix.{namespace}.fraud.{end}" for end in ENDS}
    listed = AdminClient(kafka_config(admin["kafka"])).list_topics(timeout=30).topics
    assert {topic: len(listed[topic].partitions) for topic in topics.values()} == dict.fromkeys(topics.values(), 3)

    assert "4" in tools.import_features(phoenix.kubectl, namespace)
    phoenix.start_client(namespace)
    answer = json.loads(tools.infer(phoenix.kubectl, namespace, f"fraud.{namespace}.svc", "fraud", example="fraud"))
    assert answer["outputs"][0]["data"] == EXPECTED["outputs"][0]["data"]
    assert answer["outputs"][1]["data"] == pytest.approx(EXPECTED["outputs"][1]["data"], abs=1e-6)

    schema = given["postgresql"]["schema"]
    with postgres_connect(admin["postgresql"], tmp_path) as connection:
        rows = connection.execute(f'SELECT request_id, outcome FROM "{schema}".predictions').fetchall()
    assert (answer["id"], "ok") in rows
    events = [json.loads(record.value()) for record in records(admin["kafka"], topics["predictions"], "events", 1)]
    assert answer["id"] in {event.get("request_id") for event in events}

    request = json.loads((FRAUD / "request.json").read_text()) | {"id": "by-kafka"}
    producer = confluent_kafka.Producer(kafka_config(admin["kafka"]))
    producer.produce(topics["requests"], json.dumps(request), key="card-1001")
    assert producer.flush(30) == 0
    [result] = records(admin["kafka"], topics["results"], "results", 1)
    assert result.key() == b"card-1001"
    assert json.loads(result.value())["id"] == "by-kafka"


def test_credentials_of_one_model_open_nothing_of_another(
    phoenix: Phoenix, namespace: str, another_namespace: str, admin: dict[str, Keys], tmp_path: Path
) -> None:
    own, foreign = serve_fraud(phoenix, namespace), serve_fraud(phoenix, another_namespace)
    with redis_client(own["redis"]) as client:
        client.hset(f"{own['redis']['key-prefix']}card:1", "amount_24h", "1")
        for call in (client.hgetall, client.delete):
            with pytest.raises(redis.exceptions.NoPermissionError):
                call(f"{foreign['redis']['key-prefix']}card:1")
        for dangerous in ("FLUSHALL", "KEYS *", "CONFIG GET *"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*dangerous.split())

    listed = AdminClient(kafka_config(own["kafka"])).list_topics(timeout=30).topics
    assert {topic for topic in listed if another_namespace in topic} == set()
    outcomes: list[confluent_kafka.KafkaError | None] = []
    producer = confluent_kafka.Producer(kafka_config(own["kafka"]))
    for where in (namespace, another_namespace):
        producer.produce(f"phoenix.{where}.fraud.predictions", b"{}", on_delivery=lambda e, _: outcomes.append(e))
        producer.flush(30)
    assert [error and error.code() for error in outcomes] == [
        None,
        confluent_kafka.KafkaError.TOPIC_AUTHORIZATION_FAILED,
    ]

    with postgres_connect(own["postgresql"], tmp_path) as connection:
        assert connection.execute("SELECT count(*) FROM predictions").fetchone() is not None
        for denied in (
            f'SELECT * FROM "{foreign["postgresql"]["schema"]}".predictions',
            "DELETE FROM predictions",
            "UPDATE predictions SET outcome = 'changed'",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(denied)
