"""What a dashboard is made of, as plain data, and the shapes of its PromQL, for `server_boards` and `operator_board`.

Expressions hold Grafana's variables: `$namespace` and `$model`, of which both may be several or all, and
`$__rate_interval`. Thresholds stand where the alerts have theirs, and a panel names the alerts that watch it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["timeseries", "stat", "table"]
Colour = Literal["green", "yellow", "red"]
# None: from the lowest value on.
Step = tuple[float | None, Colour]

OF = 'namespace=~"$namespace",model=~"$model"'
IN = 'namespace=~"$namespace"'
WINDOW = "[$__rate_interval]"
MODEL = "namespace, model"
NAME = "{{namespace}}/{{model}}"


@dataclass(frozen=True, slots=True)
class Query:
    """An expression, and how its series are called."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """`unit` is Grafana's name of it; `width` of 24; `steps` colour the value, and are lines in a graph."""

    title: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: Kind = "timeseries"
    width: int = 8
    steps: Sequence[Step] = ()
    alerts: Sequence[str] = ()
    description: str = ""
    is_from_zero: bool = True


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard. `variables`: of `namespace` and `model`, those it has; `found_by` is the metric they come from."""

    uid: str
    title: str
    description: str
    rows: Sequence[tuple[str, Sequence[Panel]]]
    variables: Sequence[str] = ("namespace", "model")
    found_by: str = "phoenix_model_info"

    def panels(self) -> Iterator[Panel]:
        """Yield every panel."""
        for _, panels in self.rows:
            yield from panels


def graph(title: str, unit: str, *several: Query, steps: Sequence[Step] = (), watched: Sequence[str] = ()) -> Panel:
    """Return a graph of some queries."""
    return Panel(title, several, unit, steps=steps, alerts=watched)


def stat(title: str, expr: str, unit: str = "short", steps: Sequence[Step] = (), watched: Sequence[str] = ()) -> Panel:
    """Return one number."""
    return Panel(title, [Query(expr)], unit, "stat", 4, steps, watched)


def rate(metric: str, by: str, selector: str = OF) -> str:
    """Return the rate a second, in total or by labels."""
    total = f"sum by ({by})" if by else "sum"
    return f"{total} (rate({metric}{{{selector}}}{WINDOW}))"


def count(metric: str, by: str, selector: str = OF) -> str:
    """Return how many there were in the window of a rate."""
    return f"sum by ({by}) (increase({metric}{{{selector}}}{WINDOW}))"


def quantile(share: float, histogram: str, by: str, selector: str = OF) -> str:
    """Return a quantile of a histogram."""
    labels = ", ".join(name for name in (by, "le") if name)
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', labels, selector)})"


def mean(histogram: str, by: str) -> str:
    """Return the mean of a histogram."""
    return f"{rate(f'{histogram}_sum', by)} / {rate(f'{histogram}_count', by)}"


def share(outcomes: str, by: str) -> str:
    """Return the share of requests with these outcomes."""
    some = rate("inference_requests_total", by, f'{OF},outcome=~"{outcomes}"')
    return f"{some} / {rate('inference_requests_total', by)}"


def limit(value: float) -> tuple[Step, Step]:
    """Return the steps of a value that should stay below a limit."""
    return (None, "green"), (value, "red")


ANY = limit(1)
