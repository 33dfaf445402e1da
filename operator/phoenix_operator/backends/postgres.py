"""PostgreSQL: a schema for each model, its owner who cannot log in, and logins that may become the owner to migrate.

Hides `psycopg`, names that fit into 63 bytes, and who may do what: the server itself grants its login what it works
with once it has made the tables (docs/decisions, 18). Each change is one transaction under an advisory lock: an
operator that ends in the middle leaves nothing half done. Passwords are hashed here; the server's log never sees one.

A schema carries the uid of its model in its comment. One that another model's login can still reach is not taken over.
"""

import asyncio
import hashlib
import re
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import psycopg
from psycopg import errors, sql
from psycopg.rows import namedtuple_row

from phoenix_api import Reason
from phoenix_operator.backends.contract import SLOTS, BackendError, Login, Tenant, required
from phoenix_operator.settings import BackendSettings

_CONNECTIONS = 4
_LONGEST = 61  # of the 63 bytes that a name may have: a login adds its slot
_HASH_DIGITS = 12
_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_OWN_COMMENT = re.compile(r"Phoenix model \S+, uid (\S+)")
# What a server says that cannot serve at the moment, whoever asks.
_NOT_NOW = ("starting up", "shutting down", "too many", "connection slots", "recovery")
_Connection = psycopg.AsyncConnection[Any]


@dataclass(frozen=True)
class _Names:
    """What is made for a model."""

    owner: str
    logins: tuple[str, ...]

    @property
    def schema(self) -> str:
        return self.owner

    @property
    def roles(self) -> list[str]:
        return [*self.logins, self.owner]


