"""`phoenix-server features import`: writes a table of features, CSV or Parquet, into the hashes that a model reads.

Hides the file formats and the writing. Reads the file twice: first every row is checked, so that a table with a fault
in it changes nothing; then the rows are written in pipelines. Memory is bounded by one block of rows. A hash gets all
fields of the manifest and `_updated`; a field that the table leaves empty is deleted, because `_updated` speaks for the
whole hash. Running it again does no harm.
"""

import asyncio
import contextlib
import csv
import io
import math
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import redis

from phoenix_api import Features, Manifest
from phoenix_server.app import new_store
from phoenix_server.errors import ModelLoadError, Reason, StartError, shown
from phoenix_server.feature_rows import ENTITY, MAX_ENTITY_CHARACTERS, UPDATED, FeaturePlan, expected_of, parse_value
from phoenix_server.features import default_prefix
from phoenix_server.redis_address import RedisAddress, parse_redis_url
from phoenix_server.settings import Settings
from phoenix_server.tensors import DTYPE_OF_ONNX, DTYPES, DType, Signature, TensorSpec

BAD_FILE, NO_REDIS = 3, 4  # exit codes; see docs/bindings/redis.md
_BLOCK_ROWS = 1000
_SHOWN_FAULTS = 20
_MAX_LISTED = 1000
_TIMEOUT_S = 10.0

# What a column may hold: bytes as the hash will, None for nothing, or a value that is neither.
_Row = tuple[int, dict[str, Any]]
_Advance = Callable[[int], None]


class FeatureImportError(Exception):
    """The table was not written, or not all of it; `exit_code` says whether the file or Redis is to blame."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.message = message


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """How to read the file: the entity's column (empty: named as `entityParameter`) and the input's datatype.

    An empty `datatype` is looked up in the model. `is_check_only`: nothing is written.
    """

    file: Path
    entity_column: str = ""
    datatype: str = ""
    is_check_only: bool = False


def import_features(settings: Settings, manifest: Manifest, options: ImportOptions) -> int:
    """Check and write the table; return the exit code. Raises `ModelLoadError` for the manifest's and settings' faults.

    Prints what was done on stdout, faults on stderr.
    """
    spec = manifest.model.spec.features
    if spec is None:
        raise StartError(Reason.INVALID_SPEC, f"{manifest.file}: the model has no spec.features")
    if settings.redis_url is None and not options.is_check_only:
        raise StartError(Reason.INVALID_SETTING, "no Redis is set: give --url or PHOENIX_REDIS_URL")
    prefix = settings.redis_key_prefix
    plan = FeaturePlan(
        spec,
        _signature(settings, manifest, spec, options.datatype),
        prefix=default_prefix(manifest) if prefix is None else prefix,
    )
    try:
        table = _table(options, spec)
        count = _check(table, plan)
        if options.is_check_only:
            print(f"{options.file}: {count} rows are good; nothing was written")
            return 0
        assert settings.redis_url is not None
        address = parse_redis_url(settings.redis_url.get_secret_value())
        seconds = _write(table, plan, address, settings.redis_ca_file)
        print(f"{options.file}: {count} rows written to {address} in {seconds:.1f} s, as {plan.key('…').decode()}")
    except FeatureImportError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    return 0


# --- reading ---------------------------------------------------------------------------------------------------------


class _Table:
    """A file's rows as (place, values by column); the place is a line or, in Parquet, a row."""

    def __init__(self, file: Path, columns: list[str], place: str) -> None:
        self.file = file
        self.entity_column, *self.columns = columns
        self.place = place

    def rows(self, description: str) -> Generator[_Row, None, None]:
        """Yield every row, with a progress bar on a terminal. Raises `FeatureImportError` for what is no table."""
        raise NotImplementedError

    def fault(self, message: str) -> FeatureImportError:
        return FeatureImportError(BAD_FILE, f"{self.file}: {message}")

    def _require(self, found: list[str]) -> None:
        for column in (self.entity_column, *self.columns):
            if column != UPDATED and found.count(column) != 1:
                what = "found it twice" if column in found else f"found {', '.join(found)[:500] or 'nothing'}"
                raise self.fault(f"expected a column '{column}', {what}")


