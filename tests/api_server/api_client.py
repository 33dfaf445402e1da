"""The API server as these tests speak to it: many requests at once, each answer with its code, none retried."""

import asyncio
import base64
import io
import json
import ssl
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import yaml

Object = dict[str, Any]
T = TypeVar("T")
_JSON = "application/json"
MODELS = "/apis/phoenix-ml.io/v1alpha1"
APPLY, MERGE = "application/apply-patch+yaml", "application/merge-patch+json"


@dataclass(frozen=True)
class Answer:
    """What came back."""

    code: int
    body: Object

    @property
    def is_success(self) -> bool:
        return 200 <= self.code < 300

    @property
    def message(self) -> str:
        return str(self.body.get("message", ""))

    @property
    def causes(self) -> list[tuple[str, str]]:
        """Field and message of each fault of an invalid object."""
        rows = (self.body.get("details") or {}).get("causes") or []
        return [(row.get("field", ""), row.get("message", "")) for row in rows]


class Api:
    """An open connection."""

    def __init__(self, session: aiohttp.ClientSession, host: str) -> None:
        self._session, self._host = session, host

    async def __call__(
        self, method: str, path: str, body: Object | str | None = None, *, kind: str = _JSON, accept: str = _JSON,
        **query: str,
    ) -> Answer:  # fmt: skip
        """Ask once. `kind` is the type of the body (text is sent as it is), `query` the end of the address."""
        text = json.dumps(body) if isinstance(body, dict) else body
        data = None if text is None else io.BytesIO(text.encode())  # aiohttp warns of a megabyte of bytes
        headers = {"Content-Type": kind, "Accept": accept}
        async with self._session.request(
            method, self._host + path, data=data, params=query, headers=headers
        ) as response:
            said = await response.read()
            is_json = response.content_type == _JSON
            return Answer(response.status, json.loads(said) if is_json else {"message": said.decode()})

    async def items(self, path: str) -> list[Object]:
        """Return all objects of a collection."""
        answer = await self("GET", path)
        assert answer.is_success, answer.message
        return list(answer.body["items"])

    async def must(self, method: str, path: str, body: Object | str | None = None, **more: str) -> Object:
        """Ask for what has to succeed."""
        answer = await self(method, path, body, **more)
        assert answer.is_success, f"{method} {path}: {answer.code} {answer.message}"
        return answer.body

    async def make_namespace(self, name: str) -> None:
        answer = await self("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        assert answer.is_success or answer.code == 409, answer.message


@dataclass(frozen=True)
class ApiServer:
    """Where it is."""

    kubeconfig: Path
    audit_log: Path

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Api]:
        config = yaml.safe_load(self.kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        trust = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
        with tempfile.NamedTemporaryFile() as pair:  # the ssl module reads certificates from files only
            pair.write(base64.b64decode(user["client-certificate-data"]))
            pair.write(base64.b64decode(user["client-key-data"]))
            pair.flush()
            trust.load_cert_chain(pair.name)
        connector = aiohttp.TCPConnector(ssl=trust, limit=32)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
            yield Api(session, cluster["server"])

    def run(self, work: Callable[[Api], Awaitable[T]]) -> T:
        """Do the work with a connection."""

        async def main() -> T:
            async with self.connected() as api:
                return await work(api)

        return asyncio.run(main())

    def ask(self, method: str, path: str, body: Object | None = None, **query: str) -> Answer:
        """Ask one thing."""
        return self.run(lambda api: api(method, path, body, **query))


async def in_turn(work: Iterable[Awaitable[T]], at_once: int = 32) -> list[T]:
    """Await all, a bounded number at the same time, and return the results in order."""
    gate = asyncio.Semaphore(at_once)

    async def one(each: Awaitable[T]) -> T:
        async with gate:
            return await each

    return list(await asyncio.gather(*map(one, work)))


def models_path(namespace: str, name: str = "", subresource: str = "") -> str:
    parts = [MODELS, "namespaces", namespace, "phoenixmodels", name, subresource]
    return "/".join(part for part in parts if part)
