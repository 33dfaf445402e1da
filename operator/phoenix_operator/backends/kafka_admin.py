"""One piece of work on a Kafka cluster, in a process of its own: JSON comes in by stdin, JSON goes out by stdout.

librdkafka can abort the process that it lives in (seen: SCRAM calls of an admin without rights, answers that come
late), so the operator runs this file for each piece of work and ends it at the deadline. Secrets come by stdin:
arguments and environment can be read by others. This is the only module that knows `confluent_kafka`, and it knows
nothing of the project, whose packages take three times as long to load as the work takes.

In: `{"client": {…}, "deadline_s": …, "work": "ensure" | "drop_logins" | "drop_data", …}`, the rest are the arguments of
the function of that name. Out: `{}`, or `{"reason": …, "message": …}` with a member's name of `phoenix_api.Reason`, or
`LOGIN_REFUSED` with the broker's words; without a message `BACKEND_UNREACHABLE` says that nothing came.
"""

import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from typing import Any, NamedTuple, TypeVar

from confluent_kafka import KafkaError, KafkaException, TopicCollection
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
    NewPartitions,
    NewTopic,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialDeletion,
    UserScramCredentialUpsertion,
)

T = TypeVar("T")
_Rule = tuple[ResourceType, str, ResourcePatternType, AclOperation]

_RETENTION = "retention.ms"
_ITERATIONS = 8192
_POLL_S = 0.05
_DENIED = {
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    KafkaError.DELEGATION_TOKEN_AUTHORIZATION_FAILED,
}
# Of an error's text: how often and after how long it came, which differs each time.
_CHATTER = re.compile(r" \((after \d+ms|\d+ identical).*\)$")
_LOCAL = "Local: "  # librdkafka's own words, and no broker's
# Looked for before anything else: where Describe is denied, librdkafka 2.16 aborts (SCRAM) or tells of no ACLs.
_RIGHTS_FOR_USERS = (AclOperation.DESCRIBE, AclOperation.ALTER)
_NOT_YET = {
    KafkaError.NOT_COORDINATOR,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
}
_SILENT = {KafkaError._TIMED_OUT, KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError.REQUEST_TIMED_OUT}


class _Partitions(NamedTuple):
    """How many a topic has, and how many of them have a leader."""

    all: int
    led: int


# A client whose last reference ends in a thread of librdkafka's aborts the process, as with an answer that comes late.
_KEPT: list["Connection"] = []


class Failure(Exception):
    """What the process answers where it cannot do its work."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


class Connection:
    """The admin client of one login, until a deadline (of `time.monotonic`). Its errors are `Failure`."""

    def __init__(self, client: dict[str, Any], *, until: float) -> None:
        self._until, self._trouble, self._refusal = until, "", ""
        _KEPT.append(self)
        self.admin = AdminClient(
            {
                "client.id": "phoenix-operator",
                "allow.auto.create.topics": False,
                "reconnect.backoff.ms": 100,
                "reconnect.backoff.max.ms": 1000,
                **client,
                "error_cb": self._on_error,
            },
            logger=_Silence(),
        )

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self._until - time.monotonic()

    def done(self, future: "Future[T]", doing: str) -> T:
        """Return the result of a call; `doing` completes "may not …". Raises `Failure` or `KafkaException`.

        The errors that a caller knows what to do with come as they are.
        """
        while not wait([future], timeout=_POLL_S).done:
            self.admin.poll(0)  # which brings what `_on_error` is told
            if self._refusal:
                raise Failure("LOGIN_REFUSED", self._refusal)
            if self.left_s <= 0:
                raise self.silence()
        try:
            return future.result()
        except KafkaException as exception:
            error = exception.args[0]
            if error.code() in _DENIED:
                words = KafkaError(error.code()).str()  # a controller's own are a page of its internals
                raise Failure("ACCESS_DENIED", f"the admin may not {doing}: {words}") from None
            if error.code() in (KafkaError.POLICY_VIOLATION, KafkaError.UNSUPPORTED_VERSION):
                raise Failure("ACCESS_DENIED", f"the broker refuses to {doing}: {error.str()}") from None
            if error.code() in _SILENT:
                raise self.silence() from None
            raise

    def silence(self) -> Failure:
        """Return what to say where the broker says nothing: the last trouble with it, if there was one."""
        return Failure("BACKEND_UNREACHABLE", self._trouble)

    def greet(self, *needs: AclOperation) -> None:
        """Return once the broker answers to this login. Raises `Failure` if it lacks rights on the cluster."""
        call = self.admin.describe_cluster(include_authorized_operations=bool(needs), request_timeout=self._request_s)
        found = self.done(call, "describe the cluster")
        if missing := [right.name.capitalize() for right in needs if right not in (found.authorized_operations or ())]:
            raise Failure(
                "ACCESS_DENIED", f"the admin may not {' nor '.join(missing)} the cluster; give it these rights"
            )

    @property
    def _request_s(self) -> float:
        return max(self.left_s, 0.1)

    def _on_error(self, error: KafkaError) -> None:
        if error.code() != KafkaError._ALL_BROKERS_DOWN or not self._trouble:  # which of them, and why, came before
            self._trouble = _CHATTER.sub("", error.str())
        # a connection that ends while somebody logs in is called a failure to log in too
        if error.code() == KafkaError._AUTHENTICATION and _LOCAL not in error.str():
            self._refusal = self._trouble.rpartition(": ")[2]


class _Silence:
    """Takes the place of librdkafka's own log, which would go to stderr."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Forget it."""


