"""What is measured, on whom, and what must come of it. Scenarios and targets are data; the verbs are above them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import load
from bindings import Services, lost, settle
from processes import BenchError
from raw import RawWorker
from records import records_per_s
from subjects import Fleet, Running
from workloads import GRPC_METHOD, Array, Form, Workload, check_grpc, check_http, right_answer

Figures = dict[str, float]
Measure = Callable[["Bench", str, Workload], Figures]
REFUSED_BYTES = 100_000_000
STORM_CONNECTIONS = 256
_REFUSE_EVERY_S = 0.1
_RECORDS_PER_S = 5_000


@dataclass
class Bench:
    """What a measurement needs: the servers, the in-process limit, and how long to take."""

    fleet: Fleet
    folder: Path
    server_core: int
    seconds: float
    services: Services

    @cached_property
    def raw(self) -> RawWorker:
        """The worker that runs ONNX Runtime in process; started when it is first asked for."""
        return RawWorker(self.server_core)

    def close(self) -> None:
        """Stop everything."""
        self.fleet.stop_all()
        self.services.close()
        if "raw" in self.__dict__:
            self.raw.close()

    def right(self, workload: Workload) -> dict[str, Array]:
        """Return the right answer."""
        return right_answer(workload, self.raw, self.folder)


@dataclass(frozen=True)
class Scenario:
    """One row of the table. `subjects` are tried in this order in every round; `raw@32` is a batch of 32 in process."""

    key: str
    group: str
    title: str
    workload: str
    subjects: tuple[str, ...]
    form: Form
    measure: Measure
    least_rounds: int = 1


def rest(bench: Bench, subject: str, workload: Workload, *, form: Form, connections: int) -> Figures:
    """Measure a REST endpoint in a closed loop."""
    server, request = bench.fleet.server(subject, workload), bench.fleet.request(subject, workload, form)
    return _with_cpu(
        server, lambda: load.http(server.http_port, request, connections=connections, seconds=bench.seconds)
    )


def bound(bench: Bench, subject: str, workload: Workload, *, form: Form, connections: int) -> Figures:
    """Measure a REST endpoint that has something to do beside; `lost` is how many events or rows it gave up."""
    server = bench.fleet.server(subject, workload)
    settle(server)
    before = lost(server)
    figures = rest(bench, subject, workload, form=form, connections=connections)
    settle(server)
    return figures | {"lost": lost(server) - before}


def records(bench: Bench, subject: str, workload: Workload) -> Figures:
    """Measure asynchronous inference; as many requests as the target takes in the time."""
    server = bench.fleet.server(subject, workload)
    settle(server)
    count, before_s = int(_RECORDS_PER_S * bench.seconds), server.process.cpu_s()
    rate = records_per_s(bench.services, workload, bench.right(workload), count=count)
    server.process.check_alive()
    return {"rps": rate, "cpu_us": (server.process.cpu_s() - before_s) / count * 1e6}


def grpc(bench: Bench, subject: str, workload: Workload, *, streams: int) -> Figures:
    """Measure unary calls on one connection in a closed loop."""
    server, message = bench.fleet.server(subject, workload), workload.message()
    size = check_grpc(server.grpc_port, message, bench.right(workload))
    return _with_cpu(
        server,
        lambda: load.grpc(
            server.grpc_port, GRPC_METHOD, message, answer_size=size, streams=streams, seconds=bench.seconds
        ),
    )


def _with_cpu(server: Running, run: Callable[[], load.Load]) -> Figures:
    before_s = server.process.cpu_s()
    seen = run()
    cpu_s = server.process.cpu_s() - before_s
    server.process.check_alive()
    return {"rps": seen.rps, "p50_ms": seen.p50_ms, "p95_ms": seen.p95_ms, "p99_ms": seen.p99_ms,
            "cpu_us": cpu_s / seen.requests * 1e6}  # fmt: skip


def in_process(bench: Bench, subject: str, workload: Workload) -> Figures:
    """Measure ONNX Runtime in process: `raw`, or `raw@ROWS` for batches."""
    rows = int(subject.partition("@")[2] or 1)
    seconds = max(0.5, bench.seconds / 2)
    return {"rps": bench.raw.rows_per_s(workload.model, workload.inputs, rows=rows, seconds=seconds)}


def storm(bench: Bench, subject: str, workload: Workload) -> Figures:
    """Measure how long many new connections at once wait for their answers."""
    port = bench.fleet.server(subject, workload).http_port
    seconds = load.storm(port, workload.request("json"), connections=STORM_CONNECTIONS)
    return {"storm_ms": seconds * 1e3}


def refuse(bench: Bench, subject: str, workload: Workload) -> Figures:
    """Measure how fast too large a body is refused, and what another client notices of it."""
    port, request = bench.fleet.server(subject, workload).http_port, workload.request("json")
    before = load.http(port, request, connections=1, seconds=bench.seconds)
    times_s: list[float] = []
    faults: list[Exception] = []
    is_over = threading.Event()

    def keep_refusing() -> None:
        try:
            while not is_over.wait(_REFUSE_EVERY_S):
                times_s.append(load.refused_s(port, request, size_bytes=REFUSED_BYTES))
        except (BenchError, OSError) as error:
            faults.append(error)

    thread = threading.Thread(target=keep_refusing)
    thread.start()
    try:
        during = load.http(port, request, connections=1, seconds=bench.seconds)
    finally:
        is_over.set()
        thread.join()
    if faults or not times_s:
        raise BenchError(f"too large a body was not refused: {faults or 'too slow'}")
    return {
        "refused_ms": max(times_s) * 1e3,
        "before_p50_ms": before.p50_ms,
        "during_p50_ms": during.p50_ms,
        "before_p99_ms": before.p99_ms,
        "during_p99_ms": during.p99_ms,
    }


def cold_start(bench: Bench, subject: str, workload: Workload) -> Figures:
    """Measure the time from exec to ready with a warm page cache, and the memory after some load."""
    server = bench.fleet.start(subject, workload)
    try:
        load.http(server.http_port, workload.request("json"), connections=16, seconds=min(1.0, bench.seconds))
        time.sleep(0.05)
        pss_mb, rss_mb = server.process.memory_mb()
        return {"ready_s": server.ready_s, "pss_mb": pss_mb, "rss_mb": rss_mb}
    finally:
        server.process.stop()


def check(bench: Bench, scenario: Scenario, subject: str, workload: Workload) -> None:
    """Compare one answer of a server with ONNX Runtime's in process, bit for bit."""
    if subject.startswith("raw") or scenario.measure in (cold_start, records):  # the latter checks every result
        return
    server = bench.fleet.server(subject, workload)
    if scenario.form == "grpc":
        check_grpc(server.grpc_port, workload.message(), bench.right(workload))
    else:
        request = bench.fleet.request(subject, workload, scenario.form)
        check_http(server.http_port, request, bench.right(workload))


