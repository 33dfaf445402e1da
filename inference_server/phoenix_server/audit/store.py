"""What is written to and read from the audit's tables; each function is one transaction.

On PostgreSQL a group of rows and their events go out as one statement with one parameter, a JSON document that the
database takes apart: one round trip, atomic without BEGIN and COMMIT, and a pooler may stand between. (COPY is as fast
for the database but takes five round trips, which a slow network turns into seconds; `executemany` and arrays cost
several times the processor time here.) Values never become part of a statement's text.
"""

from binascii import hexlify
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson
from sqlalchemy import Connection, Table, bindparam, delete, func, insert, literal, select, update
from sqlalchemy.dialects.postgresql import insert as insert_postgresql
from sqlalchemy.dialects.sqlite import insert as insert_sqlite

from phoenix_server.audit.chain import AuditRow, ChainedRow, Head, microseconds, moment
from phoenix_server.audit.database import Database, Link
from phoenix_server.event_format import Event

_TYPES = {"sequence": "bigint", "written": "timestamptz", "time": "timestamptz", "latency_us": "bigint",
          "inputs": "bytea", "outputs": "bytea", "features": "bytea", "hash": "bytea", "key": "bytea",
          "value": "bytea"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """One version that is served: a row of `models`."""

    namespace: str
    name: str
    version: str
    digest: str
    uri: str
    folder: str
    signature: str


class Store:
    """Statements for one database."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._tables = database.tables
        self._names = [column.name for column in self._tables.predictions.columns]
        # `%%` is the driver's `%`; the statement has one parameter, so there is nothing else to escape.
        self._insert_rows = "" if database.is_sqlite else self._one_statement(with_events=False)
        self._insert_both = "" if database.is_sqlite else self._one_statement(with_events=True)

    # --- the writer ------------------------------------------------------------------------------------------------

    def add(self, link: Link, rows: Sequence[ChainedRow], events: Sequence[Event]) -> None:
        """Commit rows and events: all or nothing. Raises `DatabaseError`."""
        connection = link.connection
        with self.database.errors():
            if self.database.is_sqlite:
                with connection.begin():
                    if rows:
                        connection.execute(
                            insert(self._tables.predictions), [_as_values(row.row, row.hash) for row in rows]
                        )
                    if events:
                        connection.execute(insert(self._tables.outbox), [_event_values(e, rows) for e in events])
                return
            texts = [b'%b,"hash":"\\\\x%b"}' % (text[:-1], hexlify(chained)) for _, text, chained in rows]
            document = b'{"rows":[%b]' % b",".join(texts)
            if events:
                time = moment(rows[0].row.written_us).isoformat()
                listed = [
                    {"time": time, "event_id": event.id, "topic": event.topic,
                     "key": f"\\x{event.key.hex()}", "value": f"\\x{event.value.hex()}"}
                    for event in events
                ]  # fmt: skip
                document += b',"events":%b' % orjson.dumps(listed)
            statement = self._insert_both if events else self._insert_rows
            # The driver's own cursor: outside of a transaction a statement is one, and SQLAlchemy would begin another.
            raw: Any = connection.connection.dbapi_connection
            with _autocommit(raw), raw.cursor() as cursor:
                cursor.execute(statement, {"document": f"{document.decode()}}}"})

    def has_row(self, link: Link, writer: str, sequence: int) -> bool:
        """Whether that row is there: what became of a transaction whose end was not heard of."""
        columns = self._tables.predictions.c
        statement = select(literal(1)).where(columns.writer == writer, columns.sequence == sequence)
        with self.database.errors(), link.connection.begin():
            return link.connection.scalar(statement) is not None

    def add_head(self, link: Link, head: Head, time: datetime) -> None:
        """Note how far a chain has come."""
        values = {"writer": head.writer, "sequence": head.sequence, "is_pruned": False, "hash": head.hash, "time": time}
        with self.database.errors(), link.connection.begin():
            link.connection.execute(insert(self._tables.chains).values(values))

    def see_model(self, link: Link, facts: ModelFacts, time: datetime) -> None:
        """Add a version to `models`, or note that it is still served."""
        models = self._tables.models
        values = {name: getattr(facts, name) for name in ModelFacts.__slots__}
        key = {name: values[name] for name in ("namespace", "name", "version", "digest")}
        is_it = [models.c[name] == value for name, value in key.items()]
        with self.database.errors(), link.connection.begin():
            seen = link.connection.execute(update(models).where(*is_it).values(last_seen=time))
            if not seen.rowcount:
                # Another replica may do the same at this moment.
                dialect = insert_sqlite if self.database.is_sqlite else insert_postgresql
                new = dialect(models).values(**values, first_seen=time, last_seen=time).on_conflict_do_nothing()
                link.connection.execute(new)

    # --- the relay -------------------------------------------------------------------------------------------------

    def claim(self, connection: Connection, limit: int) -> list[tuple[int, Event]]:
        """Lock and return the oldest events that no other relay has, inside the caller's transaction."""
        columns = self._tables.outbox.c
        wanted = select(columns.id, columns.event_id, columns.topic, columns.key, columns.value)
        statement = wanted.order_by(columns.id).limit(limit).with_for_update(skip_locked=True)
        return [(row.id, Event(row.event_id, row.topic, row.key, row.value))
                for row in connection.execute(statement)]  # fmt: skip

    def release(self, connection: Connection, ids: Sequence[int]) -> None:
        """Take delivered events out of the outbox, inside the caller's transaction."""
        column = self._tables.outbox.c.id
        connection.execute(delete(self._tables.outbox).where(column.in_(bindparam("ids", ids, expanding=True))))

    def count_outbox(self, link: Link, limit: int) -> int:
        """Return how many events wait, counted up to `limit`."""
        some = select(self._tables.outbox.c.id).limit(limit).subquery()
        with self.database.errors(), link.connection.begin():
            return link.connection.scalar(select(func.count()).select_from(some)) or 0

    # --- the readers -----------------------------------------------------------------------------------------------

    def writers(self, connection: Connection) -> list[str]:
        """Return every writer that left a row or a head, oldest first by name of its first row."""
        predictions, chains = self._tables.predictions, self._tables.chains
        first = select(predictions.c.writer, func.min(predictions.c.written).label("at")).group_by(predictions.c.writer)
        found = {row.writer: row.at for row in connection.execute(first)}
        only_heads = connection.scalars(select(chains.c.writer).distinct())
        return sorted(found, key=lambda writer: found[writer]) + sorted(set(only_heads) - found.keys())

    def heads(self, connection: Connection, writer: str) -> list[Head]:
        """Return the heads that the database knows of a chain."""
        columns = self._tables.chains.c
        rows = connection.execute(select(self._tables.chains).where(columns.writer == writer))
        return [Head(row.writer, row.sequence, row.hash, row.is_pruned) for row in rows]

    def chain(self, connection: Connection, writer: str) -> Iterator[tuple[AuditRow, bytes]]:
        """Yield a writer's rows with their hashes, by sequence, without holding them all."""
        predictions = self._tables.predictions
        statement = select(predictions).where(predictions.c.writer == writer).order_by(predictions.c.sequence)
        yield from _stream(connection, statement)

    def find(self, connection: Connection, name: str) -> list[AuditRow]:
        """Return the predictions of that id: WRITER-SEQUENCE, a request's id or an event's."""
        predictions = self._tables.predictions
        columns = predictions.c
        writer, _, sequence = name.rpartition("-")
        if len(writer) == 32 and sequence.isdecimal():
            is_it = (columns.writer == writer) & (columns.sequence == int(sequence))
            rows = list(_stream(connection, select(predictions).where(is_it)))
            if rows:
                return [row for row, _ in rows]
        for column in (columns.request_id, columns.event_id):
            rows = list(_stream(connection, select(predictions).where(column == name).order_by(columns.written)))
            if rows:
                return [row for row, _ in rows]
        return []

    def last(self, connection: Connection, count: int) -> Iterator[AuditRow]:
        """Yield the newest predictions, newest first."""
        predictions = self._tables.predictions
        newest = select(predictions).order_by(predictions.c.written.desc(), predictions.c.sequence.desc()).limit(count)
        for row, _ in _stream(connection, newest):
            yield row

    def model(self, connection: Connection, row: AuditRow) -> ModelFacts | None:
        """Return what is known of the version that answered."""
        columns = self._tables.models.c
        is_it = (columns.namespace == row.namespace, columns.name == row.model, columns.version == row.version,
                 columns.digest == row.digest)  # fmt: skip
        found = connection.execute(select(self._tables.models).where(*is_it)).one_or_none()
        return None if found is None else ModelFacts(*(getattr(found, name) for name in ModelFacts.__slots__))

    def _one_statement(self, *, with_events: bool) -> str:
        def part(key: str, table: Table, names: Iterable[str]) -> str:
            listed = ", ".join(names)
            typed = ", ".join(f"{name} {_TYPES.get(name, 'text')}" for name in names)
            schema = f'"{table.schema.replace(chr(34), chr(34) * 2).replace("%", "%%")}".' if table.schema else ""
            return (
                f"INSERT INTO {schema}{table.name} ({listed}) "
                f"SELECT {listed} FROM d, json_to_recordset(d.j -> '{key}') AS r({typed})"
            )

        document = "WITH d AS (SELECT %(document)s::json AS j)"
        rows = part("rows", self._tables.predictions, self._names)
        if not with_events:
            return f"{document} {rows}"
        events = part("events", self._tables.outbox, ["time", "event_id", "topic", "key", "value"])
        return f"{document}, p AS ({rows}) {events}"


class _autocommit:
    """The driver's connection in autocommit mode, for one statement."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def __enter__(self) -> None:
        self._raw.autocommit = True

    def __exit__(self, *_: object) -> None:
        if not self._raw.closed:
            self._raw.autocommit = False


def _as_values(row: AuditRow, chained: bytes) -> dict[str, Any]:
    values = row._asdict()
    values["written"], values["time"] = moment(values.pop("written_us")), moment(values.pop("time_us"))
    values["hash"] = chained
    return values


def _event_values(event: Event, rows: Sequence[ChainedRow]) -> dict[str, Any]:
    time = moment(rows[0].row.written_us)
    return {"time": time, "event_id": event.id, "topic": event.topic, "key": event.key, "value": event.value}


def _stream(connection: Connection, statement: Any) -> Iterator[tuple[AuditRow, bytes]]:
    rows = connection.execute(statement.execution_options(yield_per=500))
    for row in rows:
        values = dict(row._mapping)
        chained = values.pop("hash")
        for name in ("written", "time"):
            values[f"{name}_us"] = microseconds(values.pop(name))
        yield AuditRow(**values), chained
