"""Measures how long a real Prometheus takes to evaluate the recording rules, with many models.

    python benchmarks/rules_bench.py [--models N] [--pods N] [--evaluations N] [--quick] [--output DIR]

The series are those of the server's own metrics page that the rules read, scraped over HTTP from pods that are none.
Exits 0 also when the target is missed: a busy machine misses it. Exits 1 when something is wrong, so that the figures
would mean nothing: a rule that fails, a model without a signal.
"""

from __future__ import annotations

import argparse
import datetime
import http.server
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from report import Table, commit, machine, number, slug, spread
from rich.console import Console
from rich.table import Table as RichTable

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "tools"), str(ROOT / "dashboards")]

import queries  # noqa: E402
from lab import LabError, processes  # noqa: E402
from lab.prometheus import Prometheus, Target  # noqa: E402

from phoenix_server.errors import Outcome  # noqa: E402
from phoenix_server.metrics import Metrics, Objective  # noqa: E402

_TARGET_S = 1.0
_READ = ("inference_latency_seconds", "inference_inflight_requests", "phoenix_model_slo_seconds")
_PERCENTILES = (95, 99, 90, 50)
_MODELS_OF_A_POD = 100  # so many share a page, which changes nothing for the rules
_ANSWERS = ((Outcome.OK, 0.08, 40), (Outcome.OK, 0.14, 4), (Outcome.SHED, 0.001, 5))
_BEGUN_AFTER_S = 120.0
# The longest window of the rules but that for missing pods.
_FILLED_AFTER_S = 120.0


class BenchError(Exception):
    """Something is wrong, so that the figures would mean nothing."""


class Page:
    """The metrics page of one pod: counters grow by the same every second, gauges stay."""

    def __init__(self, first: int, count: int) -> None:
        metrics = Metrics()
        for index in range(first, first + count):
            model = metrics.model(f"model-{index}", "1", Objective(0.1, _PERCENTILES[index % len(_PERCENTILES)]))
            model.inflight = 1
            for outcome, seconds, times in _ANSWERS:
                for _ in range(times):
                    model.observe_request(outcome, "rest", seconds, (1, 0, 0))
        lines = metrics.exposition()[0].decode().splitlines()
        self._lines = [line.rpartition(" ") for line in lines if line.startswith(_READ)]
        self.series = len(self._lines)
        self._begun = time.monotonic()

    def text(self) -> bytes:
        """Return the page as it is now."""
        passed_s = time.monotonic() - self._begun
        return "".join(
            f"{name} {value if name.startswith(_READ[1:]) else float(value) * passed_s}\n"
            for name, _, value in self._lines
        ).encode()


@contextmanager
def pods(options: argparse.Namespace) -> Iterator[tuple[list[Target], int]]:
    """Serve the pages for the block; yield the targets and how many series they have."""
    pages: dict[str, Page] = {}
    targets: list[tuple[str, dict[str, str]]] = []
    for first in range(0, options.models, _MODELS_OF_A_POD):
        for pod in range(options.pods):
            path = f"/{first}/{pod}"
            pages[path] = Page(first, min(_MODELS_OF_A_POD, options.models - first))
            labels = {"namespace": f"team-{first // _MODELS_OF_A_POD}", "pod": f"pod-{first}-{pod}"}
            targets.append((path, labels))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(pages[self.path].text())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"127.0.0.1:{server.server_port}"
    try:
        yield (
            [
                Target(address, labels | {"__metrics_path__": path, "instance": labels["pod"]})
                for path, labels in targets
            ],
            sum(page.series for page in pages.values()),
        )
    finally:
        server.shutdown()
        server.server_close()


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return seconds of each evaluation, and how long each rule took in the middle one."""
    Prometheus.install()
    interval_s = 1 if options.quick else 15
    with pods(options) as (targets, series), tempfile.TemporaryDirectory(prefix="rules-bench-") as folder:
        server = Prometheus(Path(folder) / "server", interval=f"{interval_s}s", targets=targets)
        server.start()
        try:
            console.print(f"{series:,} series of {len(targets)} targets; waiting for the windows to fill", style="dim")
            evaluations = _evaluations(server, options, interval_s)
            if wrong := _wrong(server, options.models):
                raise BenchError(wrong)
            record = processes.read(server.record)
            assert record is not None
            return {
                "prometheus": server.version(),
                "interval_s": interval_s,
                "series": series,
                "seconds": [each["evaluationTime"] for each in evaluations],
                "rules": _by_record(evaluations),
                "resident_mb": _resident_mb(record.pid),
                "recorded_series": _count(server, '{__name__=~"phoenix:.*"}'),
            }
        finally:
            server.remove()


def _evaluations(server: Prometheus, options: argparse.Namespace, interval_s: int) -> list[dict[str, Any]]:
    """Wait until every window is full, then look at one evaluation after the other."""
    found: list[dict[str, Any]] = []
    processes.wait_until("every signal is right", lambda: not _wrong(server, options.models), deadline_s=_BEGUN_AFTER_S)
    filled_at = time.monotonic() + (0 if options.quick else _FILLED_AFTER_S)
    deadline = filled_at + (options.evaluations + 4) * interval_s + 60
    while len(found) < options.evaluations:
        if time.monotonic() > deadline:
            raise BenchError(f"only {len(found)} of {options.evaluations} evaluations in time")
        time.sleep(interval_s / 5)
        (group,) = server.rule_groups()
        failed = [f"{rule['name']}: {rule['lastError']}" for rule in group["rules"] if rule.get("lastError")]
        if failed:
            raise BenchError(f"rules fail: {'; '.join(failed)}")
        is_new = not found or found[-1]["lastEvaluation"] != group["lastEvaluation"]
        if time.monotonic() >= filled_at and is_new:
            found.append(group)
    return found


def _wrong(server: Prometheus, models: int) -> str:
    """Say what is wrong; nothing where every model has every signal, and the right one."""
    for signal_name in (queries.CONCURRENCY, queries.LATENCY, queries.PRESSURE):
        if (count := _count(server, signal_name)) != models:
            return f"{signal_name}: {count} models have it, of {models}"
    # of 44 good answers a second 40 take 0.08 s: p50 and p90 are below the SLO of 0.1 s, p95 and p99 above it
    expected = sum(_PERCENTILES[index % len(_PERCENTILES)] >= 95 for index in range(models))
    over = _count(server, f"{queries.PRESSURE} > 1")
    return "" if over == expected else f"{over} models are over their objective, {expected} should be"


def _count(server: Prometheus, expression: str) -> int:
    found = server.query(f"count({expression})")
    return int(float(found[0]["value"][1])) if found else 0


def _by_record(evaluations: list[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds of each record, those of all its rules together; the median of the evaluations."""
    sums: dict[str, list[float]] = {}
    for group in evaluations:
        of_group: dict[str, float] = {}
        for rule in group["rules"]:
            of_group[rule["name"]] = of_group.get(rule["name"], 0.0) + rule["evaluationTime"]
        for name, seconds in of_group.items():
            sums.setdefault(name, []).append(seconds)
    return {name: median(seconds) for name, seconds in sums.items()}


