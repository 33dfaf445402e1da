"""Brings the schema to this server's version, makes the partitions to come and drops those that are too old.

Everything happens in one transaction under an advisory lock, so that replicas that start together do it once, and
through a pooler too. It runs as the owner of the schema where the login may become it, and ends with what it grants to
the login: see docs/decisions/0018.
"""

import contextlib
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import Connection, inspect, text

from phoenix_server.audit.database import Database, DatabaseError, Link
from phoenix_server.audit.tables import VERSION

_log = logging.getLogger(__name__)
_MONTHS_AHEAD = 3
_LOCK_TIMEOUT = "30s"
_RIGHTS = (
    ("predictions", "SELECT, INSERT"),
    ("chains", "SELECT, INSERT"),
    ("models", "SELECT, INSERT, UPDATE (last_seen)"),
    ("outbox", "SELECT, INSERT, UPDATE, DELETE"),
    ("schema_version", "SELECT"),
)


def ensure(link: Link) -> bool:
    """Migrate if the schema is older than this server; return whether it was. Raises `DatabaseError`.

    A login that is new (rotation) may not read the version yet: it gets its rights by the same way.
    """
    with contextlib.suppress(DatabaseError):
        if version(link) == VERSION:
            return False
    try:
        return migrate(link)
    except DatabaseError as error:
        if "permission denied" not in error.message:
            raise
        raise DatabaseError(
            f"{error.message}: the login may not migrate; run `phoenix-server migrate` with the owner's, and "
            "PHOENIX_DATABASE_LOGIN set to this one"
        ) from None


def version(link: Link) -> str | None:
    """Return the version of the schema; None before the first migration."""
    database, connection = link.database, link.connection
    with database.errors(), connection.begin():
        return _version(connection, database)


def migrate(link: Link) -> bool:
    """Run every migration that is missing and make partitions; return whether the version changed."""
    database, connection = link.database, link.connection
    with database.errors(), connection.begin():
        login = _become_owner(connection, database) if not database.is_sqlite else None
        before = _version(connection, database)
        if before != VERSION:
            _upgrade(connection, database, before)
        if not database.is_sqlite:
            make_partitions(connection, database, datetime.now(UTC))
            for grantee in filter(None, (login, database.settings.database_login)):
                _grant(connection, database, grantee)
    if before != VERSION:
        _log.info("audit schema migrated", extra={"from": before or "nothing", "to": VERSION})
    return before != VERSION


def make_partitions(connection: Connection, database: Database, now: datetime) -> list[str]:
    """Make the partitions of this month and the next ones that are missing; return their names. PostgreSQL only."""
    made = []
    start = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    parent = _name(database, connection, "predictions")
    for _ in range(_MONTHS_AHEAD + 1):
        end = (start + timedelta(days=32)).replace(day=1)
        name = f"predictions_{start:%Y_%m}"
        if connection.scalar(text("SELECT to_regclass(:name)"), {"name": _name(database, connection, name)}) is None:
            bounds = f"FROM ('{start:%Y-%m-%d} 00:00:00+00') TO ('{end:%Y-%m-%d} 00:00:00+00')"
            connection.execute(
                text(f"CREATE TABLE {_name(database, connection, name)} PARTITION OF {parent} FOR VALUES {bounds}")
            )
            made.append(name)
        start = end
    return made


def maintain(link: Link, now: datetime) -> list[str]:
    """Make the partitions to come and drop what retention ends; return what was dropped. Raises `DatabaseError`."""
    database, connection = link.database, link.connection
    days = database.settings.audit_retention_days
    with database.errors(), connection.begin():
        if database.is_sqlite:
            return _delete_old(connection, database, now - timedelta(days=days)) if days else []
        _become_owner(connection, database)
        make_partitions(connection, database, now)
        return _drop_old(connection, database, now - timedelta(days=days)) if days else []


def _version(connection: Connection, database: Database) -> str | None:
    if not inspect(connection).has_table("schema_version", schema=database.schema):
        return None
    found: str | None = connection.scalar(
        text(f"SELECT version_num FROM {_name(database, connection, 'schema_version')}")
    )
    return found


def _upgrade(connection: Connection, database: Database, before: str | None) -> None:
    # A quarter of a second to import, needed once in a schema's life.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    config.attributes |= {"connection": connection, "schema": database.schema}
    try:
        command.upgrade(config, VERSION)
    except CommandError:
        raise DatabaseError(
            f"{database.place}: the audit schema has version {before}, which this server does not know (its own is "
            f"{VERSION}): it was migrated by a newer one; use that"
        ) from None


