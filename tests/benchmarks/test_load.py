"""The bench's arithmetic and the readers of its tools' output: a wrong answer must never become a figure."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = (
    "bindings", "load", "processes", "raw", "records", "report", "results", "scenarios", "subjects", "workloads"
)  # fmt: skip

H2LOAD = """\
finished in 2.00s, 10.00 req/s, 1.00KB/s
requests: 20 total, 24 started, 20 done, 20 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 20 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 2.34KB (2400) total, 440B (440) headers (space savings 90.00%), 1.56KB ({data}) data
"""
LOG = "".join(f"1700000000000000\t200\t{micros}\n" for micros in range(1000, 21000, 1000))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules of the bench, which are a script's and so not a package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


def test_wrk_result_is_read(bench: dict[str, ModuleType]) -> None:
    times = '"us": 2000000, "p50_us": 150, "p95_us": 400, "p99_us": 900'
    output = f'noise\nRESULT {{"requests": 500, {times}, "failed": 0}}\n'
    seen = bench["load"].parse_wrk(output)
    assert (seen.rps, seen.p50_ms, seen.p95_ms, seen.p99_ms) == (250, 0.15, 0.4, 0.9)


def test_wrk_result_with_failed_requests_is_refused(bench: dict[str, ModuleType]) -> None:
    output = 'RESULT {"requests": 500, "us": 2000000, "p50_us": 150, "p95_us": 400, "p99_us": 900, "failed": 1}\n'
    with pytest.raises(bench["processes"].BenchError, match="1 requests failed"):
        bench["load"].parse_wrk(output)


def test_h2load_result_is_read(bench: dict[str, ModuleType]) -> None:
    seen = bench["load"].parse_h2load(H2LOAD.format(data=20 * 65), LOG, answer_size=60)
    assert (seen.rps, seen.p50_ms, seen.p95_ms, seen.p99_ms) == (10, 10, 19, 20)


def test_h2load_result_without_messages_is_refused(bench: dict[str, ModuleType]) -> None:
    with pytest.raises(bench["processes"].BenchError, match="answers of 65 bytes expected, 1299"):
        bench["load"].parse_h2load(H2LOAD.format(data=1299), LOG, answer_size=60)


def test_ratio_is_the_median_of_ratios_within_rounds(bench: dict[str, ModuleType]) -> None:
    outcome = bench["results"].Outcome()
    for fast, slow in ((100.0, 10.0), (300.0, 20.0), (60.0, 20.0)):
        outcome.add("iris-rest-64", "phoenix", {"rps": fast})
        outcome.add("iris-rest-64", "naive", {"rps": slow})
    target = bench["scenarios"].Target("iris-rest-64", "rps", at_least=5, over="naive")
    assert outcome.of_target(target) == [10, 15, 3]
    _, _, targets = bench["results"].tables(outcome)
    assert any(row[1].startswith("10 (3 to 15)") and row[2] == "met" for row in targets.rows)


def test_target_of_another_subject_looks_at_it_and_at_the_difference(bench: dict[str, ModuleType]) -> None:
    outcome = bench["results"].Outcome()
    for plain, durable in ((0.5, 2.0), (0.25, 3.25)):
        outcome.add("bindings-1", "phoenix", {"p50_ms": plain})
        outcome.add("bindings-1", "durable", {"p50_ms": durable})
    target = bench["scenarios"].Target("bindings-1", "p50_ms", at_most=3, beyond="phoenix", subject="durable")
    assert outcome.of_target(target) == [1.5, 3]


def test_every_target_names_a_scenario_and_a_subject_of_it(bench: dict[str, ModuleType]) -> None:
    scenarios = {scenario.key: scenario for scenario in bench["scenarios"].SCENARIOS}
    for target in bench["scenarios"].TARGETS:
        assert target.figure in bench["results"].UNITS
        subjects = scenarios[target.scenario].subjects
        assert target.subject in subjects
        assert target.over is None or target.over in subjects
        assert target.beyond is None or target.beyond in subjects
