"""Load generators: closed loops over keep-alive connections, always from the load core.

`wrk` and `h2load` where they are installed, because a generator in Python would be the bottleneck on one core; own ones
where they are not, and for what those tools cannot do (a storm of new connections, bodies that are refused).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from processes import BenchError

_TIMEOUT_S = 60.0
_SHARES = (0.50, 0.95, 0.99)
_LUA = Path(__file__).with_name("post.lua")


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A POST: its path, extra headers and body."""

    path: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)

    def encoded(self, *, content_length: int | None = None, is_last: bool = False) -> bytes:
        """Return the request as it goes over the wire, without the body if `content_length` claims one of that size."""
        size = len(self.body) if content_length is None else content_length
        lines = [f"POST {self.path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {size}"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        lines += ["Connection: close"] if is_last else []
        head = "\r\n".join([*lines, "", ""]).encode()
        return head + self.body if content_length is None else head


@dataclass(frozen=True, slots=True)
class Load:
    """What a load generator saw; every answer was a good one."""

    requests: int
    seconds: float
    p50_ms: float
    p95_ms: float
    p99_ms: float

    @property
    def rps(self) -> float:
        """Answers a second."""
        return self.requests / self.seconds


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` of the sorted `values` do not exceed."""
    return values[max(0, math.ceil(share * len(values)) - 1)]


def generators() -> dict[str, str]:
    """Return which generator makes which load here."""
    return {
        "http": "wrk" if shutil.which("wrk") else "asyncio, which is slower than the server; install wrk",
        "grpc": "h2load" if shutil.which("h2load") else "grpc.aio, which is slower than the server; install h2load",
    }


def http(port: int, request: HttpRequest, *, connections: int, seconds: float) -> Load:
    """Keep `connections` busy for `seconds`; raise `BenchError` if an answer is not 200."""
    if shutil.which("wrk"):
        return _wrk(port, request, connections, seconds)
    return asyncio.run(_own_http(port, request, connections, seconds))


def _wrk(port: int, request: HttpRequest, connections: int, seconds: float) -> Load:
    with tempfile.NamedTemporaryFile() as body:
        body.write(request.body)
        body.flush()
        headers = [f"{name}: {value}" for name, value in request.headers]
        output = _run(
            ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", f"{_TIMEOUT_S:.0f}s",
             "-s", str(_LUA), f"http://127.0.0.1:{port}{request.path}", "--", body.name, *headers],
            seconds,
        )  # fmt: skip
    return parse_wrk(output)


def parse_wrk(output: str) -> Load:
    """Read the line that `post.lua` writes; raise `BenchError` if a request failed."""
    found = re.search(r"^RESULT (.*)$", output, re.MULTILINE)
    if found is None:
        raise BenchError(f"wrk gave no result:\n{output}")
    result = json.loads(found[1])
    if result["failed"] or not result["requests"]:
        raise BenchError(f"{result['failed']} requests failed, {result['requests']} were answered:\n{output}")
    p50_ms, p95_ms, p99_ms = (result[f"p{share}_us"] / 1e3 for share in (50, 95, 99))
    return Load(result["requests"], result["us"] / 1e6, p50_ms, p95_ms, p99_ms)


def grpc(port: int, method: str, message: bytes, *, answer_size: int, streams: int, seconds: float) -> Load:
    """Keep `streams` calls of one connection open for `seconds`; `answer_size` is the size of a good answer's message.

    h2load does not look at `grpc-status`; but a failed call carries no message, so the bytes that came tell.
    """
    if not shutil.which("h2load"):
        return asyncio.run(_grpc_aio(port, method, message, streams, seconds))
    with tempfile.TemporaryDirectory() as folder:
        frame, log = Path(folder, "frame"), Path(folder, "log")
        frame.write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
        output = _run(
            ["h2load", "-t1", "-c1", f"-m{streams}", "-D", f"{max(1, round(seconds))}", "-d", str(frame),
             "-H", "content-type: application/grpc", "-H", "te: trailers", "--log-file", str(log),
             f"http://127.0.0.1:{port}{method}"],
            seconds,
        )  # fmt: skip
        return parse_h2load(output, log.read_text(), answer_size=answer_size)


def parse_h2load(output: str, log: str, *, answer_size: int) -> Load:
    """Read h2load's summary and its log of single requests; raise `BenchError` unless all calls were good."""
    finished = re.search(r"finished in ([\d.]+)(m?s)", output)
    counts = re.search(r"requests: (\d+) total, \d+ started, (\d+) done, (\d+) succeeded, (\d+) failed", output)
    statuses = re.search(r"status codes: (\d+) 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx", output)
    data = re.search(r"\((\d+)\) data", output)
    if not (finished and counts and statuses and data):
        raise BenchError(f"h2load gave no result:\n{output}")
    done, succeeded, failed = int(counts[2]), int(counts[3]), int(counts[4])
    bad = sum(int(status) for status in statuses.groups()[1:])
    if failed or bad or not done or succeeded != done:
        raise BenchError(f"calls failed:\n{output}")
    if int(data[1]) < done * (answer_size + 5):
        raise BenchError(f"{done} answers of {answer_size + 5} bytes expected, {data[1]} bytes came:\n{output}")
    times_ms = sorted(int(line.split()[2]) / 1e3 for line in log.splitlines() if line)
    seconds = float(finished[1]) / (1e3 if finished[2] == "ms" else 1)
    return Load(done, seconds, *(percentile(times_ms, share) for share in _SHARES))


def _run(command: list[str], seconds: float) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 2 * _TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{command[0]} did not end in time") from error
    if done.returncode:
        raise BenchError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


# --- own generators --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Tally:
    until: float
    times_ms: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class _Connection(asyncio.Protocol):
    """One keep-alive connection that sends the next request when the last one is answered."""

    def __init__(self, request: bytes, tally: _Tally) -> None:
        self._request = request
        self._tally = tally
        self._buffer = b""
        self._sent_s = 0.0
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, separator, body = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
        if not head.startswith(b"HTTP/1.1 200 ") or length is None:
            self._tally.failures.append(head[:200].decode("latin-1"))
            self._transport.close()
        elif len(body) >= int(length[1]):
            self._buffer = b""
            now = time.perf_counter()
            self._tally.times_ms.append((now - self._sent_s) * 1e3)
            if now < self._tally.until:
                self._send()
            else:
                self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._tally.failures.append(repr(exc))
        if not self.closed.done():
            self.closed.set_result(None)

    def _send(self) -> None:
        self._sent_s = time.perf_counter()
        self._transport.write(self._request)


async def _own_http(port: int, request: HttpRequest, connections: int, seconds: float) -> Load:
    loop, encoded = asyncio.get_running_loop(), request.encoded()
    started = time.perf_counter()
    tally = _Tally(started + seconds)
    async with asyncio.timeout(seconds + _TIMEOUT_S):
        opened = [
            await loop.create_connection(lambda: _Connection(encoded, tally), "127.0.0.1", port)
            for _ in range(connections)
        ]
        await asyncio.gather(*(connection.closed for _, connection in opened))
    return _load(tally, time.perf_counter() - started)


async def _grpc_aio(port: int, method: str, message: bytes, streams: int, seconds: float) -> Load:
    from grpc import aio

    started = time.perf_counter()
    tally = _Tally(started + seconds)
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(method)

        async def caller() -> None:
            while (sent := time.perf_counter()) < tally.until:
                await call(message, timeout=_TIMEOUT_S)
                tally.times_ms.append((time.perf_counter() - sent) * 1e3)

        await asyncio.gather(*(caller() for _ in range(streams)))
    return _load(tally, time.perf_counter() - started)


def _load(tally: _Tally, seconds: float) -> Load:
    if tally.failures or not tally.times_ms:
        raise BenchError(f"{len(tally.failures)} requests failed, the first: {(tally.failures or ['no answer'])[0]}")
    times_ms = sorted(tally.times_ms)
    return Load(len(times_ms), seconds, *(percentile(times_ms, share) for share in _SHARES))


def storm(port: int, request: HttpRequest, *, connections: int) -> float:
    """Open that many connections at once with a request on each; return the seconds until all are answered."""
    encoded = request.encoded(is_last=True)
    with contextlib.ExitStack() as stack:
        started = time.perf_counter()
        sockets = []
        for _ in range(connections):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT_S))
            sock.sendall(encoded)
            sockets.append(sock)
        # In any order: what counts is the last answer.
        heads = [sock.recv(65536) for sock in sockets]
        seconds = time.perf_counter() - started
    wrong = [head for head in heads if not head.startswith(b"HTTP/1.1 200 ")]
    if wrong:
        raise BenchError(f"{len(wrong)} of {connections} new connections got no good answer: {wrong[0][:200]!r}")
    return seconds


def refused_s(port: int, request: HttpRequest, *, size_bytes: int) -> float:
    """Announce and send a body that is too large; return the seconds until 413 came."""
    chunk = memoryview(bytes(1 << 20))
    left = size_bytes
    with socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT_S) as sock:
        started = time.perf_counter()
        sock.sendall(request.encoded(content_length=size_bytes))
        sock.setblocking(False)
        while time.perf_counter() - started < _TIMEOUT_S:
            readable, writable, _ = select.select([sock], [sock] if left else [], [], _TIMEOUT_S)
            if readable:
                status = sock.recv(65536)[:13]
                if status != b"HTTP/1.1 413 ":
                    raise BenchError(f"a body of {size_bytes} bytes was answered with {status!r}, not with 413")
                return time.perf_counter() - started
            if writable:
                # A server that refused may have reset the connection; its answer can still be read.
                with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                    left -= sock.send(chunk[: min(left, len(chunk))])
    raise BenchError(f"a body of {size_bytes} bytes was not refused within {_TIMEOUT_S:g} s")
