"""The services that tests and the lab start: real ones, that can be killed, paused and broken, and come back."""

import base64
import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import confluent_kafka
import psycopg
import pytest
import redis
import services
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
from lab import LabError, machine, processes

# What never answers is given this long before a test says that it hangs.
SOON_S = 0.5


@pytest.fixture(params=["redis", "postgres", "kafka"])
def any_service(request):
    return request.getfixturevalue(f"{request.param}_factory")()


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=SOON_S):
        return True
    return False


# All alike


def test_service_that_was_killed_comes_back_on_its_port(any_service):
    port = any_service.port
    any_service.kill()
    assert not any_service.is_running
    assert not answers(port)
    any_service.start()
    assert any_service.port == port
    assert answers(port)
    with pytest.raises(LabError, match="runs already"):
        any_service.start()


def test_service_that_was_stopped_comes_back_and_one_that_is_paused_can_be_stopped(any_service):
    any_service.stop()
    assert not any_service.is_running
    any_service.start()
    any_service.pause()
    any_service.stop()
    assert not any_service.is_running
    assert not answers(any_service.port)
    with pytest.raises(LabError, match="does not run"):
        any_service.pause()


def test_service_without_logins_stays_on_loopback(tmp_path):
    with pytest.raises(LabError, match=r"listens on 127\.0\.0\.1 only, not on 192\.0\.2\.1"):
        services.RedisServer(tmp_path / "r", host="192.0.2.1")


def test_removed_service_leaves_neither_process_nor_file(services_here):
    with services.running(services.RedisServer) as server:
        found = processes.read(server.record)
    assert found is not None
    assert not found.is_running()
    assert not server.folder.exists()


def test_services_of_a_session_that_was_killed_are_ended_by_the_next(services_here):
    program = (
        "import services, sys, time\n"
        "with services.running(services.RedisServer) as server:\n"
        "    print(server.record, flush=True)\n"
        "    time.sleep(600)\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'tests'}:{root / 'tools'}"}
    session = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    assert session.stdout is not None
    with session.stdout:
        record = Path(session.stdout.readline().strip())
    found = processes.read(record)
    assert found is not None
    session.kill()
    session.wait()
    assert found.is_running()
    services._end_orphans()
    assert not found.is_running()
    assert not record.exists()


def test_programs_that_cannot_be_had_are_a_skip_with_the_reason_or_a_failure_where_services_are_required(monkeypatch):
    class Unobtainable(services.RedisServer):
        @classmethod
        def install(cls):
            raise LabError("no network")

    monkeypatch.setenv("PHOENIX_REQUIRE", "ui")
    with pytest.raises(pytest.skip.Exception, match="no redis: no network"):
        services.have(Unobtainable)
    for required in ("services", "compose,cluster"):
        monkeypatch.setenv("PHOENIX_REQUIRE", required)
        with pytest.raises(pytest.fail.Exception, match="no redis: no network"):
            services.have(Unobtainable)


def test_packages_are_installed_without_starting_their_daemons(tmp_path, monkeypatch):
    policy = tmp_path / "policy-rc.d"
    calls = tmp_path / "calls"
    apt = tmp_path / "apt-get"
    apt.write_text(
        f'#!/bin/sh\necho "$*" >> {calls}\n{policy} redis-server start >> {calls} || echo "code $?" >> {calls}\n'
    )
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(machine.os, "geteuid", lambda: 0)
    monkeypatch.setattr(machine, "_POLICY", policy)
    machine.install(["redis-server"])
    said = calls.read_text().splitlines()
    assert said[2].startswith("install -y --no-install-recommends")
    assert said[2].endswith("redis-server")
    assert said[3] == "code 101"
    assert not policy.exists()
    policy.write_text("#!/bin/sh\nexit 0\n")
    policy.chmod(0o755)
    machine.install(["redis-server"])
    assert policy.read_text() == "#!/bin/sh\nexit 0\n"


def test_free_port_is_none_that_an_outgoing_connection_takes():
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    port = machine.free_port("127.0.0.1")
    assert 1024 < port < lowest
    assert machine.free_port("127.0.0.1", usual=port) == port
    with socket.create_server(("127.0.0.1", port)):
        assert machine.free_port("127.0.0.1", usual=port) != port


# Redis


def test_redis_keeps_keys_and_users_through_a_kill(redis_factory):
    server = redis_factory()
    with server.client(decode_responses=True) as client:
        client.set("a", "1")
        client.acl_setuser("reader", enabled=True, passwords=["+secret"], keys=["a"], commands=["+get"])
        client.acl_save()
    server.kill()
    server.start()
    with server.client(decode_responses=True, username="reader", password="secret") as client:
        assert client.get("a") == "1"
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.get("b")
    server.flush()
    with server.client() as client:
        assert client.dbsize() == 0
        assert client.acl_users() == ["default"]


