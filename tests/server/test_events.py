"""Events on a real Kafka, and in files: delivered, keyed, counted; each fault is told, counted and survived."""

import asyncio
import json
import os
import ssl
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import phoenix_process
import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from phoenix_process import wait_until
from server.kafka_models import (
    Reader,
    Topics,
    ask,
    await_state,
    behind_a_proxy,
    binding,
    is_ready,
    metric,
    records_of,
    settings_of,
    write_model,
)
from server.test_event_format import VALIDATOR
from services import DEADLINE_S, KafkaBroker

from phoenix_server.errors import StartError
from phoenix_server.event_format import Event
from phoenix_server.events import Events, NotDelivered
from phoenix_server.metrics import Metrics
from phoenix_server.settings import load_settings

PUBLISHED = 'phoenix_events_published_total{{model="{}"}}'
DROPPED = 'phoenix_events_dropped_total{{model="{}",reason="{}"}}'


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- in files ------------------------------------------------------------------------------------------------


def test_without_a_broker_events_are_lines_of_a_file(tmp_path: Path) -> None:
    folder, state = write_model(tmp_path / "m", "filed"), tmp_path / "state"
    with phoenix_process.start([folder], {"PHOENIX_STATE_DIR": str(state)}) as server:
        for number in range(20):
            assert ask(server, "filed", number, f"r-{number}") == 2 * number
        with pytest.raises(urllib.error.HTTPError):
            ask(server, "filed", 1, "bad", timeout="soon")
    found = lines(state / "events" / "phoenix.default.filed.predictions.jsonl")
    for event in found:
        VALIDATOR.validate(event)
    assert [event["request_id"] for event in found] == [f"r-{number}" for number in range(20)]
    assert found[3]["outputs"][0]["data"] == [6.0]
    assert len({event["id"] for event in found}) == 20


def event(number: int, size: int = 10, topic: str = "t") -> Event:
    value = json.dumps({"id": f"e{number}", "pad": "x" * size}).encode()
    return Event(f"e{number}", topic, b"k", value)


def test_delivered_lines_are_in_the_file_and_files_are_bounded(tmp_path: Path) -> None:
    async def main() -> None:
        settings = load_settings({}, state_dir=tmp_path, events_file_bytes=1 << 16)
        async with Events(settings, Metrics()) as events:
            for number in range(300):
                await events.deliver([event(number, 1000)], deadline_s=DEADLINE_S)
                assert lines(tmp_path / "events" / "t.jsonl")[-1]["id"] == f"e{number}"
        with pytest.raises(NotDelivered, match="shutting down"):
            await events.deliver([event(1)], deadline_s=1)

    asyncio.run(main())
    new, old = tmp_path / "events" / "t.jsonl", tmp_path / "events" / "t.jsonl.1"
    assert new.stat().st_size <= 1 << 16 >= old.stat().st_size
    assert [e["id"] for e in lines(old) + lines(new)][-1] == "e299"


def test_a_line_cut_short_by_a_crash_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / "events" / "t.jsonl"
    path.parent.mkdir()
    path.write_text('{"id":"e0"}\n{"id":"e')

    async def main() -> None:
        async with Events(load_settings({}, state_dir=tmp_path), Metrics()) as events:
            await events.deliver([event(1)], deadline_s=DEADLINE_S)

    asyncio.run(main())
    assert path.read_text().splitlines()[0] == '{"id":"e0"}'
    assert json.loads(path.read_text().splitlines()[2])["id"] == "e1"


def test_a_file_that_cannot_be_written_is_told_and_counted(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "events").write_text("in the way")
    with phoenix_process.start(
        [write_model(tmp_path / "m", "stuck")], {"PHOENIX_STATE_DIR": str(tmp_path / "state")}
    ) as server:
        assert ask(server, "stuck", 2) == 4
        wait_until(lambda: metric(server, DROPPED.format("stuck", "file")) == 1, "the loss to be counted")
    assert any("events cannot be written" in line for line in server.stderr)

    async def main() -> None:
        async with Events(load_settings({}, state_dir=tmp_path / "state"), Metrics()) as events:
            with pytest.raises(NotDelivered, match="events"):
                await events.deliver([event(1)], deadline_s=DEADLINE_S)

    asyncio.run(main())


