"""Which metrics there are, of the pages in docs/reference and the recording rules; and which an expression reads."""

import functools
import re
from pathlib import Path

import queries

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
PAGES = ("metrics.md", "operator-metrics.md", "metrics-api-metrics.md")
# Prometheus' own
_BUILT_IN = {"up", "ALERTS"}
_WORDS = {"and", "or", "unless", "offset", "bool"}


@functools.cache
def exposed() -> frozenset[str]:
    """The names on the pages."""
    rows = [row for page in PAGES for row in re.findall(r"^\| `(\w+)` \| (\w+) ", (REFERENCE / page).read_text(), re.M)]
    return frozenset(name for name, _ in rows)


@functools.cache
def reference() -> frozenset[str]:
    """Every name that a query may read: the pages', a histogram's series, recorded ones, Prometheus' own."""
    series = {f"{name}_{end}" for name in exposed() for end in ("bucket", "sum", "count") if name.endswith("_seconds")}
    rows = {f"inference_batch_rows_{end}" for end in ("bucket", "sum", "count")}
    return exposed() | series | rows | _BUILT_IN | {rule.record for rule in queries.autoscaling_rules()}


def names_in(expr: str) -> set[str]:
    """Return the metrics that an expression reads: words that are no function, keyword, label or duration."""
    text = re.sub(r'\{[^}]*\}|\b(by|on|ignoring|group_left|group_right) \([^)]*\)|"[^"]*"|\[[^]]*\]', " ", expr)
    text = re.sub(r"\boffset \w+", " ", text)
    return set(re.findall(r"(?<![\w:$.])[A-Za-z_][\w:]*(?![\w:]|\s*\()", text)) - _WORDS
