"""The tables of the audit as SQLAlchemy knows them. Migrations make them; this is how they are read and written."""

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import BigInteger, Boolean, Column, DateTime, Dialect, Integer, LargeBinary, MetaData, Table, Text
from sqlalchemy.types import TypeDecorator, TypeEngine

# The version of the schema that this server reads and writes: the newest file of `migrations/versions`.
VERSION = "0001"


class Moment(TypeDecorator[datetime]):
    """A moment with microseconds: `timestamptz` on PostgreSQL, ISO 8601 in UTC as text on SQLite, which sorts."""

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return the type of that database."""
        kind: TypeEngine[Any] = DateTime(timezone=True) if dialect.name == "postgresql" else Text()
        return dialect.type_descriptor(kind)

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> object:
        """Return what is stored."""
        if value is None or dialect.name == "postgresql":
            return value
        return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")

    def process_result_value(self, value: object, dialect: Dialect) -> datetime | None:
        """Return what was stored, in UTC."""
        if isinstance(value, str):
            return datetime.fromisoformat(value)
        return value.astimezone(UTC) if isinstance(value, datetime) else None


@dataclass(frozen=True, slots=True)
class Tables:
    """Every table, in one schema (None: where the `search_path` points)."""

    models: Table
    predictions: Table
    chains: Table
    outbox: Table


@lru_cache(8)
def tables(schema: str | None) -> Tables:
    """Return the tables of a schema."""
    metadata = MetaData(schema=schema)
    number = BigInteger().with_variant(Integer(), "sqlite")  # SQLite numbers rows by itself for INTEGER only
    models = Table(
        "models", metadata,
        Column("namespace", Text, primary_key=True), Column("name", Text, primary_key=True),
        Column("version", Text, primary_key=True), Column("digest", Text, primary_key=True),
        Column("uri", Text, nullable=False), Column("folder", Text, nullable=False),
        Column("signature", Text, nullable=False),
        Column("first_seen", Moment, nullable=False), Column("last_seen", Moment, nullable=False),
    )  # fmt: skip
    predictions = Table(
        "predictions", metadata,
        Column("writer", Text, primary_key=True), Column("sequence", BigInteger, primary_key=True),
        Column("written", Moment, primary_key=True), Column("time", Moment, nullable=False),
        Column("latency_us", BigInteger, nullable=False),
        *(Column(name, Text, nullable=False)
          for name in ("namespace", "model", "version", "digest", "provider", "runtime", "outcome", "request_id")),
        *(Column(name, Text) for name in ("event_id", "entity", "caller", "error")),
        *(Column(name, LargeBinary) for name in ("inputs", "outputs", "features")),
        Column("hash", LargeBinary, nullable=False),
    )  # fmt: skip
    chains = Table(
        "chains", metadata,
        Column("writer", Text, primary_key=True), Column("sequence", BigInteger, primary_key=True),
        Column("is_pruned", Boolean, primary_key=True), Column("hash", LargeBinary, nullable=False),
        Column("time", Moment, nullable=False),
    )  # fmt: skip
    outbox = Table(
        "outbox", metadata,
        Column("id", number, primary_key=True), Column("time", Moment, nullable=False),
        Column("event_id", Text, nullable=False), Column("topic", Text, nullable=False),
        Column("key", LargeBinary, nullable=False), Column("value", LargeBinary, nullable=False),
    )  # fmt: skip
    return Tables(models, predictions, chains, outbox)
