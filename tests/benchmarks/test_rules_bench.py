"""The bench of the recording rules works on this machine: it finds every signal and writes what it measured.

No time is judged.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import services
from lab.prometheus import Prometheus

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_quick_bench_evaluates_the_rules_of_every_model(services_here: None, tmp_path: Path) -> None:
    services.have(Prometheus)
    command = [sys.executable, str(BENCHMARKS / "rules_bench.py"), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    results = json.loads(file.read_text())
    assert len(results["seconds"]) == 3
    assert "phoenix:inference_slo_pressure" in results["rules"]
    assert "| phoenix:inference_slo_pressure |" in (tmp_path / "latest.md").read_text()
