"""Kafka as the operator provisions it, on the real one: TLS, SCRAM, ACLs, topics that are never made by being named."""

import asyncio
import functools
import itertools
import os
import re
import signal
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from backend_cases import ADMIN_SECRET, PROVISIONING, assert_silent, login_of, on_a_loop, refused, using, wait_for
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ConfigSource,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialDeletion,
    UserScramCredentialUpsertion,
)
from faulty_proxy import proxy_to
from services import DEADLINE_S, KafkaBroker

from phoenix_api import Reason
from phoenix_operator.backends import Backend, Tenant, Topic

Admin = Mapping[str, str]
Rule = tuple[ResourceType, str, ResourcePatternType, AclOperation]
KIND = "kafka"
_numbers = itertools.count(1)


def admin_of(broker: KafkaBroker, **others: str) -> dict[str, str]:
    return {
        "bootstrap-servers": broker.bootstrap,
        "security-protocol": "SASL_SSL",
        "sasl-mechanism": "SCRAM-SHA-512",
        "username": broker.admin.username,
        "password": broker.admin.password,
        "certificates": broker.authority.read_text(),
        **others,
    }


def model(*, partitions: int = 2, hours: int = 24, namespace: str = "", name: str = "fraud") -> Tenant:
    """A model in a namespace of its own, with two topics."""
    namespace = namespace or f"ml-{next(_numbers)}"
    topics = [Topic(f"phoenix.{namespace}.{name}.{end}", partitions, hours) for end in ("predictions", "requests")]
    return Tenant(namespace, name, "7c1a4a3e-0001", tuple(topics), f"phoenix.{namespace}.{name}")


@functools.cache
def chief(broker: KafkaBroker) -> AdminClient:
    """The admin's client: one, for what it is asked ends when it does."""
    return AdminClient(broker.config() | {"log_level": 0})


class Pod:
    """A server of a model: it knows the binding Secret and nothing else."""

    def __init__(self, broker: KafkaBroker, binding: Mapping[str, str]) -> None:
        self.group = binding["group-id"]
        self._config: dict[str, Any] = {
            "bootstrap.servers": binding["bootstrap-servers"],
            "security.protocol": binding["security-protocol"],
            "sasl.mechanism": binding["sasl-mechanism"],
            "sasl.username": binding["username"],
            "sasl.password": binding["password"],
            "ssl.ca.pem": binding["certificates"],
            "log_level": 0,
        }

    def client(self, kind: Callable[[dict[str, Any]], Any], **others: Any) -> tuple[Any, list[KafkaError]]:
        """A client, and the errors that it meets."""
        met: list[KafkaError] = []
        config = {name.replace("_", "."): value for name, value in others.items()}
        return kind(self._config | config | {"error_cb": met.append}), met

    def produce(self, topic: str, value: bytes = b"x", *, transaction: str = "") -> KafkaError | None:
        """Write a record; what went wrong, if something did."""
        options = {"transactional_id": transaction} if transaction else {}
        producer, met = self.client(Producer, enable_idempotence=True, message_timeout_ms=10_000, **options)
        told: list[KafkaError | None] = []
        try:
            if transaction:
                producer.init_transactions(10)
                producer.begin_transaction()
            producer.produce(topic, value, on_delivery=lambda error, message: told.append(error))
            until = time.monotonic() + DEADLINE_S
            while not told and time.monotonic() < until:
                producer.poll(0.05)
                if refusal := [error for error in met if error.code() == KafkaError._AUTHENTICATION]:
                    return refusal[0]
            if transaction:
                producer.commit_transaction(10)
        except KafkaException as exception:
            return exception.args[0]  # type: ignore[no-any-return]
        return told[0] if told else met[-1]

    def consume(self, topic: str, *, group: str = "") -> Message | KafkaError:
        """Read one record and commit its offset, or say what went wrong."""
        consumer, _ = self.client(
            Consumer, group_id=group or self.group, auto_offset_reset="earliest", enable_auto_commit=False
        )
        consumer.subscribe([topic])
        try:
            until = time.monotonic() + DEADLINE_S
            while time.monotonic() < until:
                if (message := consumer.poll(0.1)) is not None:
                    if message.error():
                        return message.error()
                    consumer.commit(message, asynchronous=False)
                    return message
        except KafkaException as exception:
            return exception.args[0]
        finally:
            consumer.close()
        raise AssertionError("nothing was read")


