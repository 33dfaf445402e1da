"""What the queries of the metrics API find, by promtool: Prometheus' own evaluation of them."""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from lab import LabError, machine

from phoenix_operator.metrics_api import adapter
from phoenix_operator.metrics_api.metrics import METRICS, expression

pytestmark = pytest.mark.services
METRIC = METRICS["inference_latency_seconds_concurrency"]
# By model: a value each 15 s. One is no number, one is infinite; one stops, and one is marked as gone.
MODELS = {
    "busy": "2.5x40",
    "fast": "0.0004x40",
    "idle": "0x40",
    "nan": "NaN+0x40",
    "infinite": "Inf+0x40",
    "stopped": "7x8 _x32",
    "gone": "7x8 stale",
}


def series(model: str, namespace: str = "ml") -> str:
    return f'{METRIC.series}{{namespace="{namespace}",model="{model}"}}'


def evaluated(folder: Path, query: str, at: str, expected: dict[str, float]) -> None:
    """Have promtool evaluate a query after a time, and compare labels and values."""
    inputs = [{"series": series(model), "values": values} for model, values in MODELS.items()]
    inputs.append({"series": series("busy", "other"), "values": "9x40"})
    samples = [{"labels": labels, "value": value} for labels, value in expected.items()]
    test = {
        "interval": "15s",
        "input_series": inputs,
        "promql_expr_test": [
            {"expr": query, "eval_time": at, "exp_samples": samples},
            # promtool marks a series as gone only if it is asked later, too
            {"expr": "vector(1)", "eval_time": "10m", "exp_samples": [{"labels": "{}", "value": 1}]},
        ],
    }
    (folder / "test.yaml").write_text(json.dumps({"rule_files": [], "tests": [test]}))
    done = subprocess.run(
        ["promtool", "test", "rules", folder / "test.yaml"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module", autouse=True)
def promtool() -> None:
    if shutil.which("promtool"):
        return
    try:
        machine.install(["prometheus"])
    except LabError as error:
        if "services" in os.environ.get("PHOENIX_REQUIRE", "").split(","):
            pytest.fail(f"no promtool: {error}")
        pytest.skip(f"no promtool: {error}")


@pytest.mark.parametrize(
    ("at", "models"),
    [
        ("2m", {"busy": 2.5, "fast": 0.0004, "idle": 0, "stopped": 7, "gone": 7}),
        ("2m45s", {"busy": 2.5, "fast": 0.0004, "idle": 0, "stopped": 7}),
        ("3m15s", {"busy": 2.5, "fast": 0.0004, "idle": 0}),
    ],
    ids=["all are there", "what is marked as gone is", "what is old is left out"],
)
def test_query_finds_what_is_recent_in_its_namespace(tmp_path: Path, at: str, models: dict[str, float]) -> None:
    # NaN equals nothing, so promtool cannot expect it
    query = f"({expression(METRIC, 'ml', max_age_s=60)}) >= 0 < Inf"
    evaluated(tmp_path, query, at, {series(model): value for model, value in models.items()})


def test_query_does_not_hide_what_is_no_number(tmp_path: Path) -> None:
    query = f"count(({expression(METRIC, 'ml', max_age_s=60)}))"
    evaluated(tmp_path, query, "3m15s", {"{}": 5})


def test_query_of_the_adapter_rounds_up_and_leaves_out_what_is_no_number(tmp_path: Path) -> None:
    query = (
        adapter.query()
        .replace("<<.Series>>", METRIC.series)
        .replace("<<.LabelMatchers>>", 'namespace="ml",model=~".*"')
        .replace("<<.GroupBy>>", "model")
    )
    found = {"busy": 2.5005, "fast": 0.0015, "idle": 0.0005}
    evaluated(tmp_path, query, "3m15s", {f'{{model="{model}"}}': value for model, value in found.items()})
    thousandths = {model: math.trunc(value * 1000) for model, value in found.items()}
    assert thousandths == {"busy": 2500, "fast": 1, "idle": 0}, "as the adapter cuts them"
