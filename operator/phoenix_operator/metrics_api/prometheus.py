"""Prometheus, as far as the metrics API asks it: instant queries with a deadline, by the HTTP API.

Hides addresses, TLS, the token and every way in which an answer can be wrong. A failure is a `PrometheusError` whose
message has no secret; it is never an empty answer, because that means that there is no such series.
"""

import asyncio
import json
import math
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from phoenix_operator.settings import Prometheus

_LARGEST_BYTES = 8 * 1024 * 1024
_AT_ONCE = 16
# Told of each query: how it ended, and after how many seconds.
Observer = Callable[[str, float], None]
RESULTS = ("ok", "unreachable", "timeout", "refused", "malformed", "credentials")


class PrometheusError(Exception):
    """A query without an answer. `result` is one of `RESULTS`."""

    def __init__(self, result: str, message: str) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True, slots=True)
class Sample:
    """One element of an instant vector: its labels, when it was evaluated (Unix time) and what it is."""

    labels: Mapping[str, str]
    at: float
    value: float


class PrometheusClient:
    """A connection to the Prometheus of the settings, whose address is given."""

    def __init__(self, settings: Prometheus, *, observer: Observer = lambda result, seconds: None) -> None:
        if settings.url is None:
            raise ValueError("expected settings with an address")
        self._settings, self._url, self._observer = settings, settings.url, observer
        parts = urlsplit(settings.url)
        self._name = f"Prometheus at {parts.scheme}://{parts.netloc}"
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self._session: aiohttp.ClientSession | None = None
        self._trust: tuple[int, ssl.SSLContext] | None = None

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def query(self, expression: str) -> list[Sample]:
        """Return the instant vector of an expression, now. Raises `PrometheusError`."""
        started, result = time.monotonic(), "unreachable"
        try:
            async with asyncio.timeout(self._settings.timeout_seconds), self._gate:
                samples = parse(*await self._ask(expression), name=self._name)
            result = "ok"
            return samples
        except TimeoutError:
            result = "timeout"
            words = f"{self._name} did not answer within {self._settings.timeout_seconds:g} s"
            raise PrometheusError(result, words) from None
        except PrometheusError as error:
            result = error.result
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # what aiohttp says may repeat headers of a broken answer
            raise PrometheusError(result, f"{self._name} cannot be asked: {_cause(error)}") from None
        finally:
            self._observer(result, time.monotonic() - started)

    async def _ask(self, expression: str) -> tuple[int, bytes]:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                trust_env=False, cookie_jar=aiohttp.DummyCookieJar(), timeout=aiohttp.ClientTimeout(total=None)
            )
        # a redirect could lead the token elsewhere
        asking = self._session.get(
            f"{self._url}/api/v1/query",
            params={"query": expression},
            headers=self._headers(),
            ssl=self._context(),
            allow_redirects=False,
        )
        async with asking as response:
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > _LARGEST_BYTES:
                    raise PrometheusError("malformed", f"{self._name} answered with more than {_LARGEST_BYTES} bytes")
            return response.status, bytes(body)

    def _headers(self) -> dict[str, str]:
        headers = {"Accept": "application/json", "User-Agent": "phoenix-operator"}
        if (file := self._settings.bearer_token_file) is None:
            return headers
        try:
            token = Path(file).read_text(encoding="ascii").strip()
        except OSError as error:
            words = f"the token file {file} cannot be read: {error.strerror or type(error).__name__}"
            raise PrometheusError("credentials", words) from None
        except ValueError:
            token = ""
        if not token or not token.isprintable():
            raise PrometheusError("credentials", f"the token file {file} holds no token: expected one line of ASCII")
        return headers | {"Authorization": f"Bearer {token}"}

    def _context(self) -> ssl.SSLContext | bool:
        """Return whom to trust; the file is read again when it changes."""
        if (file := self._settings.ca_file) is None:
            return True
        try:
            changed_at = Path(file).stat().st_mtime_ns
            if self._trust is None or self._trust[0] != changed_at:
                self._trust = changed_at, ssl.create_default_context(cafile=file)
        except ssl.SSLError:
            raise PrometheusError("credentials", f"the CA file {file} holds no certificates in PEM") from None
        except OSError as error:
            words = f"the CA file {file} cannot be read: {error.strerror or type(error).__name__}"
            raise PrometheusError("credentials", words) from None
        return self._trust[1]


def parse(status: int, body: bytes, *, name: str) -> list[Sample]:
    """Return the vector in an answer of the query API. Raises `PrometheusError`."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    if status != 200:
        said = answer.get("errorType") if isinstance(answer, dict) else None
        what = f"HTTP {status}" + (f" ({said:.40})" if isinstance(said, str) else "")
        raise PrometheusError("refused", f"{name} answered with {what}")
    try:
        return _vector(answer)
    except (TypeError, ValueError, KeyError, OverflowError):
        raise PrometheusError("malformed", f"{name} answered with something that is no instant vector") from None


def _vector(answer: Any) -> list[Sample]:
    data = answer["data"]
    if answer["status"] != "success" or data["resultType"] != "vector":
        raise ValueError
    return [_sample(row) for row in data["result"]]


def _sample(row: Any) -> Sample:
    labels, (at, value) = row["metric"], row["value"]
    is_sane = isinstance(labels, dict) and all(isinstance(text, str) for text in labels.values())
    if not is_sane or isinstance(at, bool) or not isinstance(at, int | float) or not isinstance(value, str):
        raise ValueError
    if not math.isfinite(at):
        raise ValueError
    return Sample(labels, float(at), float(value))


def _cause(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "its certificate is not trusted; see caFile"
    if isinstance(error, aiohttp.ClientConnectorError):
        return error.os_error.strerror or type(error.os_error).__name__
    return type(error).__name__