def test_paused_redis_hangs_and_goes_on(redis_factory):
    server = redis_factory()
    with server.client(socket_timeout=SOON_S, retry=None) as client:
        assert client.ping()
        server.pause()
        assert server.is_running
        with pytest.raises(redis.exceptions.TimeoutError):
            client.ping()
        server.resume()
    with server.client() as client:
        assert client.ping()


def test_secure_redis_takes_only_the_login_over_tls(secure_redis):
    with secure_redis.client() as client:
        assert client.ping()
    with secure_redis.client(password="wrong") as client, pytest.raises(redis.exceptions.AuthenticationError):
        client.ping()
    plain = redis.Redis(host=secure_redis.host, port=secure_redis.port, socket_timeout=1, retry=None)
    with plain as client, pytest.raises(redis.exceptions.ConnectionError):
        client.ping()
    assert secure_redis.admin.password not in repr(secure_redis.admin)


# PostgreSQL


def test_postgres_keeps_what_was_committed_through_a_kill(postgres_factory):
    server = postgres_factory()
    database = server.fresh_database()
    with server.connect(database) as connection:
        connection.execute("CREATE TABLE t (n int)")
        connection.execute("INSERT INTO t VALUES (7)")
        server.kill()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    server.start()
    with server.connect(database) as connection:
        assert connection.execute("SELECT n FROM t").fetchall() == [(7,)]


def test_postgres_databases_are_fresh_and_roles_need_their_password(postgres_server):
    assert postgres_server.fresh_database() != postgres_server.fresh_database()
    role = f"role_{os.getpid()}"
    with postgres_server.connect() as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'right'")
    try:
        with psycopg.connect(postgres_server.url(username=role, password="right")) as connection:
            assert connection.execute("SELECT current_user").fetchone() == (role,)
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(postgres_server.url(username=role, password="wrong"))
    finally:
        with postgres_server.connect() as connection:
            connection.execute(f"DROP ROLE {role}")


def test_paused_postgres_lets_an_open_connection_hang(postgres_factory):
    server = postgres_factory()
    with server.connect() as connection:
        server.pause()
        done = threading.Event()

        def ask() -> None:
            connection.execute("SELECT 1")
            done.set()

        asking = threading.Thread(target=ask)
        asking.start()
        assert not done.wait(SOON_S)
        server.resume()
        assert done.wait(services.DEADLINE_S)
        asking.join()


def test_read_only_postgres_refuses_writes_until_it_takes_them_again(postgres_factory):
    server = postgres_factory()
    server.set_read_only(True)
    with server.connect() as connection, pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        connection.execute("CREATE TABLE t (n int)")
    server.set_read_only(False)
    with server.connect() as connection:
        connection.execute("CREATE TABLE t (n int)")


def test_secure_postgres_takes_only_the_login_over_tls(secure_postgres):
    with secure_postgres.connect() as connection:
        assert connection.execute("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").fetchone() == (True,)
    with pytest.raises(psycopg.OperationalError, match="no encryption"):
        psycopg.connect(secure_postgres.url().replace("verify-full", "disable"))
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(secure_postgres.url(username="postgres", password="wrong"))


# Kafka


def produce(broker, topic: str, value: bytes, **config: Any) -> None:
    """One record, acknowledged; raises what the broker answered."""
    producer = confluent_kafka.Producer(broker.config({"message.timeout.ms": 20_000, **config}))
    outcomes: list[confluent_kafka.KafkaError | None] = []
    producer.produce(topic, value, on_delivery=lambda error, _: outcomes.append(error))
    producer.flush(services.DEADLINE_S)
    assert outcomes
    if outcomes[0] is not None:
        raise confluent_kafka.KafkaException(outcomes[0])


def consume(broker, topic: str, count: int, **config: str) -> list[bytes]:
    consumer = confluent_kafka.Consumer(broker.config({"group.id": "test", "auto.offset.reset": "earliest", **config}))
    try:
        consumer.subscribe([topic])
        values: list[bytes] = []
        end_at = time.monotonic() + services.DEADLINE_S
        while len(values) < count and time.monotonic() < end_at:
            record = consumer.poll(1)
            if record is None:
                continue
            if record.error():
                raise confluent_kafka.KafkaException(record.error())
            values.append(record.value() or b"")
        return values
    finally:
        consumer.close()


def test_kafka_keeps_records_through_a_kill(kafka_factory):
    broker = kafka_factory()
    topic = broker.fresh_topic(partitions=2, config={"retention.ms": "3600000"})
    produce(broker, topic, b"before")
    broker.kill()
    broker.start()
    produce(broker, topic, b"after")
    assert sorted(consume(broker, topic, 2)) == [b"after", b"before"]