class PostgresBackend:
    """One database. Admin Secret: `host`, `database`, `username`, `password`; also `port`, `sslmode`, `certificates`.

    Raises `BackendError(SecretMissing)` where what the Secret says cannot be.
    """

    kind = "postgresql"

    def __init__(self, config: BackendSettings, admin: Mapping[str, str]) -> None:
        required(admin, "host", "database", "username", of=config.name)
        self._config, self._admin = config, admin
        self._host, self._port, self._database = admin["host"], admin.get("port") or "5432", admin["database"]
        self._ssl_mode = admin.get("sslmode") or ("verify-full" if admin.get("certificates") else "prefer")
        self._where = f"postgresql {config.name} at {self._host}:{self._port}/{self._database}"
        if self._ssl_mode not in _SSL_MODES:
            raise BackendError(
                Reason.SECRET_MISSING,
                f"backend {config.name}: sslmode of its admin Secret: expected one of {', '.join(_SSL_MODES)}, "
                f"got {self._ssl_mode!r:.40}",
            )
        self._authority = _file(admin.get("certificates", ""))
        self._turns = asyncio.Semaphore(_CONNECTIONS)

    def username(self, tenant: Tenant, slot: str) -> str:
        """Return `phx_<namespace>_<name>_<slot>`, cut and with a hash if that is too long."""
        return f"{_names(tenant).owner}_{slot}"

    def binding(self, tenant: Tenant, login: Login) -> dict[str, str]:
        """Return the keys of the binding Secret."""
        if not self._config.capabilities.manage_users:
            login = Login(self._admin["username"], self._admin.get("password", ""))
        user, password = quote(login.username, safe=""), quote(login.password, safe="")
        host = f"[{self._host}]" if ":" in self._host else quote(self._host, safe="/")
        database = quote(self._database, safe="")
        keys = {
            "type": self.kind,
            "provider": "phoenix",
            "host": self._host,
            "port": self._port,
            "database": self._database,
            "username": login.username,
            "password": login.password,
            "schema": _names(tenant).schema,
            "sslmode": self._ssl_mode,
            "uri": f"postgresql://{user}:{password}@{host}:{self._port}/{database}?sslmode={self._ssl_mode}",
        }
        if certificates := self._admin.get("certificates"):
            keys["certificates"] = certificates
        return keys

    async def ensure(self, tenant: Tenant, login: Login) -> None:
        """Make owner, schema and login. Raises `BackendError`."""
        can, names, is_known = self._config.capabilities, _names(tenant), True
        doing = f"make schema and login of {tenant.namespace}/{tenant.name}"
        async with self._asked(doing) as connection:
            work = _Work(connection, names)
            await work.lock()
            if can.manage_users:
                await work.ensure_owner()
            if can.manage_schemas:
                await self._ensure_schema(work, tenant)
            elif await work.schema_comment() is None:
                raise BackendError(
                    Reason.ACCESS_DENIED,
                    f"{self._where}: there is no schema {names.schema}; make it, with an owner of this name, or switch "
                    "manageSchemas on",
                )
            if can.manage_users:
                is_known = login.username in await work.who_can_log_in() and await self._works(login)
                await work.ensure_login(
                    login, database=self._database, limit=self._config.connection_limit, is_password_known=is_known
                )
        async with self._told(doing):
            if not is_known and not await self._works(login):
                raise BackendError(
                    Reason.ACCESS_DENIED,
                    f"{self._where}: {login.username} is made and cannot log in; see pg_hba.conf and the server's log",
                )

    async def drop_login(self, tenant: Tenant, username: str) -> None:
        """Take password and right to log in away, and end its sessions. Raises `BackendError`."""
        names = _names(tenant)
        if username not in names.logins:
            raise ValueError(f"{username!r:.80} is no login of {tenant.namespace}/{tenant.name}")
        if not self._config.capabilities.manage_users:
            return
        async with self._asked(f"take the login of {username} away") as connection:
            work = _Work(connection, names)
            await work.lock()
            await work.end_login(username)
        async with self._asked(f"end the sessions of {username}") as connection:
            await _Work(connection, names).end_sessions(username)

    async def drop_data(self, tenant: Tenant) -> None:
        """Drop the schema with all that is in it, and the roles; one of another uid stays. Raises `BackendError`."""
        can, names = self._config.capabilities, _names(tenant)
        async with self._asked(f"look at the schema {names.schema}") as connection:
            comment = await _Work(connection, names).schema_comment()
        if comment is not None and _uid(comment) not in (None, tenant.uid):
            return
        for username in names.logins:
            await self.drop_login(tenant, username)
        async with self._asked(f"drop the schema {names.schema} and its roles") as connection:
            work = _Work(connection, names)
            await work.lock()
            if can.manage_schemas and comment is not None and _uid(comment) == tenant.uid:
                await work.drop_schema()
            if can.manage_users:
                await work.drop_roles(with_owner=can.manage_schemas)

    async def close(self) -> None:
        """Forget the authority's file; connections live no longer than a call."""
        if self._authority:
            self._authority.close()

    async def _ensure_schema(self, work: "_Work", tenant: Tenant) -> None:
        comment = await work.schema_comment()
        own = f"Phoenix model {tenant.namespace}/{tenant.name}, uid {tenant.uid}"
        if comment is None:
            await work.make_schema(own, is_owned=self._config.capabilities.manage_users)
            return
        uid, schema = _uid(comment), work.names.schema
        if uid is None:
            raise BackendError(
                Reason.ACCESS_DENIED,
                f"{self._where}: the schema {schema} is not the operator's; rename it, or tell that it is yours: "
                f"COMMENT ON SCHEMA {schema} IS '{own}'",
            )
        if uid != tenant.uid:
            if alive := await work.who_can_log_in():
                raise BackendError(
                    Reason.ACCESS_DENIED,
                    f"{self._where}: the schema {schema} belongs to the model with uid {uid}, of another cluster or "
                    "deleted by force. If that one is gone: "
                    + "; ".join(f"ALTER ROLE {role} NOLOGIN" for role in alive),
                )
            await work.comment_schema(own)

    async def _works(self, login: Login) -> bool:
        """Return whether the login is let in, or would be but for its limit or for a right that is granted later."""
        try:
            connection = await self._connect(login)
        except psycopg.OperationalError as error:
            words = str(error)
            if "FATAL" not in words:
                raise
            return "connections for role" in words or "permission denied for database" in words
        await connection.close()
        return True

    async def _connect(self, login: Login) -> _Connection:
        timeout_ms = int(self._config.timeout_seconds * 1000)
        authority = {"sslrootcert": self._authority.name} if self._authority else {}
        return await psycopg.AsyncConnection.connect(
            host=self._host,
            port=self._port,
            dbname=self._database,
            user=login.username,
            password=login.password or None,
            sslmode=self._ssl_mode,
            connect_timeout=max(2, int(self._config.timeout_seconds)),
            application_name="phoenix-operator",
            options=f"-c statement_timeout={timeout_ms} -c lock_timeout={timeout_ms}",
            row_factory=namedtuple_row,
            **authority,
        )

    @asynccontextmanager
    async def _asked(self, doing: str) -> AsyncIterator[_Connection]:
        """A transaction of the admin's with a deadline, whose errors have a reason. `doing` completes "may not …"."""
        async with self._turns, self._told(doing):
            connection = await self._connect(Login(self._admin["username"], self._admin.get("password", "")))
            try:
                yield connection
                await connection.commit()
            finally:
                await connection.close()  # which rolls back, and waits for nobody

    @asynccontextmanager
    async def _told(self, doing: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._config.timeout_seconds):
                yield
        except (TimeoutError, errors.QueryCanceled, errors.LockNotAvailable, errors.ConnectionTimeout):
            raise self._unreachable(f"no answer within {self._config.timeout_seconds:g} s") from None
        except errors.InsufficientPrivilege as error:
            raise BackendError(
                Reason.ACCESS_DENIED, f"{self._where}: the admin may not {doing}: {_words(error)}; give it the rights"
            ) from None
        except (errors.ReadOnlySqlTransaction, errors.DiskFull) as error:
            raise BackendError(
                Reason.BACKEND_UNREACHABLE,
                f"{self._where}: {_words(error)}; it takes no writes: a standby, or a full disk",
            ) from None
        except psycopg.OperationalError as error:
            words = _words(error)
            if "FATAL" not in words or any(phrase in words for phrase in _NOT_NOW):
                raise self._unreachable(words) from None
            raise BackendError(
                Reason.ACCESS_DENIED,
                f"{self._where}: the credentials of the Secret {self._config.admin_secret_ref.name} are refused: "
                f"{words.rpartition('FATAL:')[2].strip()}",
            ) from None
        except OSError as error:
            raise self._unreachable(str(error)) from None
        except psycopg.Error as error:
            raise BackendError(Reason.ACCESS_DENIED, f"{self._where}: refuses to {doing}: {_words(error)}") from None

    def _unreachable(self, what: str) -> BackendError:
        return BackendError(
            Reason.BACKEND_UNREACHABLE,
            f"{self._where}: {what}; see that it runs and can be reached from the operator",
        )


