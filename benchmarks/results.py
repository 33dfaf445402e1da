"""Turns rounds of figures into medians, ratios and verdicts, and writes them: for people, and as JSON for machines.

A ratio is computed within one round and the median taken of the ratios, because the machine's speed drifts from one
round to the next and both sides of a round drift with it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from load import generators
from report import Table, commit, machine, number, slug, spread
from scenarios import SCENARIOS, TARGETS, Figures, Target

UNITS = {
    "rps": "requests/s",
    "p50_ms": "p50 ms",
    "p95_ms": "p95 ms",
    "p99_ms": "p99 ms",
    "lost": "events or rows lost",
    "cpu_us": "CPU µs/request",
    "storm_ms": "all answered after ms",
    "refused_ms": "413 after ms (worst)",
    "before_p50_ms": "p50 ms before",
    "before_p99_ms": "p99 ms before",
    "during_p50_ms": "p50 ms during",
    "during_p99_ms": "p99 ms during",
    "ready_s": "exec to ready s",
    "pss_mb": "PSS MB",
    "rss_mb": "RSS MB",
}
TITLES = {"phoenix": "Phoenix", "grpcio": "Phoenix on grpc.aio", "naive": "FastAPI endpoint", "raw": "in process",
          "mlserver": "MLServer", "kserve": "KServe", "features": "with features from Redis",
          "events": "with events to Kafka", "best-effort": "with BestEffort audit", "durable": "with Durable audit",
          "async": "Phoenix"}  # fmt: skip
_PACKAGES = ("onnxruntime", "numpy", "uvicorn", "uvloop", "httptools", "fastapi", "pydantic", "orjson", "pysimdjson",
             "grpcio", "pygrpc-native")  # fmt: skip


@dataclass(slots=True)
class Outcome:
    """Everything that was measured: for each scenario, each subject's figures round by round."""

    rounds: dict[str, dict[str, list[Figures]]] = field(default_factory=dict)
    quiet_rps: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, scenario: str, subject: str, figures: Figures) -> None:
        """Keep the figures of one round."""
        self.rounds.setdefault(scenario, {}).setdefault(subject, []).append(figures)

    def values(self, scenario: str, subject: str, figure: str) -> list[float]:
        """Return one figure round by round; empty if it was not measured."""
        rounds = self.rounds.get(scenario, {}).get(subject, [])
        return [figures[figure] for figures in rounds if figure in figures]

    def ratios(self, scenario: str, subject: str, over: str, figure: str = "rps") -> list[float]:
        """Return a figure of `subject` divided by that of `over`, round by round."""
        pairs = zip(self.values(scenario, subject, figure), self.values(scenario, over, figure), strict=False)
        return [above / below for above, below in pairs]

    def of_target(self, target: Target) -> list[float]:
        """Return what a target looks at, round by round."""
        if target.over is not None:
            return self.ratios(target.scenario, target.subject, target.over, target.figure)
        values = self.values(target.scenario, target.subject, target.figure)
        if target.beyond is None:
            return values
        less = self.values(target.scenario, target.beyond, target.figure)
        return [above - below for above, below in zip(values, less, strict=False)]


def tables(outcome: Outcome) -> list[Table]:
    """Return the figures, then the targets."""
    return [_throughput(outcome), _other(outcome), _targets(outcome)]


def _throughput(outcome: Outcome) -> Table:
    rows = []
    for scenario in SCENARIOS:
        for subject in outcome.rounds.get(scenario.key, {}):
            if not outcome.values(scenario.key, subject, "rps"):
                continue
            cells = [spread(outcome.values(scenario.key, subject, figure)) for figure in ("rps", "p50_ms", "p99_ms")]
            cells.append(spread(outcome.values(scenario.key, subject, "cpu_us")))
            ratios = outcome.ratios(scenario.key, "phoenix", subject)
            cells.append("" if subject == "phoenix" or not ratios else f"{spread(ratios)} x")
            rows.append((scenario.title, title_of(subject), *cells))
    columns = ("scenario", "server", "requests/s", "p50 ms", "p99 ms", "CPU µs/request", "Phoenix is")
    return Table("Throughput and latency: median (lowest to highest of the rounds)", columns, rows)