def ensure(
    connection: Connection,
    *,
    login: dict[str, Any] | None,
    prefix: str,
    group: str,
    topics: list[dict[str, Any]],
    manages: dict[str, bool],
    replication_factor: int,
) -> None:
    """Make user, ACLs and topics as asked; write what differs only. `login` is a client's settings, or none to make."""
    connection.greet(*_RIGHTS_FOR_USERS if login else ())
    if login:
        if manages["acls"]:
            _ensure_acls(connection, login["sasl.username"], _rules(prefix, group))
        _ensure_user(connection, login)
    if topics:
        _ensure_topics(connection, topics, is_managed=manages["topics"], replication_factor=replication_factor)


def drop_logins(connection: Connection, *, usernames: list[str], manages: dict[str, bool]) -> None:
    """Take the rights away, at once, and then the credentials."""
    connection.greet(*_RIGHTS_FOR_USERS if usernames else ())
    for username in usernames:
        _drop_login(connection, username, manages_acls=manages["acls"])


def _drop_login(connection: Connection, username: str, *, manages_acls: bool) -> None:
    if manages_acls:
        _delete_acls(connection, username, _acls(connection, username))
    if _mechanisms(connection, username):
        deletion = UserScramCredentialDeletion(username, ScramMechanism.SCRAM_SHA_512)
        [future] = connection.admin.alter_user_scram_credentials([deletion]).values()
        _done_unless(connection, future, f"delete the user {username}", KafkaError.RESOURCE_NOT_FOUND)
        _until(connection, lambda: not _mechanisms(connection, username), f"the user {username} is being deleted")


def drop_data(
    connection: Connection, *, usernames: list[str], prefix: str, group: str, manages: dict[str, bool]
) -> None:
    """Drop the logins, every topic under the prefix and the group's offsets; return once no topic is left."""
    drop_logins(connection, usernames=usernames, manages=manages)
    if not manages["topics"]:
        return
    while names := _topics_under(connection, prefix):
        for name, future in connection.admin.delete_topics(names).items():
            _done_unless(connection, future, f"delete the topic {name}", KafkaError.UNKNOWN_TOPIC_OR_PART)
        time.sleep(_POLL_S)
    _delete_group(connection, group)


def _delete_group(connection: Connection, group: str) -> None:
    """Delete the group's offsets. One with a member is about to end; its offsets end by themselves."""
    while True:
        [future] = connection.admin.delete_consumer_groups([group]).values()
        try:
            _done_unless(
                connection, future, f"delete the group {group}", KafkaError.GROUP_ID_NOT_FOUND,
                KafkaError.NON_EMPTY_GROUP,
            )  # fmt: skip
        except KafkaException as exception:
            if exception.args[0].code() not in _NOT_YET or connection.left_s <= 0:
                raise
            time.sleep(_POLL_S)
        else:
            return


# --- users -----------------------------------------------------------------------------------------------------------


def _ensure_user(connection: Connection, login: dict[str, Any]) -> None:
    """Set the password unless the login works: a broker tells nobody what a password is."""
    username, password = login["sasl.username"], login["sasl.password"]
    if not _mechanisms(connection, username) or not _works(connection, login):
        info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, _ITERATIONS)
        upsertion = UserScramCredentialUpsertion(username, info, password.encode())
        [future] = connection.admin.alter_user_scram_credentials([upsertion]).values()
        connection.done(future, f"make the user {username}")
        _until(connection, lambda: _works(connection, login), f"the user {username} cannot log in yet")


def _mechanisms(connection: Connection, username: str) -> list[ScramMechanism]:
    [future] = connection.admin.describe_user_scram_credentials([username]).values()
    found = _done_unless(connection, future, f"look at the user {username}", KafkaError.RESOURCE_NOT_FOUND)
    infos = found.scram_credential_infos if found else ()
    return [info.mechanism for info in infos if info.mechanism == ScramMechanism.SCRAM_SHA_512]


