"""The operator's bench works on this machine: it runs on a real API server and writes what it measured.

No time is judged. What does not depend on the machine is: nothing is written at rest or at a restart, each child once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lab import binaries

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _is_built() -> bool:
    """Whether the lab's programs are there: building them takes minutes, which is not this test's to spend."""
    return all(binaries.path(program).exists() for program in ("etcd", "kube-apiserver"))


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_quick_bench_measures_every_phase_and_finds_no_needless_write(tmp_path: Path) -> None:
    if not _is_built():
        reason = "the lab's programs are not built; `make lab-up` builds them"
        if "cluster" in os.environ.get("PHOENIX_REQUIRE", "").split(","):
            pytest.fail(reason)
        pytest.skip(reason)
    command = [
        sys.executable, str(BENCHMARKS / "operator_bench.py"), "--quick", "--lab", f"bench-test-{os.getpid()}",
        "--output", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    results = json.loads(file.read_text())
    assert set(results["rounds"]) == {"loop", "idle", "create", "edit", "restart", "rest"}
    for rounds in results["rounds"].values():
        assert all(value >= 0 for figures in rounds for value in figures.values())
    (created,) = results["rounds"]["create"]
    assert created["writes: children"] == 8
    assert created["writes: status"] == 1
    verdicts = {target["target"]: target["is_met"] for target in results["targets"]}
    assert all(is_met for target, is_met in verdicts.items() if " in ms" not in target), verdicts
    assert "| writes at rest | <= 0 | 0 | met |" in (tmp_path / "latest.md").read_text()
