"""The feature table that lies beside a manifest, for where there is no Redis: `features.json` or `features.csv`.

`features.json` maps entities to objects of fields; `features.csv` has a header, a column named as the manifest's
`entityParameter`, and one of each field. Values are kept as the bytes that a Redis hash would hold, so that one parser
serves both. A row without `_updated` is as old as its file. The file is read again when it changes; while the new one
is broken, the old values go on and the log says why.
"""

import asyncio
import csv
import io
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from phoenix_server.errors import ModelLoadError, Reason
from phoenix_server.feature_rows import UPDATED, Values

_log = logging.getLogger(__name__)
NAMES = ("features.json", "features.csv")
MAX_BYTES = 64 << 20
_LOOK_S = 1.0

Table = Mapping[str, Mapping[str, bytes]]
_Stamp = tuple[str, int, int, int]


class FeatureFile:
    """The table of one folder. Lives on the event loop; files are read in threads."""

    def __init__(self, folder: Path, entity_column: str) -> None:
        self._folder = folder
        self._entity_column = entity_column
        self._table: Table = {}
        self._stamp: _Stamp | None = None
        self._looked_at_s = 0.0
        self._reading: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Read the table for the first time. Raises `ModelLoadError`: NotFound, or InvalidSpec for a broken file."""
        self._stamp = _stamp(self._folder)
        if self._stamp is None:
            raise ModelLoadError(
                Reason.NOT_FOUND,
                f"spec.features: no {' or '.join(NAMES)} in {self._folder}, and no Redis is set (PHOENIX_REDIS_URL)",
            )
        self._table = await asyncio.to_thread(self._read, self._stamp)
        self._looked_at_s = time.monotonic()

    def read(self, entities: Sequence[str], fields: Sequence[str]) -> list[Values]:
        """Return the values of `fields` for each entity."""
        now_s = time.monotonic()
        if now_s - self._looked_at_s > _LOOK_S and self._reading is None:
            self._looked_at_s = now_s
            stamp = _stamp(self._folder)
            if stamp is not None and stamp != self._stamp:
                self._reading = asyncio.create_task(self._read_again(stamp))
        empty: Mapping[str, bytes] = {}
        return [[row.get(field) for field in fields] for row in (self._table.get(entity, empty) for entity in entities)]

    async def _read_again(self, stamp: _Stamp) -> None:
        try:
            self._table = await asyncio.to_thread(self._read, stamp)
            _log.info("features read again", extra={"file": stamp[0], "entities": len(self._table)})
        except ModelLoadError as error:
            _log.error("features not read again; the old ones go on", extra={"cause": error.message})
        finally:
            self._stamp, self._reading = stamp, None

    def _read(self, stamp: _Stamp) -> Table:
        file, size_bytes = Path(stamp[0]), stamp[3]
        if size_bytes > MAX_BYTES:
            raise ModelLoadError(
                Reason.INVALID_SPEC, f"{file}: {size_bytes} bytes, at most {MAX_BYTES} are read; use Redis for more"
            )
        try:
            text = file.read_text(encoding="utf-8-sig")
            rows = _json_rows(text) if file.suffix == ".json" else _csv_rows(text, self._entity_column)
            default_updated = b"%.3f" % (stamp[2] / 1e9)
            return {entity: {UPDATED: default_updated, **row} for entity, row in rows}
        except (OSError, ValueError, csv.Error) as error:
            raise ModelLoadError(Reason.INVALID_SPEC, f"{file}: {error}") from None


def _json_rows(text: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    document = orjson.loads(text)
    if not isinstance(document, dict):
        raise ValueError('expected an object of entities, as in {"alice": {"age_days": 12}}')
    for entity, fields in document.items():
        if not isinstance(fields, dict):
            raise ValueError(f"expected an object of fields for entity {entity!r:.80}")
        row = {}
        for name, value in fields.items():
            if isinstance(value, dict | list):
                raise ValueError(f"expected a number, a string, true, false or null in {entity!r:.80}.{name!r:.80}")
            if value is not None:
                row[name] = _as_bytes(value)
        yield entity, row


def _csv_rows(text: str, entity_column: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    columns = reader.fieldnames or ()
    if entity_column not in columns:
        raise ValueError(f"line 1: expected a column '{entity_column}', found {', '.join(columns) or 'nothing'}")
    for fields in reader:
        if None in fields or None in fields.values():
            raise ValueError(f"line {reader.line_num}: expected {len(columns)} columns as in line 1")
        yield fields[entity_column], {name: value.encode() for name, value in fields.items() if value != ""}


def _as_bytes(value: Any) -> bytes:
    if isinstance(value, bool):
        return b"true" if value else b"false"
    return str(value).encode()


def _stamp(folder: Path) -> _Stamp | None:
    """Return the first table there is, and what changes when it is written or replaced."""
    for name in NAMES:
        try:
            stat = (folder / name).stat()
        except OSError:
            continue
        return str(folder / name), stat.st_ino, stat.st_mtime_ns, stat.st_size
    return None