def test_kafka_makes_no_topic_by_its_name_being_used(kafka_broker):
    with pytest.raises(confluent_kafka.KafkaException) as error:
        produce(kafka_broker, "never-made", b"x", **{"topic.metadata.propagation.max.ms": "500"})
    assert error.value.args[0].code() == confluent_kafka.KafkaError.UNKNOWN_TOPIC_OR_PART
    topic = kafka_broker.fresh_topic()
    assert topic in kafka_broker.admin_client().list_topics(timeout=services.DEADLINE_S).topics
    kafka_broker.delete_topic(topic)
    assert topic not in kafka_broker.admin_client().list_topics(timeout=services.DEADLINE_S).topics


def test_secure_kafka_lets_a_scram_user_do_what_its_acls_say(secure_kafka):
    admin = secure_kafka.admin_client()
    own, foreign = secure_kafka.fresh_topic(), secure_kafka.fresh_topic()
    credential = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
    admin.alter_user_scram_credentials([UserScramCredentialUpsertion("writer", credential, b"secret")])[
        "writer"
    ].result(services.DEADLINE_S)
    may_write = AclBinding(
        ResourceType.TOPIC,
        own,
        ResourcePatternType.LITERAL,
        "User:writer",
        "*",
        AclOperation.WRITE,
        AclPermissionType.ALLOW,
    )
    admin.create_acls([may_write])[may_write].result(services.DEADLINE_S)
    login = {"sasl.username": "writer", "sasl.password": "secret"}
    produce(secure_kafka, own, b"x", **login)
    with pytest.raises(confluent_kafka.KafkaException) as error:
        produce(secure_kafka, foreign, b"x", **login)
    assert error.value.args[0].code() == confluent_kafka.KafkaError.TOPIC_AUTHORIZATION_FAILED
    assert consume(secure_kafka, own, 1) == [b"x"]


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "PLAIN"])
def test_secure_kafka_refuses_a_wrong_password(secure_kafka, mechanism):
    errors: list[confluent_kafka.KafkaError] = []
    config = secure_kafka.config({"error_cb": errors.append, "sasl.mechanism": mechanism})
    good = confluent_kafka.Producer(config)
    assert good.list_topics(timeout=services.DEADLINE_S).brokers
    assert errors == []
    bad = confluent_kafka.Producer(config | {"sasl.password": "wrong"})
    with pytest.raises(confluent_kafka.KafkaException):
        bad.list_topics(timeout=2)
    bad.poll(0)
    assert confluent_kafka.KafkaError._AUTHENTICATION in {error.code() for error in errors}


def test_secure_kafka_takes_a_client_certificate_for_a_login(secure_kafka):
    topic = secure_kafka.fresh_topic()
    for name in ("admin", "nobody-known"):
        certificate, key = secure_kafka.client_certificate(name)
        mutual = {
            "bootstrap.servers": secure_kafka.mutual_tls_bootstrap,
            "security.protocol": "SSL",
            "ssl.certificate.location": str(certificate),
            "ssl.key.location": str(key),
        }
        with contextlib.ExitStack() as stack:
            if name != "admin":
                stack.enter_context(pytest.raises(confluent_kafka.KafkaException, match="Topic authorization failed"))
            produce(secure_kafka, topic, b"x", **mutual)


def test_kafka_that_takes_tokens_lets_in_whom_they_name(kafka_factory):
    broker = kafka_factory(is_secure=True, takes_tokens=True)

    def token(_: str) -> tuple[str, float]:
        until = int(time.time()) + 600
        parts = ({"alg": "none"}, {"sub": "admin", "iat": until - 600, "exp": until})
        encoded = (base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts)
        return ".".join((*encoded, "")), until

    produce(broker, broker.fresh_topic(), b"x", **{"sasl.mechanism": "OAUTHBEARER", "oauth_cb": token})


# TLS


@pytest.mark.parametrize("is_expired", [False, True])
def test_certificate_is_of_the_authority_and_ended_only_where_asked_for(redis_factory, is_expired):
    server = redis_factory(is_secure=True, is_expired=is_expired)
    context = ssl.create_default_context(cafile=str(server.authority))
    raw = socket.create_connection((server.host, server.port), timeout=services.DEADLINE_S)
    with contextlib.ExitStack() as stack:
        if is_expired:
            stack.enter_context(raw)
            stack.enter_context(pytest.raises(ssl.SSLCertVerificationError, match="certificate has expired"))
        stack.enter_context(context.wrap_socket(raw, server_hostname=server.host))


@pytest.mark.parametrize("kind", ["postgres", "kafka"])
def test_service_with_an_expired_certificate_starts_and_is_refused_by_clients(request, kind):
    server = request.getfixturevalue(f"{kind}_factory")(is_secure=True, is_expired=True)
    if kind == "postgres":
        with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
            server.connect()
    else:
        errors: list[confluent_kafka.KafkaError] = []
        client = confluent_kafka.Producer(server.config({"error_cb": errors.append}))
        with pytest.raises(confluent_kafka.KafkaException):
            client.list_topics(timeout=2)
        client.poll(0)
        assert confluent_kafka.KafkaError._SSL in {error.code() for error in errors}
