"""The bench works on this machine: it runs, checks its answers, and writes what it measured. No figure is judged."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import services

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def quick_results(folder: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--quick", "--output", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=220, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("*.json")
    return dict(json.loads(file.read_text()))


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_quick_bench_measures_every_scenario_and_writes_results(tmp_path: Path) -> None:
    results = quick_results(tmp_path)
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


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_quick_bench_of_bindings_measures_each_on_real_services(services_here: None, tmp_path: Path) -> None:
    for kind in (services.RedisServer, services.PostgresServer, services.KafkaBroker):
        services.have(kind)
    results = quick_results(tmp_path, "--only", "bindings")
    measured = {key: set(subjects) for key, subjects in results["rounds"].items()}
    assert measured == {
        "bindings-1": {"phoenix", "features", "durable"},
        "bindings-64": {"phoenix", "features", "events", "best-effort", "durable"},
        "bindings-32-rows": {"phoenix", "features"},
        "bindings-async": {"async"},
    }
    assert len(results["targets"]) == 10
