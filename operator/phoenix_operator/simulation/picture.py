"""Draws a comparison: replicas, load, and the percentile against the objective over time. matplotlib's only door."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from phoenix_operator.simulation.run import Run, Step

_COLORS = {"slo": "#0072b2", "latency": "#d55e00", "cpu": "#009e73"}  # told apart by colour-blind people too
_POINTS = 400  # of a line; more would not be seen
SUFFIXES = (".svg", ".png")


class PictureError(Exception):
    """There is no picture; the message says what is missing."""


def check(file: Path) -> None:
    """Raise `PictureError` if no picture can be written to that file."""
    if file.suffix not in SUFFIXES:
        raise PictureError(f"--picture: expected a file that ends in {' or '.join(SUFFIXES)}, got {file.name!r}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PictureError(
            "--picture: expected matplotlib to be installed, which the extra `simulate` brings: "
            f"pip install 'phoenix-ml[operator,simulate]'; got: {error}"
        ) from error


def draw(runs: Sequence[Run], file: Path, title: str) -> None:
    """Write the picture; the same runs give the same SVG. Raises `PictureError`."""
    check(file)
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    settings = {"svg.hashsalt": "phoenix", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(10, 7), layout="constrained")
        load, replicas, latency = figure.subplots(3, 1, sharex=True)
        figure.suptitle(title)
        hours = _thin([step.at_s / 3600 for step in runs[0].steps], max)
        load.plot(hours, _series(runs[0], lambda step: step.per_second), color="#444444", linewidth=1)
        load.set_ylabel("requests per second")
        load.set_ylim(bottom=0)
        for run in runs:
            look = {"color": _COLORS.get(run.policy, "#cc79a7"), "linewidth": 1.2, "label": run.policy}
            replicas.step(hours, _series(run, lambda step: float(step.replicas)), where="post", **look)
            latency.plot(hours, _series(run, lambda step: step.latency_s), **look)
        replicas.set_ylabel("replicas")
        replicas.set_ylim(bottom=0)
        replicas.legend(loc="upper right")
        latency.axhline(runs[0].slo_s, color="#444444", linestyle="--", linewidth=0.8)
        latency.set_yscale("log")
        latency.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        latency.yaxis.set_major_formatter("{x:g}")
        latency.yaxis.set_minor_locator(NullLocator())
        latency.set_ylabel(f"p{runs[0].percentile} in seconds\n(dashed: objective)")
        latency.set_xlabel("hours")
        for axes in (load, replicas, latency):
            axes.grid(alpha=0.25)
        try:
            figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
        except OSError as error:
            raise PictureError(f"--picture: expected a file that can be written, got: {error}") from error


def _series(run: Run, value: Callable[[Step], float]) -> list[float]:
    return _thin([value(step) for step in run.steps], max)


def _thin(values: Sequence[float], of: Callable[[Sequence[float]], float]) -> list[float]:
    """Return at most `_POINTS` values, each the worst of a few neighbours."""
    size = max(1, math.ceil(len(values) / _POINTS))
    groups = [values[start : start + size] for start in range(0, len(values), size)]
    return [of([value for value in group if not math.isnan(value)] or [math.nan]) for group in groups]
