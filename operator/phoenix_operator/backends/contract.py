"""What the operator asks of every backend, and in which words: one model's needs, a login, a failure.

The three backends hide how a home and its rights are made. Names reach them checked: a `Tenant` cannot be made of
anything but DNS labels, so that no name means something in SQL, in a glob or in a prefix.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from phoenix_api import Reason

SLOTS = ("a", "b")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_UID = re.compile(r"[A-Za-z0-9][-A-Za-z0-9]{0,63}")
_TOPIC = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,248}")


class BackendError(Exception):
    """A backend that does not do what it is asked. `message` names the next step and never carries a secret."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True)
class Login:
    """Name and password with which the pods of a model come."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class Topic:
    """A Kafka topic that a model needs."""

    name: str
    partitions: int
    retention_hours: int


@dataclass(frozen=True)
class Tenant:
    """One model and what it needs; the same type for all kinds of backends.

    Raises `ValueError` if a name is none: not a DNS label, not a topic, not a uid.
    """

    namespace: str
    name: str
    uid: str
    topics: tuple[Topic, ...] = ()
    group: str = ""

    def __post_init__(self) -> None:
        checks: list[tuple[str, re.Pattern[str], str, Iterable[str]]] = [
            ("namespace", _LABEL, "a DNS label", [self.namespace]),
            ("name", _LABEL, "a DNS label", [self.name]),
            ("uid", _UID, "a uid", [self.uid]),
            ("topic", _TOPIC, "a Kafka topic name", [topic.name for topic in self.topics]),
            ("group", _TOPIC, "a Kafka group name", [self.group] if self.group else []),
        ]
        for what, pattern, expected, values in checks:
            for value in values:
                if not pattern.fullmatch(value):
                    raise ValueError(f"{what}: expected {expected}, got {value!r:.80}")


class Backend(Protocol):
    """One backend of the settings, with its administrator's credentials. Every call has a deadline."""

    kind: str
    """`redis`, `kafka` or `postgresql`: the type of the binding."""

    def username(self, tenant: Tenant, slot: str) -> str:
        """Return the name of one of the two logins of a model: `a` or `b`."""
        ...

    def binding(self, tenant: Tenant, login: Login) -> dict[str, str]:
        """Return the keys of the binding Secret, in the layout of the Service Binding specification."""
        ...

    async def ensure(self, tenant: Tenant, login: Login) -> None:
        """Make the home of the model and this login with exactly its rights. Raises `BackendError`.

        The second time nothing is written. The other slot's login stays as it is.
        """
        ...

    async def drop_login(self, tenant: Tenant, username: str) -> None:
        """Take the login away; what it may have open is closed. Nothing to do is fine. Raises `BackendError`."""
        ...

    async def drop_data(self, tenant: Tenant) -> None:
        """Remove topics, keys or schema, and the logins that are left. Raises `BackendError`."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


def required(admin: Mapping[str, str], *keys: str, of: str) -> None:
    """Raise `BackendError(SecretMissing)` unless the admin Secret `of` has all these keys."""
    missing = [key for key in keys if not admin.get(key)]
    if missing:
        raise BackendError(
            Reason.SECRET_MISSING,
            f"backend {of}: its admin Secret has no {' and no '.join(missing)}; add what is missing",
        )
