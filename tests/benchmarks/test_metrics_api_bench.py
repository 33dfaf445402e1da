"""The bench of the metrics API works on this machine: every answer is right, and it writes what it measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_quick_bench_measures_both_phases(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "metrics_api_bench.py"), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    results = json.loads(file.read_text())
    assert set(results["rounds"]) == {"spread", "burst"}
    for (figures,) in results["rounds"].values():
        assert all(value >= 0 for value in figures.values())
        assert figures["queries"] <= 1, "for a metric and namespace, however many models"
    assert "| queries for a metric and namespace in a burst | <= 1 |" in (tmp_path / "latest.md").read_text()
