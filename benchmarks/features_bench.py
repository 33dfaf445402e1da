"""Measures what online features cost a request: the iris model with its input sent, and with it read from Redis.

    python benchmarks/features_bench.py [--rounds N] [--seconds S] [--quick]

A private Redis runs on the core that makes the load, the server on one of its own. Exits 0 also when a target is
missed; exits 1 when an answer is wrong. Needs Redis (Debian: `redis-server`) and, for figures that mean something,
`wrk`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from load import HttpRequest, http, percentile
from processes import BenchError, Cores, Process, answers, choose_cores, free_port, on_core

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from lab import LabError  # noqa: E402 - the lab lies beside the benchmarks
from lab.services import Redis  # noqa: E402

ENTITIES = 1000
CONNECTIONS = 64
# What must come of it: share of the requests per second, and milliseconds added to the p95 of one connection.
LEAST_SHARE, MOST_ADDED_MS = 0.6, {1: 1.0, 32: 3.0}


@dataclass(frozen=True, slots=True)
class Figures:
    """One measurement: answers a second, CPU time of the server, and the latency of a single connection."""

    rps: float
    cpu_us: float
    p50_ms: float
    p95_ms: float


def manifests(folder: Path) -> None:
    """Write the model twice: `sent`, and `filled` from features."""
    shutil.copy(ROOT / "examples/iris/model.onnx", folder / "model.onnx")
    features = {"keyTemplate": "flower:{entity}", "input": "x", "names": ["a", "b", "c", "d"]}
    for name, more in (("sent", {}), ("filled", {"features": features, "bindings": {"redis": {"backend": "default"}}})):
        spec = {"model": {"uri": "model.onnx"}, **more}
        head = {"apiVersion": "phoenix-ml.io/v1alpha1", "kind": "PhoenixModel", "metadata": {"name": name}}
        (folder / f"{name}.yaml").write_text(json.dumps(head | {"spec": spec}))


def numbers(entity: int) -> list[float]:
    """Return the features of an entity."""
    return [round(4 + (entity * step % 37) / 10, 1) for step in (1, 3, 5, 7)]


def fill(port: int) -> None:
    """Write the hashes of all entities."""
    lines = []
    for entity in range(ENTITIES):
        fields = " ".join(f"{name} {value}" for name, value in zip("abcd", numbers(entity), strict=True))
        lines.append(f"HSET phx:default:filled:flower:e{entity} {fields} _updated {time.time():.0f}\r\n")
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.sendall("".join(lines).encode())
        answer = b""
        while answer.count(b"\r\n") < ENTITIES:
            answer += sock.recv(65_536)
    if b"-" in answer:
        raise BenchError(f"Redis refused to be filled: {answer[:200]!r}")


def request(name: str, rows: int) -> HttpRequest:
    """Return the request for `rows` rows of one of the two models."""
    body: dict[str, object]
    if name == "sent":
        data = [value for entity in range(rows) for value in numbers(entity)]
        body = {"inputs": [{"name": "x", "shape": [rows, 4], "datatype": "FP32", "data": data}]}
    else:
        entities = [f"e{entity}" for entity in range(rows)]
        body = {"parameters": {"entity_id": entities if rows > 1 else entities[0]}, "inputs": []}
    return HttpRequest(f"/v2/models/{name}/infer", json.dumps(body).encode())


def check(port: int, rows: int) -> None:
    """Raise `BenchError` unless both models give the same answer."""
    outputs = []
    for name in ("sent", "filled"):
        asked = request(name, rows)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{asked.path}", asked.body, timeout=30) as reply:
            outputs.append(json.load(reply)["outputs"])
    if outputs[0] != outputs[1]:
        raise BenchError("features give another answer than the same numbers sent")


def latencies_ms(port: int, asked: HttpRequest, seconds: float) -> list[float]:
    """Return the sorted latencies of one connection, asked one request after the other."""
    encoded, times = asked.encoded(), []
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end = time.perf_counter() + seconds
        while (sent := time.perf_counter()) < end:
            sock.sendall(encoded)
            answer = sock.recv(262_144)
            times.append((time.perf_counter() - sent) * 1e3)
            if not answer.startswith(b"HTTP/1.1 200 "):
                raise BenchError(f"a request failed: {answer[:300]!r}")
    return sorted(times)


def measure(server: Process, port: int, name: str, rows: int, seconds: float, cores: Cores) -> Figures:
    """Measure one model."""
    asked = request(name, rows)
    # as many connections as rows fit into the model's queue
    connections = min(CONNECTIONS, 768 // rows)
    with on_core(cores.load):
        alone = latencies_ms(port, asked, seconds / 2)
        before = server.cpu_s()
        loaded = http(port, asked, connections=connections, seconds=seconds)
        cpu_us = (server.cpu_s() - before) / loaded.requests * 1e6
    return Figures(loaded.rps, cpu_us, percentile(alone, 0.5), percentile(alone, 0.95))


@contextmanager
def served(folder: Path, cores: Cores) -> Iterator[tuple[Process, int]]:
    """Start Redis and the server."""
    Redis.install()
    with on_core(cores.load):
        store = Redis(folder / "redis")
        store.start()
    try:
        fill(store.port)
        manifests(folder)
        port = free_port()
        env = {
            "PHOENIX_REDIS_URL": f"redis://127.0.0.1:{store.port}",
            "PHOENIX_HTTP_PORT": str(port),
            "PHOENIX_GRPC_PORT": "0",
            "PHOENIX_HOST": "127.0.0.1",
            "PHOENIX_MEASURE_CAPACITY": "false",
            "PHOENIX_STATE_DIR": str(folder / "state"),
        }
        command = [sys.executable, "-m", "phoenix_server", "serve", str(folder)]
        server = Process(command, core=cores.server, log=folder / "server.log", env=env, cwd=folder)
        try:
            server.wait_until(answers(f"http://127.0.0.1:{port}/v2/health/ready"), deadline_s=60)
            yield server, port
        finally:
            server.stop()
    finally:
        store.stop()


def report(rows: int, sent: Sequence[Figures], filled: Sequence[Figures]) -> None:
    """Print the medians of all rounds; the ratio and the difference are taken within a round."""
    share = median(after.rps / before.rps for before, after in zip(sent, filled, strict=True))
    added = median(after.p95_ms - before.p95_ms for before, after in zip(sent, filled, strict=True))
    for name, figures in (("sent", sent), ("features", filled)):
        print(
            f"{rows:2} rows, {name:8}  {median(f.rps for f in figures):8.0f} requests/s  "
            f"{median(f.cpu_us for f in figures):6.0f} CPU µs/request  "
            f"p50 {median(f.p50_ms for f in figures):.3f} ms  p95 {median(f.p95_ms for f in figures):.3f} ms"
        )
    verdict = "met" if share >= LEAST_SHARE and added <= MOST_ADDED_MS[rows] else "MISSED"
    print(
        f"{rows:2} rows: {share:.2f} of the requests/s (at least {LEAST_SHARE}), p95 {added:+.3f} ms "
        f"(at most {MOST_ADDED_MS[rows]:g}): {verdict}"
    )


def main() -> int:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of load, for each measurement")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that the bench works")
    options = parser.parse_args()
    rounds, seconds = (1, 1.0) if options.quick else (options.rounds, options.seconds)
    cores = choose_cores()
    with tempfile.TemporaryDirectory(prefix="phoenix-features-") as name:
        try:
            with served(Path(name), cores) as (server, port):
                for rows in MOST_ADDED_MS:
                    check(port, rows)
                    found: dict[str, list[Figures]] = {"sent": [], "filled": []}
                    for _ in range(rounds):
                        for model, figures in found.items():
                            figures.append(measure(server, port, model, rows, seconds, cores))
                    report(rows, found["sent"], found["filled"])
        except (BenchError, LabError) as error:
            print(f"the bench failed: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