class _CsvTable(_Table):
    def rows(self, description: str) -> Generator[_Row, None, None]:
        with self.file.open("rb") as binary, _progress(description, self.file.stat().st_size) as advance:
            text = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
            reader = csv.reader(text, strict=True)
            seen = 0
            try:
                header = next(reader, [])
                self._require(header)
                places = {name: header.index(name) for name in self.columns if name in header}
                entity_at = header.index(self.entity_column)
                for fields in reader:
                    if not fields:
                        continue  # an empty line
                    if len(fields) != len(header):
                        raise self.fault(
                            f"line {reader.line_num}: expected {len(header)} columns as in line 1, got {len(fields)}"
                        )
                    row: dict[str, Any] = {name: fields[at].encode() or None for name, at in places.items()}
                    row[self.entity_column] = fields[entity_at]
                    if reader.line_num % _BLOCK_ROWS == 0:
                        advance(binary.tell() - seen)
                        seen = binary.tell()
                    yield reader.line_num, row
                advance(binary.tell() - seen)
            except UnicodeDecodeError as error:
                got = f"{error.object[error.start]:#04x}"
                raise self.fault(
                    f"line {reader.line_num + 1} or soon after: expected UTF-8 text, got byte {got}"
                ) from None
            except csv.Error as error:
                raise self.fault(f"line {reader.line_num}: {error}") from None


class _ParquetTable(_Table):
    def rows(self, description: str) -> Generator[_Row, None, None]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise self.fault("reading Parquet needs pyarrow: pip install 'phoenix-ml[parquet]'") from None
        try:
            with parquet.ParquetFile(self.file) as file, _progress(description, file.metadata.num_rows) as advance:
                found = file.schema_arrow.names
                self._require(found)
                wanted = [name for name in (self.entity_column, *self.columns) if name in found]
                number = 0
                for batch in file.iter_batches(batch_size=_BLOCK_ROWS, columns=wanted):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, {name: _as_hash_value(value) for name, value in row.items()}
                    advance(len(batch))
        except (pyarrow.ArrowException, OSError) as error:
            raise self.fault(f"this Parquet file cannot be read: {str(error)[:300]}") from None


def _table(options: ImportOptions, spec: Features) -> _Table:
    columns = [options.entity_column or spec.entity_parameter, *spec.names, UPDATED]
    file = options.file
    try:
        with file.open("rb") as opened:
            is_parquet = opened.read(4) == b"PAR1"
    except OSError as error:
        raise FeatureImportError(BAD_FILE, f"{file}: {error.strerror}") from None
    if not is_parquet and file.suffix.lower() in (".parquet", ".pq"):
        raise FeatureImportError(BAD_FILE, f"{file}: expected a Parquet file by its name, and it is none")
    return _ParquetTable(file, columns, "row") if is_parquet else _CsvTable(file, columns, "line")


def _as_hash_value(value: Any) -> Any:
    """Return a value of a data frame as a hash holds it; None for nothing, which frames also write as NaN."""
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return b"true" if value else b"false"
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)).encode() if value.is_integer() and abs(value) < 2**63 else repr(value).encode()
    if isinstance(value, datetime):
        moment = value if value.tzinfo else value.replace(tzinfo=UTC)
        return repr(moment.timestamp()).encode()
    return value if isinstance(value, dict | list) else str(value).encode()


# --- checking --------------------------------------------------------------------------------------------------------


def _check(table: _Table, plan: FeaturePlan) -> int:
    """Return the number of rows; raise `FeatureImportError` that lists what is wrong with them."""
    faults: list[str] = []
    dtype = plan.tensor.dtype
    expected, count, found = expected_of(dtype), 0, 0
    for place, row in table.rows("checking"):
        count += 1
        for column, wanted in _row_faults(row, table, dtype, expected):
            found += 1
            if len(faults) < _SHOWN_FAULTS:
                value = row.get(column)
                value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
                faults.append(
                    f"{table.file} {table.place} {place}, column {column}: expected {wanted}, got {shown(value)}"
                )
        if found > _MAX_LISTED:
            break
    if found:
        more = found - len(faults)
        at_least = "at least " if found > _MAX_LISTED else ""
        end = f"and {at_least}{more} more; " if more else ""
        raise FeatureImportError(BAD_FILE, "\n".join([*faults, f"{end}nothing was written"]))
    return count