async def pod_of(broker: KafkaBroker, backend: Backend, tenant: Tenant, slot: str = "a", *, password: str = "") -> Pod:
    login = login_of(backend, tenant, slot, password=password)
    await backend.ensure(tenant, login)
    return Pod(broker, backend.binding(tenant, login))


def topics(broker: KafkaBroker, tenant: Tenant) -> dict[str, int]:
    known = chief(broker).list_topics(timeout=DEADLINE_S).topics
    prefix = f"phoenix.{tenant.namespace}."
    return {name: len(topic.partitions) for name, topic in known.items() if name.startswith(prefix)}


def configuration(broker: KafkaBroker, name: str) -> dict[str, str]:
    """What was set on a topic, not what it inherits."""
    resource = ConfigResource(ConfigResource.Type.TOPIC, name)
    entries = chief(broker).describe_configs([resource])[resource].result(DEADLINE_S)
    return {
        key: entry.value for key, entry in entries.items() if entry.source == ConfigSource.DYNAMIC_TOPIC_CONFIG.value
    }


def configure(broker: KafkaBroker, name: str, **values: str) -> None:
    changes = [
        ConfigEntry(key.replace("_", "."), value, incremental_operation=AlterConfigOpType.SET)
        for key, value in values.items()
    ]
    resource = ConfigResource(ConfigResource.Type.TOPIC, name, incremental_configs=changes)
    chief(broker).incremental_alter_configs([resource])[resource].result(DEADLINE_S)


def acls(broker: KafkaBroker, username: str) -> set[AclBinding]:
    everything = AclBindingFilter(
        ResourceType.ANY, None, ResourcePatternType.ANY, f"User:{username}", None, AclOperation.ANY,
        AclPermissionType.ANY,
    )  # fmt: skip
    return set(chief(broker).describe_acls(everything).result(DEADLINE_S))


def give(broker: KafkaBroker, username: str, *rules: Rule) -> None:
    bindings = [AclBinding(*rule[:3], f"User:{username}", "*", rule[3], AclPermissionType.ALLOW) for rule in rules]
    for future in chief(broker).create_acls(bindings).values():
        future.result(DEADLINE_S)


def remove(broker: KafkaBroker, *rules: AclBinding) -> None:
    filters = [
        AclBindingFilter(
            rule.restype, rule.name, rule.resource_pattern_type, rule.principal, rule.host, rule.operation,
            rule.permission_type,
        )
        for rule in rules
    ]  # fmt: skip
    for future in chief(broker).delete_acls(filters).values():
        future.result(DEADLINE_S)


def code(error: Any) -> int:
    """The code of an error, which must be one."""
    assert isinstance(error, KafkaError), error
    return int(error.code())


def make_user(broker: KafkaBroker, username: str, password: str) -> None:
    info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
    change = UserScramCredentialUpsertion(username, info, password.encode())
    for future in chief(broker).alter_user_scram_credentials([change]).values():
        future.result(DEADLINE_S)


def has_user(broker: KafkaBroker, username: str) -> bool:
    [future] = chief(broker).describe_user_scram_credentials([username]).values()
    try:
        future.result(DEADLINE_S)
    except KafkaException as exception:
        if exception.args[0].code() != KafkaError.RESOURCE_NOT_FOUND:
            raise
        return False
    return True


class Written:
    """What the controller writes from now on of users, ACLs, topics and configurations: not the empty records."""

    def __init__(self, broker: KafkaBroker) -> None:
        self._folder = broker.folder / "data" / "__cluster_metadata-0"
        self._before = self._content()

    def speaks_of(self, name: str) -> bool:
        content = self._content()
        assert content.startswith(self._before)
        return name.encode() in content[len(self._before) :]

    def _content(self) -> bytes:
        return b"".join(file.read_bytes() for file in sorted(self._folder.glob("*.log")))


@on_a_loop
async def test_topics_user_and_acls_are_made_and_work(secure_kafka: KafkaBroker) -> None:
    tenant = model()
    predictions, requests = (topic.name for topic in tenant.topics)
    async with using(KIND, admin_of(secure_kafka)) as backend:
        pod = await pod_of(secure_kafka, backend, tenant)
    assert topics(secure_kafka, tenant) == {predictions: 2, requests: 2}
    assert configuration(secure_kafka, requests) == {"retention.ms": "86400000"}
    assert pod.produce(predictions) is None
    assert pod.produce(requests, b"asked", transaction=f"{pod.group}.0") is None
    assert pod.produce(requests, transaction=pod.group) is None
    record = pod.consume(requests)
    assert isinstance(record, Message), record
    assert record.value() in (b"asked", b"x")


