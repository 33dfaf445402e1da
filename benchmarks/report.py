"""What every bench's report is made of: figures in words, tables for the terminal and for Markdown, machine, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Table:
    """A table for the terminal and for Markdown alike."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def markdown(self) -> Iterator[str]:
        """Yield the lines of the table under its title, and an empty one."""
        yield from (f"## {self.title}", "", _cells(self.columns), _cells(["---"] * len(self.columns)))
        yield from map(_cells, self.rows)
        yield ""


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float]) -> str:
    """Return the median with the range behind it; one number where all values are the same."""
    if not values:
        return ""
    if len(set(values)) == 1:
        return number(values[0])
    return f"{number(median(values))} ({number(min(values))} to {number(max(values))})"


def number(value: float) -> str:
    """Return three significant digits, or all of a whole number."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def machine() -> dict[str, Any]:
    """Return what the figures depend on, without the machine's name."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"^model name\s*: (.*)$", info, re.MULTILINE)
    return {
        "cpu": found[1].strip() if found else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def slug(machine: dict[str, Any]) -> str:
    """Return the part of a file's name that stands for a machine."""
    return re.sub(r"[^a-z0-9]+", "-", f"{machine['cpu']} {machine['cores']} cores".lower()).strip("-")


def commit(root: Path, *folders: str) -> str:
    """Return the commit of a checkout, and whether something in these folders differs from it."""
    changed = " with changes" if _git(root, "status", "--porcelain", "--", *folders) else ""
    return f"{_git(root, 'rev-parse', '--short', 'HEAD') or 'none'}{changed}"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else ""
