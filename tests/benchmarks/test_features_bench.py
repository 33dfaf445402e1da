"""The bench of features works on this machine: it runs and checks its answers. No figure is judged."""

import subprocess
import sys
from pathlib import Path

import pytest
from services import RedisServer, have

BENCH = Path(__file__).parents[2] / "benchmarks" / "features_bench.py"


@pytest.mark.slow
@pytest.mark.usefixtures("services_here")
def test_quick_bench_of_features_compares_both_ways_of_asking() -> None:
    have(RedisServer)
    done = subprocess.run(
        [sys.executable, str(BENCH), "--quick"], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for rows in (" 1 rows", "32 rows"):
        assert f"{rows}, sent" in done.stdout
        assert f"{rows}, features" in done.stdout
        assert f"{rows}: " in done.stdout