@on_a_loop
async def test_second_ensure_writes_nothing(secure_kafka: KafkaBroker) -> None:
    tenant = model()
    async with using(KIND, admin_of(secure_kafka)) as backend:
        login = login_of(backend, tenant)
        await backend.ensure(tenant, login)
        written = Written(secure_kafka)
        await backend.ensure(tenant, login)
        await backend.ensure(tenant, login)
        assert not written.speaks_of(tenant.namespace)
        configure(secure_kafka, tenant.topics[0].name, retention_ms="1000")
        assert written.speaks_of(tenant.namespace), "what is written would be seen"


@on_a_loop
async def test_foreign_login_reaches_nothing(secure_kafka: KafkaBroker) -> None:
    tenant = model()
    topic, group = tenant.topics[0].name, f"phoenix.{tenant.namespace}.fraud"
    async with using(KIND, admin_of(secure_kafka)) as backend:
        own = await pod_of(secure_kafka, backend, tenant)
        assert own.produce(topic) is None
        for other in (model(namespace=tenant.namespace, name="fraud-2"), model(namespace=tenant.namespace, name="f"),
                      model()):  # fmt: skip
            pod = await pod_of(secure_kafka, backend, other)
            mine = other.topics[0].name
            assert code(pod.produce(topic)) == KafkaError.TOPIC_AUTHORIZATION_FAILED
            assert code(pod.consume(topic)) == KafkaError.TOPIC_AUTHORIZATION_FAILED
            assert code(pod.consume(mine, group=group)) == KafkaError.GROUP_AUTHORIZATION_FAILED
            assert code(pod.produce(mine, transaction=group)) == KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED
            assert code(pod.produce(mine, transaction=f"{group}.1")) == KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED
            client, _ = pod.client(AdminClient)
            assert set(client.list_topics(timeout=DEADLINE_S).topics) == {topic.name for topic in other.topics}
            for future in client.delete_topics([topic]).values():
                with pytest.raises(KafkaException) as caught:
                    future.result(DEADLINE_S)
                assert code(caught.value.args[0]) == KafkaError.TOPIC_AUTHORIZATION_FAILED


@on_a_loop
async def test_rotation_lets_both_slots_in_until_the_old_one_goes(secure_kafka: KafkaBroker) -> None:
    tenant = model()
    topic = tenant.topics[0].name
    async with using(KIND, admin_of(secure_kafka)) as backend:
        old = await pod_of(secure_kafka, backend, tenant)
        new = await pod_of(secure_kafka, backend, tenant, "b")
        assert (old.produce(topic), new.produce(topic)) == (None, None)
        for _ in range(2):
            await backend.drop_login(tenant, backend.username(tenant, "a"))
            assert code(old.produce(topic)) == KafkaError._AUTHENTICATION
            assert new.produce(topic) is None
            assert not acls(secure_kafka, backend.username(tenant, "a"))
        again = await pod_of(secure_kafka, backend, tenant, password="s3cret-anew")
        assert again.produce(topic) is None
        assert code(old.produce(topic)) == KafkaError._AUTHENTICATION


@on_a_loop
async def test_login_that_is_dropped_can_do_nothing_with_what_it_has_open(secure_kafka: KafkaBroker) -> None:
    tenant = model()
    topic = tenant.topics[0].name
    async with using(KIND, admin_of(secure_kafka)) as backend:
        pod = await pod_of(secure_kafka, backend, tenant)
        producer, _ = pod.client(Producer)
        producer.produce(topic, b"before")
        assert producer.flush(DEADLINE_S) == 0
        await backend.drop_login(tenant, backend.username(tenant, "a"))
        told: list[KafkaError] = []
        producer.produce(topic, b"after", on_delivery=lambda error, message: told.append(error))
        assert producer.flush(DEADLINE_S) == 0
        assert code(told[0]) == KafkaError.TOPIC_AUTHORIZATION_FAILED