def _resident_mb(pid: int) -> float:
    rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(rows["VmRSS"].split()[0]) / 1024


def tables(results: dict[str, Any]) -> list[Table]:
    """Return the target, then what the rules take."""
    seconds = results["seconds"]
    verdict = "met" if max(seconds) < _TARGET_S else "MISSED"
    rows = sorted(results["rules"].items(), key=lambda row: -row[1])
    return [
        Table(
            "Target",
            ("what", "target", "measured", "verdict"),
            [("seconds of one evaluation, the slowest", f"< {_TARGET_S:g}", spread(seconds), verdict)],
        ),
        Table("Rules, slowest first", ("record", "ms"), [(name, number(value * 1000)) for name, value in rows]),
    ]


def write(results: dict[str, Any], options: argparse.Namespace, load: float) -> Path:
    """Write `<date>-<machine>.json` and `latest.md` into the options' folder; return the former."""
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    on, date = machine(), datetime.datetime.now(datetime.UTC)
    asked = {name: getattr(options, name) for name in ("models", "pods", "evaluations")}
    of = {"prometheus": results["prometheus"], "phoenix commit": commit(ROOT, "dashboards", "inference_server")}
    document = {
        "date": date.isoformat(timespec="seconds"), "machine": on, "versions": of, "options": asked,
        "load_average": load, "is_met": max(results["seconds"]) < _TARGET_S, **results,
    }  # fmt: skip
    file = folder / f"{date:%Y-%m-%d}-{slug(on)}.json"
    file.write_text(json.dumps(document, indent=1) + "\n")
    lines = [
        "# What the recording rules cost", "",
        f"{date:%Y-%m-%d}, {on['cpu']}, {on['cores']} cores, Linux {on['kernel']}; {options.models:,} models with "
        f"{options.pods} pods each, {results['series']:,} series scraped every {results['interval_s']} s, "
        f"{results['recorded_series']:,} recorded; {options.evaluations} evaluations; "
        f"Prometheus holds {number(results['resident_mb'])} MB. "
        f"Load average when the bench began: {load:.1f}.", "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in of.items()) + ".", "",
    ]  # fmt: skip
    for table in tables(results):
        lines += table.markdown()
    (folder / "latest.md").write_text(
        "\n".join([*lines, "Made by `make bench-rules`; see `benchmarks/README.md`."]) + "\n"
    )
    return file


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measures how long the recording rules take, with many models.")
    parser.add_argument("--models", type=int, default=1000, help="how many models (default 1000)")
    parser.add_argument("--pods", type=int, default=1, help="how many pods each (default 1)")
    parser.add_argument("--evaluations", type=int, default=12, help="how many are looked at (default 12)")
    parser.add_argument("--quick", action="store_true", help="10 models, 3 evaluations: does the bench work?")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/rules", help="folder for results"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.evaluations = 12, 3
    if min(options.models, options.pods, options.evaluations) < 1:
        parser.error("--models, --pods and --evaluations must be at least 1")
    return options


def main() -> int:
    """Run the bench; return the exit code."""
    options, console, load = read_options(), Console(stderr=True), os.getloadavg()[0]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that Prometheus ends then, too
    try:
        results = measure(options, console)
    except (BenchError, LabError) as error:
        console.print(f"rules-bench: {error}", style="red", highlight=False)
        return 1
    console = Console()
    for content in tables(results):
        table = RichTable(*content.columns, title=content.title, title_justify="left", title_style="bold")
        for row in content.rows:
            table.add_row(*row, style={"met": "green", "MISSED": "yellow"}.get(row[-1]))
        console.print(table)
    console.print(f"written to {write(results, options, load)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
