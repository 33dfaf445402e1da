"""The audit over both databases: what is recorded, that nothing is answered unrecorded, and what `audit` commands find.

`phoenix-server audit replay --last 1000` after `make run` and some load does what the test of several hundred does.
"""

import contextlib
import http.client
import json
import signal
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_home import (
    PASSWORD,
    Answers,
    Home,
    PostgresHome,
    SqliteHome,
    cli,
    infer,
    load,
    metric,
    row_ids,
    serving,
    state,
    write_model,
)
from phoenix_process import wait_until

from phoenix_server.audit import migrate
from phoenix_server.audit.chain import AuditRow, Head, chained, genesis, microseconds
from phoenix_server.audit.database import Database
from phoenix_server.audit.store import Store
from phoenix_server.audit.tensor_blob import pack, unpack
from phoenix_server.settings import load_settings

WRITER = "ab" * 16
EVENTS = Path("events", "phoenix.ml.iris.predictions.jsonl")


@pytest.fixture(params=["sqlite", "postgresql"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Home:
    if request.param == "sqlite":
        return SqliteHome(tmp_path)
    return PostgresHome(request.getfixturevalue("postgres_server"))


def record_some(home: Home, *, rows: int = 20) -> None:
    """Write a chain of that many rows, and its head."""
    store = Store(Database(load_settings(home.env)))
    tensors, now = pack([("x", np.ones((1, 4), np.float32))]), time.time_ns() // 1000
    chain, last = [], genesis(WRITER)
    for number in range(1, rows + 1):
        outputs = pack([("y", np.full(1, number, np.float32))])
        row = AuditRow(
            WRITER, number, now, now, 250, "ml", "iris", "1", "0" * 64, "CPUExecutionProvider", "onnxruntime 1", "ok",
            f"r{number}", None, None, None, None, tensors, outputs, None,
        )  # fmt: skip
        chain.append(chained(last, row))
        last = chain[-1].hash
    with store.database.connect() as link:
        migrate.ensure(link)
        store.add(link, chain, [])
        store.add_head(link, Head(WRITER, rows, last), datetime.now(UTC))


def test_durable_answer_is_in_the_database_before_it_is_sent(home: Home, tmp_path: Path) -> None:
    manifest = write_model(tmp_path / "iris")
    with serving(home, manifest) as server:
        status, answer = infer(server, "first")
        assert status == 200
        ((model, outcome, request_id, inputs, outputs, runtime, provider, error, caller),) = home.query(
            "SELECT model, outcome, request_id, inputs, outputs, runtime, provider, error, caller FROM predictions"
        )
        assert (model, outcome, request_id, error, caller) == ("iris", "ok", "first", None, None)
        assert runtime.startswith("onnxruntime ")
        assert provider == "CPUExecutionProvider"
        assert [name for name, _ in unpack(bytes(inputs))] == ["x"]
        logged = dict(unpack(bytes(outputs)))
        for output in answer["outputs"]:
            assert logged[output["name"]].ravel().tolist() == pytest.approx(output["data"])
        with load(server) as answers:
            wait_until(lambda: len(answers.of(200)) > 300, "300 answers")
            assert set(list(answers.of(200))) <= set(row_ids(home))
        assert not answers.broken
        assert set(answers.ids) == {200}
        ids = row_ids(home)
        assert sorted(ids) == sorted({*answers.of(200), "first"})
        # group commit: requests that wait together share a transaction
        assert metric(server, "phoenix_audit_rows_total") == len(ids)
        assert metric(server, "phoenix_audit_commit_seconds_count") < len(ids)
        assert metric(server, "phoenix_audit_chain_length") == len(ids)
        assert state(server)["up"] is True
        log = "".join(server.stderr)
    assert PASSWORD not in log + "".join(server.stderr)
    ((name, version, signature),) = home.query("SELECT name, version, signature FROM models")
    assert (name, version) == ("iris", "1")
    assert [tensor["name"] for tensor in json.loads(signature)["inputs"]] == ["x"]


def test_event_is_delivered_from_the_outbox_once_for_each_row(home: Home, tmp_path: Path) -> None:
    manifest = write_model(tmp_path / "iris", has_events=True)
    places = tmp_path / "state"
    with serving(home, manifest, PHOENIX_STATE_DIR=str(places)) as server:
        with load(server, connections=4) as answers:
            wait_until(lambda: len(answers.of(200)) > 100, "100 answers")
        wait_until(lambda: not home.query("SELECT id FROM outbox"), "the outbox is drained")
        assert metric(server, "phoenix_audit_events_delivered_total") == len(answers.of(200))
    events = [json.loads(line) for line in (places / EVENTS).read_text().splitlines()]
    assert sorted(event["request_id"] for event in events) == sorted(answers.of(200))
    rows = home.query("SELECT event_id FROM predictions")
    assert {event["id"] for event in events} == {event_id for (event_id,) in rows}


def test_failed_requests_are_recorded_with_their_outcome(home: Home, tmp_path: Path) -> None:
    manifest = write_model(tmp_path / "iris")
    with serving(home, manifest) as server:
        wrong = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}]}
        assert infer(server, "wrong\0\u00e9", body=wrong)[0] == 400
    ((outcome, request_id, error, outputs),) = home.query("SELECT outcome, request_id, error, outputs FROM predictions")
    assert (outcome, request_id, outputs) == ("client_error", "wrong\ufffd\u00e9", None)
    assert "shape [1, 1]" in error
    assert cli(home, "audit", "verify").returncode == 0
    skipped = cli(home, "audit", "replay", "--last", "5")
    assert (skipped.returncode, skipped.stdout.splitlines()[-1]) == (0, "0 identical, 0 different, 1 skipped")


