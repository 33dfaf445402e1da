"""Redis: an ACL user for each login that reads and writes under the prefix of its model, and nothing else.

Hides the `redis` package, the rule of the user, and how a rule is compared with what Redis says of it. A user is set
in one command that begins with `reset` (`ACL SETUSER` adds to what is there), by the hash of its password: neither
MONITOR nor the slow log sees the password. ACLs are of one node and, without `aclfile`, gone after a restart: the next
`ensure` sees it and sets them again.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from phoenix_api import Reason
from phoenix_operator.backends.contract import SLOTS, BackendError, Login, Tenant, required
from phoenix_operator.settings import BackendSettings

_log = logging.getLogger(__name__)
_CONNECTIONS = 4
_SCAN_COUNT = 1000
# What feature tables need, and what a client sends to be one. No command that works on all keys at once or tells the
# names of others' (`scan`, `keys`, `randomkey`, `dbsize`: `@keyspace`), nor functions (`@write` has `function flush`).
_COMMANDS = (
    "-@all +@hash +@string +@transaction +@connection +del +unlink +exists +type +ttl +pttl +expire +pexpire +expireat "
    "+pexpireat +persist -@dangerous -@admin -@scripting -client|tracking"
)


class RedisBackend:
    """One Redis. Admin Secret: `host`; optional `port`, `username`, `password`, `ssl`, `certificates`."""

    kind = "redis"

    def __init__(self, config: BackendSettings, admin: Mapping[str, str]) -> None:
        required(admin, "host", of=config.name)
        self._config, self._admin = config, admin
        self._host, self._port = admin["host"], admin.get("port") or "6379"
        self._is_tls = admin.get("ssl", "").lower() == "true"
        self._where = f"redis {config.name} at {self._host}:{self._port}"
        tls: dict[str, Any] = {"ssl": True, "ssl_ca_data": admin.get("certificates")} if self._is_tls else {}
        self._client = redis.Redis(
            host=self._host,
            port=_port(self._port, of=config.name),
            username=admin.get("username") or None,
            password=admin.get("password") or None,
            decode_responses=True,
            protocol=2,
            socket_timeout=config.timeout_seconds,
            socket_connect_timeout=config.timeout_seconds,
            max_connections=_CONNECTIONS,
            retry=Retry(NoBackoff(), 1),  # the first call after a restart finds a connection that has ended
            **tls,
        )
        self._turns = asyncio.Semaphore(_CONNECTIONS)
        self._commands_as_told = {_sorted(_COMMANDS)}
        self._cursors: dict[str, int] = {}

    def username(self, tenant: Tenant, slot: str) -> str:
        """Return `phx:<namespace>:<name>:<slot>`: labels have no colon, so no two models share a name."""
        return f"{_prefix(tenant)}{slot}"

    def binding(self, tenant: Tenant, login: Login) -> dict[str, str]:
        """Return the keys of the binding Secret."""
        if not self._config.capabilities.manage_users:
            login = Login(self._admin.get("username", ""), self._admin.get("password", ""))
        user, password = quote(login.username, safe=""), quote(login.password, safe="")
        host = f"[{self._host}]" if ":" in self._host else self._host
        credentials = f"{user}:{password}@" if login.password else ""
        keys = {
            "type": self.kind,
            "provider": "phoenix",
            "host": self._host,
            "port": self._port,
            "username": login.username,
            "password": login.password,
            "ssl": "true" if self._is_tls else "false",
            "key-prefix": _prefix(tenant),
            "uri": f"{'rediss' if self._is_tls else 'redis'}://{credentials}{host}:{self._port}/0",
        }
        if certificates := self._admin.get("certificates"):
            keys["certificates"] = certificates
        return keys

    async def ensure(self, tenant: Tenant, login: Login) -> None:
        """Set the user unless it is as it should be. Raises `BackendError`."""
        async with self._asked(f"make the user {login.username}"):
            if not self._config.capabilities.manage_users:
                await self._client.ping()
                return
            password_hash = hashlib.sha256(login.password.encode()).hexdigest()
            if self._is_set(await self._user(login.username), tenant, password_hash):
                return
            rule = ["reset", "on", f"#{password_hash}", f"~{_prefix(tenant)}*", "resetchannels", *_COMMANDS.split()]
            await self._acl("SETUSER", login.username, *rule)
            # Redis tells a rule in words of its own, other ones in each version: they are learnt
            self._commands_as_told.add(_sorted((await self._user(login.username)).get("commands", "")))
            await self._save()

    async def drop_login(self, tenant: Tenant, username: str) -> None:
        """Delete the user; Redis closes its connections. Raises `BackendError`."""
        if not self._config.capabilities.manage_users:
            return
        _own(self, tenant, username)
        async with self._asked(f"delete the user {username}"):
            if await self._acl("DELUSER", username):
                await self._save()

    async def drop_data(self, tenant: Tenant) -> None:
        """Unlink every key of the prefix. Raises `BackendError`: also if time is up, and the next call goes on."""
        for slot in SLOTS:
            await self.drop_login(tenant, self.username(tenant, slot))
        prefix, until = _prefix(tenant), time.monotonic() + self._config.timeout_seconds
        cursor = self._cursors.pop(prefix, 0)
        while True:
            async with self._asked(f"delete the keys of {prefix}*"):
                cursor, keys = await self._client.scan(cursor, match=f"{prefix}*", count=_SCAN_COUNT)
                if keys:
                    await self._client.unlink(*keys)
            if cursor == 0:
                return
            if time.monotonic() > until:
                self._cursors[prefix] = cursor
                raise BackendError(
                    Reason.DELETION_BLOCKED, f"{self._where}: keys of {prefix}* are still being deleted; nothing to do"
                )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _acl(self, *words: str) -> Any:
        return await self._client.execute_command("ACL", *words)  # type: ignore[no-untyped-call]

    async def _user(self, username: str) -> dict[str, Any]:
        """Return what Redis says of a user; nothing if there is none."""
        answer = await self._acl("GETUSER", username)
        return dict(zip(answer[::2], answer[1::2], strict=True)) if answer else {}

    def _is_set(self, user: dict[str, Any], tenant: Tenant, password_hash: str) -> bool:
        flags = user.get("flags", ())
        return (
            "on" in flags
            and "nopass" not in flags
            and user["passwords"] == [password_hash]
            and _sorted(user["commands"]) in self._commands_as_told
            and user["keys"] == f"~{_prefix(tenant)}*"
            and not user["channels"]
            and not user.get("selectors")
        )

    async def _save(self) -> None:
        """Write the users to the ACL file, where Redis has one: most have none."""
        try:
            await self._acl("SAVE")
        except ResponseError as error:
            if "ACL file" not in str(error) or "not configured" not in str(error):
                _log.warning("ACLs are not saved", extra={"backend": self._config.name, "cause": str(error)})

    @asynccontextmanager
    async def _asked(self, doing: str) -> AsyncIterator[None]:
        """Give what is asked a connection and a deadline, and its errors a reason. `doing` completes "may not …"."""
        try:
            async with asyncio.timeout(self._config.timeout_seconds), self._turns:
                yield
        except (TimeoutError, redis.TimeoutError):
            raise BackendError(
                Reason.BACKEND_UNREACHABLE,
                f"{self._where}: no answer within {self._config.timeout_seconds:g} s; see that it runs and can be "
                "reached from the operator",
            ) from None
        except (AuthenticationError, AuthorizationError):
            raise BackendError(
                Reason.ACCESS_DENIED,
                f"{self._where}: the credentials of the Secret {self._config.admin_secret_ref.name} are refused; "
                "correct its username and password",
            ) from None
        except NoPermissionError as error:
            raise BackendError(
                Reason.ACCESS_DENIED,
                f"{self._where}: the admin may not {doing}: {error}; give it the rights, or switch manageUsers off",
            ) from None
        except ReadOnlyError:
            raise BackendError(
                Reason.ACCESS_DENIED, f"{self._where}: may not {doing}: this is a replica; name the primary as host"
            ) from None
        except ResponseError as error:
            raise BackendError(
                Reason.ACCESS_DENIED, f"{self._where}: refuses to {doing}: {error}; where ACLs are managed elsewhere, "
                "switch manageUsers off"
            ) from None  # fmt: skip
        except (RedisError, OSError) as error:
            raise BackendError(
                Reason.BACKEND_UNREACHABLE,
                f"{self._where}: {error}; see that it runs and can be reached from the operator",
            ) from None


def _prefix(tenant: Tenant) -> str:
    return f"phx:{tenant.namespace}:{tenant.name}:"


def _sorted(commands: str) -> tuple[str, ...]:
    return tuple(sorted(commands.split()))


def _own(backend: RedisBackend, tenant: Tenant, username: str) -> None:
    if username not in [backend.username(tenant, slot) for slot in SLOTS]:
        raise ValueError(f"{username!r:.80} is no login of {tenant.namespace}/{tenant.name}")


def _port(text: str, *, of: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise BackendError(
            Reason.SECRET_MISSING, f"backend {of}: port of its admin Secret: expected a port number, got {text!r:.40}"
        )
    return int(text)
