"""Measures what the metrics API costs when an autoscaler polls it: share of a core, queries, time to an answer.

    python benchmarks/metrics_api_bench.py [--models N] [--rounds N] [--period S] [--quick] [--output DIR]

Exits 0 also when a target is missed: a busy machine misses them all. Exits 1 when an answer is wrong. The server is a
process of its own behind real TLS; the API server and Prometheus that it asks are the stand-ins of the tests, in the
process of the load, so that only its own work is counted.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import importlib.metadata
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

import aiohttp

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests/operator"), str(ROOT / "tools")]

from metrics_api_world import (  # noqa: E402
    CONFIG,
    HPA,
    NAMESPACE,
    FrontProxy,
    Kubernetes,
    Prometheus,
    config_map,
    model,
    on_socket,
    path,
)
from operator_lab import cpu_s, memory_mb  # noqa: E402
from processes import BenchError, choose_cores, free_port, on_core  # noqa: E402
from report import Table, commit, machine, slug, spread  # noqa: E402
from rich.console import Console  # noqa: E402

from phoenix_operator.metrics_api.metrics import METRICS  # noqa: E402
from phoenix_operator.metrics_api.names import NAME  # noqa: E402

POLLED = ("inference_latency_seconds_concurrency", "inference_latency_seconds_pressure")
Ask = Callable[[str], Awaitable[float]]
Polls = Callable[[Ask], Awaitable[list[float]]]
AT_ONCE = 5  # as the HPA controller does it
_PACKAGES = ("aiohttp", "kubernetes", "cryptography")
KUBECONFIG = """\
apiVersion: v1
kind: Config
current-context: x
contexts: [{{name: x, context: {{cluster: x, user: x}}}}]
clusters: [{{name: x, cluster: {{server: "{server}"}}}}]
users: [{{name: x, user: {{}}}}]
"""


@dataclass
class Outcome:
    """What each phase cost, round by round."""

    rounds: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def values(self, phase: str, figure: str) -> list[float]:
        """Return one figure round by round."""
        return [row[figure] for row in self.rounds[phase]]


@dataclass(frozen=True, slots=True)
class Target:
    """What the issue asks for."""

    words: str
    phase: str
    figure: str
    at_most: float


TARGETS = (
    Target("share of a core in %, polls spread over the period", "spread", "core_percent", 2),
    Target("share of a core in %, polls in a burst", "burst", "core_percent", 2),
    Target("time to an answer, p99 in ms, spread", "spread", "p99_ms", 50),
    Target("time to an answer, p99 in ms, burst", "burst", "p99_ms", 50),
    Target("queries for a metric and namespace in a burst", "burst", "queries", 1),
)


class Bench:
    """A running server and what it talks to."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.outcome = options, folder, Outcome()
        self.proxy, self.kubernetes, self.prometheus = FrontProxy(folder), Kubernetes(), Prometheus()
        self.names = [f"model-{number}" for number in range(options.models)]
        self.kubernetes.objects[CONFIG] = config_map(self.proxy.authority(), "front-proxy-client")
        self.kubernetes.models["ml"] = [model(name, team="risk") for name in self.names]
        for name in self.names:
            for metric in METRICS.values():
                self.prometheus.put(metric.series, "2.5", model=name)

    async def run(self) -> None:
        """Measure each phase in turn, round by round."""
        async with (
            on_socket(self.kubernetes.reply) as address,
            on_socket(self.prometheus.answer) as source,
            self.server(address, source) as (port, pid),
        ):
            connector = aiohttp.TCPConnector(ssl=self.proxy.context(self.kubernetes.bundle()), limit=AT_ONCE)
            async with aiohttp.ClientSession(connector=connector) as session:
                ask = self.asking(session, port)
                await self.burst(ask)  # connections, reviews, lists
                for _ in range(self.options.rounds):
                    for phase, polls in (("spread", self.spread), ("burst", self.burst)):
                        row = await self.measure(polls, ask, pid)
                        self.outcome.rounds.setdefault(phase, []).append(row)

    @asynccontextmanager
    async def server(self, address: str, source: str) -> AsyncIterator[tuple[int, int]]:
        """Run `phoenix-operator metrics-api` on its core until the end; yield its port and its process id."""
        port, cores = free_port(), choose_cores()
        (self.folder / "kubeconfig").write_text(KUBECONFIG.format(server=address))
        settings = {"httpPort": 0, "autoscaling": {"prometheus": {"url": source}, "httpsPort": port}}
        (self.folder / "settings.yaml").write_text(json.dumps(settings))
        command = [sys.executable, "-m", "phoenix_operator", "metrics-api", f"--settings={self.folder}/settings.yaml"]
        environment = os.environ | {"KUBECONFIG": str(self.folder / "kubeconfig"), "POD_NAMESPACE": NAMESPACE}
        with on_core(cores.server), (self.folder / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(*command, env=environment, stderr=log)
        try:
            async with asyncio.timeout(60):
                while '"message": "serving"' not in (self.folder / "log").read_text():  # noqa: ASYNC110 - of a process
                    await asyncio.sleep(0.1)
            with on_core(cores.load):
                yield port, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            await process.wait()

    def asking(self, session: aiohttp.ClientSession, port: int) -> Ask:
        """Return what asks one thing and returns how long it took, in seconds."""

        async def ask(asked: str) -> float:
            started = time.perf_counter()
            async with session.get(
                f"https://127.0.0.1:{port}{asked}",
                headers={"X-Remote-User": HPA, "X-Remote-Group": "system:serviceaccounts"},
                server_hostname=f"{NAME}.{NAMESPACE}.svc",
            ) as response:
                body = await response.json()
            took_s = time.perf_counter() - started
            if response.status != 200 or body["items"][0]["value"] != "2500m":
                raise BenchError(f"{asked}: HTTP {response.status}: {body}")
            return took_s

        return ask

    def polls(self) -> list[str]:
        """Return what is asked in a period."""
        return [path(metric, name=name) for name in self.names for metric in POLLED]

    async def spread(self, ask: Ask) -> list[float]:
        """Poll each model once, evenly over the period."""
        asked, tasks, started = self.polls(), [], time.monotonic()
        for number, one in enumerate(asked):
            await asyncio.sleep(started + number * self.options.period / len(asked) - time.monotonic())
            tasks.append(asyncio.ensure_future(ask(one)))
        return list(await asyncio.gather(*tasks))

    async def burst(self, ask: Ask) -> list[float]:
        """Poll each model once, five at a time, then wait until the period is over."""
        gate, started = asyncio.Semaphore(AT_ONCE), time.monotonic()

        async def one(asked: str) -> float:
            async with gate:
                return await ask(asked)

        times = list(await asyncio.gather(*map(one, self.polls())))
        await asyncio.sleep(max(0, started + self.options.period - time.monotonic()))
        return times

    async def measure(self, polls: Polls, ask: Ask, pid: int) -> dict[str, float]:
        """Return what a phase of some periods cost."""
        self.prometheus.queries.clear()
        lists, reviews = self.kubernetes.lists, len(self.kubernetes.reviews)
        cpu, started, times = cpu_s(pid), time.monotonic(), []
        for _ in range(self.options.periods):
            times += await polls(ask)
        seconds, periods = time.monotonic() - started, self.options.periods
        used = cpu_s(pid) - cpu
        cuts = quantiles(times, n=100)
        return {
            "core_percent": 100 * used / seconds,
            "cpu_ms_each": 1000 * used / len(times),
            "p50_ms": 1000 * cuts[49],
            "p99_ms": 1000 * cuts[98],
            "queries": len(self.prometheus.queries) / periods / len(POLLED),
            "lists": (self.kubernetes.lists - lists) / periods,
            "reviews": (len(self.kubernetes.reviews) - reviews) / periods,
            **memory_mb(pid),
        }


def tables(outcome: Outcome) -> list[Table]:
    """Return the targets, then the figures."""
    targets = []
    for target in TARGETS:
        measured = outcome.values(target.phase, target.figure)
        verdict = "met" if max(measured) <= target.at_most else "MISSED"
        targets.append((target.words, f"<= {target.at_most:g}", spread(measured), verdict))
    figures = {
        "share of a core, %": "core_percent",
        "CPU ms for a request": "cpu_ms_each",
        "time to an answer, ms: p50": "p50_ms",
        "time to an answer, ms: p99": "p99_ms",
        "in a period, for a metric: queries to Prometheus": "queries",
        "in a period: lists of PhoenixModels": "lists",
        "in a period: reviews of access": "reviews",
        "resident memory, MB": "rss_mb",
    }
    rows = [
        (words, *(spread(outcome.values(phase, name)) for phase in outcome.rounds)) for words, name in figures.items()
    ]
    return [
        Table("Targets", ("what", "target", "measured", "verdict"), targets),
        Table("Figures", ("", *outcome.rounds), rows),
    ]


def write(outcome: Outcome, options: argparse.Namespace) -> Path:
    """Write `<date>-<machine>.json` and `latest.md` into the options' folder; return the former."""
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    on, date = machine(), datetime.datetime.now(datetime.UTC)
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    versions["phoenix commit"] = commit(ROOT, "operator", "crds")
    asked = {name: getattr(options, name) for name in ("models", "rounds", "periods", "period")}
    document = {"date": date.isoformat(timespec="seconds"), "machine": on, "versions": versions, "options": asked}
    file = folder / f"{date:%Y-%m-%d}-{slug(on)}.json"
    file.write_text(json.dumps(document | {"rounds": outcome.rounds}, indent=1) + "\n")
    lines = [
        "# What the metrics API costs",
        "",
        f"{date:%Y-%m-%d}, {on['cpu']}, {on['cores']} cores, Linux {on['kernel']}, Python {on['python']}; "
        f"{options.models} models with {len(POLLED)} metrics each, polled every {options.period:g} s; "
        f"{options.periods} periods a phase, {options.rounds} rounds; median (lowest to highest).",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
    ]
    for table in tables(outcome):
        lines += table.markdown()
    (folder / "latest.md").write_text(
        "\n".join([*lines, "Made by `make bench-metrics`; see `benchmarks/README.md`."]) + "\n"
    )
    return file


def read_options() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--periods", type=int, default=4, help="polls of every model in a phase")
    parser.add_argument("--period", type=float, default=15.0, help="seconds between two polls of a model")
    parser.add_argument("--quick", action="store_true", help="show only that it works")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/metrics-api")
    options = parser.parse_args()
    if options.quick:
        options.models, options.rounds, options.periods, options.period = 5, 1, 1, 1.0
    return options


def main() -> int:
    """Run the bench; return the exit code."""
    options, console = read_options(), Console()
    with tempfile.TemporaryDirectory(prefix="metrics-api-bench-") as folder:
        bench = Bench(options, Path(folder))
        try:
            asyncio.run(bench.run())
        except (BenchError, TimeoutError, aiohttp.ClientError) as error:
            console.print(f"metrics-api-bench: {type(error).__name__}: {error}", style="red", highlight=False)
            return 1
    for table in tables(bench.outcome):
        for line in table.markdown():
            console.print(line, highlight=False, soft_wrap=True)
    console.print(f"written to {write(bench.outcome, options)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