@on_a_loop
async def test_what_somebody_changed_is_set_right(secure_kafka: KafkaBroker) -> None:
    tenant = model()
    topic = tenant.topics[0].name
    async with using(KIND, admin_of(secure_kafka)) as backend:
        pod = await pod_of(secure_kafka, backend, tenant)
        username = backend.username(tenant, "a")
        rules = acls(secure_kafka, username)
        assert len(rules) == 6
        make_user(secure_kafka, username, "other")
        remove(secure_kafka, *[rule for rule in rules if rule.operation == AclOperation.WRITE])
        give(secure_kafka, username, (ResourceType.TOPIC, "phoenix.", ResourcePatternType.PREFIXED, AclOperation.READ))
        configure(secure_kafka, topic, retention_ms="1000", max_message_bytes="2000000")
        wait_for(lambda: configuration(secure_kafka, topic)["retention.ms"] == "1000")  # the last is told last
        await pod_of(secure_kafka, backend, tenant)
        assert acls(secure_kafka, username) == rules
        expected = {"retention.ms": "86400000", "max.message.bytes": "2000000"}
        wait_for(lambda: configuration(secure_kafka, topic) == expected)
        assert pod.produce(topic) is None
        chief(secure_kafka).delete_topics([topic])[topic].result(DEADLINE_S)
        wait_for(lambda: topic not in topics(secure_kafka, tenant))
        await pod_of(secure_kafka, backend, tenant)
        assert pod.produce(topic) is None


@on_a_loop
async def test_topic_is_widened_and_never_narrowed(secure_kafka: KafkaBroker) -> None:
    tenant = model(partitions=1)
    predictions, requests = (topic.name for topic in tenant.topics)
    async with using(KIND, admin_of(secure_kafka)) as backend:
        pod = await pod_of(secure_kafka, backend, tenant)
        assert pod.produce(predictions, b"kept") is None
        await pod_of(secure_kafka, backend, model(partitions=3, namespace=tenant.namespace))
        assert topics(secure_kafka, tenant) == {predictions: 3, requests: 3}
        with refused(
            Reason.TOPIC_MISMATCH,
            f"kafka default at {secure_kafka.bootstrap}: {predictions} has 3 partitions, not 2; {requests} has 3 "
            "partitions, not 2. Partitions cannot be taken away: ask for 3, or delete the topic",
        ):
            await pod_of(secure_kafka, backend, model(partitions=2, hours=48, namespace=tenant.namespace))
        assert topics(secure_kafka, tenant) == {predictions: 3, requests: 3}
        wait_for(lambda: configuration(secure_kafka, requests)["retention.ms"] == "172800000")  # the rest is done
        record = pod.consume(predictions)
        assert isinstance(record, Message)
        assert record.value() == b"kept"


@on_a_loop
async def test_retain_keeps_topics_and_delete_takes_them_all(secure_kafka: KafkaBroker) -> None:
    tenant = model()
    topic = tenant.topics[0].name
    neighbour = model(namespace=tenant.namespace, name="fraud-2")
    async with using(KIND, admin_of(secure_kafka)) as backend:
        for slot in "ab":
            pod = await pod_of(secure_kafka, backend, tenant, slot)
        other = await pod_of(secure_kafka, backend, neighbour)
        assert pod.produce(topic) is None
        assert isinstance(pod.consume(topic), Message)
        for slot in "ab":
            await backend.drop_login(tenant, backend.username(tenant, slot))
        assert len(topics(secure_kafka, tenant)) == 4
        heir = await pod_of(secure_kafka, backend, tenant)
        assert heir.produce(topic) is None, "what is retained is taken up again"
        secure_kafka.make_topic(f"phoenix.{tenant.namespace}.fraud.forgotten")
        for _ in range(2):
            await backend.drop_data(tenant)
            assert set(topics(secure_kafka, tenant)) == {topic.name for topic in neighbour.topics}
            assert not has_user(secure_kafka, backend.username(tenant, "a"))
            assert not acls(secure_kafka, backend.username(tenant, "a"))
        groups = chief(secure_kafka).list_consumer_groups().result(DEADLINE_S).valid
        assert pod.group not in [group.group_id for group in groups]
        assert other.produce(neighbour.topics[0].name) is None
        await pod_of(secure_kafka, backend, tenant)


