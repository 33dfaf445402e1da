"""`phoenix-operator simulate`, as people call it: traces, tables, files, and what it says to what it cannot take."""

import contextlib
import csv
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from phoenix_operator.__main__ import main
from phoenix_operator.simulation.report import COLUMNS
from phoenix_operator.simulation.trace import TraceError, parse_trace, read_trace

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "autoscaling"
AUTOSCALING = {"minReplicas": 1, "maxReplicas": 10, "targetLatency": "200m"}
HEADER = "seconds,requests_per_second\n"
OPTIONS = ("--capacity", "4", "--service-ms", "50")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return written(tmp_path, AUTOSCALING)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    file = tmp_path / "trace.csv"
    file.write_text(f"{HEADER}0,20\n300,200\n600,20\n900,20\n")
    return file


def written(folder: Path, autoscaling: dict[str, object] | None, models: int = 1) -> Path:
    spec: dict[str, object] = {"model": {"uri": "fraud/model.onnx"}}
    if autoscaling is not None:
        spec["autoscaling"] = autoscaling
    kafka = autoscaling is not None and autoscaling["minReplicas"] == 0
    if kafka:
        spec["bindings"] = {"kafka": {"backend": "default", "requests": {"topic": "asked"}}}
    documents = [
        {
            "apiVersion": "phoenix-ml.io/v1alpha1",
            "kind": "PhoenixModel",
            "metadata": {"name": f"fraud-{index}", "namespace": "ml"},
            "spec": spec,
        }
        for index in range(models)
    ]
    file = folder / "model.yaml"
    file.write_text(yaml.safe_dump_all(documents))
    return file


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def policies(table: str) -> list[str]:
    return [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]