class _Work:
    """What is read and written for one model in one transaction."""

    def __init__(self, connection: _Connection, names: _Names) -> None:
        self._connection, self.names = connection, names
        self._has_options = connection.info.server_version >= 160000  # memberships with INHERIT and SET

    async def lock(self) -> None:
        """Wait until nobody else works on this model."""
        await self._connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [self.names.owner])

    async def ensure_owner(self) -> None:
        """Make the role that owns the schema, and the admin one who may act for it."""
        if not await self._rows("SELECT FROM pg_roles WHERE rolname = %s", self.names.owner):
            await self._do("CREATE ROLE {} NOLOGIN", sql.Identifier(self.names.owner))
        await self._act_for(self.names.owner)

    async def schema_comment(self) -> str | None:
        """Return the schema's comment, `""` if it has none, or None if there is no schema."""
        rows = await self._rows(
            "SELECT coalesce(obj_description(oid, 'pg_namespace'), '') AS comment FROM pg_namespace WHERE nspname = %s",
            self.names.schema,
        )
        return str(rows[0].comment) if rows else None

    async def make_schema(self, comment: str, *, is_owned: bool) -> None:
        """Make the schema, of its owner or of the admin."""
        schema = sql.Identifier(self.names.schema)
        if is_owned:
            await self._do("CREATE SCHEMA {} AUTHORIZATION {}", schema, sql.Identifier(self.names.owner))
        else:
            await self._do("CREATE SCHEMA {}", schema)
        await self.comment_schema(comment)

    async def comment_schema(self, comment: str) -> None:
        """Say whose the schema is."""
        await self._do("COMMENT ON SCHEMA {} IS {}", sql.Identifier(self.names.schema), sql.Literal(comment))

    async def who_can_log_in(self) -> list[str]:
        """Return the logins that are open."""
        rows = await self._rows(
            "SELECT rolname FROM pg_roles WHERE rolname = ANY(%s) AND rolcanlogin ORDER BY 1", list(self.names.logins)
        )
        return [str(row.rolname) for row in rows]

    async def ensure_login(self, login: Login, *, database: str, limit: int, is_password_known: bool) -> None:
        """Make the login as it should be: it inherits nothing, and may become the owner."""
        role = sql.Identifier(login.username)
        found = await self._rows(
            "SELECT rolcanlogin AND NOT rolinherit AND rolconnlimit = %s AS is_so, array_remove(ARRAY["
            "CASE WHEN rolsuper THEN 'NOSUPERUSER' END, CASE WHEN rolcreaterole THEN 'NOCREATEROLE' END, "
            "CASE WHEN rolcreatedb THEN 'NOCREATEDB' END, CASE WHEN rolreplication THEN 'NOREPLICATION' END, "
            "CASE WHEN rolbypassrls THEN 'NOBYPASSRLS' END], NULL) AS excess FROM pg_roles WHERE rolname = %s",
            limit, login.username,
        )  # fmt: skip
        if not found:
            await self._do("CREATE ROLE {} NOINHERIT", role)
        # some of these words only a superuser may say: they are said where there is something to take away
        excess = found[0].excess if found else []
        if not found or not found[0].is_so or excess or not is_password_known:
            await self._do(
                "ALTER ROLE {} LOGIN NOINHERIT {} CONNECTION LIMIT {} PASSWORD {}",
                role, sql.SQL(" ".join(excess)), sql.Literal(limit), sql.Literal(self._hashed(login)),
            )  # fmt: skip
        await self._ensure_membership(login.username)
        rows = await self._rows("SELECT has_database_privilege(%s, %s, 'CONNECT') AS may", login.username, database)
        if not rows[0].may:
            await self._do("GRANT CONNECT ON DATABASE {} TO {}", sql.Identifier(database), role)
        await self._ensure_search_path(login.username, database)

    async def end_login(self, username: str) -> None:
        """Take the password and the right to log in away. The role stays: what it was granted names it."""
        if username in await self.who_can_log_in():
            await self._do("ALTER ROLE {} NOLOGIN PASSWORD NULL", sql.Identifier(username))

    async def end_sessions(self, username: str) -> None:
        """End what the login has open."""
        if await self._rows("SELECT FROM pg_stat_activity WHERE usename = %s", username):
            await self._act_for(username)
            await self._rows("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", username)

    async def drop_schema(self) -> None:
        """Drop the schema with all that is in it."""
        await self._do("DROP SCHEMA {} CASCADE", sql.Identifier(self.names.schema))

    async def drop_roles(self, *, with_owner: bool) -> None:
        """Drop the roles that are there, with what they own and were granted in this database."""
        wanted = self.names.roles if with_owner else list(self.names.logins)
        for row in await self._rows("SELECT rolname FROM pg_roles WHERE rolname = ANY(%s)", wanted):
            await self._act_for(row.rolname)
            await self._do("DROP OWNED BY {} CASCADE", sql.Identifier(row.rolname))
        for row in await self._rows("SELECT rolname FROM pg_roles WHERE rolname = ANY(%s)", wanted):
            await self._do("DROP ROLE {}", sql.Identifier(row.rolname))

    async def _act_for(self, role: str) -> None:
        """Let the admin act for a role that it made; a superuser may without."""
        ways = ["USAGE", "SET"] if self._has_options else ["USAGE"]
        rows = await self._rows(
            "SELECT bool_and(pg_has_role(current_user, %s, way)) AS may FROM unnest(%s::text[]) AS way", role, ways
        )
        if not rows[0].may:
            options = sql.SQL(" WITH INHERIT TRUE, SET TRUE" if self._has_options else "")
            await self._do("GRANT {} TO CURRENT_USER{}", sql.Identifier(role), options)

    async def _ensure_membership(self, username: str) -> None:
        options = " AND NOT inherit_option AND set_option" if self._has_options else ""
        rows = await self._rows(
            "SELECT FROM pg_auth_members JOIN pg_roles AS member ON member.oid = pg_auth_members.member "
            "JOIN pg_roles AS owner ON owner.oid = roleid "
            f"WHERE owner.rolname = %s AND member.rolname = %s AND NOT admin_option{options}",
            self.names.owner, username,
        )  # fmt: skip
        if not rows:
            await self._do(
                "GRANT {} TO {}{}", sql.Identifier(self.names.owner), sql.Identifier(username),
                sql.SQL(" WITH INHERIT FALSE, SET TRUE" if self._has_options else ""),
            )  # fmt: skip

    async def _ensure_search_path(self, username: str, database: str) -> None:
        rows = await self._rows(
            "SELECT setconfig FROM pg_db_role_setting JOIN pg_roles ON pg_roles.oid = setrole "
            "JOIN pg_database ON pg_database.oid = setdatabase WHERE rolname = %s AND datname = %s",
            username, database,
        )  # fmt: skip
        wanted = {f"search_path={self.names.schema}", f'search_path="{self.names.schema}"'}
        if not rows or not wanted & set(rows[0].setconfig):
            await self._do(
                "ALTER ROLE {} IN DATABASE {} SET search_path = {}",
                sql.Identifier(username), sql.Identifier(database), sql.Identifier(self.names.schema),
            )  # fmt: skip

    def _hashed(self, login: Login) -> str:
        """Return what PostgreSQL keeps of a password, computed here."""
        pgconn = self._connection.pgconn
        return pgconn.encrypt_password(login.password.encode(), login.username.encode(), b"scram-sha-256").decode()

    async def _do(self, statement: str, *parts: sql.Composable) -> None:
        await self._connection.execute(sql.SQL(statement).format(*parts))

    async def _rows(self, query: str, *values: Any) -> list[Any]:
        cursor = await self._connection.execute(query, values)
        return await cursor.fetchall()


def _names(tenant: Tenant) -> _Names:
    """Return the names of a model's schema and roles.

    Labels have no `_`: `phx_a_b` is one model's only, and no name that was not cut has `__`.
    """
    owner = f"phx_{tenant.namespace}_{tenant.name}"
    if len(owner) > _LONGEST:
        digest = hashlib.sha256(owner.encode()).hexdigest()[:_HASH_DIGITS]
        owner = f"{owner[: _LONGEST - _HASH_DIGITS - 2]}__{digest}"
    return _Names(owner, tuple(f"{owner}_{slot}" for slot in SLOTS))


def _uid(comment: str) -> str | None:
    """Return the uid that the operator wrote into a comment, or None if it did not write it."""
    match = _OWN_COMMENT.fullmatch(comment)
    return match[1] if match else None


def _file(certificates: str) -> Any:
    """Return a file with the certificates, for as long as it is open: libpq takes no text."""
    if not certificates:
        return None
    file = tempfile.NamedTemporaryFile(prefix="phoenix-authority-", suffix=".pem")  # noqa: SIM115
    file.write(certificates.encode())
    file.flush()
    return file


def _words(error: Exception) -> str:
    """Return what the server says in one line."""
    primary = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    return " ".join((primary or str(error)).split())