def test_modes_and_tensors_are_as_declared(home: Home, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    for name, mode, includes in (("iris", "BestEffort", True), ("off", "Off", True), ("bare", "Durable", False)):
        write_model(folder, name, mode=mode, includes_tensors=includes)
    keys = tmp_path / "keys"
    keys.write_text("the-key-of-a-caller\n")
    with serving(home, folder) as server:
        for model in ("iris", "off", "bare"):
            assert infer(server, f"to-{model}", model=model)[0] == 200
        wait_until(lambda: len(row_ids(home)) == 2, "rows of two models")
        with load(server, connections=4) as answers:
            wait_until(lambda: len(answers.of(200)) > 300, "300 answers")
        wait_until(lambda: len(row_ids(home)) == 2 + len(answers.of(200)), "every row")
        assert metric(server, "phoenix_audit_dropped_total") == 0
    assert sorted(home.query("SELECT name FROM models")) == [("bare",), ("iris",), ("off",)]
    assert home.query("SELECT model, inputs, outputs FROM predictions WHERE request_id = 'to-bare'") == [
        ("bare", None, None)
    ]
    assert cli(home, "audit", "verify").returncode == 0


def test_best_effort_writes_what_waits_when_the_process_ends(home: Home, tmp_path: Path) -> None:
    manifest = write_model(tmp_path / "iris", mode="BestEffort")
    with serving(home, manifest) as server, load(server, connections=4) as answers:
        wait_until(lambda: len(answers.of(200)) > 200, "200 answers")
    assert sorted(row_ids(home)) == sorted(answers.of(200))


@pytest.mark.parametrize(
    ("statements", "row"),
    [
        (["UPDATE predictions SET outcome = 'error' WHERE sequence = 7"], 7),
        (["UPDATE predictions SET latency_us = latency_us + 1 WHERE sequence = 7"], 7),
        (["UPDATE predictions SET outputs = inputs WHERE sequence = 7"], 7),
        (["DELETE FROM predictions WHERE sequence = 9"], 9),
        (["DELETE FROM predictions WHERE sequence < 4"], 1),
        (
            [
                "UPDATE predictions SET sequence = 1000 WHERE sequence = 5",
                "UPDATE predictions SET sequence = 5 WHERE sequence = 6",
                "UPDATE predictions SET sequence = 6 WHERE sequence = 1000",
            ],
            5,
        ),
        (["DELETE FROM predictions WHERE sequence > 15"], 16),
        (["DELETE FROM predictions"], 1),
    ],
    ids=["changed", "changed-number", "changed-tensors", "deleted", "beginning", "swapped", "end", "everything"],
)
def test_verify_names_the_first_row_that_does_not_hold(home: Home, statements: list[str], row: int) -> None:
    record_some(home)
    clean = cli(home, "audit", "verify")
    assert (clean.returncode, clean.stdout.splitlines()[-1]) == (0, "1 chains, 20 rows verified, 0 broken")
    home.tamper(*statements)
    found = cli(home, "audit", "verify")
    assert found.returncode == 3
    assert f"BROKEN at row {WRITER}-{row}: " in found.stdout


def test_head_of_the_log_finds_a_chain_that_is_gone_with_its_heads(home: Home, tmp_path: Path) -> None:
    manifest = write_model(tmp_path / "iris")
    with serving(home, manifest) as server:
        assert infer(server, "only")[0] == 200
    lines = [json.loads(line) for line in server.stderr if '"audit chain"' in line]
    head = f"{lines[-1]['writer']}:{lines[-1]['sequence']}:{lines[-1]['hash']}"
    assert cli(home, "audit", "verify", "--head", head).returncode == 0
    home.tamper("DELETE FROM predictions", "DELETE FROM chains")
    assert cli(home, "audit", "verify").returncode == 0  # as if it had never been
    found = cli(home, "audit", "verify", "--head", head)
    assert found.returncode == 3
    assert f"BROKEN at row {lines[-1]['writer']}-1: the end of the chain is missing" in found.stdout
    assert cli(home, "audit", "verify", "--head", "nonsense").returncode == 2


def test_rows_cannot_be_changed_by_a_plain_statement(home: Home) -> None:
    record_some(home, rows=2)
    for statement in ("UPDATE predictions SET outcome = 'x'", "DELETE FROM predictions", "DELETE FROM chains"):
        with pytest.raises(Exception, match="never changed or deleted"):
            home.query(statement)


def test_replay_is_bit_identical(home: Home, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    manifest = write_model(folder / "iris")
    write_model(folder / "text", "text", example="text")
    with serving(home, folder / "iris", folder / "text") as server:
        with load(server, connections=16) as answers:
            wait_until(lambda: len(answers.of(200)) > 400, "400 answers")
        request = json.loads((Path(__file__).parents[2] / "examples" / "text" / "request.json").read_text())
        request.pop("id", None)
        for number in range(20):
            assert infer(server, f"text-{number}", model="text", body=request)[0] == 200
    total = len(answers.of(200)) + 20
    done = cli(home, "audit", "replay", "--last", str(total + 5))
    assert (done.returncode, done.stdout) == (0, f"{total} identical, 0 different, 0 skipped\n"), done.stderr
    one = cli(home, "audit", "replay", "text-3")
    assert one.returncode == 0
    assert " text 1 identical" in one.stdout
    missing = cli(home, "audit", "replay", "no-such-request")
    assert (missing.returncode, missing.stderr) == (4, "no prediction with the id no-such-request\n")

    ((writer, sequence),) = home.query("SELECT writer, sequence FROM predictions WHERE request_id = 'text-3'")
    home.tamper("UPDATE predictions SET outputs = (SELECT p.outputs FROM predictions p WHERE p.request_id = 'text-4') "
                "WHERE request_id = 'text-3'")  # fmt: skip
    assert cli(home, "audit", "replay", f"{writer}-{sequence}").returncode == 0  # the same request, the same answer
    first, second = answers.of(200)[:2]
    home.tamper(f"UPDATE predictions SET outputs = (SELECT p.outputs FROM predictions p WHERE p.request_id = '{second}'"
                f") WHERE request_id = '{first}'")  # fmt: skip
    assert cli(home, "audit", "replay", first).returncode == 3

    (manifest.parent / "model.onnx").write_bytes((folder / "text" / "model.onnx").read_bytes())
    other = cli(home, "audit", "replay", second)
    assert other.returncode == 4
    assert "DigestMismatch" in other.stderr


def serve_and_kill(home: Home, manifest: Path, name: str, more: dict[str, str]) -> Answers:
    """Kill a server in the middle of a load; what it answered."""
    answers = Answers()
    with (
        contextlib.suppress(AssertionError),  # it does not end with 0
        serving(home, manifest, **more) as server,
        load(server, name=name) as answers,
    ):
        wait_until(lambda: len(answers.of(200)) > 100, "100 answers")
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    assert server.process.returncode == -signal.SIGKILL
    return answers


def test_killed_server_has_recorded_every_answer(home: Home, tmp_path: Path) -> None:
    manifest = write_model(tmp_path / "iris", has_events=True)
    more = {"PHOENIX_STATE_DIR": str(tmp_path / "state")}
    answered: list[str] = []
    for life in range(3):
        answers = serve_and_kill(home, manifest, f"life{life}", more)
        assert set(answers.ids) == {200}
        answered += answers.of(200)
    with serving(home, manifest, **more):  # the next life delivers what the others left
        wait_until(lambda: not home.query("SELECT id FROM outbox"), "the outbox is drained")
    ids = row_ids(home)
    assert len(ids) == len(set(ids))
    assert set(answered) <= set(ids)
    lines = (tmp_path / "state" / EVENTS).read_text().splitlines()
    assert {event["request_id"] for event in map(json.loads, lines)} == set(ids)
    assert cli(home, "audit", "verify").returncode == 0


def test_retention_drops_whole_months_and_the_chain_holds(home: Home, tmp_path: Path) -> None:
    record_some(home, rows=6)
    long_ago = (datetime.now(UTC) - timedelta(days=400)).strftime("%Y-%m-15 12:00:00.000000")
    age_rows(home, long_ago)
    assert cli(home, "audit", "verify").returncode == 0
    manifest = write_model(tmp_path / "iris")
    with serving(home, manifest, PHOENIX_AUDIT_RETENTION_DAYS="365") as server:
        assert infer(server, "new")[0] == 200
        wait_until(lambda: len(row_ids(home)) == 4, "old rows are dropped")
    assert home.query("SELECT writer, sequence FROM chains WHERE is_pruned") == [(WRITER, 3)]
    found = cli(home, "audit", "verify")
    assert found.returncode == 0, found.stdout
    assert f"{WRITER}  3 rows  ok" in found.stdout
    home.tamper("DELETE FROM predictions WHERE sequence = 4")
    assert cli(home, "audit", "verify").returncode == 3


def age_rows(home: Home, moment: str) -> None:
    """Let the first three rows be written at another time, in a chain that holds."""
    store = Store(Database(load_settings(home.env)))
    with store.database.connect() as link, link.connection.begin():
        (writer,) = store.writers(link.connection)
        rows = [row for row, _ in store.chain(link.connection, writer)]
    old = microseconds(datetime.fromisoformat(f"{moment}+00:00"))
    last, values = genesis(writer), []
    for row in rows:
        link_ = chained(last, row._replace(written_us=old) if row.sequence <= 3 else row)
        last = link_.hash
        values.append(link_)
    home.tamper("DELETE FROM predictions", "DELETE FROM chains")
    if isinstance(home, PostgresHome):
        month = datetime.fromisoformat(moment).replace(day=1)
        end = (month + timedelta(days=32)).replace(day=1)
        name = f"predictions_{month:%Y_%m}"
        home.tamper(
            f"CREATE TABLE {name} PARTITION OF predictions FOR VALUES FROM ('{month:%Y-%m-01 00:00:00+00}') "
            f"TO ('{end:%Y-%m-01 00:00:00+00}')",
            f'ALTER TABLE {name} OWNER TO "{home.owner}"',
        )
    with store.database.connect() as link:
        store.add(link, values, [])


def test_api_key_is_told_apart_and_not_kept(home: Home, tmp_path: Path) -> None:
    manifest = write_model(tmp_path / "iris")
    keys = tmp_path / "keys"
    keys.write_text("key-of-the-first\nkey-of-the-second\n")
    data: dict[str, Any] = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
    with serving(home, manifest, PHOENIX_API_KEYS_FILE=str(keys)) as server:
        for key in ("first", "second", "first"):
            connection = http.client.HTTPConnection(server.rest_url.removeprefix("http://"), timeout=30)
            headers = {"Authorization": f"Bearer key-of-the-{key}"}
            connection.request("POST", "/v2/models/iris/infer", json.dumps(data), headers)
            assert connection.getresponse().status == 200
            connection.close()
    callers = [caller for (caller,) in home.query("SELECT caller FROM predictions ORDER BY sequence")]
    assert callers[0] == callers[2] != callers[1]
    assert all(caller.startswith("key:") and "key-of" not in caller for caller in callers)