def _row_faults(row: dict[str, Any], table: _Table, dtype: DType, expected: str) -> Iterator[tuple[str, str]]:
    entity = row[table.entity_column]
    if not (isinstance(entity, str | bytes) and ENTITY.fullmatch(_text(entity))):
        yield table.entity_column, f"an entity of 1 to {MAX_ENTITY_CHARACTERS} characters without control characters"
    for column in table.columns:
        value = row.get(column)
        if value is None:
            continue
        is_time = column == UPDATED
        try:
            if not isinstance(value, bytes):
                raise ValueError
            parse_value(value, DType.FP64 if is_time else dtype)
        except ValueError:
            yield column, "seconds since 1970" if is_time else expected


def _text(entity: str | bytes) -> str:
    return entity if isinstance(entity, str) else entity.decode("utf-8", "surrogateescape")


# --- writing ---------------------------------------------------------------------------------------------------------


def _write(table: _Table, plan: FeaturePlan, address: RedisAddress, ca_file: Path | None) -> float:
    """Write every row; return the seconds. Raises `FeatureImportError` that says how far it came."""
    started, written = time.perf_counter(), 0
    tls: dict[str, Any] = {"ssl": True, "ssl_ca_certs": ca_file and str(ca_file)} if address.is_tls else {}
    client = redis.Redis(
        host=address.host,
        port=address.port,
        db=address.database,
        username=address.username or None,
        password=address.password or None,
        socket_timeout=_TIMEOUT_S,
        socket_connect_timeout=_TIMEOUT_S,
        **tls,
    )
    now = f"{time.time():.3f}".encode()
    try:
        with client, contextlib.closing(table.rows("writing")) as rows:
            while block := list(islice(rows, _BLOCK_ROWS)):
                with client.pipeline(transaction=False) as pipeline:
                    for _, row in block:
                        key = plan.key(_text(row[table.entity_column]))
                        fields = {name: row[name] for name in table.columns if row.get(name) is not None}
                        if empty := [name for name in table.columns if name not in fields and name != UPDATED]:
                            pipeline.hdel(key, *empty)
                        mapping: dict[Any, Any] = {UPDATED: now, **fields}
                        pipeline.hset(key, mapping=mapping)
                    pipeline.execute()
                written += len(block)
    except (redis.RedisError, OSError) as error:
        cause = address.without_password(str(error))[:300] or type(error).__name__
        raise FeatureImportError(
            NO_REDIS,
            f"{address}: {cause}; {written} rows were written before. "
            "Run the import again: it starts from the beginning and does no harm",
        ) from None
    return time.perf_counter() - started


@contextlib.contextmanager
def _progress(description: str, total: int) -> Iterator[_Advance]:
    """Show a bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.advance(task, done)


# --- the model -------------------------------------------------------------------------------------------------------


def _signature(settings: Settings, manifest: Manifest, spec: Features, datatype: str) -> Signature:
    """Return the inputs of the model, or one as the caller says it is. No runtime and no accelerator is needed."""
    if datatype:
        return Signature((TensorSpec(spec.input, DTYPES[datatype], (-1, len(spec.names))),), ())
    import onnx

    model = manifest.model.spec.model
    try:
        artifact = asyncio.run(
            new_store(settings).fetch(model.uri, sha256=model.sha256, beside=manifest.file.parent, credentials=None)
        )
    except ModelLoadError as error:
        raise StartError(
            error.reason, f"{error.message} (the model tells the datatype of input '{spec.input}'; or give --datatype)"
        ) from error
    graph = onnx.load_model(artifact.path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    return Signature(tuple(_spec(value) for value in graph.input if value.name not in weights), ())


def _spec(value: Any) -> TensorSpec:
    import onnx

    tensor = value.type.tensor_type
    # "tensor(float)" and so on, as ONNX Runtime writes types
    name = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    dtype = DTYPE_OF_ONNX.get(f"tensor({name})", DType.FP32)
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
    return TensorSpec(value.name, dtype, shape)
