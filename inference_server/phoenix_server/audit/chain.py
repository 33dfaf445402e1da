"""The hash chain over one writer's rows: what is hashed, and what a broken chain looks like. Pure.

Each process that writes is a writer with a name of its own (32 hex digits), and numbers its rows from 1:

    hash(row) = SHA-256(hash(row before) ‖ canonical(row)),    hash(row 0) = SHA-256("phoenix audit chain" ‖ writer)

`canonical` is the row as a JSON object in UTF-8, without spaces: every column of `predictions` but `hash`, in the
order of `AuditRow`. Moments are in UTC with six digits after the second (`2026-11-28T07:31:24.869988Z`), bytes are
`\\x` and lower-case hex digits, in strings only `"`, `\\` and control characters are escaped. It is also the form in
which rows go to PostgreSQL, so each is written once; who knows the table can compute the chain in any language.
"""

import hashlib
import time
from binascii import hexlify
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import NamedTuple

import orjson

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class AuditRow(NamedTuple):
    """One prediction as a row: every column of `predictions` but the hash, in the order of the canonical form.

    `written_us` (when the writer took it up) never decreases along a chain; `time_us` is when the request came. Both
    are microseconds since 1970.
    """

    writer: str
    sequence: int
    written_us: int
    time_us: int
    latency_us: int
    namespace: str
    model: str
    version: str
    digest: str
    provider: str
    runtime: str
    outcome: str
    request_id: str
    event_id: str | None
    entity: str | None
    caller: str | None
    error: str | None
    inputs: bytes | None
    outputs: bytes | None
    features: bytes | None


@dataclass(frozen=True, slots=True)
class Head:
    """How far a chain has come: the last row's number and hash. `is_pruned`: retention dropped the rows up to it."""

    writer: str
    sequence: int
    hash: bytes
    is_pruned: bool = False


@dataclass(frozen=True, slots=True)
class Break:
    """The first place at which a chain does not hold."""

    writer: str
    sequence: int
    text: str


def genesis(writer: str) -> bytes:
    """Return the hash before the first row."""
    return hashlib.sha256(b"phoenix audit chain" + writer.encode()).digest()


def canonical(row: AuditRow) -> bytes:
    """Return the bytes of a row that are hashed: a JSON object."""
    return _FORM % (
        row.writer.encode(),
        row.sequence,
        *_iso(row.written_us),
        *_iso(row.time_us),
        row.latency_us,
        _constants(row[5:12]),
        orjson.dumps(row.request_id),
        orjson.dumps(row.event_id),
        orjson.dumps(row.entity),
        orjson.dumps(row.caller),
        orjson.dumps(row.error),
        _hex(row.inputs),
        _hex(row.outputs),
        _hex(row.features),
    )


class ChainedRow(NamedTuple):
    """A row with its canonical form and its hash."""

    row: AuditRow
    text: bytes
    hash: bytes


def chained(previous: bytes, row: AuditRow) -> ChainedRow:
    """Return `row` behind a row with the hash `previous`."""
    text = canonical(row)
    return ChainedRow(row, text, hashlib.sha256(previous + text).digest())


def check(writer: str, rows: Iterable[tuple[AuditRow, bytes]], heads: Iterable[Head]) -> Iterator[int | Break]:
    """Yield the number of each row that holds, and at the first that does not a `Break`, which is the end.

    `rows` are a writer's, by sequence, each with the hash that is stored with it. `heads` are the heads that are known
    of this chain: a row that has another hash than a head says, or a head behind the last row, is a break too.
    """
    known = {head.sequence: head for head in heads if not head.is_pruned}
    pruned = max((head for head in heads if head.is_pruned), key=lambda head: head.sequence, default=None)
    sequence, previous = (pruned.sequence, pruned.hash) if pruned else (0, genesis(writer))
    for row, stored in rows:
        if row.sequence <= sequence:
            if pruned and row.sequence <= pruned.sequence and sequence == pruned.sequence:
                continue  # retention drops whole months, and may have been interrupted
            yield Break(writer, row.sequence, "there are two rows of this number")
            return
        if row.sequence != sequence + 1:
            missing = row.sequence - sequence - 1
            text = "this row is missing" if missing == 1 else f"this row and the {missing - 1} behind it are missing"
            yield Break(writer, sequence + 1, text)
            return
        if chained(previous, row).hash != stored:
            yield Break(writer, row.sequence, "this row was changed, or another stands in its place")
            return
        sequence, previous = row.sequence, stored
        if sequence in known and known.pop(sequence).hash != stored:
            yield Break(writer, sequence, "the chain up to this row is not the one whose head was published")
            return
        yield sequence
    behind = max((at for at in known if at > sequence), default=None)
    if behind is not None:
        yield Break(writer, sequence + 1, f"the end of the chain is missing: its head was published at row {behind}")


def microseconds(time: datetime) -> int:
    """Return an aware time as whole microseconds since 1970."""
    return (time - _EPOCH) // _MICROSECOND


def moment(time_us: int) -> datetime:
    """Return microseconds since 1970 as a time in UTC."""
    return _EPOCH + timedelta(microseconds=time_us)


_FORM = (
    b'{"writer":"%b","sequence":%d,"written":"%b.%06dZ","time":"%b.%06dZ","latency_us":%d,%b,"request_id":%b,'
    b'"event_id":%b,"entity":%b,"caller":%b,"error":%b,"inputs":%b,"outputs":%b,"features":%b}'
)


def _hex(value: bytes | None) -> bytes:
    return b"null" if value is None else b'"\\\\x%b"' % hexlify(value)


def _iso(time_us: int) -> tuple[bytes, int]:
    second, rest = divmod(time_us, 1_000_000)
    return _second(second), rest


@lru_cache(64)
def _second(second: int) -> bytes:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)).encode()


@lru_cache(1024)
def _constants(values: tuple[str, ...]) -> bytes:
    """Return the columns that are the same in most rows of a model."""
    return orjson.dumps(dict(zip(AuditRow._fields[5:12], values, strict=True)))[1:-1]