# --- on Kafka ------------------------------------------------------------------------------------------------


def test_each_prediction_is_one_valid_event_with_its_key(kafka_broker: KafkaBroker, tmp_path: Path) -> None:
    topics = Topics("delivered").make(kafka_broker)
    with phoenix_process.start([write_model(tmp_path, "delivered")], settings_of(kafka_broker)) as server:
        await_state(server, "delivered", up=True)
        for number in range(50):
            ask(server, "delivered", number, f"r-{number}")
    found = records_of(kafka_broker, topics.events, count=50)
    assert len(found) == 50
    events = {record.key(): json.loads(record.value()) for record in found}
    for number in range(50):
        document = events[f"r-{number}".encode()]
        VALIDATOR.validate(document)
        assert document["outputs"][0]["data"] == [2.0 * number]


def test_a_broker_that_is_down_at_the_start_and_comes_later_gets_everything(
    kafka_factory: Callable[..., KafkaBroker], tmp_path: Path
) -> None:
    broker = kafka_factory()
    topics = Topics("late").make(broker)
    broker.kill()
    with phoenix_process.start([write_model(tmp_path, "late")], settings_of(broker)) as server:
        await_state(server, "late", up=False)
        for number in range(20):
            assert ask(server, "late", number) == 2 * number
        assert metric(server, 'phoenix_binding_up{kind="kafka",model="late"}') == 0
        broker.start()
        await_state(server, "late", up=True)
        wait_until(lambda: metric(server, PUBLISHED.format("late")) == 20, "all events to be published")
        broker.kill()
        await_state(server, "late", up=False)
        for number in range(20):
            ask(server, "late", number)
        broker.start()
        wait_until(lambda: metric(server, PUBLISHED.format("late")) == 40, "all events to be published")
        await_state(server, "late", up=True)
    assert len({json.loads(r.value())["id"] for r in records_of(broker, topics.events, count=40)}) == 40


def test_a_slow_or_hanging_broker_holds_no_answer_up_and_gets_everything(
    kafka_factory: Callable[..., KafkaBroker], tmp_path: Path
) -> None:
    with behind_a_proxy(kafka_factory) as (broker, proxy):
        topics = Topics("slow").make(broker)
        with phoenix_process.start([write_model(tmp_path, "slow")], settings_of(broker)) as server:
            await_state(server, "slow", up=True)
            proxy.set("delay", delay_s=0.5)
            for number in range(20):
                assert ask(server, "slow", number, timeout=500_000) == 2 * number
            wait_until(lambda: metric(server, PUBLISHED.format("slow")) == 20, "all events to be published")
            assert binding(server, "slow")["up"] is True
            proxy.set("hang")
            for number in range(20):
                assert ask(server, "slow", number, timeout=500_000) == 2 * number
            await_state(server, "slow", up=False)
            assert metric(server, 'phoenix_binding_up{kind="kafka",model="slow"}') == 0
            assert is_ready(server)
            proxy.set("pass")
            await_state(server, "slow", up=True)
            wait_until(lambda: metric(server, PUBLISHED.format("slow")) == 40, "all events to be published")
        assert len({json.loads(r.value())["id"] for r in records_of(broker, topics.events, count=40)}) == 40


def test_requests_with_the_same_id_are_events_of_their_own(kafka_broker: KafkaBroker, tmp_path: Path) -> None:
    topics = Topics("again").make(kafka_broker)
    with phoenix_process.start([write_model(tmp_path, "again")], settings_of(kafka_broker)) as server:
        assert [ask(server, "again", number, "same") for number in range(3)] == [0, 2, 4]
    events = [json.loads(record.value()) for record in records_of(kafka_broker, topics.events, count=3)]
    assert [event["outputs"][0]["data"] for event in events] == [[0.0], [2.0], [4.0]]
    assert {event["request_id"] for event in events} == {"same"}
    assert len({event["id"] for event in events}) == 3