def _become_owner(connection: Connection, database: Database) -> str | None:
    """Take the lock, and the owner's role if the login is not the owner; return the login then."""
    connection.execute(text(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'"))
    schema = database.schema
    lock = "SELECT pg_advisory_xact_lock(hashtextextended('phoenix audit ' || coalesce(:schema, current_schema()), 0))"
    connection.execute(text(lock), {"schema": schema})
    row = connection.execute(
        text(
            "SELECT session_user, pg_get_userbyid(nspowner) AS owner, pg_has_role(session_user, nspowner, 'MEMBER') "
            "AS may FROM pg_namespace WHERE nspname = coalesce(:schema, current_schema())"
        ),
        {"schema": schema},
    ).one_or_none()
    quote = connection.dialect.identifier_preparer.quote_identifier
    if row is None:
        if schema is None:
            raise DatabaseError(
                f"{database.place}: the login's search_path names no schema; set PHOENIX_DATABASE_SCHEMA"
            )
        connection.execute(text(f"CREATE SCHEMA {quote(schema)}"))
        return None
    login, owner, may = row
    if login == owner or not may or owner == "pg_database_owner":
        return None
    connection.execute(text(f"SET LOCAL ROLE {quote(owner)}"))
    return str(login)


def _grant(connection: Connection, database: Database, login: str) -> None:
    quote = connection.dialect.identifier_preparer.quote_identifier
    schema = database.schema or connection.scalar(text("SELECT current_schema()"))
    connection.execute(text(f"GRANT USAGE ON SCHEMA {quote(str(schema))} TO {quote(login)}"))
    for table, rights in _RIGHTS:
        connection.execute(text(f"GRANT {rights} ON {_name(database, connection, table)} TO {quote(login)}"))


def _drop_old(connection: Connection, database: Database, before: datetime) -> list[str]:
    """Drop the partitions whose newest possible row is older than `before`, and note where each chain goes on."""
    statement = text(
        "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid "
        "WHERE i.inhparent = to_regclass(:parent) AND c.relname ~ '^predictions_[0-9]{4}_[0-9]{2}$' ORDER BY 1"
    )
    names = connection.scalars(statement, {"parent": _name(database, connection, "predictions")})
    old = []
    for name in names.all():
        start = datetime.strptime(f"{name[-7:]}+0000", "%Y_%m%z")
        if (start + timedelta(days=32)).replace(day=1) <= before:
            old.append(name)
    for name in old:
        table = _name(database, connection, name)
        _note_pruned(connection, database, table, "")
        connection.execute(text(f"DROP TABLE {table}"))
    return old


def _delete_old(connection: Connection, database: Database, before: datetime) -> list[str]:
    """Do on SQLite what dropping partitions does, with the trigger out of the way for the length of a transaction."""
    month = before.strftime("%Y-%m-01T00:00:00.000000Z")
    old = "WHERE written < :month"
    count = connection.scalar(text(f"SELECT count(*) FROM predictions {old}"), {"month": month})
    if not count:
        return []
    _note_pruned(connection, database, "predictions", old, month)
    trigger = connection.scalar(text("SELECT sql FROM sqlite_master WHERE name = 'predictions_refuse_delete'"))
    connection.execute(text("DROP TRIGGER predictions_refuse_delete"))
    connection.execute(text(f"DELETE FROM predictions {old}"), {"month": month})
    connection.exec_driver_sql(str(trigger))
    return [f"{count} predictions written before {month[:10]}"]


def _note_pruned(connection: Connection, database: Database, table: str, where: str, month: str | None = None) -> None:
    chains = _name(database, connection, "chains")
    statement = text(
        f"INSERT INTO {chains} (writer, sequence, is_pruned, hash, time) "
        f"SELECT p.writer, p.sequence, true, p.hash, p.written FROM {table} p JOIN "
        f"(SELECT writer, max(sequence) AS sequence FROM {table} {where} GROUP BY writer) l "
        f"ON l.writer = p.writer AND l.sequence = p.sequence WHERE true ON CONFLICT DO NOTHING"
    )
    connection.execute(statement, {"month": month} if where else {})


def _name(database: Database, connection: Connection, table: str) -> str:
    quote = connection.dialect.identifier_preparer.quote_identifier
    return table if database.schema is None else f"{quote(database.schema)}.{quote(table)}"
