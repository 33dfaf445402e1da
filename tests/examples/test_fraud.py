"""The laptop's walk-through of examples/fraud: its README's commands, with no Redis, Kafka or PostgreSQL running."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime
import phoenix_process
import pytest
from phoenix_process import Running, wait_until

ROOT = Path(__file__).parents[2]
FRAUD = ROOT / "examples/fraud"
REQUEST = json.loads((FRAUD / "request.json").read_text())
EXPECTED = json.loads((FRAUD / "response.json").read_text())
LAPTOP = (FRAUD / "README.md").read_text().split("## On a laptop")[1].split("## In a cluster")[0]
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", LAPTOP, re.DOTALL) for line in block.splitlines()]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def server(state: Path) -> Iterator[Running]:
    with phoenix_process.start([FRAUD], {"PHOENIX_STATE_DIR": str(state)}) as running:
        yield running


@pytest.fixture
def answer(server: Running) -> dict[str, Any]:
    found = infer(server, REQUEST)
    assert found.status_code == 200, found.text
    body: dict[str, Any] = found.json()
    return body


def infer(server: Running, request: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.rest_url}/v2/models/fraud/infer", json=request)


def typed(command: str, state: Path) -> str:
    """Run a command as the README has it, with the state folder of the test; return what it printed."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PHOENIX_")}
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PHOENIX_STATE_DIR": str(state)}
    done = subprocess.run(
        ["bash", "-c", command.replace(".phoenix", str(state))],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def command(words: str) -> str:
    [found] = [line for line in COMMANDS if words in line]
    return found


def payment(card: str, *values: float) -> dict[str, Any]:
    tensor = {"name": "payment", "shape": [1, 2], "datatype": "FP32", "data": values}
    return {"parameters": {"card": card}, "inputs": [tensor]}


def events(state: Path) -> list[dict[str, Any]]:
    file = state / "events/phoenix.default.fraud.predictions.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_answer_is_completed_with_features_of_the_file(answer: dict[str, Any]) -> None:
    assert answer["parameters"]["feature_age_seconds"] >= 0
    [label, probabilities] = answer["outputs"]
    assert label["data"] == EXPECTED["outputs"][0]["data"]
    assert probabilities["data"] == pytest.approx(EXPECTED["outputs"][1]["data"], abs=1e-6)


def test_card_that_is_not_in_the_table_is_refused_by_name(server: Running) -> None:
    refused = infer(server, payment("card-9999", 10, 0))
    assert refused.status_code == 400
    assert "card-9999" in refused.json()["error"]
    assert "amount_24h" in refused.json()["error"]


def test_field_that_is_missing_gets_the_default(server: Running) -> None:
    got = infer(server, payment("card-1004", 500, 1)).json()
    [row] = [line for line in (FRAUD / "features.csv").read_text().splitlines() if line.startswith("card-1004,")]
    amount_24h, count_24h, age_days = row.split(",")[1:]
    assert age_days == ""
    model = onnxruntime.InferenceSession(FRAUD / "model.onnx")
    inputs = {"payment": [[500, 1]], "features": [[float(amount_24h), float(count_24h), 0]]}
    expected = model.run(["probabilities"], {name: np.array(rows, np.float32) for name, rows in inputs.items()})[0]
    assert got["outputs"][1]["data"] == pytest.approx(expected.ravel().tolist(), abs=1e-6)


def test_prediction_is_an_event_line_and_an_audit_row(server: Running, state: Path, answer: dict[str, Any]) -> None:
    with sqlite3.connect(state / "audit.sqlite3") as database:  # Durable: it is there when the answer is
        rows = database.execute("SELECT request_id FROM predictions").fetchall()
    database.close()
    assert rows.count((answer["id"],)) == 1
    wait_until(lambda: answer["id"] in {event["request_id"] for event in events(state)}, "the event")
    [event] = [event for event in events(state) if event["request_id"] == answer["id"]]
    assert (event["model"], event["version"], event["outcome"]) == ("fraud", "1", "ok")
    assert [tensor["name"] for tensor in event["inputs"]] == ["payment", "features"]
    assert event["outputs"] == [
        {key: tensor[key] for key in ("name", "datatype", "shape", "data")} for tensor in answer["outputs"]
    ]
    assert json.loads(typed(command("tail -n 1"), state))["id"] == events(state)[-1]["id"]


def test_audit_is_verified_and_replayed_bit_for_bit(server: Running, state: Path, answer: dict[str, Any]) -> None:
    assert "0 broken" in typed(command("audit verify"), state)
    assert "1 identical, 0 different" in typed(command("audit replay"), state)
    assert "1 identical, 0 different" in typed(f"phoenix-server audit replay {answer['id']}", state)


def test_requests_in_a_file_are_answered(state: Path) -> None:
    typed(command("python3 -c"), state)
    [result] = map(json.loads, typed(command("replay-requests"), state).splitlines())
    assert result["id"] == "batch-1"
    assert result["outputs"][0]["data"] == EXPECTED["outputs"][0]["data"]