def _works(connection: Connection, login: dict[str, Any]) -> bool:
    attempt = Connection(login, until=time.monotonic() + connection.left_s)
    try:
        attempt.greet()
    except Failure as error:
        if error.reason != "LOGIN_REFUSED":
            raise
        return False
    return True


# --- ACLs ------------------------------------------------------------------------------------------------------------


def _rules(prefix: str, group: str) -> set[_Rule]:
    """Return what a login may: everything under its prefix, which ends with a dot, and the group that is its name."""
    topic, of_group, transaction = ResourceType.TOPIC, ResourceType.GROUP, ResourceType.TRANSACTIONAL_ID
    return {
        (topic, prefix, ResourcePatternType.PREFIXED, AclOperation.READ),
        (topic, prefix, ResourcePatternType.PREFIXED, AclOperation.WRITE),
        (of_group, prefix, ResourcePatternType.PREFIXED, AclOperation.READ),
        (of_group, group, ResourcePatternType.LITERAL, AclOperation.READ),
        (transaction, prefix, ResourcePatternType.PREFIXED, AclOperation.WRITE),
        (transaction, group, ResourcePatternType.LITERAL, AclOperation.WRITE),
    }


def _ensure_acls(connection: Connection, username: str, rules: set[_Rule]) -> None:
    """Make the ACLs of a login exactly these."""
    wanted = {AclBinding(*rule[:3], f"User:{username}", "*", rule[3], AclPermissionType.ALLOW) for rule in rules}
    found = _acls(connection, username)
    if missing := sorted(wanted - found):
        for future in connection.admin.create_acls(missing).values():
            connection.done(future, f"make ACLs of {username}")
        _until(connection, lambda: wanted <= _acls(connection, username), f"ACLs of {username} are being made")
    _delete_acls(connection, username, found - wanted)


def _acls(connection: Connection, username: str) -> set[AclBinding]:
    everything = AclBindingFilter(
        ResourceType.ANY, None, ResourcePatternType.ANY, f"User:{username}", None, AclOperation.ANY,
        AclPermissionType.ANY,
    )  # fmt: skip
    return set(connection.done(connection.admin.describe_acls(everything), f"look at ACLs of {username}"))


def _delete_acls(connection: Connection, username: str, acls: set[AclBinding]) -> None:
    filters = [
        AclBindingFilter(
            acl.restype, acl.name, acl.resource_pattern_type, acl.principal, acl.host, acl.operation,
            acl.permission_type,
        )
        for acl in sorted(acls)
    ]  # fmt: skip
    if filters:
        for future in connection.admin.delete_acls(filters).values():
            connection.done(future, f"delete ACLs of {username}")
        _until(connection, lambda: not acls & _acls(connection, username), f"ACLs of {username} are being deleted")


# --- topics ----------------------------------------------------------------------------------------------------------


def _ensure_topics(
    connection: Connection, wanted: list[dict[str, Any]], *, is_managed: bool, replication_factor: int
) -> None:
    """Make topics, widen them, set their retention. Raises `Failure` with all that cannot be."""
    names = [topic["name"] for topic in wanted]
    found = _described(connection, names)
    missing = [topic for topic in wanted if topic["name"] not in found]
    if not is_managed:
        if missing:
            listed = ", ".join(f"{topic['name']} ({topic['partitions']} partitions)" for topic in missing)
            raise Failure("TOPIC_MISMATCH", f"missing topics: {listed}; make them, or switch manageTopics on")
        return
    _create(connection, missing, replication_factor)
    narrow = [topic for topic in wanted if topic["name"] in found and found[topic["name"]].all < topic["partitions"]]
    if narrow:
        partitions = [NewPartitions(topic["name"], topic["partitions"]) for topic in narrow]
        for name, future in connection.admin.create_partitions(partitions).items():
            connection.done(future, f"add partitions to {name}")
    _keep_retention(connection, [topic for topic in wanted if topic not in missing])
    for topic in missing + narrow:
        name, count = topic["name"], topic["partitions"]
        _until(connection, functools.partial(_is_led, connection, name, count), f"the topic {name} has no leaders yet")
    wide = [
        (topic, found[topic["name"]].all)
        for topic in wanted
        if topic["name"] in found and found[topic["name"]].all > topic["partitions"]
    ]
    if wide:
        listed = "; ".join(f"{topic['name']} has {has} partitions, not {topic['partitions']}" for topic, has in wide)
        raise Failure(
            "TOPIC_MISMATCH",
            f"{listed}. Partitions cannot be taken away: ask for {max(has for _, has in wide)}, or delete the topic, "
            "with its records, to have it made anew",
        )


