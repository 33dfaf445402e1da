"""What the operator is measured on: a Kubernetes API server of its own, a client for it, and the operator's process.

The API server is the real one (`tools/lab`, etcd and kube-apiserver, no node, no controllers), new for each subject.
Everything is seen from outside: the audit log tells who asked for what and when, `/proc` what a process cost, the
operator's own `/metrics` only when it is done.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import aiohttp
import yaml
from processes import BenchError, answers

ROOT = Path(__file__).parent.parent
OPERATOR_NAMESPACE = "phoenix-system"
ACCOUNT = "phoenix-operator"
USER = f"system:serviceaccount:{OPERATOR_NAMESPACE}:{ACCOUNT}"
LOOP_AGENT = "operator-bench-loop"
_APPLY = "application/apply-patch+yaml"
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_READY_S, _STOP_S = 60.0, 20.0

Object = dict[str, Any]


# --- processes -------------------------------------------------------------------------------------------------------


def cpu_s(pid: int) -> float:
    """Return user and system time of a process so far, in seconds (resolution 10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def memory_mb(pid: int) -> dict[str, float]:
    """Return proportional, resident and highest resident set size in MB."""
    rows = f"{Path(f'/proc/{pid}/smaps_rollup').read_text()}{Path(f'/proc/{pid}/status').read_text()}"
    found = {name: int(kb) * 1024 / 1e6 for name, kb in re.findall(r"^(Pss|Rss|VmHWM):\s+(\d+) kB", rows, re.MULTILINE)}
    return {"pss_mb": found["Pss"], "rss_mb": found["Rss"], "peak_rss_mb": found["VmHWM"]}


def machine_busy_s() -> float:
    """Return the time for which the machine's cores have been busy so far, with whatever."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_SECOND


# --- the API server --------------------------------------------------------------------------------------------------


class Lab:
    """A lab of this bench's own name: started, asked and stopped by `tools/lab`'s command line."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.kubeconfig = ""
        self.pids: dict[str, int] = {}

    def renew(self) -> None:
        """Start with nothing stored, and wait until the API server has nothing more to do of its own."""
        try:
            self.kubeconfig = self._start()
        except BenchError:
            self.kubeconfig = self._start()  # another lab that starts at this moment may have taken a port
        self.pids = {part: int(pid) for part, pid in re.findall(r"(\S+)\s+runs as (\d+)", self._run("status"))}
        self._kubectl("apply", "--server-side", "-k", str(ROOT / "operator/manifests/cluster"))
        self._kubectl("wait", "--for=condition=Established", "crd/phoenixmodels.phoenix-ml.io", "--timeout=60s")
        self._wait_until_idle()

    def remove(self) -> None:
        """Stop it and remove everything it stored."""
        self._run("down", "--purge")

    @property
    def audit_log(self) -> Path:
        """The API server's audit log."""
        return Path(self._run("audit-log"))

    def cpu_s(self) -> dict[str, float]:
        """Return what API server and etcd have cost so far."""
        return {part: cpu_s(self.pids[part]) for part in ("apiserver", "etcd")}

    def _start(self) -> str:
        self.remove()
        return self._run("up", "--control-plane").splitlines()[-1]

    def _wait_until_idle(self) -> None:
        """A new API server publishes its schemas for some seconds, which would be paid by whoever is measured first."""
        for _ in range(30):
            before = self.cpu_s()["apiserver"]
            time.sleep(1)
            if self.cpu_s()["apiserver"] - before < 0.1:
                return

    def _kubectl(self, *arguments: str) -> None:
        command = [
            shutil.which("kubectl") or self._run("binary", "kubectl"),
            f"--kubeconfig={self.kubeconfig}",
            *arguments,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(f"kubectl {' '.join(arguments)} failed: {done.stderr.strip()}")

    def _run(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "lab", *arguments, "--name", self._name]
        # a cluster that the environment names is somebody's: this one is always its own
        env = {name: value for name, value in os.environ.items() if name != "PHOENIX_TEST_KUBECONFIG"}
        done = subprocess.run(command, env=env | {"PYTHONPATH": str(ROOT / "tools")}, capture_output=True, text=True)
        if done.returncode:
            raise BenchError(f"lab {' '.join(arguments)} failed: {done.stderr.strip()}")
        return done.stdout.strip()


class Api:
    """An HTTP client for the API server that does nothing but send and check: prepared bytes in, bytes out."""

    def __init__(self, kubeconfig: str, *, agent: str, connections: int = 64, token: str | None = None) -> None:
        config = yaml.safe_load(Path(kubeconfig).read_text())
        self.server = config["clusters"][0]["cluster"]["server"]
        self.authority = config["clusters"][0]["cluster"]["certificate-authority-data"]
        context = ssl.create_default_context(cadata=base64.b64decode(self.authority).decode())
        headers = {"User-Agent": agent}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        else:
            _load_certificate(context, config["users"][0]["user"])
        self._session = aiohttp.ClientSession(
            self.server,
            connector=aiohttp.TCPConnector(limit=connections, ssl=context),
            headers=headers,
            read_bufsize=2**21,
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def send(
        self, method: str, path: str, body: bytes | None = None, *, content_type: str = "application/json"
    ) -> bytes:
        """Send a request and return the answer's body. Raises `BenchError` for anything but success."""
        headers = {"Content-Type": content_type}
        async with self._session.request(method, path, data=body, headers=headers) as response:
            answer = await response.read()
            if response.status >= 300:
                raise BenchError(f"{method} {path}: HTTP {response.status}: {answer[:500].decode(errors='replace')}")
            return answer

    async def apply(self, path: str, body: bytes) -> None:
        """Server-side apply, as the operator does it."""
        query = "?fieldManager=phoenix-operator&fieldValidation=Strict"
        await self.send("PATCH", path + query, body, content_type=_APPLY)

    async def get(self, path: str) -> Object:
        """Return an answer as JSON."""
        answer: Object = json.loads(await self.send("GET", path))
        return answer

    async def watch(self, path: str, since: str) -> AsyncGenerator[Object, None]:
        """Yield the events of a watch; `path` has a query already."""
        async with self._session.get(f"{path}&watch=true&resourceVersion={since}") as response:
            async for line in response.content:
                yield json.loads(line)


def _load_certificate(context: ssl.SSLContext, user: Object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        certificate, key = Path(folder) / "certificate", Path(folder) / "key"
        key.touch(mode=0o600)
        certificate.write_bytes(base64.b64decode(user["client-certificate-data"]))
        key.write_bytes(base64.b64decode(user["client-key-data"]))
        context.load_cert_chain(certificate, key)


async def operator_token(api: Api) -> str:
    """Return a token of the operator's ServiceAccount: it and the loop act with the rights of the install manifests."""
    path = f"/api/v1/namespaces/{OPERATOR_NAMESPACE}/serviceaccounts/{ACCOUNT}/token"
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 86_400}}
    answer = json.loads(await api.send("POST", path, json.dumps(body).encode()))
    return str(answer["status"]["token"])


async def at_once(work: Sequence[Any], concurrency: int) -> None:
    """Await prepared calls (functions without arguments), so many at a time; the first failure ends it."""
    waiting = iter(work)

    async def worker() -> None:
        for call in waiting:
            await call()

    await asyncio.gather(*(worker() for _ in range(concurrency)))


# --- the audit log ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """A request that the API server has answered, or for a watch: has begun to answer."""

    user: str
    agent: str
    verb: str
    resource: str
    subresource: str
    code: int
    received: float
    answered: float
    is_continued: bool

    @property
    def is_write(self) -> bool:
        """Whether it asks for a change."""
        return self.verb in ("create", "update", "patch", "delete", "deletecollection")


class AuditLog:
    """The audit log from one moment on."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._offset = file.stat().st_size

    def read(self) -> list[Request]:
        """Return the requests since the last call; a watch once, when it begins."""
        with self._file.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._offset:
                raise BenchError("the audit log was rotated in the middle of a measurement")
            file.seek(self._offset)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [request for line in whole.splitlines() if (request := _request(json.loads(line))) is not None]


def _request(row: Object) -> Request | None:
    is_watch = row["verb"] == "watch"
    if row["stage"] != ("ResponseStarted" if is_watch else "ResponseComplete"):
        return None
    target, query = row.get("objectRef", {}), parse_qs(urlsplit(row["requestURI"]).query)
    return Request(
        user=row["user"]["username"],
        agent=row.get("userAgent", ""),
        verb=row["verb"],
        resource=target.get("resource", ""),
        subresource=target.get("subresource", ""),
        code=row.get("responseStatus", {}).get("code", 0),
        received=datetime.fromisoformat(row["requestReceivedTimestamp"]).timestamp(),
        answered=datetime.fromisoformat(row["stageTimestamp"]).timestamp(),
        is_continued="continue" in query,
    )


def of_operator(requests: Sequence[Request]) -> list[Request]:
    """Return what the operator asked for, its lease aside."""
    return [
        request
        for request in requests
        if request.user == USER and request.agent != LOOP_AGENT and request.resource != "leases"
    ]


def by_verb(requests: Sequence[Request]) -> dict[str, int]:
    """Count requests by the operator's names for them."""
    return dict(sorted(Counter(map(_verb, requests)).items()))


def _verb(request: Request) -> str:
    if request.verb != "patch":
        return request.verb
    return "apply status" if request.subresource == "status" else "apply"


def writes(requests: Sequence[Request]) -> dict[str, int]:
    """Count writes by what they write."""
    found = {"children": 0, "status": 0, "events": 0}
    for request in requests:
        if request.is_write:
            kind = "status" if request.subresource == "status" else request.resource
            found[kind if kind in found else "children"] += 1
    return found


# --- the operator ----------------------------------------------------------------------------------------------------


class Operator:
    """A running operator."""

    def __init__(self, *, kubeconfig: Path, settings: Path, port: int, log: Path) -> None:
        command = [
            str(Path(sys.executable).with_name("phoenix-operator")),
            "run",
            "--settings",
            str(settings),
        ]
        self._log, self._port = log, port
        # as in a pod of the install manifests: its own namespace, and a name that tells it from others
        surroundings = {"PATH": os.environ["PATH"], "KUBECONFIG": str(kubeconfig), "POD_NAMESPACE": OPERATOR_NAMESPACE}
        with log.open("ab") as output:
            self.started_s = time.perf_counter()
            self._popen = subprocess.Popen(
                command, env=surroundings, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._popen.pid

    async def wait_until_ready(self) -> None:
        """Wait for `/readyz`, which is good once the watches are up."""
        is_ready = answers(f"http://127.0.0.1:{self._port}/readyz")
        while not await asyncio.to_thread(is_ready):
            self.check_alive()
            if time.perf_counter() - self.started_s > _READY_S:
                raise BenchError(f"the operator is not ready after {_READY_S:g} s:\n{self._last_words()}")
            await asyncio.sleep(0.05)

    async def metrics(self) -> Counter[str]:
        """Return the sums of the operator's metrics by name."""
        self.check_alive()
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self._port}/metrics") as response,
        ):
            text = await response.text()
        found: Counter[str] = Counter()
        for name, value in re.findall(r"^([a-z_]+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
            found[name] += float(value)  # type: ignore[assignment]
        return found

    async def reconciles(self) -> int:
        """Return how many reconciles it has done."""
        return int((await self.metrics())["phoenix_operator_reconcile_seconds_count"])

    async def wait_for_reconciles(self, least: int, *, deadline_s: float) -> int:
        """Wait until it has done so many reconciles; return how many it has done."""
        deadline = time.monotonic() + deadline_s
        while True:
            count = await self.reconciles()
            if count >= least:
                return count
            if time.monotonic() > deadline:
                raise BenchError(f"{count} of {least} reconciles after {deadline_s:g} s:\n{self._last_words()}")
            await asyncio.sleep(0.2)

    async def wait_until_quiet(self) -> int:
        """Wait until there was no reconcile for two seconds; return how many there were."""
        before = -1
        while (count := await self.reconciles()) != before:
            before = count
            await asyncio.sleep(2)
        return count

    def check_alive(self) -> None:
        """Raise `BenchError` if it has ended."""
        if self._popen.poll() is not None:
            raise BenchError(f"the operator ended with code {self._popen.returncode}:\n{self._last_words()}")

    def stop(self) -> None:
        """End it: SIGTERM, and SIGKILL if that is not enough."""
        for signum in (signal.SIGTERM, signal.SIGKILL):
            if self._popen.poll() is not None:
                return
            self._popen.send_signal(signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(_STOP_S)

    def _last_words(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])


@contextlib.contextmanager
def running(operator: Operator) -> Iterator[Operator]:
    """Stop the operator at the end of the block."""
    try:
        yield operator
    finally:
        operator.stop()


def write_kubeconfig(file: Path, api: Api, token: str) -> None:
    """Write how the operator reaches the API server."""
    cluster = {"server": api.server, "certificate-authority-data": api.authority}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "lab", "cluster": cluster}],
        "users": [{"name": "operator", "user": {"token": token}}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "operator"}}],
        "current-context": "lab",
    }
    file.touch(mode=0o600)
    file.write_text(json.dumps(config))
