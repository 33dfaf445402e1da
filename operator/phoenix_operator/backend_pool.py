"""The backends of the settings, open: one connection each, few calls at once, and none to one that does not answer.

Hides admin Secrets (read by name, kept as long as their resourceVersion stands, never logged), deadlines, and what
keeps a backend that hangs from holding up every worker: after a failure one call at a time finds out whether it is
back, and until then everybody else gets the same answer at once.
"""

import asyncio
import base64
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from phoenix_api import Reason
from phoenix_operator.backends import Backend, BackendError, make_backend
from phoenix_operator.cluster import ApiError, Cluster
from phoenix_operator.kinds import SECRET
from phoenix_operator.metrics import Metrics
from phoenix_operator.observed import Object
from phoenix_operator.settings import BackendSettings, Settings

_log = logging.getLogger(__name__)
T = TypeVar("T")
Maker = Callable[[BackendSettings, Mapping[str, str]], Backend]
_AT_ONCE = 8
_CALLS = 3  # a backend has a deadline for each of its own requests; this many of them end a call from outside
_SECRET_STANDS_S = 5.0
_FIRST_PAUSE_S, _LAST_PAUSE_S = 2.0, 60.0


@dataclass
class _Line:
    """The way to one backend."""

    config: BackendSettings
    backend: Backend | None = None
    version: str = ""  # of its admin Secret
    looked_at: float = float("-inf")
    error: BackendError | None = None
    failures: int = 0
    failed_at: float = float("-inf")
    retry_at: float = 0.0
    is_probing: bool = False
    gate: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)


class BackendPool:
    """Backends by kind and name."""

    def __init__(
        self,
        cluster: Cluster,
        settings: Settings,
        metrics: Metrics,
        *,
        namespace: str,
        make: Maker = make_backend,
    ) -> None:
        self._cluster, self._metrics, self._namespace, self._make = cluster, metrics, namespace, make
        self._lines = {(str(config.kind), config.name): _Line(config) for config in settings.backends}

    async def close(self) -> None:
        """Close every backend."""
        for line in self._lines.values():
            if line.backend is not None:
                await _quietly(line.backend.close())

    def config(self, kind: str, name: str) -> BackendSettings | None:
        """Return the settings of a backend; None if there is none of this kind and name."""
        line = self._lines.get((kind, name))
        return line.config if line else None

    async def get(self, kind: str, name: str) -> Backend:
        """Return a backend, made from its present admin Secret. Raises `BackendError`."""
        line = self._line(kind, name)
        async with line.opening:
            if line.backend is None or time.monotonic() - line.looked_at > _SECRET_STANDS_S:
                await self._open(line)
            assert line.backend is not None
            return line.backend

    async def call(self, kind: str, name: str, work: Callable[[Backend], Awaitable[T]]) -> T:
        """Do work on a backend before a deadline. Raises `BackendError`, whose message has no secret."""
        line = self._line(kind, name)
        _check(line)
        backend = await self.get(kind, name)
        async with line.gate:
            _check(line)
            line.is_probing = line.error is not None
            started, result = time.monotonic(), "error"
            try:
                answer = await self._work(line, backend, work)
                result = "ok"
                line.error, line.failures = None, 0
                return answer
            except BackendError as error:
                # those that were under way together fail together: that is one failure
                if error.reason is Reason.BACKEND_UNREACHABLE and started >= line.failed_at:
                    _pause(line, error)
                raise
            finally:
                line.is_probing = False
                self._metrics.backend_seconds.labels(kind, result).observe(time.monotonic() - started)

    async def _work(self, line: _Line, backend: Backend, work: Callable[[Backend], Awaitable[T]]) -> T:
        name = line.config.name
        deadline_s = line.config.timeout_seconds * _CALLS
        try:
            async with asyncio.timeout(deadline_s):
                return await work(backend)
        except TimeoutError as error:
            words = f"backend {name} ({line.config.kind}) did not answer within {deadline_s:g} s"
            raise BackendError(Reason.BACKEND_UNREACHABLE, f"{words}; see whether it runs") from error
        except BackendError:
            raise
        except Exception as error:
            # what a client library says may hold an address with a password
            _log.error("a backend failed", extra={"backend": name, "cause": type(error).__name__})
            words = f"backend {name} ({line.config.kind}) failed with {type(error).__name__}"
            raise BackendError(Reason.BACKEND_UNREACHABLE, f"{words}; see the operator's log") from None

    def _line(self, kind: str, name: str) -> _Line:
        line = self._lines.get((kind, name))
        if line is None:
            words = f"the operator's settings name no backend {name} of kind {kind}"
            raise BackendError(Reason.BACKEND_UNREACHABLE, f"{words}; add it again")
        return line

    async def _open(self, line: _Line) -> None:
        config = line.config
        secret = await self._admin_secret(config)
        version = f"{secret['metadata'].get('uid')}/{secret['metadata'].get('resourceVersion')}"
        if line.backend is None or version != line.version:
            made = self._make(config, _text_of(secret, config))
            before, line.backend, line.version = line.backend, made, version
            line.error, line.failures = None, 0  # what did not answer before may be another one now
            if before is not None:
                await _quietly(before.close())
        line.looked_at = time.monotonic()

    async def _admin_secret(self, config: BackendSettings) -> Object:
        name = config.admin_secret_ref.name
        which = f"Secret {self._namespace}/{name} of backend {config.name}"
        try:
            secret = await self._cluster.get(SECRET, self._namespace, name)
        except ApiError as error:
            if error.code == 403:
                words = f"{which} may not be read; install with `phoenix-operator manifests FOLDER --bindings {name}`"
                raise BackendError(Reason.ACCESS_DENIED, words) from None
            raise
        if secret is None:
            raise BackendError(Reason.SECRET_MISSING, f"{which} does not exist; the operator's settings name it")
        return secret


def _text_of(secret: Object, config: BackendSettings) -> dict[str, str]:
    found = {}
    for key, encoded in (secret.get("data") or {}).items():
        try:
            found[key] = base64.b64decode(encoded).decode()
        except ValueError:
            words = f"backend {config.name}: key {key} of its admin Secret is no text"
            raise BackendError(Reason.SECRET_MISSING, words) from None
    return found


def _check(line: _Line) -> None:
    """Raise what the backend last failed with, unless it is time to find out whether it is back."""
    if line.error is not None and (line.is_probing or time.monotonic() < line.retry_at):
        raise BackendError(line.error.reason, line.error.message)


def _pause(line: _Line, error: BackendError) -> None:
    line.failures += 1
    pause_s = min(_FIRST_PAUSE_S * 2 ** min(line.failures - 1, 10), _LAST_PAUSE_S)
    line.error, line.failed_at = error, time.monotonic()
    line.retry_at = line.failed_at + pause_s * random.uniform(0.8, 1.2)


async def _quietly(closing: Awaitable[None]) -> None:
    try:
        async with asyncio.timeout(5):
            await closing
    except Exception as error:
        _log.warning("a backend did not close", extra={"cause": type(error).__name__})
