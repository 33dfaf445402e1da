"""The load that is simulated: reads TRACE.csv. A rate holds until the next line; the last line ends the trace.

Hides the format and says what is wrong with a file, by line.
"""

import csv
import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _csv import Reader as _Reader

HEADER = ("seconds", "requests_per_second")
MOST_SECONDS = 31 * 86_400.0
MOST_PER_SECOND = 10_000_000.0


class TraceError(Exception):
    """A file that is no trace; the message names file, line, expectation and what came."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Times in seconds, growing from 0, and the requests per second from each on."""

    seconds: tuple[float, ...]
    per_second: tuple[float, ...]

    @property
    def ends_s(self) -> float:
        """When it ends."""
        return self.seconds[-1]

    def at(self, seconds: float) -> float:
        """Return the requests per second at that time."""
        return self.per_second[max(0, bisect_right(self.seconds, seconds) - 1)]


def read_trace(file: Path) -> Trace:
    """Read a file. Raises `TraceError`."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            return parse_trace(lines, str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{file}: expected a CSV file, got: {error}") from error


def parse_trace(lines: Iterable[str], name: str) -> Trace:
    """Read a trace of lines of text. Raises `TraceError`."""
    rows = csv.reader(lines)
    try:
        return _trace(rows, name)
    except csv.Error as error:
        raise TraceError(f"{name}:{rows.line_num}: expected values with commas between, got: {error}") from error


def _trace(rows: "_Reader", name: str) -> Trace:
    seconds: list[float] = []
    per_second: list[float] = []
    header = next(rows, [])
    if tuple(cell.strip() for cell in header) != HEADER:
        raise TraceError(f"{name}:1: expected the header {','.join(HEADER)}, got {_shown(','.join(header))}")
    for row in rows:
        if not row:
            continue
        where = f"{name}:{rows.line_num}"
        if len(row) != len(HEADER):
            raise TraceError(f"{where}: expected 2 values, {' and '.join(HEADER)}, got {len(row)}")
        at_s = _number(row[0], f"{where}: {HEADER[0]}", MOST_SECONDS)
        if not seconds and at_s != 0:
            raise TraceError(f"{where}: {HEADER[0]}: expected 0 in the first line, got {row[0].strip()}")
        if seconds and at_s <= seconds[-1]:
            raise TraceError(f"{where}: {HEADER[0]}: expected more than {seconds[-1]:g}, the line before, got {at_s:g}")
        seconds.append(at_s)
        per_second.append(_number(row[1], f"{where}: {HEADER[1]}", MOST_PER_SECOND))
    if len(seconds) < 2:
        raise TraceError(
            f"{name}: expected 2 lines or more after the header, of which the last ends it, got {len(seconds)}"
        )
    return Trace(tuple(seconds), tuple(per_second))


def _number(text: str, what: str, most: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= most:
        raise TraceError(f"{what}: expected a number from 0 to {most:.0f}, got {_shown(text)}")
    return number


def _shown(text: str) -> str:
    return repr(text if len(text) <= 64 else text[:64] + "…")