@on_a_loop
async def test_name_that_is_not_under_the_models_prefix_is_refused(secure_kafka: KafkaBroker) -> None:
    for name in ("payments", "phoenix.ml.other.requests", "phoenix.ml.fraud", "phoenix.ml.fraud-2.requests"):
        tenant = Tenant("ml", "fraud", "uid", (Topic(name, 1, 1),))
        async with using(KIND, admin_of(secure_kafka)) as backend:
            with refused(Reason.TOPIC_MISMATCH, f"{name}: the operator gives rights on topics that begin with "
                         "phoenix.ml.fraud. only: choose such a name, or"):  # fmt: skip
                await backend.ensure(tenant, login_of(backend, tenant))
    tenant = Tenant("ml", "fraud", "uid", group="phoenix.ml.other")
    async with using(KIND, admin_of(secure_kafka)) as backend:
        with refused(Reason.TOPIC_MISMATCH, "the group phoenix.ml.other: expected phoenix.ml.fraud"):
            await backend.ensure(tenant, login_of(backend, tenant))


# --- capabilities and rights -----------------------------------------------------------------------------------------


@on_a_loop
async def test_admin_with_the_rights_that_the_docs_name_is_enough(secure_kafka: KafkaBroker) -> None:
    make_user(secure_kafka, "provisioner", "s3cret-provisioner")
    of_cluster, of_topics, of_group = map(rules_of, re.findall(r"^kafka-acls\.sh .*$", PROVISIONING, re.MULTILINE))
    admin = admin_of(secure_kafka, username="provisioner", password="s3cret-provisioner")
    tenant = model()
    async with using(KIND, admin) as backend:
        with refused(Reason.ACCESS_DENIED, "the admin may not Describe nor Alter the cluster; give it these rights"):
            await backend.ensure(tenant, login_of(backend, tenant))
        give(secure_kafka, "provisioner", *of_cluster)
        with refused(Reason.ACCESS_DENIED, f"the admin may not look at the topic phoenix.{tenant.namespace}."):
            await backend.ensure(tenant, login_of(backend, tenant))
        give(secure_kafka, "provisioner", *of_topics, *of_group)
        pod = await pod_of(secure_kafka, backend, tenant)
        assert pod.produce(tenant.topics[0].name) is None
        assert isinstance(pod.consume(tenant.topics[0].name), Message)
        await pod_of(secure_kafka, backend, model(partitions=3, hours=1, namespace=tenant.namespace))
        await backend.drop_data(tenant)
    assert topics(secure_kafka, tenant) == {}


def rules_of(command: str) -> list[Rule]:
    """The rules that a `kafka-acls.sh` command makes."""
    operations = [
        AclOperation[re.sub("(?<=.)(?=[A-Z])", "_", name).upper()] for name in re.findall(r"--operation (\w+)", command)
    ]
    if "--cluster" in command:
        return [(ResourceType.BROKER, "kafka-cluster", ResourcePatternType.LITERAL, right) for right in operations]
    [(kind, name)] = re.findall(r"--(topic|group) (\S+) --resource-pattern-type prefixed", command)
    return [(ResourceType[kind.upper()], name, ResourcePatternType.PREFIXED, right) for right in operations]


@on_a_loop
async def test_without_users_the_admins_credentials_are_given(secure_kafka: KafkaBroker) -> None:
    tenant, admin = model(), admin_of(secure_kafka)
    async with using(KIND, admin, capabilities={"manageUsers": False}) as backend:
        pod = await pod_of(secure_kafka, backend, tenant)
        username = backend.username(tenant, "a")
        assert pod.produce(tenant.topics[0].name) is None
        assert not has_user(secure_kafka, username)
        assert not acls(secure_kafka, username)
        await backend.drop_login(tenant, username)
        await backend.drop_data(tenant)
    assert topics(secure_kafka, tenant) == {}


@on_a_loop
async def test_without_topics_they_must_be_there(secure_kafka: KafkaBroker) -> None:
    tenant = model()
    predictions, requests = (topic.name for topic in tenant.topics)
    async with using(KIND, admin_of(secure_kafka), capabilities={"manageTopics": False}) as backend:
        with refused(Reason.TOPIC_MISMATCH, f"missing topics: {predictions} (2 partitions), {requests} (2 partitions); "
                     "make them, or switch manageTopics on"):  # fmt: skip
            await pod_of(secure_kafka, backend, tenant)
        for topic in (predictions, requests):
            secure_kafka.make_topic(topic, partitions=5)
        pod = await pod_of(secure_kafka, backend, tenant)
        assert pod.produce(predictions) is None
        await backend.drop_data(tenant)
        assert topics(secure_kafka, tenant) == {predictions: 5, requests: 5}
        assert configuration(secure_kafka, requests) == {}
        assert not has_user(secure_kafka, backend.username(tenant, "a"))


