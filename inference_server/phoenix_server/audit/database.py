"""The door to the database: engine, connections, TLS, and what an error may say.

Hides the differences between PostgreSQL (psycopg 3) and SQLite up to where statements begin. A connection that hangs
is ended from outside with `Link.abort`: the thread that waits on it gets an error at once.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from phoenix_server.audit.tables import Tables, tables
from phoenix_server.errors import Reason, StartError
from phoenix_server.settings import Settings

SQLITE_FILE = "audit.sqlite3"
_CONNECT_TIMEOUT_S = 3
_SQLITE_BUSY_S = 30
_QUERY_OF_ASYNCPG = {"ssl": "sslmode"}


class DatabaseError(Exception):
    """The database cannot do what was asked; the message names no secret. `is_refusal`: asking again will not help."""

    def __init__(self, message: str, *, is_refusal: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.is_refusal = is_refusal


class Database:
    """One database, by the settings. Making it connects to nothing."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        url = _url(settings)
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self.schema = None if self.is_sqlite else settings.database_schema
        self.place = str(url.database) if self.is_sqlite else f"{url.host}:{url.port or 5432}/{url.database}"
        self._secrets = tuple(filter(None, (url.password, url.render_as_string(hide_password=False))))
        self._engine = _sqlite(url) if self.is_sqlite else _postgresql(url, settings)

    @property
    def tables(self) -> Tables:
        """The tables, in the schema of the settings."""
        return tables(self.schema)

    def connect(self) -> "Link":
        """Open a connection. Raises `DatabaseError`."""
        with self.errors():
            return Link(self._engine.connect(), self)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what SQLAlchemy and the driver raise into `DatabaseError`."""
        try:
            yield
        except DBAPIError as error:
            raise DatabaseError(self._said(error), is_refusal=_is_refusal(error)) from None
        except (SQLAlchemyError, OSError) as error:
            raise DatabaseError(self._said(error)) from None

    def _said(self, error: Exception) -> str:
        origin = getattr(error, "orig", None) or error
        text = " ".join(str(origin).split("\nLINE ")[0].split()) or type(origin).__name__
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return f"{self.place}: {text[:300]}"


class Link:
    """One open connection."""

    def __init__(self, connection: Connection, database: Database) -> None:
        self.connection = connection
        self.database = database

    def abort(self) -> None:
        """Break the connection under whoever waits on it. Safe from any thread; SQLite has its own time limit."""
        raw: Any = self.connection.connection.dbapi_connection
        pgconn = getattr(raw, "pgconn", None)
        with contextlib.suppress(Exception):  # it may be closing at this moment
            if pgconn is not None:
                copy = socket.socket(fileno=os.dup(pgconn.socket))
                with copy:
                    copy.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close without waiting for an answer."""
        with contextlib.suppress(Exception):
            self.connection.invalidate()
        with contextlib.suppress(Exception):
            self.connection.close()

    def __enter__(self) -> "Link":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _url(settings: Settings) -> URL:
    if settings.database_url is None:
        folder = Path(settings.state_dir)
        return URL.create("sqlite+pysqlite", database=str(folder / SQLITE_FILE))
    try:
        url = make_url(settings.database_url.get_secret_value())
    except (ArgumentError, ValueError):
        raise StartError(Reason.INVALID_SETTING, "DATABASE_URL: not a URL of a database") from None
    if url.get_backend_name() == "sqlite":
        return url.set(drivername="sqlite+pysqlite")
    query = {_QUERY_OF_ASYNCPG.get(key, key): value for key, value in url.query.items()}
    if settings.database_sslmode is not None:
        query["sslmode"] = settings.database_sslmode
    if settings.database_ca_file is not None:
        query["sslrootcert"] = str(settings.database_ca_file)
    elif query.get("sslmode") in ("verify-ca", "verify-full"):
        query.setdefault("sslrootcert", "system")
    query.setdefault("connect_timeout", str(_CONNECT_TIMEOUT_S))
    query.setdefault("application_name", "phoenix-server")
    return url.set(query=query)


def _postgresql(url: URL, settings: Settings) -> Engine:
    # Statements are prepared after some runs, unless a pooler gives each transaction another connection.
    arguments = {"prepare_threshold": None} if settings.database_pooler else {}
    keepalive = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
    return create_engine(url, poolclass=NullPool, connect_args={**keepalive, **arguments}, hide_parameters=True)


def _sqlite(url: URL) -> Engine:
    if url.database and url.database != ":memory:":
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    arguments = {"timeout": _SQLITE_BUSY_S, "check_same_thread": False}
    engine = create_engine(url, poolclass=NullPool, connect_args=arguments, hide_parameters=True)

    # The driver's own idea of transactions leaves DDL outside of them:
    # https://docs.sqlalchemy.org/en/20/dialects/sqlite.html#pysqlite-serializable
    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        is_reader = connection.get_execution_options().get("phoenix_reads_only", False)
        connection.exec_driver_sql("BEGIN" if is_reader else "BEGIN IMMEDIATE")

    return engine


def _is_refusal(error: DBAPIError) -> bool:
    """Whether the statement itself is the fault: SQLSTATE classes 22 and 23, a value the database will never take."""
    state = getattr(error.orig, "sqlstate", None)
    return state is not None and state[:2] in ("22", "23")
