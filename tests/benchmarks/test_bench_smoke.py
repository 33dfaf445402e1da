"""The bench works on this machine: it runs, checks its answers, and writes what it measured. No figure is judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_quick_bench_measures_every_scenario_and_writes_results(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=220, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    results = json.loads(file.read_text())
    assert set(results["rounds"]) == {
        "cold", "iris-rest-1", "iris-rest-64", "storm", "refuse", "iris-grpc-64", "mlp-rest-64", "resnet-binary-4",
        "resnet-json-4",
    }  # fmt: skip
    for subjects in results["rounds"].values():
        assert "phoenix" in subjects
        for rounds in subjects.values():
            assert all(value >= 0 for figures in rounds for value in figures.values())
    assert {target["target"] for target in results["targets"]}
    assert "requests/s" in (tmp_path / "latest.md").read_text()