def _create(connection: Connection, topics: list[dict[str, Any]], replication_factor: int) -> None:
    new = [
        NewTopic(
            topic["name"],
            num_partitions=topic["partitions"],
            replication_factor=replication_factor,
            config={_RETENTION: topic["retention_ms"]},
        )
        for topic in topics
    ]
    if not new:
        return
    for name, future in connection.admin.create_topics(new).items():
        try:
            _done_unless(connection, future, f"make the topic {name}", KafkaError.TOPIC_ALREADY_EXISTS)
        except KafkaException as exception:
            raise Failure("TOPIC_MISMATCH", f"the topic {name} cannot be made: {exception.args[0].str()}") from None


def _keep_retention(connection: Connection, topics: list[dict[str, Any]]) -> None:
    """Set the retention of topics that were there, where it differs. No other key of theirs is touched."""
    if not topics:
        return
    asked = {ConfigResource(ConfigResource.Type.TOPIC, topic["name"]): topic["retention_ms"] for topic in topics}
    changed = []
    for resource, future in connection.admin.describe_configs(list(asked)).items():
        entries = connection.done(future, f"look at the configuration of {resource.name}")
        if entries[_RETENTION].value != asked[resource]:
            entry = ConfigEntry(
                _RETENTION, asked[resource], ConfigSource.DYNAMIC_TOPIC_CONFIG,
                incremental_operation=AlterConfigOpType.SET,
            )  # fmt: skip
            changed.append(ConfigResource(ConfigResource.Type.TOPIC, resource.name, incremental_configs=[entry]))
    if changed:
        for resource, future in connection.admin.incremental_alter_configs(changed).items():
            connection.done(future, f"set the retention of {resource.name}")


def _described(connection: Connection, names: list[str]) -> dict[str, _Partitions]:
    """Return the partitions of each topic that is there."""
    found = {}
    for name, future in connection.admin.describe_topics(TopicCollection(names)).items():
        topic = _done_unless(
            connection, future, f"look at the topic {name}", KafkaError.UNKNOWN_TOPIC_OR_PART,
            KafkaError.LEADER_NOT_AVAILABLE,
        )  # fmt: skip
        if topic:
            led = sum(partition.leader is not None for partition in topic.partitions)
            found[name] = _Partitions(len(topic.partitions), led)
    return found


def _is_led(connection: Connection, name: str, partitions: int) -> bool:
    found = _described(connection, [name])
    return name in found and found[name].led >= partitions


def _topics_under(connection: Connection, prefix: str) -> list[str]:
    if connection.left_s <= 0:
        raise Failure("BACKEND_UNREACHABLE", f"topics of {prefix}* are still being deleted")
    try:
        known = connection.admin.list_topics(timeout=connection.left_s).topics
    except KafkaException:
        raise connection.silence() from None
    return sorted(name for name in known if name.startswith(prefix))


# --- the process -----------------------------------------------------------------------------------------------------


def _until(connection: Connection, holds: Callable[[], bool], meanwhile: str) -> None:
    """Return once it holds: brokers learn what a controller has written a moment later."""
    while not holds():
        if connection.left_s <= 0:
            raise Failure("BACKEND_UNREACHABLE", meanwhile)
        time.sleep(_POLL_S)


def _done_unless(connection: Connection, future: "Future[T]", doing: str, *expected: int) -> T | None:
    """Return the result of a call, or None if it ended with one of the errors that mean: nothing to do."""
    try:
        return connection.done(future, doing)
    except KafkaException as exception:
        if exception.args[0].code() not in expected:
            raise
        return None


_WORK: dict[str, Callable[..., None]] = {"ensure": ensure, "drop_logins": drop_logins, "drop_data": drop_data}


def answer(request: dict[str, Any]) -> dict[str, str]:
    """Do one piece of work; return what the process says of it."""
    until = time.monotonic() + request.pop("deadline_s")
    work = _WORK[request.pop("work")]
    try:
        work(Connection(request.pop("client"), until=until), **request)
    except Failure as denied:
        return {"reason": denied.reason, "message": denied.message}
    except KafkaException as exception:
        error = exception.args[0]
        is_open = error.code() == KafkaError.SECURITY_DISABLED
        words = "the broker has no authorizer; switch manageAcls off" if is_open else f"refuses: {error.str()}"
        return {"reason": "ACCESS_DENIED", "message": words}
    return {}


def main(lines: Iterable[str]) -> None:
    """Read the work, write how it ended, and end without waiting for librdkafka's threads."""
    print(json.dumps(answer(json.loads("".join(lines)))), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.stdin)
