"""`phoenix-server replay-requests`: lines of requests in, lines of results out in order, the rest aside."""

import json
import os
import subprocess
import sys
from pathlib import Path

from server.kafka_models import body, write_model

from phoenix_server.errors import Reason


def replay(
    folder: Path, *arguments: str | Path, stdin: bytes = b"", env: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[bytes]":
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PHOENIX_")}
    return subprocess.run(
        [sys.executable, "-m", "phoenix_server", "replay-requests", *map(str, arguments)],
        input=stdin,
        env=inherited | {"PHOENIX_STATE_DIR": str(folder / "state")} | (env or {}),
        capture_output=True,
        cwd=folder,
        timeout=60,
    )


def test_each_line_has_a_result_in_its_place_or_a_dead_letter(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", "replayed")
    lines = [body(number, f"r{number}") for number in range(1200)]
    lines[7], lines[1100] = b"{bad", body(1, "binary", binary_data_output=True)
    lines.insert(500, b"")
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    done = replay(tmp_path, "in.jsonl", "--models", model, "--output", "out.jsonl")
    assert done.returncode == 1, done.stderr
    assert b"1198 results, 2 dead letters in in.jsonl.dead-letters.jsonl" in done.stderr
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected = [number for number in range(1200) if number not in (7, 1100)]
    assert [(result["id"], result["outputs"][0]["data"]) for result in results] == [
        (f"r{number}", [2.0 * number]) for number in expected
    ]
    dead = [json.loads(line) for line in (tmp_path / "in.jsonl.dead-letters.jsonl").read_text().splitlines()]
    assert [(letter["line"], letter["reason"]) for letter in dead] == [(8, "invalid"), (1102, "invalid")]
    assert dead[0]["request"] == "{bad"
    events = (tmp_path / "state" / "events" / "phoenix.default.replayed.predictions.jsonl").read_text().splitlines()
    assert len(events) == 1199  # what was inferred, if in vain


def test_a_pipe_needs_no_files(tmp_path: Path) -> None:
    done = replay(tmp_path, "-", "--models", write_model(tmp_path / "m", "piped"), stdin=body(4, "r") + b"\n")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outputs"][0]["data"] == [8.0]


def test_a_model_or_file_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    models = [write_model(tmp_path / name, name) for name in ("one", "two")]
    several = replay(tmp_path, "-", "--models", *models)
    assert several.returncode == Reason.INVALID_SETTING.exit_code
    assert b"several models are found; name one with --name; found: one, two" in several.stderr
    unknown = replay(tmp_path, "-", "--name", "three", "--models", *models)
    assert b"no model 'three'; found: one, two" in unknown.stderr
    missing = replay(tmp_path, "nowhere.jsonl", "--models", models[0])
    assert b"nowhere.jsonl: No such file or directory" in missing.stderr