def test_a_table_is_printed_with_what_was_assumed(
    manifest: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", str(manifest), str(trace)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("Replica: 4 at once, 50 ms alone, 50 ms with 4, 80 requests/s at most, ready after 30 s. ")
    assert "Objective: p95 of 200 ms. Seed 1.\n" in told
    assert policies(told) == ["slo", "latency", "cpu"]


def test_the_policies_that_are_asked_for_are_run(
    manifest: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["simulate", str(manifest), str(trace), "--policy", "cpu", "--policy", "slo", "--policy", "cpu"]
    assert main(command) == 0
    assert policies(capsys.readouterr().out) == ["cpu", "slo"]


def test_the_manifest_gives_percentile_capacity_and_behavior(
    tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    never_down = {"scaleDown": {"selectPolicy": "Disabled"}}
    file = written(tmp_path, AUTOSCALING | {"percentile": 90, "concurrencyPerReplica": 7, "behavior": never_down})
    steps = tmp_path / "steps.csv"
    assert main(["simulate", str(file), str(trace), "--policy", "slo", "--csv", str(steps)]) == 0
    told = capsys.readouterr().out
    assert "Replica: 10 at once" in told
    assert "p90 of 200 ms" in told
    replicas = [int(row["replicas"]) for row in rows_of(steps)]
    assert replicas == sorted(replicas)


def test_every_step_of_every_policy_is_in_the_csv(manifest: Path, trace: Path, tmp_path: Path) -> None:
    file = tmp_path / "steps.csv"
    assert main(["simulate", str(manifest), str(trace), *OPTIONS, "--csv", str(file)]) == 0
    rows = rows_of(file)
    assert tuple(rows[0]) == COLUMNS
    assert [row["policy"] for row in rows] == ["slo"] * 60 + ["latency"] * 60 + ["cpu"] * 60
    assert [float(row["seconds"]) for row in rows[:60]] == [15.0 * step for step in range(1, 61)]
    assert [float(row["requests_per_second"]) for row in rows[18:22]] == [20, 20, 200, 200]
    assert max(int(row["replicas"]) for row in rows) > 1
    assert {row["scaling_active"] for row in rows} == {"ValidMetricFound"}
    for row, after in pairwise(rows):
        if row["policy"] == after["policy"]:
            assert row["desired"] == after["replicas"]


def test_the_seed_decides(manifest: Path, trace: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    texts = []
    for seed in ("3", "3", "4"):
        file = tmp_path / "steps.csv"
        assert main(["simulate", str(manifest), str(trace), *OPTIONS, "--seed", seed, "--csv", str(file)]) == 0
        texts.append(file.read_text())
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_picture_is_drawn(manifest: Path, trace: Path, tmp_path: Path, suffix: str) -> None:
    files = [tmp_path / f"{name}{suffix}" for name in ("one", "other")]
    for file in files:
        assert main(["simulate", str(manifest), str(trace), "--picture", str(file)]) == 0
    one, other = (file.read_bytes() for file in files)
    assert one.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    assert one == other
    if suffix == ".svg":
        for text in ("slo", "latency", "cpu", "requests per second", "objective", "fraud-0 under trace.csv"):
            assert text in one.decode()


def test_without_matplotlib_the_extra_is_named_before_anything_is_run(
    manifest: Path, trace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["simulate", str(manifest), str(trace), "--picture", "a.svg"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "which the extra `simulate` brings: pip install 'phoenix-ml[operator,simulate]'" in told.err
    assert main(["simulate", str(manifest), str(trace)]) == 0


def failure(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["simulate", *map(str, arguments)]) == 1
    told = capsys.readouterr()
    assert told.out == "" or "--csv" in arguments
    return told.err


def test_a_file_that_cannot_be_written_is_named(
    manifest: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "nowhere" / "steps.csv"
    assert (
        f"--csv: expected a file that can be written, got: [Errno 2] No such file or directory: '{nowhere}'"
        in failure(capsys, manifest, trace, "--csv", nowhere)
    )
    assert "expected a file that ends in .svg or .png, got 'a.jpg'" in failure(
        capsys, manifest, trace, "--picture", "a.jpg"
    )


@pytest.mark.parametrize(
    ("autoscaling", "models", "told"),
    [
        (None, 1, "spec.autoscaling: expected autoscaling, which is simulated, got none"),
        (
            AUTOSCALING | {"minReplicas": 0},
            1,
            "spec.autoscaling.minReplicas: expected 1 or more: to 0 scales KEDA, got 0",
        ),
        (AUTOSCALING, 2, "expected one PhoenixModel, got 2"),
        (AUTOSCALING | {"targetLatency": "100u"}, 1, "spec.autoscaling.targetLatency: expected 1m or more, got 100u"),
    ],
)
def test_a_manifest_that_cannot_be_simulated_is_refused(
    autoscaling: dict[str, object] | None,
    models: int,
    told: str,
    trace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert told in failure(capsys, written(tmp_path, autoscaling, models), trace)


def test_a_manifest_that_is_none_is_refused_as_everywhere(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "maxReplicas" in failure(capsys, written(tmp_path, {"minReplicas": 1, "targetLatency": "200m"}), trace)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--capacity", "0"], "argument --capacity: expected a whole number from 1, got '0'"),
        (["--capacity", "4.5"], "argument --capacity: expected a whole number from 1, got '4.5'"),
        (["--service-ms", "-1"], "argument --service-ms: expected a number from 0 to 1e9, got '-1'"),
        (["--load-seconds", "nan"], "argument --load-seconds: expected a number from 0 to 1e9, got 'nan'"),
        (["--policy", "best"], "argument --policy: invalid choice: 'best'"),
    ],
)
def test_an_option_that_is_wrong_is_named(
    arguments: list[str], told: str, manifest: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["simulate", str(manifest), str(trace), *arguments])
    assert end.value.code == 2
    assert told in capsys.readouterr().err


def test_times_that_no_replica_has_are_refused(manifest: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "service time: expected more than 0 s" in failure(capsys, manifest, trace, "--service-ms", "0")
    told = failure(capsys, manifest, trace, *OPTIONS, "--loaded-service-ms", "20")
    assert "loaded service time: expected 0.05 s to 0.2 s, the time alone to 4 times it, got 0.02 s" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "t.csv:1: expected the header seconds,requests_per_second, got ''"),
        ("time,rps\n0,1\n", "t.csv:1: expected the header seconds,requests_per_second, got 'time,rps'"),
        (HEADER, "t.csv: expected 2 lines or more after the header, of which the last ends it, got 0"),
        (f"{HEADER}0,1\n", "t.csv: expected 2 lines or more after the header, of which the last ends it, got 1"),
        (f"{HEADER}0,1\n60\n", "t.csv:3: expected 2 values, seconds and requests_per_second, got 1"),
        (f"{HEADER}0,1\n60,2,3\n", "t.csv:3: expected 2 values, seconds and requests_per_second, got 3"),
        (f"{HEADER}5,1\n60,2\n", "t.csv:2: seconds: expected 0 in the first line, got 5"),
        (f"{HEADER}0,1\n60,2\n60,3\n", "t.csv:4: seconds: expected more than 60, the line before, got 60"),
        (f"{HEADER}0,1\n\n60,2\n30,3\n", "t.csv:5: seconds: expected more than 60, the line before, got 30"),
        (f"{HEADER}0,many\n60,2\n", "t.csv:2: requests_per_second: expected a number from 0 to 10000000, got 'many'"),
        (f"{HEADER}0,-1\n60,2\n", "t.csv:2: requests_per_second: expected a number from 0 to 10000000, got '-1'"),
        (f"{HEADER}0,nan\n60,2\n", "t.csv:2: requests_per_second: expected a number from 0 to 10000000, got 'nan'"),
        (f"{HEADER}0,1\n1e9,2\n", "t.csv:3: seconds: expected a number from 0 to 2678400, got '1e9'"),
        (
            f"{HEADER}0,1\n{'x' * 140_000},2\n",
            "t.csv:3: expected values with commas between, got: field larger than field limit (131072)",
        ),
        (
            f"{HEADER}0,{'9' * 99}\n1,2\n",
            f"t.csv:2: requests_per_second: expected a number from 0 to 10000000, got '{'9' * 64}…'",
        ),
    ],
)  # fmt: skip
def test_a_trace_that_is_wrong_is_told_by_line(text: str, told: str) -> None:
    with pytest.raises(TraceError) as error:
        parse_trace(text.splitlines(), "t.csv")
    assert str(error.value) == told


@pytest.mark.parametrize("content", [None, b"seconds,requests_per_second\n0,\xff\n1,2\n"])
def test_a_file_that_cannot_be_read_is_named(
    content: bytes | None, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "t.csv"
    if content is not None:
        file.write_bytes(content)
    assert f"phoenix-operator: {file}: expected a CSV file, got: " in failure(capsys, manifest, file)


def test_a_rate_holds_until_the_next_line() -> None:
    trace = parse_trace(f"\ufeff{HEADER}0,1\n60, 2.5\n90,0\n".removeprefix("\ufeff").splitlines(), "t.csv")
    assert [trace.at(seconds) for seconds in (0, 59.9, 60, 89.9, 90, 1000)] == [1, 1, 2.5, 2.5, 0, 0]
    assert trace.ends_s == 90


def test_a_trace_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes(b"\xef\xbb\xbfseconds,requests_per_second\r\n0,1\r\n60,2\r\n")
    assert read_trace(file).per_second == (1.0, 2.0)


@given(st.lists(st.text(max_size=30), max_size=6))
def test_no_text_is_a_surprise(lines: list[str]) -> None:
    with contextlib.suppress(TraceError):
        trace = parse_trace([HEADER, *lines], "t.csv")
        assert all(math.isfinite(rate) for rate in trace.per_second)


def test_the_picture_of_the_documentation_shows_what_its_page_says() -> None:
    picture = (DOCS / "step.svg").read_text()
    assert len(picture) < 150_000
    assert "ranker under step.csv" in picture
    assert "(step.svg)" in (DOCS / "simulate.md").read_text()