def test_what_a_broker_that_stays_down_does_not_get_is_counted_at_the_end(
    kafka_factory: Callable[..., KafkaBroker],
) -> None:
    async def main() -> None:
        broker = kafka_factory()
        broker.kill()
        settings = load_settings({}, kafka_bootstrap_servers=broker.bootstrap, shutdown_seconds=2)
        async with Events(settings, Metrics()) as events:
            with pytest.raises(NotDelivered, match="not acknowledged within"):
                await events.deliver([event(1)], deadline_s=0.5)

    asyncio.run(main())


def test_a_topic_that_is_missing_is_told_counted_and_found_once_it_is_made(
    kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    topics = Topics("homeless")
    with phoenix_process.start([write_model(tmp_path, "homeless")], settings_of(kafka_broker)) as server:
        await_state(server, "homeless", up=False, saying=f"topic '{topics.events}' does not exist")
        ask(server, "homeless", 1)
        wait_until(lambda: metric(server, DROPPED.format("homeless", "no_topic")) == 1, "the loss to be counted")
        kafka_broker.make_topic(topics.events)
        await_state(server, "homeless", up=True)

        def is_published() -> bool:
            ask(server, "homeless", 2)
            return metric(server, PUBLISHED.format("homeless")) > 0

        wait_until(is_published, "events to be published again")


def test_an_event_over_the_size_limit_is_lost_alone(kafka_broker: KafkaBroker, tmp_path: Path) -> None:
    topics = Topics("fat").make(kafka_broker)
    folder, settings = write_model(tmp_path, "fat"), settings_of(kafka_broker, PHOENIX_KAFKA_MESSAGE_MAX_BYTES="20000")
    with phoenix_process.start([folder], settings) as server:
        ask(server, "fat", 1, "a")
        big = {"inputs": [{"name": "x", "shape": [9000, 1], "datatype": "FP32", "data": [0.1] * 9000}]}
        request = urllib.request.Request(f"{server.rest_url}/v2/models/fat/infer", json.dumps(big).encode())
        urllib.request.urlopen(request, timeout=DEADLINE_S).close()
        ask(server, "fat", 1, "b")
        wait_until(lambda: metric(server, DROPPED.format("fat", "too_large")) == 1, "the loss to be counted")
        wait_until(lambda: metric(server, PUBLISHED.format("fat")) == 2, "the others to be published")
        await_state(server, "fat", up=True)
    assert {record.key() for record in records_of(kafka_broker, topics.events, count=2)} == {b"a", b"b"}


def test_a_full_queue_loses_and_counts(kafka_factory: Callable[..., KafkaBroker], tmp_path: Path) -> None:
    broker = kafka_factory()
    Topics("full").make(broker)
    broker.kill()
    settings = settings_of(broker, PHOENIX_EVENTS_QUEUE_BYTES=str(1 << 16), PHOENIX_SHUTDOWN_SECONDS="1")
    with phoenix_process.start([write_model(tmp_path, "full")], settings) as server:
        # the thread asks a cluster that does not answer, and meanwhile events wait
        def is_lost() -> bool:
            for _ in range(50):
                assert ask(server, "full", 1) == 2
            return metric(server, DROPPED.format("full", "queue_full")) > 0

        wait_until(is_lost, "a loss to be counted")


def test_delivery_is_acknowledged_by_the_broker(kafka_broker: KafkaBroker) -> None:
    topic = kafka_broker.fresh_topic()

    async def main() -> None:
        settings = load_settings({}, kafka_bootstrap_servers=kafka_broker.bootstrap)
        async with Events(settings, Metrics()) as events:
            await events.deliver([event(number, topic=topic) for number in range(1000)], deadline_s=DEADLINE_S)
            with pytest.raises(NotDelivered, match="UNKNOWN"):
                await events.deliver([event(1, topic="not-there")], deadline_s=50)
            await events.deliver([event(1000, topic=topic)], deadline_s=DEADLINE_S)

    asyncio.run(main())
    assert len(records_of(kafka_broker, topic, count=1001)) == 1001


# --- with logins ---------------------------------------------------------------------------------------------


def add_user(broker: KafkaBroker, name: str, password: str) -> None:
    credential = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
    change = UserScramCredentialUpsertion(name, credential, password.encode())
    admin = broker.admin_client()
    admin.alter_user_scram_credentials([change])[name].result(DEADLINE_S)


def allow(broker: KafkaBroker, user: str, kind: ResourceType, name: str, *operations: AclOperation) -> None:
    admin = broker.admin_client()
    rules = [
        AclBinding(kind, name, ResourcePatternType.LITERAL, f"User:{user}", "*", operation, AclPermissionType.ALLOW)
        for operation in operations
    ]
    for future in admin.create_acls(rules).values():
        future.result(DEADLINE_S)


def login(broker: KafkaBroker, user: str, password: str) -> dict[str, str]:
    return settings_of(
        broker,
        PHOENIX_KAFKA_SECURITY_PROTOCOL="SASL_SSL",
        PHOENIX_KAFKA_SASL_MECHANISM="SCRAM-SHA-512",
        PHOENIX_KAFKA_USERNAME=user,
        PHOENIX_KAFKA_PASSWORD=password,
        PHOENIX_KAFKA_CA_FILE=str(broker.authority),
    )


def test_a_wrong_password_is_told_and_the_right_one_needs_no_restart(secure_kafka: KafkaBroker, tmp_path: Path) -> None:
    topics = Topics("locked").make(secure_kafka)
    allow(secure_kafka, "locked", ResourceType.TOPIC, topics.events, AclOperation.WRITE, AclOperation.DESCRIBE)
    add_user(secure_kafka, "locked", "another-secret")
    settings = login(secure_kafka, "locked", "right-secret-4711")
    with phoenix_process.start([write_model(tmp_path, "locked")], settings) as server:
        await_state(server, "locked", up=False, saying="uthentication")
        assert ask(server, "locked", 1) == 2
        add_user(secure_kafka, "locked", "right-secret-4711")
        await_state(server, "locked", up=True)
        wait_until(lambda: metric(server, PUBLISHED.format("locked")) == 1, "the event to be published")
    assert "4711" not in "".join(server.stderr)


def test_a_topic_that_may_not_be_written_is_told_and_counted(secure_kafka: KafkaBroker, tmp_path: Path) -> None:
    topics = Topics("denied").make(secure_kafka)
    add_user(secure_kafka, "denied", "secret")
    allow(secure_kafka, "denied", ResourceType.TOPIC, topics.events, AclOperation.DESCRIBE)
    with phoenix_process.start([write_model(tmp_path, "denied")], login(secure_kafka, "denied", "secret")) as server:
        ask(server, "denied", 1)
        wait_until(lambda: metric(server, DROPPED.format("denied", "denied")) == 1, "the loss to be counted")
        await_state(server, "denied", up=False, saying="AUTHORIZATION_FAILED")
        allow(secure_kafka, "denied", ResourceType.TOPIC, topics.events, AclOperation.WRITE)

        def is_published() -> bool:
            ask(server, "denied", 2)
            return metric(server, PUBLISHED.format("denied")) > 0

        wait_until(is_published, "events to be published once they may be")
        await_state(server, "denied", up=True)


def test_a_broker_whose_certificate_nobody_knows_is_not_trusted(secure_kafka: KafkaBroker, tmp_path: Path) -> None:
    settings = login(secure_kafka, "admin", secure_kafka.admin.password) | {
        "PHOENIX_KAFKA_CA_FILE": ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt"
    }
    with phoenix_process.start([write_model(tmp_path, "strange")], settings) as server:
        await_state(server, "strange", up=False, saying="SSL")
        assert ask(server, "strange", 1) == 2


def test_an_expired_certificate_is_not_trusted(kafka_factory: Callable[..., KafkaBroker], tmp_path: Path) -> None:
    expired = kafka_factory(is_secure=True, is_expired=True)
    settings = login(expired, "admin", expired.admin.password)
    with phoenix_process.start([write_model(tmp_path, "expired")], settings) as server:
        await_state(server, "expired", up=False, saying="certificate verify failed")
        assert ask(server, "expired", 1) == 2
        assert is_ready(server)
    assert expired.admin.password not in "".join(server.stderr)


def test_a_service_binding_is_all_that_a_pod_needs(secure_kafka: KafkaBroker, tmp_path: Path) -> None:
    topics = Topics("bound").make(secure_kafka)
    folder = tmp_path / "bindings" / "kafka"
    folder.mkdir(parents=True)
    assert secure_kafka.authority is not None
    for key, value in {
        "type": "kafka",
        "provider": "phoenix",
        "bootstrap-servers": secure_kafka.bootstrap,
        "security-protocol": "SASL_SSL",
        "sasl-mechanism": "SCRAM-SHA-512",
        "username": secure_kafka.admin.username,
        "password": secure_kafka.admin.password,
        "certificates": secure_kafka.authority.read_text(),
        "group-id": "phoenix.default.bound",
    }.items():
        (folder / key).write_text(value)
    settings = {"SERVICE_BINDING_ROOT": str(tmp_path / "bindings")}
    with phoenix_process.start([write_model(tmp_path / "m", "bound")], settings) as server:
        ask(server, "bound", 1, "r")
        reader = Reader(secure_kafka, [topics.events])
        reader.read_until(lambda records: len(records) == 1, "the event")
        reader.close()


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"PHOENIX_KAFKA_SECURITY_PROTOCOL": "SASL_SSL"}, "PHOENIX_KAFKA_SASL_MECHANISM is missing"),
        (
            {"PHOENIX_KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "PHOENIX_KAFKA_SASL_MECHANISM": "PLAIN"},
            "PHOENIX_KAFKA_USERNAME is missing: PLAIN needs a user; PHOENIX_KAFKA_PASSWORD is missing",
        ),
        ({"PHOENIX_KAFKA_SASL_MECHANISM": "PLAIN"}, "expected SASL_SSL or SASL_PLAINTEXT with PLAIN, got PLAINTEXT"),
        (
            {"PHOENIX_KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "PHOENIX_KAFKA_SASL_MECHANISM": "OAUTHBEARER"},
            "PHOENIX_KAFKA_OAUTH_TOKEN_URL is missing",
        ),
        (
            {
                "PHOENIX_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
                "PHOENIX_KAFKA_SASL_MECHANISM": "OAUTHBEARER",
                "PHOENIX_KAFKA_OAUTH_CALLBACK": "nowhere:token",
            },
            "PHOENIX_KAFKA_OAUTH_CALLBACK: No module named 'nowhere'",
        ),
        (
            {"PHOENIX_KAFKA_SECURITY_PROTOCOL": "SSL", "PHOENIX_KAFKA_CA_FILE": "/nowhere.pem"},
            "PHOENIX_KAFKA_CA_FILE: no such file: /nowhere.pem",
        ),
        (
            {"PHOENIX_KAFKA_SECURITY_PROTOCOL": "SSL", "PHOENIX_KAFKA_KEY_FILE": os.devnull},
            "PHOENIX_KAFKA_CERTIFICATE_FILE is missing: mutual TLS needs certificate and key",
        ),
        ({"PHOENIX_KAFKA_SECURITY_PROTOCOL": "TLS"}, "PHOENIX_KAFKA_SECURITY_PROTOCOL"),
        ({"PHOENIX_KAFKA_BOOTSTRAP_SERVERS": "host one"}, "PHOENIX_KAFKA_BOOTSTRAP_SERVERS"),
    ],
)
def test_settings_that_do_not_fit_together_are_an_error_that_names_them(environment: dict[str, str], says: str) -> None:
    async def main() -> None:
        settings = load_settings({"PHOENIX_KAFKA_BOOTSTRAP_SERVERS": "localhost:9092"} | environment)
        async with Events(settings, Metrics()):
            pass

    with pytest.raises(StartError) as caught:
        asyncio.run(main())
    assert says in caught.value.message
