"""`phoenix-server features import`: what is written, what is refused with line and column, and that Redis may fail."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import feature_models
import phoenix_process
import pyarrow
import pytest
import redis
from feature_models import ask, put, rows_of
from lab import machine
from pyarrow import parquet
from services import RedisServer

from phoenix_server.errors import Reason

BAD_FILE, NO_REDIS = 3, 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return feature_models.write(tmp_path / "models", "strict", "words", "whole")


@pytest.fixture
def store(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis_server.client() as client:
        yield client
    redis_server.flush()


def run(folder: Path, file: Path, url: str, *more: str, model: str = "strict") -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PHOENIX_")}
    command = [sys.executable, "-m", "phoenix_server", "features", "import", str(file)]
    manifest = str(folder / f"{model}.yaml")
    return subprocess.run(
        [*command, "--manifest", manifest, *more],
        env=environment | {"PHOENIX_REDIS_URL": url, "PHOENIX_STATE_DIR": str(folder / "state")},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_csv_is_written_and_served(
    folder: Path, redis_server: RedisServer, store: redis.Redis, tmp_path: Path
) -> None:
    put(store, "strict", "bob", 1, 1, 1)
    file = tmp_path / "table.csv"
    file.write_text('note,c,entity_id,a,b\nx,3,alice,1,2.5\n\n"two\nlines",6,bob,4,\n', encoding="utf-8-sig")
    done = run(folder, file, redis_server.url)
    assert done.returncode == 0, done.stderr
    assert f"2 rows written to redis://127.0.0.1:{redis_server.port}/0" in done.stdout
    alice = store.hgetall("phx:ml:strict:user:alice")
    assert abs(float(alice.pop(b"_updated")) - time.time()) < 60
    assert alice == {b"a": b"1", b"b": b"2.5", b"c": b"3"}
    # a field that the table leaves empty does not stay as it was
    assert store.hgetall("phx:ml:strict:user:bob").keys() == {b"a", b"c", b"_updated"}
    with phoenix_process.start([folder], {"PHOENIX_REDIS_URL": redis_server.url}) as server:
        assert rows_of(ask(server, "strict", "alice")) == [[1, 2.5, 3]]


def test_updated_of_the_table_is_kept(
    folder: Path, redis_server: RedisServer, store: redis.Redis, tmp_path: Path
) -> None:
    file = tmp_path / "table.csv"
    file.write_text("user,a,b,c,_updated\nalice,1,2,3,1234.5\nbob,1,2,3,\n")
    assert run(folder, file, redis_server.url, "--entity-column", "user").returncode == 0
    assert store.hget("phx:ml:strict:user:alice", "_updated") == b"1234.5"
    updated = store.hget("phx:ml:strict:user:bob", "_updated")
    assert updated is not None
    assert float(updated) > 1e9


def test_parquet_is_written_by_its_columns(
    folder: Path, redis_server: RedisServer, store: redis.Redis, tmp_path: Path
) -> None:
    file = tmp_path / "table.parquet"
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    columns = {
        "b": [2.5, float("nan"), 0.1],
        "entity_id": [1, 2, 3],
        "a": [1, None, 3],
        "c": [3.0, 4.0, 1e300],
        "_updated": [moment, None, moment],
    }
    parquet.write_table(pyarrow.table(columns), file)
    refused = run(folder, file, redis_server.url)
    assert refused.returncode == BAD_FILE
    assert f"{file} row 3, column c: expected a finite number of FP32, got '1e+300'" in refused.stderr
    assert store.dbsize() == 0
    done = run(folder, file, redis_server.url, "--datatype", "FP64")
    assert done.returncode == 0, done.stderr
    first = {b"a": b"1", b"b": b"2.5", b"c": b"3", b"_updated": b"%.1f" % moment.timestamp()}
    assert store.hgetall("phx:ml:strict:user:1") == first
    assert store.hgetall("phx:ml:strict:user:2").keys() == {b"c", b"_updated"}


def test_strings_are_written_to_models_of_strings(
    folder: Path, redis_server: RedisServer, store: redis.Redis, tmp_path: Path
) -> None:
    file = tmp_path / "table.parquet"
    parquet.write_table(pyarrow.table({"entity_id": ["é"], "a": ["Zürich"], "b": [""], "c": ["3"]}), file)
    assert run(folder, file, redis_server.url, model="words").returncode == 0
    assert store.hget("phx:ml:words:user:é", "a") == "Zürich".encode()
    assert store.hget("phx:ml:words:user:é", "b") == b""


def test_many_rows_are_written_in_bounded_blocks(
    folder: Path, redis_server: RedisServer, store: redis.Redis, tmp_path: Path
) -> None:
    file = tmp_path / "table.csv"
    with file.open("w") as out:
        out.write("entity_id,a,b,c\n")
        out.writelines(f"u{index},{index},{index}.5,-{index}\n" for index in range(12_345))
    done = run(folder, file, redis_server.url)
    assert done.returncode == 0, done.stderr
    assert "12345 rows written" in done.stdout
    assert store.dbsize() == 12_345
    assert store.hmget("phx:ml:strict:user:u12344", "a", "b", "c") == [b"12344", b"12344.5", b"-12344"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "expected a column 'entity_id', found nothing"),
        ("entity_id,a,b\nx,1,2\n", "expected a column 'c', found entity_id, a, b"),
        ("entity_id,a,a,b,c\nx,1,1,2,3\n", "expected a column 'a', found it twice"),
        ("entity_id,a,b,c\nx,1,2\n", "line 2: expected 4 columns as in line 1, got 3"),
        ('entity_id,a,b,c\n"x,1,2,3\n', "line 2: unexpected end of data"),
        ("entity_id,a,b,c\nx,1,2,abc\n", "line 2, column c: expected a finite number of FP32, got 'abc'"),
        ("entity_id,a,b,c\nx,1,2,3\n,1,2,3\n", "line 3, column entity_id: expected an entity of 1 to 256 characters"),
        ("entity_id,a,b,c\nx\x01,1,2,3\n", "column entity_id: expected an entity"),
        ("entity_id,a,b,c,_updated\nx,1,2,3,now\n", "column _updated: expected seconds since 1970, got 'now'"),
    ],
)
def test_a_fault_in_the_table_is_named_and_nothing_is_written(
    folder: Path, redis_server: RedisServer, store: redis.Redis, tmp_path: Path, text: str, fault: str
) -> None:
    file = tmp_path / "table.csv"
    file.write_text(text)
    done = run(folder, file, redis_server.url)
    assert done.returncode == BAD_FILE
    assert fault in done.stderr
    assert str(file) in done.stderr
    assert "Traceback" not in done.stderr
    assert store.dbsize() == 0


def test_integers_have_to_be_integers(folder: Path, redis_server: RedisServer, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text("entity_id,a,b,c\nx,1,2.5,3\n")
    done = run(folder, file, redis_server.url, model="whole")
    assert "line 2, column b: expected an integer of INT64 (-9223372036854775808 to" in done.stderr


def test_many_faults_are_counted(folder: Path, redis_server: RedisServer, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text("entity_id,a,b,c\n" + "x,1,2,abc\n" * 100)
    done = run(folder, file, redis_server.url)
    assert done.stderr.count("column c") == 20
    assert "and 80 more; nothing was written" in done.stderr
    file.write_text("entity_id,a,b,c\n" + "x,1,2,abc\n" * 5000)
    assert "and at least" in run(folder, file, redis_server.url).stderr


@pytest.mark.parametrize(
    ("name", "data", "fault"),
    [
        ("table.csv", b"entity_id,a,b,c\nx,1,2,\xff\n", "expected UTF-8 text, got byte 0xff"),
        ("table.parquet", b"entity_id,a,b,c\n", "expected a Parquet file by its name, and it is none"),
        ("table.parquet", b"PAR1 and then nothing", "this Parquet file cannot be read"),
    ],
)
def test_what_is_no_table_is_refused(
    folder: Path, redis_server: RedisServer, tmp_path: Path, name: str, data: bytes, fault: str
) -> None:
    (tmp_path / name).write_bytes(data)
    done = run(folder, tmp_path / name, redis_server.url)
    assert done.returncode == BAD_FILE
    assert fault in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_is_not_there_is_told(folder: Path, redis_server: RedisServer, tmp_path: Path) -> None:
    done = run(folder, tmp_path / "none.csv", redis_server.url)
    assert (done.returncode, done.stderr.strip()) == (BAD_FILE, f"{tmp_path}/none.csv: No such file or directory")


def test_a_check_writes_nothing(folder: Path, redis_server: RedisServer, store: redis.Redis, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text("entity_id,a,b,c\nx,1,2,3\n")
    done = run(folder, file, redis_server.url, "--check-only")
    assert done.returncode == 0
    assert "1 rows are good; nothing was written" in done.stdout
    assert store.dbsize() == 0


def test_a_redis_that_does_not_answer_is_told_without_its_password(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text("entity_id,a,b,c\nx,1,2,3\n")
    done = run(folder, file, f"redis://user:hunter2@127.0.0.1:{machine.free_port('127.0.0.1')}")
    assert done.returncode == NO_REDIS
    assert "Connection refused" in done.stderr
    assert "0 rows were written before. Run the import again" in done.stderr
    assert "hunter2" not in done.stderr + done.stdout


def test_a_login_that_may_not_write_is_told(folder: Path, secure_redis: RedisServer, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text("entity_id,a,b,c\nx,1,2,3\n")
    with secure_redis.client() as client:
        client.execute_command("ACL", "SETUSER", "reader", "on", ">hunter2", "~*", "+@read", "+@connection")
    url = f"rediss://reader:hunter2@127.0.0.1:{secure_redis.port}"
    untrusted = run(folder, file, url)
    assert untrusted.returncode == NO_REDIS
    assert "certificate" in untrusted.stderr
    os.environ["SSL_CERT_FILE"] = str(secure_redis.authority)
    try:
        done = run(folder, file, url)
    finally:
        del os.environ["SSL_CERT_FILE"]
        secure_redis.flush()
    assert done.returncode == NO_REDIS
    assert "hdel" in done.stderr.lower() or "hset" in done.stderr.lower()
    assert "hunter2" not in untrusted.stderr + done.stderr


def test_the_command_line_says_what_it_lacks(folder: Path, redis_server: RedisServer, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text("entity_id,a,b,c\nx,1,2,3\n")
    several = run(folder, file, redis_server.url, "--manifest", str(folder))
    assert several.returncode == Reason.INVALID_SPEC.exit_code
    assert "several models with features: strict, whole, words; give --model" in several.stderr
    assert run(folder, file, redis_server.url, "--manifest", str(folder), "--model", "strict").returncode == 0
    redis_server.flush()
    none = run(folder, file, "")
    assert none.returncode == Reason.INVALID_SETTING.exit_code
    assert "give --url or PHOENIX_REDIS_URL" in none.stderr
    (folder / "strict.onnx").unlink()
    lost = run(folder, file, redis_server.url)
    assert lost.returncode == Reason.NOT_FOUND.exit_code
    assert "or give --datatype" in lost.stderr