@on_a_loop
async def test_without_acls_a_user_has_the_rights_that_others_give(secure_kafka: KafkaBroker) -> None:
    tenant = model()
    async with using(KIND, admin_of(secure_kafka), capabilities={"manageAcls": False}) as backend:
        username = backend.username(tenant, "a")
        rule = (ResourceType.TOPIC, tenant.topics[0].name, ResourcePatternType.LITERAL, AclOperation.WRITE)
        give(secure_kafka, username, rule)
        pod = await pod_of(secure_kafka, backend, tenant)
        assert pod.produce(tenant.topics[0].name) is None
        assert code(pod.produce(tenant.topics[1].name)) == KafkaError.TOPIC_AUTHORIZATION_FAILED
        await backend.drop_login(tenant, username)
        assert len(acls(secure_kafka, username)) == 1


@on_a_loop
async def test_broker_without_logins_serves_topics_only(kafka_broker: KafkaBroker) -> None:
    admin = {"bootstrap-servers": kafka_broker.bootstrap}
    with refused(Reason.SECRET_MISSING, "security-protocol of its admin Secret is PLAINTEXT, where nobody logs in"):
        async with using(KIND, admin):
            pass
    tenant = model()
    async with using(KIND, admin, capabilities={"manageUsers": False}) as backend:
        login = login_of(backend, tenant)
        await backend.ensure(tenant, login)
        assert len(topics(kafka_broker, tenant)) == 2
        assert backend.binding(tenant, login) == {
            "type": "kafka", "provider": "phoenix", "bootstrap-servers": kafka_broker.bootstrap,
            "security-protocol": "PLAINTEXT", "group-id": f"phoenix.{tenant.namespace}.fraud",
        }  # fmt: skip
        await backend.drop_data(tenant)
    assert topics(kafka_broker, tenant) == {}


# --- faults ----------------------------------------------------------------------------------------------------------


@on_a_loop
async def test_wrong_admin_password_is_access_denied(secure_kafka: KafkaBroker) -> None:
    tenant = model()
    async with using(KIND, admin_of(secure_kafka, password="s3cret-wrong")) as backend:
        with refused(Reason.ACCESS_DENIED, f"kafka default at {secure_kafka.bootstrap}: the credentials of the Secret "
                     f"{ADMIN_SECRET} are refused; correct its username and password (Authentication failed during "
                     "authentication due to invalid credentials with SASL mechanism SCRAM-SHA-512)"):  # fmt: skip
            await backend.ensure(tenant, login_of(backend, tenant))


@on_a_loop
async def test_broker_that_ends_in_the_middle_of_a_login_has_not_refused_it() -> None:
    async with await asyncio.start_server(_answer_versions_and_hang_up, "127.0.0.1") as server:
        where = "{}:{}".format(*server.sockets[0].getsockname())
        admin = {"bootstrap-servers": where, "security-protocol": "SASL_PLAINTEXT", "username": "a", "password": "b"}
        async with using(KIND, admin, timeoutSeconds=1) as backend:
            with refused(Reason.BACKEND_UNREACHABLE, "mechanism handshake failed: Local: Broker transport failure"):
                await backend.ensure(tenant := model(), login_of(backend, tenant))


