"""Kafka: topics of a model, a SCRAM user for each login, and ACLs that cover what begins with the model's own prefix.

Hides the process that does the work (`kafka_admin`: why it is one, stands there), its deadline, and names. The prefix
ends with a dot, and labels have none: `phoenix.ml.fraud.` covers nothing of `fraud-2`, nor of another namespace.
"""

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phoenix_api import Reason
from phoenix_operator.backends.contract import SLOTS, BackendError, Login, Tenant, required
from phoenix_operator.settings import BackendSettings

_PROCESSES = 2  # of 33 MB each, in the memory of the operator
_START_S = 10.0  # a process that has not begun to work by then, beyond the deadline of the work, does not run well
_USER_MECHANISM = "SCRAM-SHA-512"
_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", _USER_MECHANISM)
_PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")


class KafkaBackend:
    """One Kafka cluster. Admin Secret: `bootstrap-servers`; optional `security-protocol`, `sasl-mechanism`, `username`,
    `password`, `certificates` (of the authority).

    Raises `BackendError(SecretMissing)` where what the Secret says cannot be.
    """  # fmt: skip

    kind = "kafka"

    def __init__(self, config: BackendSettings, admin: Mapping[str, str]) -> None:
        required(admin, "bootstrap-servers", of=config.name)
        self._config, self._admin = config, admin
        self._servers = admin["bootstrap-servers"]
        self._protocol = admin.get("security-protocol") or "PLAINTEXT"
        self._mechanism = admin.get("sasl-mechanism") or _USER_MECHANISM
        self._where = f"kafka {config.name} at {self._servers}"
        self._turns = asyncio.Semaphore(_PROCESSES)
        for key, value, known in [
            ("security-protocol", self._protocol, _PROTOCOLS),
            ("sasl-mechanism", self._mechanism, _MECHANISMS),
        ]:
            if value not in known:
                raise BackendError(
                    Reason.SECRET_MISSING,
                    f"backend {config.name}: {key} of its admin Secret: expected {', '.join(known[:-1])} or "
                    f"{known[-1]}, got {value!r:.40}",
                )
        if self._is_sasl:
            required(admin, "username", "password", of=config.name)
        elif config.capabilities.manage_users:
            raise BackendError(
                Reason.SECRET_MISSING,
                f"backend {config.name}: security-protocol of its admin Secret is {self._protocol}, where nobody logs "
                "in: name a SASL listener, or switch manageUsers off",
            )

    def username(self, tenant: Tenant, slot: str) -> str:
        """Return `phoenix.<namespace>.<name>.<slot>`."""
        return f"{_prefix(tenant)}{slot}"

    def binding(self, tenant: Tenant, login: Login) -> dict[str, str]:
        """Return the keys of the binding Secret."""
        keys = {
            "type": self.kind,
            "provider": "phoenix",
            "bootstrap-servers": self._servers,
            "security-protocol": self._protocol,
            "group-id": _group(tenant),
        }
        if self._is_sasl:
            is_own = self._config.capabilities.manage_users
            keys |= {
                "sasl-mechanism": _USER_MECHANISM if is_own else self._mechanism,
                "username": login.username if is_own else self._admin["username"],
                "password": login.password if is_own else self._admin["password"],
            }
        if certificates := self._admin.get("certificates"):
            keys["certificates"] = certificates
        return keys

    async def ensure(self, tenant: Tenant, login: Login) -> None:
        """Make user, ACLs and topics, as far as capabilities go. Raises `BackendError`."""
        can = self._config.capabilities
        if can.manage_topics or (can.manage_users and can.manage_acls):
            _refuse_foreign_names(tenant)
        await self._work(
            "ensure",
            login=self._client(_USER_MECHANISM, login.username, login.password) if can.manage_users else None,
            prefix=_prefix(tenant),
            group=_group(tenant),
            topics=[
                {
                    "name": topic.name,
                    "partitions": topic.partitions,
                    "retention_ms": str(topic.retention_hours * 3_600_000),
                }
                for topic in tenant.topics
            ],
            manages=self._manages,
            replication_factor=self._config.replication_factor,
        )

    async def drop_login(self, tenant: Tenant, username: str) -> None:
        """Take rights and credentials away; what is open can do nothing from then on. Raises `BackendError`."""
        if username not in [self.username(tenant, slot) for slot in SLOTS]:
            raise ValueError(f"{username!r:.80} is no login of {tenant.namespace}/{tenant.name}")
        if self._config.capabilities.manage_users:
            await self._work("drop_logins", usernames=[username], manages=self._manages)

    async def drop_data(self, tenant: Tenant) -> None:
        """Delete every topic under the model's prefix and its group's offsets. Raises `BackendError`."""
        can = self._config.capabilities
        if can.manage_users or can.manage_topics:
            await self._work(
                "drop_data",
                usernames=[self.username(tenant, slot) for slot in SLOTS] if can.manage_users else [],
                prefix=_prefix(tenant),
                group=_group(tenant),
                manages=self._manages,
            )

    async def close(self) -> None:
        """Nothing is kept open."""

    @property
    def _is_sasl(self) -> bool:
        return self._protocol.startswith("SASL_")

    @property
    def _manages(self) -> dict[str, bool]:
        return {"topics": self._config.capabilities.manage_topics, "acls": self._config.capabilities.manage_acls}

    def _client(self, mechanism: str, username: str, password: str) -> dict[str, Any]:
        """Return settings of librdkafka."""
        client = {"bootstrap.servers": self._servers, "security.protocol": self._protocol}
        if self._is_sasl:
            client |= {"sasl.mechanism": mechanism, "sasl.username": username, "sasl.password": password}
        if certificates := self._admin.get("certificates"):
            client["ssl.ca.pem"] = certificates
        return client

    async def _work(self, work: str, **arguments: Any) -> None:
        """Have a piece of work done in a process. Raises `BackendError`."""
        timeout_s = self._config.timeout_seconds
        client = self._client(self._mechanism, self._admin.get("username", ""), self._admin.get("password", ""))
        request = {"client": client, "deadline_s": timeout_s, "work": work, **arguments}
        async with self._turns:
            output, code = await _run(json.dumps(request).encode(), timeout_s=timeout_s + _START_S)
        if code is None:
            raise self._unreachable(f"no answer within {timeout_s:g} s")
        if code < 0:
            name = signal.Signals(-code).name
            raise self._unreachable(f"the Kafka client ended by {name}: is it a Kafka broker?")
        try:
            answer: dict[str, str] = json.loads(output)
        except ValueError:
            raise self._unreachable(f"the Kafka client ended with code {code} and without an answer") from None
        if not answer:
            return
        reason, message = answer["reason"], answer["message"]
        if reason == "LOGIN_REFUSED":
            secret = self._config.admin_secret_ref.name
            raise BackendError(
                Reason.ACCESS_DENIED,
                f"{self._where}: the credentials of the Secret {secret} are refused; correct its username and "
                f"password ({message})",
            )
        if reason == Reason.BACKEND_UNREACHABLE.name:
            raise self._unreachable(message or f"no answer within {timeout_s:g} s")
        raise BackendError(Reason[reason], f"{self._where}: {message}")

    def _unreachable(self, what: str) -> BackendError:
        return BackendError(
            Reason.BACKEND_UNREACHABLE,
            f"{self._where}: {what}; see that it runs and can be reached from the operator",
        )


