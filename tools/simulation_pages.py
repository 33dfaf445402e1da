"""Renders the traces and the example page of docs/autoscaling from the simulation. Called by `generate`."""

import contextlib
import io
import math
import shlex
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = "docs/autoscaling"
REPLICA = "--capacity 4 --service-ms 50 --load-seconds 60"


def _bump(hours: float, at: float, width: float) -> float:
    return math.exp(-(((hours - at) / width) ** 2))


def _day(seconds: int) -> float:
    hours = seconds / 3600
    return 15 + 120 * _bump(hours, 10.5, 2.5) + 180 * _bump(hours, 19.5, 2.0)


def _step(seconds: int) -> float:
    return 250 if 1800 <= seconds < 5400 else 25


def _spike(seconds: int) -> float:
    return 400 if 1800 <= seconds < 1920 else 60


# name: (what it is, length and distance of lines in seconds, requests per second)
TRACES: dict[str, tuple[str, int, int, Callable[[int], float]]] = {
    "step": ("ten times the load for an hour", 9000, 900, _step),
    "spike": ("seven times the load for two minutes", 5400, 120, _spike),
    "day": ("a quiet night, a morning and a higher evening", 86_400, 300, _day),
}


def trace(name: str) -> str:
    """Return the text of a trace."""
    _, length_s, distance_s, rate = TRACES[name]
    rows = [f"{seconds},{rate(seconds):.1f}" for seconds in range(0, length_s + 1, distance_s)]
    return "\n".join(["seconds,requests_per_second", *rows]) + "\n"


def example() -> str:
    """Return the text of docs/autoscaling/example.md, without its header."""
    from phoenix_operator.__main__ import main

    parts = [
        "# Simulated examples\n\n"
        "What the commands print for [model.yaml](model.yaml) and the traces in this folder. How to read it, and what\n"
        "is not in it, is in [simulate.md](simulate.md).\n"
    ]
    for name, (meaning, *_) in TRACES.items():
        command = f"simulate {FOLDER}/model.yaml {FOLDER}/traces/{name}.csv {REPLICA}"
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.chdir(ROOT):
            if main(shlex.split(command)) != 0:
                raise RuntimeError(f"phoenix-operator {command} failed")
        shown = command.replace(f" {REPLICA}", f" \\\n  {REPLICA}")
        # the first line says of what replica, which the command says too
        parts.append(f"## {name}: {meaning}\n\n```sh\nphoenix-operator {shown}\n```\n\n{out.getvalue()}")
    return "\n".join(parts)