async def _answer_versions_and_hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say which requests are understood (ApiVersions, https://kafka.apache.org/protocol), and end at the next one."""
    [size] = struct.unpack(">i", await reader.readexactly(4))
    _, _, correlation = struct.unpack(">hhi", (await reader.readexactly(size))[:8])
    metadata, handshake, versions, authenticate = (3, 0, 4), (17, 0, 1), (18, 0, 3), (36, 0, 1)
    keys = [struct.pack(">hhhx", *key) for key in (metadata, handshake, versions, authenticate)]
    body = struct.pack(">ihB", correlation, 0, len(keys) + 1) + b"".join(keys) + bytes(5)
    writer.write(struct.pack(">i", len(body)) + body)
    await reader.read(1)
    writer.close()


@on_a_loop
async def test_more_replicas_than_brokers_are_told(secure_kafka: KafkaBroker) -> None:
    tenant = model()
    async with using(KIND, admin_of(secure_kafka), replicationFactor=3) as backend:
        with refused(Reason.TOPIC_MISMATCH, f"the topic phoenix.{tenant.namespace}.fraud.", "cannot be made", "replic"):
            await backend.ensure(tenant, login_of(backend, tenant))


@on_a_loop
async def test_authority_that_did_not_sign_is_refused(secure_kafka: KafkaBroker, secure_redis: Any) -> None:
    tenant = model()
    admin = admin_of(secure_kafka, certificates=secure_redis.authority.read_text())
    async with using(KIND, admin, timeoutSeconds=2) as backend:
        with refused(Reason.BACKEND_UNREACHABLE, "certificate verify failed", secrets=(admin["password"],)):
            await backend.ensure(tenant, login_of(backend, tenant))


@on_a_loop
async def test_backend_that_is_down_hangs_or_is_back_again(
    secure_kafka: KafkaBroker, everything_logged: pytest.LogCaptureFixture
) -> None:
    tenant = model()
    with proxy_to(secure_kafka.port) as proxy:
        admin = admin_of(secure_kafka, **{"bootstrap-servers": f"127.0.0.1:{proxy.port}"})
        where = f"kafka default at 127.0.0.1:{proxy.port}: "
        async with using(KIND, admin, timeoutSeconds=1) as backend:
            login = login_of(backend, tenant)
            proxy.set("refuse")
            with refused(Reason.BACKEND_UNREACHABLE, where, "Connection refused; see that it runs"):
                await backend.ensure(tenant, login)
            proxy.set("hang")
            for work in (backend.ensure(tenant, login), backend.drop_data(tenant),
                         backend.drop_login(tenant, login.username)):  # fmt: skip
                with refused(Reason.BACKEND_UNREACHABLE, f"{where}no answer within 1 s; see that it runs"):
                    await work
            proxy.set("reset")
            with refused(Reason.BACKEND_UNREACHABLE, where):
                await backend.ensure(tenant, login)
        proxy.set("pass")
        async with using(KIND, admin) as backend:
            await backend.ensure(tenant, login)
    assert_silent(everything_logged, admin["password"])


def _bucket(name: str) -> int:
    """Where a Java HashMap of few entries keeps a name: it is read in this order."""
    code = 0
    for character in name:
        code = (31 * code + ord(character)) & 0xFFFFFFFF
    return (code ^ code >> 16) & 15


@on_a_loop
async def test_broker_that_has_forgotten_every_user_is_given_them_again(
    kafka_factory: Callable[..., KafkaBroker],
) -> None:
    """Kafka 4.1.1 forgets them at a start if one was removed before whose name it comes to first (ScramDelta.apply)."""
    broker = kafka_factory(is_secure=True)
    admin = admin_of(broker, **{"sasl-mechanism": "PLAIN"})  # whose password the configuration has
    tenant = model()
    async with using(KIND, admin) as backend:
        login = login_of(backend, tenant)
        last = min(_bucket(login.username), _bucket("admin"))
        gone = next(name for name in map(str, itertools.count()) if _bucket(name) < last)
        await backend.ensure(tenant, login)
        pod = Pod(broker, backend.binding(tenant, login))
        topic = tenant.topics[0].name
        chief(broker).alter_user_scram_credentials([_user(gone)])[gone].result(DEADLINE_S)
        removal = UserScramCredentialDeletion(gone, ScramMechanism.SCRAM_SHA_512)
        chief(broker).alter_user_scram_credentials([removal])[gone].result(DEADLINE_S)
        assert pod.produce(topic) is None
        broker.stop()
        broker.start()
        error = pod.produce(topic)
        assert error is not None
        assert error.code() == KafkaError._AUTHENTICATION
        await backend.ensure(tenant, login)
        assert pod.produce(topic) is None


def _user(name: str) -> UserScramCredentialUpsertion:
    return UserScramCredentialUpsertion(name, ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096), b"a-password")