def _prefix(tenant: Tenant) -> str:
    return f"{_group(tenant)}."


def _group(tenant: Tenant) -> str:
    return f"phoenix.{tenant.namespace}.{tenant.name}"


def _refuse_foreign_names(tenant: Tenant) -> None:
    """Raise `BackendError(TopicMismatch)` for a name whose rights the operator does not give: it may be another's."""
    foreign = [topic.name for topic in tenant.topics if not topic.name.startswith(_prefix(tenant))]
    if foreign:
        raise BackendError(
            Reason.TOPIC_MISMATCH,
            f"{', '.join(foreign)}: the operator gives rights on topics that begin with {_prefix(tenant)} only: choose "
            "such a name, or bring credentials of your own with secretRef",
        )
    if tenant.group and tenant.group != _group(tenant) and not tenant.group.startswith(_prefix(tenant)):
        raise BackendError(
            Reason.TOPIC_MISMATCH, f"the group {tenant.group}: expected {_group(tenant)}, or a name below it"
        )


async def _run(request: bytes, *, timeout_s: float) -> tuple[bytes, int | None]:
    """Run the worker; return what it says and its exit code, or None for one that was ended at the deadline."""
    process = await asyncio.create_subprocess_exec(
        # -P: the folder of the file, with its `redis.py`, is no place to import from
        sys.executable, "-P", Path(__file__).with_name("kafka_admin.py"),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(timeout_s):
            output, _ = await process.communicate(request)
    except TimeoutError:
        return b"", None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    return output, process.returncode
