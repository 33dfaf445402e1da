"""Measures Phoenix beside a plain FastAPI endpoint and ONNX Runtime in process, and says which targets are met.

    python benchmarks/run.py [--only iris,grpc] [--rounds N] [--seconds S] [--quick] [--output DIR]

Exits 0 also when a target is missed: a busy machine misses them all. Exits 1 when something is wrong, so that the
figures would mean nothing: an answer that differs from ONNX Runtime's, a failed request, a server that died.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from bindings import Services, bound_subjects
from load import generators
from processes import BenchError, Cores, choose_cores, on_core
from results import Outcome, quietness, tables, title_of, write
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from scenarios import BINDINGS, GROUPS, SCENARIOS, Bench, Scenario, check, cold_start, measure
from subjects import ROOT, SUBJECTS, Fleet, Subject
from workloads import Workload, prepare

_QUIET_S = 0.2


def read_options(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--only", metavar="GROUPS", help=f"of {', '.join(GROUPS)}; separated by commas; default all but {BINDINGS}"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each measurement is repeated (default 3)")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement (default 5)")
    parser.add_argument("--quick", action="store_true", help="one round of one second: does the bench work?")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"), help="folder for results")
    options = parser.parse_args(arguments)
    options.groups = tuple(options.only.split(",")) if options.only else tuple(g for g in GROUPS if g != BINDINGS)
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"unknown group {', '.join(sorted(unknown))}; known: {', '.join(GROUPS)}")
    if options.rounds < 1 or options.seconds < 1:
        parser.error("--rounds and --seconds must be at least 1")
    if options.quick:
        options.rounds, options.seconds = 1, 1.0
    return options


@dataclass
class _Run:
    """One run of the bench: what is measured, with what, and what came of it so far."""

    options: argparse.Namespace
    bench: Bench
    workloads: dict[str, Workload]
    outcome: Outcome
    progress: Progress
    task: TaskID

    def all(self) -> None:
        """Measure every scenario; servers live as long as scenarios of their model follow each other."""
        scenarios = [scenario for scenario in SCENARIOS if scenario.group in self.options.groups]
        total = sum(self._rounds(scenario) * len(self._subjects(scenario)) for scenario in scenarios)
        self.progress.update(self.task, total=total)
        workload = ""
        for scenario in scenarios:
            if scenario.workload != workload:
                self.bench.fleet.stop_all()
                workload = scenario.workload
            self._scenario(scenario)

    def _scenario(self, scenario: Scenario) -> None:
        """Check one answer of each subject, then measure the subjects in turn, round by round."""
        workload, subjects = self.workloads[scenario.workload], self._subjects(scenario)
        if not self.progress.console.is_terminal:
            self.progress.console.print(f"measuring: {scenario.title}", style="dim")
        for subject in subjects:
            self._show(f"{scenario.title}: checking an answer of {title_of(subject)}")
            try:
                check(self.bench, scenario, subject, workload)
            except BenchError as error:
                raise BenchError(f"{scenario.title}, {title_of(subject)}: {error}") from error
        for _ in range(self._rounds(scenario)):
            if scenario.measure is not cold_start:  # the worker would share memory with the server
                iris = self.workloads["iris"]
                rate = self.bench.raw.rows_per_s(iris.model, iris.inputs, rows=1, seconds=_QUIET_S)
                self.outcome.quiet_rps.append(rate)
            for subject in subjects:
                self._show(f"{scenario.title}: {title_of(subject)}")
                try:
                    self.outcome.add(scenario.key, subject, measure(self.bench, scenario, subject, workload))
                except BenchError as error:
                    raise BenchError(f"{scenario.title}, {title_of(subject)}: {error}") from error
                self.progress.advance(self.task)

    def _subjects(self, scenario: Scenario) -> list[str]:
        """Return who takes part: those that speak the scenario's form of the protocol; fewer when time is short."""
        names = scenario.subjects
        if self.options.quick and scenario.group != "iris":
            names = tuple(name for name in names if name != "naive")
        return [
            name
            for name in names
            if name.startswith("raw")
            or ((subject := self.bench.fleet.subject(name)) is not None and scenario.form in subject.forms)
        ]

    def _rounds(self, scenario: Scenario) -> int:
        return 1 if self.options.quick else max(self.options.rounds, scenario.least_rounds)

    def _show(self, text: str) -> None:
        self.progress.update(self.task, description=text)


def run(options: argparse.Namespace, subjects: list[Subject], console: Console) -> Outcome:
    """Measure what the options ask for on `subjects`."""
    outcome, cores = Outcome(), choose_cores()
    _say_how(console, cores, outcome)
    with tempfile.TemporaryDirectory(prefix="phoenix-bench-") as name, on_core(cores.load):
        folder = Path(name)
        workloads = prepare(folder)
        services = Services(folder)
        fleet = Fleet([*subjects, *bound_subjects(services)], folder, cores.server)
        bench = Bench(fleet, folder, cores.server, options.seconds, services)
        columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with closing(bench), Progress(*columns, console=console, transient=True) as progress:
            _Run(options, bench, workloads, outcome, progress, progress.add_task("", total=None)).all()
    return outcome


def _say_how(console: Console, cores: Cores, outcome: Outcome) -> None:
    tools = ", ".join(f"{kind}: {tool}" for kind, tool in generators().items())
    console.print(f"servers on core {cores.server}, load on core {cores.load}; {tools}", style="dim")
    if cores.server == cores.load:
        outcome.notes.append("Server and load share the only core: every figure is too low.")
    outcome.notes += [f"{kind} load by {tool}." for kind, tool in generators().items() if "install" in tool]


def report(outcome: Outcome, console: Console) -> None:
    """Print the tables."""
    for content in tables(outcome):
        if content.rows:
            table = Table(*content.columns, title=content.title, title_justify="left", title_style="bold")
            for row in content.rows:
                style = {"met": "green", "MISSED": "yellow"}.get(row[-1])
                table.add_row(*row, style=style)
            console.print(table)
    console.print(quietness(outcome))
    for note in outcome.notes:
        console.print(note)


def finish(options: argparse.Namespace, subjects: list[Subject], about: dict[str, str] | None = None) -> int:
    """Run, print and write; return the exit code."""
    # A terminated bench must stop its servers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # A log file has room; a terminal has the width it has.
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        outcome = run(options, subjects, console)
    except BenchError as error:
        console.print(f"[red]the bench failed:[/red] {error}", highlight=False)
        return 1
    report(outcome, console)
    asked = {"only": options.groups, "rounds": options.rounds, "seconds": options.seconds, "quick": options.quick}
    file = write(outcome, options.output, root=ROOT, options=asked, about=about)
    console.print(f"written: {file.name} and latest.md in {options.output.name}/", style="dim")
    return 0


if __name__ == "__main__":
    sys.exit(finish(read_options("Measure Phoenix."), SUBJECTS))