def _other(outcome: Outcome) -> Table:
    rows = []
    for scenario in SCENARIOS:
        for subject, rounds in outcome.rounds.get(scenario.key, {}).items():
            if "rps" in rounds[0]:
                continue
            figures = {UNITS[name]: spread(outcome.values(scenario.key, subject, name)) for name in rounds[0]}
            text = "; ".join(f"{unit} {values}" for unit, values in figures.items())
            rows.append((scenario.title, title_of(subject), text))
    return Table("Start, memory, storms and refusals", ("scenario", "server", "figures"), rows)


def _targets(outcome: Outcome) -> Table:
    rows = []
    for target in TARGETS:
        values = outcome.of_target(target)
        if values:
            verdict = "met" if target.is_met(median(values)) else "MISSED"
            rows.append((_words(target), spread(values), verdict))
    return Table("Targets", ("target", "measured", "verdict"), rows)


def _words(target: Target) -> str:
    title = next(scenario.title for scenario in SCENARIOS if scenario.key == target.scenario)
    bound = f">= {number(target.at_least)}" if target.at_least is not None else f"<= {number(target.at_most or 0)}"
    over = f" x {title_of(target.over)}" if target.over else f" + {title_of(target.beyond)}" if target.beyond else ""
    who = "" if target.subject in ("phoenix", "async") else f", {title_of(target.subject)}"
    return f"{title}{who}: {UNITS[target.figure]} {bound}{over}"


def title_of(subject: str) -> str:
    """Return a subject's name for people."""
    name, _, rows = subject.partition("@")
    return f"{TITLES[name]}, batch {rows}" if rows else TITLES[name]


def quietness(outcome: Outcome) -> str:
    """Say how steady the machine was: the spread of the same work in process before every round."""
    if not outcome.quiet_rps:
        return "the machine's steadiness was not measured"
    low, high = min(outcome.quiet_rps), max(outcome.quiet_rps)
    text = f"iris in process ran at {low:,.0f} to {high:,.0f} rows/s over the run (lowest/highest {low / high:.2f})"
    return text if low / high >= 0.85 else f"{text}: the machine is noisy, trust the ratios only"


def versions(root: Path) -> dict[str, str]:
    """Return the versions of what takes part."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"phoenix commit": commit(root, "inference_server", "crds")}


def write(
    outcome: Outcome, folder: Path, *, root: Path, options: dict[str, Any], about: dict[str, Any] | None = None
) -> Path:
    """Write `<date>-<machine>.json` and `latest.md`; return the former."""
    folder.mkdir(parents=True, exist_ok=True)
    on, date = machine() | {"load_generators": generators()}, datetime.datetime.now(datetime.UTC)
    of = {**versions(root), **(about or {})}
    document = {
        "date": date.isoformat(timespec="seconds"),
        "machine": on,
        "versions": of,
        "options": options,
        "quiet_iris_in_process_rps": outcome.quiet_rps,
        "notes": outcome.notes,
        "rounds": outcome.rounds,
        "ratios": {
            f"{scenario}: phoenix / {subject}": ratios
            for scenario, subjects in outcome.rounds.items()
            for subject in subjects
            if subject != "phoenix" and (ratios := outcome.ratios(scenario, "phoenix", subject))
        },
        "targets": [
            {"target": _words(target), "measured": median(values), "is_met": target.is_met(median(values))}
            for target in TARGETS
            if (values := outcome.of_target(target))
        ],
    }
    file = folder / f"{date:%Y-%m-%d}-{slug(on)}.json"
    file.write_text(json.dumps(document, indent=1) + "\n")
    lines = [
        "# Benchmark results", "",
        f"{date:%Y-%m-%d}, {on['cpu']}, {on['cores']} cores, Linux {on['kernel']}, Python {on['python']}; "
        f"{options['rounds']} rounds of {options['seconds']:g} s; server on one core, load on another.", "",
        f"{quietness(outcome).capitalize()}.", "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in of.items()) + ".", "",
    ]  # fmt: skip
    for table in tables(outcome):
        if table.rows:
            lines += table.markdown()
    lines += [*(f"* {note}" for note in outcome.notes), "Made by `make bench`; see `benchmarks/README.md`."]
    (folder / "latest.md").write_text("\n".join(lines) + "\n")
    return file
