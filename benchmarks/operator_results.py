"""Turns what `operator_bench` measured into tables and verdicts, and writes them: for people, and as JSON."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from report import Table, commit, machine, slug, spread

_ROOT = Path(__file__).parent.parent
_PACKAGES = ("kopf", "kubernetes", "aiohttp", "pydantic", "prometheus-client")
Figures = dict[str, float]


@dataclass(slots=True)
class Outcome:
    """Everything that was measured: for each phase its figures, round by round."""

    kubernetes: str = ""
    rounds: dict[str, list[Figures]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, phase: str, figures: Figures) -> None:
        """Keep the figures of a phase of one round."""
        self.rounds.setdefault(phase, []).append(figures)

    def values(self, phase: str, figure: str) -> list[float]:
        """Return one figure round by round; 0 where there was nothing to count."""
        return [figures.get(figure, 0) for figures in self.rounds[phase]]

    def ratios(self) -> list[float]:
        """Return the operator's objects per second over the plain loop's, round by round."""
        pairs = zip(self.values("create", "objects_per_s"), self.values("loop", "objects_per_s"), strict=True)
        return [operator / loop for operator, loop in pairs]

    def highest(self, figure: str) -> list[float]:
        """Return the highest value of a figure in each round, in whatever phase."""
        phases = ("create", "edit", "restart", "rest")
        return [max(values) for values in zip(*(self.values(phase, figure) for phase in phases), strict=True)]


@dataclass(frozen=True, slots=True)
class Target:
    """What `operator.md` of the design asks for."""

    words: str
    measured: Callable[[Outcome], list[float]]
    at_most: float

    def is_met(self, outcome: Outcome) -> bool:
        """Whether the worst round meets it: these are promises, not speeds."""
        return max(self.measured(outcome)) <= self.at_most


def _of(phase: str, figure: str) -> Callable[[Outcome], list[float]]:
    return lambda outcome: outcome.values(phase, figure)


TARGETS = (
    Target("lists of the kind that is listed most, at a start", _of("restart", "list: most of a kind"), 1),
    Target("watches of the kind that is watched most, at a start", _of("restart", "watch: most of a kind"), 1),
    Target("writes of children for a new model with 8", _of("create", "writes: children"), 8),
    Target("writes of the status for a new model", _of("create", "writes: status"), 1),
    Target("edit to Deployment, p99 in ms", _of("edit", "p99_ms"), 1000),
    Target("writes at a restart", _of("restart", "writes"), 0),
    Target("writes at rest", _of("rest", "writes"), 0),
    Target("highest resident memory in MB", lambda outcome: outcome.highest("peak_rss_mb"), 150),
    Target("highest proportional memory in MB, of those at the end of a phase", lambda o: o.highest("pss_mb"), 150),
)


def tables(outcome: Outcome) -> list[Table]:
    """Return the targets, then the figures."""
    targets = [
        (
            target.words,
            f"<= {target.at_most:g}",
            spread(target.measured(outcome)),
            "met" if target.is_met(outcome) else "MISSED",
        )
        for target in TARGETS
    ]
    return [
        Table("Targets", ("what", "target", "measured", "verdict"), targets),
        _creation(outcome),
        _requests(outcome),
        _rest(outcome),
    ]


def _creation(outcome: Outcome) -> Table:
    rows = []
    for title, phase in (("operator", "create"), ("plain loop", "loop")):
        cells = [spread(outcome.values(phase, figure)) for figure in ("seconds", "objects_per_s")]
        client = "operator_cpu_s" if phase == "create" else "bench_cpu_s"
        costs = [spread(outcome.values(phase, figure)) for figure in (client, "apiserver_cpu_s", "etcd_cpu_s")]
        rows.append((title, *cells, *costs, spread(outcome.values(phase, "other_cores"))))
    rows.append(("operator / plain loop", "", f"{spread(outcome.ratios())} x", "", "", "", ""))
    columns = ("", "seconds", "objects/s", "own CPU s", "API server CPU s", "etcd CPU s", "cores taken by others")
    return Table("Children of new models", columns, rows)


def _requests(outcome: Outcome) -> Table:
    verbs = sorted(
        {
            name
            for figures in outcome.rounds.values()
            for row in figures
            for name in row
            if name.startswith("requests: ")
        }
    )
    rows = []
    for title, phase in (
        ("a new model", "create"),
        ("an edit", "edit"),
        ("a restart", "restart"),
        ("the looks at rest", "rest"),
    ):
        rows.append((title, *(spread(outcome.values(phase, name)) for name in ("requests", *verbs))))
    return Table("Requests for", ("", "all", *(verb.removeprefix("requests: ") for verb in verbs)), rows)


def _rest(outcome: Outcome) -> Table:
    rows = [
        ("edit to Deployment, ms: p50", spread(outcome.values("edit", "p50_ms"))),
        ("edit to Deployment, ms: p99", spread(outcome.values("edit", "p99_ms"))),
        ("edit to Deployment, ms: longest", spread(outcome.values("edit", "max_ms"))),
        ("restart: exec to the first reconcile of every model, s", spread(outcome.values("restart", "seconds"))),
        ("restart: CPU s of the operator", spread(outcome.values("restart", "operator_cpu_s"))),
        (
            "at rest: CPU ms of the operator for a look at a model",
            spread(outcome.values("rest", "operator_cpu_ms_each")),
        ),
        ("reconciles for a new model", spread(outcome.values("create", "reconciles_each"))),
    ]
    for title, phase in (
        ("without models", "idle"),
        ("after creation", "create"),
        ("after a restart", "restart"),
        ("at rest", "rest"),
    ):
        values = [spread(outcome.values(phase, figure)) for figure in ("pss_mb", "rss_mb")]
        rows.append((f"memory {title}, MB: proportional; resident", "; ".join(values)))
    return Table("Latency, restart, rest and memory", ("what", "measured"), rows)


def write(outcome: Outcome, options: argparse.Namespace) -> Path:
    """Write `<date>-<machine>.json` and `latest.md` into the options' folder; return the former."""
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    on, of, date = machine(), _versions(outcome), datetime.datetime.now(datetime.UTC)
    asked = {name: getattr(options, name) for name in ("models", "edits", "rounds", "resyncs", "concurrency")}
    document = {
        "date": date.isoformat(timespec="seconds"),
        "machine": on,
        "versions": of,
        "options": asked,
        "notes": outcome.notes,
        "rounds": outcome.rounds,
        "ratios": outcome.ratios(),
        "targets": [
            {
                "target": target.words,
                "at_most": target.at_most,
                "measured": target.measured(outcome),
                "is_met": target.is_met(outcome),
            }
            for target in TARGETS
        ],
    }
    file = folder / f"{date:%Y-%m-%d}-{slug(on)}.json"
    file.write_text(json.dumps(document, indent=1) + "\n")
    lines = [
        "# What the operator costs",
        "",
        f"{date:%Y-%m-%d}, {on['cpu']}, {on['cores']} cores, Linux {on['kernel']}, Python {on['python']}; "
        f"{options.models:,} models, {options.edits} edits, {options.resyncs} looks at every model at rest, "
        f"{options.rounds} rounds; median (lowest to highest). API server, etcd, operator and bench share the cores.",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in of.items()) + ".",
        "",
    ]
    for table in tables(outcome):
        lines += table.markdown()
    lines += [*(f"* {note}" for note in outcome.notes), ""] if outcome.notes else []
    lines.append("Made by `make bench-operator`; see `benchmarks/README.md`.")
    (folder / "latest.md").write_text("\n".join(lines) + "\n")
    return file


def _versions(outcome: Outcome) -> dict[str, str]:
    """Return the versions of what takes part."""
    found = {"kubernetes API server": outcome.kubernetes}
    found |= {package: importlib.metadata.version(package) for package in _PACKAGES}
    return found | {"phoenix commit": commit(_ROOT, "operator", "crds")}