@on_a_loop
async def test_what_is_no_kafka_broker_is_unreachable(secure_kafka: KafkaBroker, redis_server: Any) -> None:
    tenant = model()
    admin = {"bootstrap-servers": f"127.0.0.1:{redis_server.port}"}
    async with using(KIND, admin, timeoutSeconds=1, capabilities={"manageUsers": False}) as backend:
        with refused(Reason.BACKEND_UNREACHABLE):
            await backend.ensure(tenant, login_of(backend, tenant))


@on_a_loop
async def test_process_that_aborts_hangs_or_is_no_longer_wanted(
    secure_kafka: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = model()
    with proxy_to(secure_kafka.port) as proxy:
        proxy.set("hang")
        admin = admin_of(secure_kafka, **{"bootstrap-servers": f"127.0.0.1:{proxy.port}"})
        async with using(KIND, admin) as backend:
            work = asyncio.create_task(backend.ensure(tenant, login_of(backend, tenant)))
            child = await child_of_this()
            seen = _process_file(child, "cmdline") + _process_file(child, "environ")
            assert b"kafka_admin" in seen
            assert not any(secret in seen for secret in (b"s3cret", admin["password"].encode()))
            os.kill(child, signal.SIGABRT)
            with refused(Reason.BACKEND_UNREACHABLE, "the Kafka client ended by SIGABRT: is it a Kafka broker?"):
                await work

            work = asyncio.create_task(backend.ensure(tenant, login_of(backend, tenant)))
            child = await child_of_this()
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work
            assert not _is_there(child)

        monkeypatch.setattr("phoenix_operator.backends.kafka._START_S", 1)
        async with using(KIND, admin, timeoutSeconds=1) as backend:
            work = asyncio.create_task(backend.ensure(tenant, login_of(backend, tenant)))
            child = await child_of_this()
            os.kill(child, signal.SIGSTOP)
            with refused(Reason.BACKEND_UNREACHABLE, "no answer within 1 s; see that it runs"):
                await work
            assert not _is_there(child)


async def child_of_this() -> int:
    """The process that works for a backend, once it is one."""
    while True:
        if found := _children():
            return found[0]
        await asyncio.sleep(0.01)


def _children() -> list[int]:
    lists = [file.read_text().split() for file in Path("/proc/self/task").glob("*/children")]
    return [child for child in map(int, itertools.chain(*lists)) if b"kafka_admin" in _process_file(child, "cmdline")]


def _process_file(process: int, name: str) -> bytes:
    return Path(f"/proc/{process}/{name}").read_bytes()


def _is_there(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


# --- names -----------------------------------------------------------------------------------------------------------


@on_a_loop
async def test_binding_has_the_keys_of_the_service_binding_specification() -> None:
    admin = {"bootstrap-servers": "k1:9092,k2:9092", "security-protocol": "SASL_SSL", "sasl-mechanism": "PLAIN",
             "username": "admin", "password": "p", "certificates": "PEM"}  # fmt: skip
    tenant = model(namespace="ml")
    expected = {
        "type": "kafka", "provider": "phoenix", "bootstrap-servers": "k1:9092,k2:9092", "security-protocol": "SASL_SSL",
        "sasl-mechanism": "SCRAM-SHA-512", "username": "phoenix.ml.fraud.a", "password": "s3cret-ml-fraud-a",
        "certificates": "PEM", "group-id": "phoenix.ml.fraud",
    }  # fmt: skip
    async with using(KIND, admin) as backend:
        assert backend.binding(tenant, login_of(backend, tenant)) == expected
    async with using(KIND, admin, capabilities={"manageUsers": False}) as backend:
        credentials = {"sasl-mechanism": "PLAIN", "username": "admin", "password": "p"}
        assert backend.binding(tenant, login_of(backend, tenant)) == expected | credentials


@on_a_loop
@pytest.mark.parametrize(
    ("admin", "phrase"),
    [
        ({}, "has no bootstrap-servers"),
        ({"bootstrap-servers": "k", "security-protocol": "SASL_SSL"}, "has no username and no password"),
        ({"bootstrap-servers": "k", "security-protocol": "TLS"}, "security-protocol of its admin Secret: expected"),
        ({"bootstrap-servers": "k", "sasl-mechanism": "GSSAPI"}, "sasl-mechanism of its admin Secret: expected"),
    ],
)
async def test_admin_secret_that_lacks_something_is_told(admin: Admin, phrase: str) -> None:
    with refused(Reason.SECRET_MISSING, "backend default", phrase):
        async with using(KIND, admin):
            pass
