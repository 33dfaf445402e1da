"""What a comparison comes to: a table for people and every step as CSV."""

import csv
import math
from collections.abc import Sequence
from typing import TextIO

from phoenix_operator.simulation.run import Run, Step

COLUMNS = (
    "policy", "seconds", "requests_per_second", "replicas", "ready", "latency_seconds", "concurrency", "pressure",
    "answered", "over_objective", "failed", "desired", "able_to_scale", "scaling_active", "scaling_limited",
)  # fmt: skip


def table(runs: Sequence[Run]) -> str:
    """Return one line per policy, as a Markdown table."""
    percentile = runs[0].percentile
    head = [
        "policy", "replicas, mean", "replicas, most", "replica-hours", f"p{percentile}", "over the objective",
        "refused or timed out", "turns per hour",
    ]  # fmt: skip
    rows = [head, *(_row(run) for run in runs)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(head))]
    lines = [_line(row, widths) for row in rows]
    rule = "|".join("-" * (width + 1) + ("-" if index == 0 else ":") for index, width in enumerate(widths))
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]]) + "\n"


def _row(run: Run) -> list[str]:
    counts = [step.replicas for step in run.steps]
    return [
        run.policy,
        f"{sum(counts) / len(counts):.1f}",
        str(max(counts)),
        f"{run.replica_hours:.1f}",
        "none" if math.isnan(run.latency_s) else f"{run.latency_s * 1000:.0f} ms",
        f"{run.share_over:.2%}",
        f"{run.share_failed:.2%}",
        f"{run.turns_per_hour:.1f}",
    ]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        cell.ljust(width) if index == 0 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "| " + " | ".join(cells) + " |"


def write_csv(out: TextIO, runs: Sequence[Run]) -> None:
    """Write every step of every run; a value that is absent is an empty cell."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in runs:
        writer.writerows(_cells(run.policy, step) for step in run.steps)


def _cells(policy: str, step: Step) -> list[str]:
    conditions = step.decision.conditions
    reasons = [
        conditions[name].reason if name in conditions else ""
        for name in ("AbleToScale", "ScalingActive", "ScalingLimited")
    ]
    return [
        policy, _shown(step.at_s), _shown(step.per_second), str(step.replicas), str(step.ready), _shown(step.latency_s),
        _shown(step.signals.concurrency), _shown(step.signals.pressure), _shown(step.answered), _shown(step.over),
        _shown(step.failed), str(step.decision.replicas), *reasons,
    ]  # fmt: skip


def _shown(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.6g}"