def measure(bench: Bench, scenario: Scenario, subject: str, workload: Workload) -> Figures:
    """Measure one subject once."""
    return (
        in_process(bench, subject, workload)
        if subject.startswith("raw")
        else scenario.measure(bench, subject, workload)
    )


# Needs Redis, PostgreSQL and Kafka, so it is measured only when it is asked for.
BINDINGS = "bindings"
PEERS = ("mlserver", "kserve")


def _rest(key: str, title: str, workload: str, subjects: tuple[str, ...], form: Form, connections: int) -> Scenario:
    verb = partial(rest, form=form, connections=connections)
    plural = "s" if connections > 1 else ""
    return Scenario(key, workload, f"{title}, {connections} connection{plural}", workload, subjects, form, verb)


def _bound(key: str, title: str, workload: str, subjects: tuple[str, ...], connections: int) -> Scenario:
    verb = partial(bound, form="json", connections=connections)
    return Scenario(key, BINDINGS, title, workload, ("phoenix", *subjects), "json", verb)


# Cold start comes first: nothing else then maps the same files, so that the memory is the server's own.
SCENARIOS = [
    Scenario("cold", "cold", "iris, cold start", "iris", ("phoenix", "naive", *PEERS), "json", cold_start, 5),
    _rest("iris-rest-1", "iris REST JSON", "iris", ("phoenix", "naive", *PEERS), "json", 1),
    _rest("iris-rest-64", "iris REST JSON", "iris", ("phoenix", "naive", *PEERS, "raw"), "json", 64),
    Scenario("storm", "storm", f"iris, {STORM_CONNECTIONS} new connections at once", "iris",
             ("phoenix", "naive", *PEERS), "json", storm),
    Scenario("refuse", "refuse", "iris, another client sends 100 MB", "iris", ("phoenix",), "json", refuse),
    Scenario("iris-grpc-64", "grpc", "iris gRPC, 64 streams", "iris", ("phoenix", "grpcio", *PEERS), "grpc",
             partial(grpc, streams=64)),
    _rest("mlp-rest-64", "mlp REST JSON", "mlp", ("phoenix", "naive", *PEERS, "raw", "raw@32"), "json", 64),
    _rest("resnet-binary-4", "resnet REST binary", "resnet", ("phoenix", *PEERS, "raw"), "binary", 4),
    _rest("resnet-json-4", "resnet REST JSON", "resnet", ("phoenix", "naive", *PEERS, "raw"), "json", 4),
    _bound("bindings-1", "iris and a binding, 1 connection", "iris", ("features", "durable"), 1),
    _bound("bindings-64", "iris and a binding, 64 connections", "iris",
           ("features", "events", "best-effort", "durable"), 64),
    _bound("bindings-32-rows", "iris and a binding, 32 rows, 1 connection", "iris-32", ("features",), 1),
    Scenario("bindings-async", BINDINGS, "iris, requests from Kafka, exactly once", "iris", ("async",), "json",
             records),
]  # fmt: skip
GROUPS = tuple(dict.fromkeys(scenario.group for scenario in SCENARIOS))


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on a figure of `subject`, or on how it compares with that of another subject in the same round.

    `over`: the bound is on the ratio; `beyond`: on the difference.
    """

    scenario: str
    figure: str
    at_least: float | None = None
    at_most: float | None = None
    over: str | None = None
    beyond: str | None = None
    subject: str = "phoenix"

    def is_met(self, value: float) -> bool:
        """Whether `value` keeps the bound."""
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


TARGETS = [
    Target("iris-rest-64", "rps", at_least=20_000),
    Target("iris-rest-64", "rps", at_least=5, over="naive"),
    Target("iris-rest-64", "p99_ms", at_most=5),
    Target("iris-rest-1", "p50_ms", at_most=0.2),
    Target("iris-grpc-64", "rps", at_least=5, over="grpcio"),
    Target("mlp-rest-64", "rps", at_least=5_000),
    Target("mlp-rest-64", "rps", at_least=0.5, over="raw@32"),
    Target("resnet-binary-4", "rps", at_least=0.97, over="raw"),
    Target("resnet-json-4", "rps", at_least=0.85, over="raw"),
    Target("cold", "ready_s", at_most=1.0),
    Target("cold", "pss_mb", at_most=90),
    Target("refuse", "refused_ms", at_most=100),
    Target("bindings-1", "p95_ms", at_most=1, beyond="phoenix", subject="features"),
    Target("bindings-32-rows", "p95_ms", at_most=3, beyond="phoenix", subject="features"),
    Target("bindings-64", "rps", at_least=0.6, over="phoenix", subject="features"),
    Target("bindings-64", "rps", at_least=0.92, over="phoenix", subject="events"),
    Target("bindings-64", "lost", at_most=0, subject="events"),
    Target("bindings-64", "rps", at_least=0.85, over="phoenix", subject="best-effort"),
    Target("bindings-64", "lost", at_most=0, subject="best-effort"),
    Target("bindings-1", "p50_ms", at_most=3, beyond="phoenix", subject="durable"),
    Target("bindings-64", "rps", at_least=0.5, over="best-effort", subject="durable"),
    Target("bindings-async", "rps", at_least=5_000, subject="async"),
]
