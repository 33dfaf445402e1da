"""A tiny API server on a socket that answers what it is told, in turn, and remembers what it was asked."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from kubernetes.aio import client

from phoenix_operator.cluster import Cluster, Pace


@dataclass(frozen=True)
class Asked:
    """A request."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


@dataclass
class Answer:
    """A response; `silent` is none at all."""

    body: Any = field(default_factory=dict)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    silent: bool = False


def failure(status: int, reason: str = "", message: str = "", **headers: str) -> Answer:
    """Return an error as the API server writes it."""
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message}
    return Answer(body, status, {name.replace("_", "-"): value for name, value in headers.items()})


class ApiServer:
    """Answers one after the other, then the last again and again."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers) or [Answer()]
        self.asked: list[Asked] = []
        self.address = ""

    async def reply(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        body = json.loads(text) if text else None
        self.asked.append(Asked(request.method, request.path, dict(request.query), dict(request.headers), body))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer.silent:
            await asyncio.sleep(10_000)
        if isinstance(answer.body, str):
            return web.Response(text=answer.body, status=answer.status, headers=answer.headers)
        return web.json_response(answer.body, status=answer.status, headers=answer.headers)


@asynccontextmanager
async def serving(server: ApiServer) -> AsyncIterator[str]:
    """Serve on a free port; yield the address."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.reply)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server.address
    finally:
        await runner.cleanup()


@asynccontextmanager
async def connected(
    server: ApiServer, *, per_second: float = 1000, timeout_s: float = 30
) -> AsyncIterator[tuple[Cluster, list[tuple[str, int, float]]]]:
    """Serve, and connect to it; yield the connection and what its observer is told."""
    told: list[tuple[str, int, float]] = []
    async with serving(server) as address:
        api = client.ApiClient(client.Configuration(host=address))
        cluster = Cluster(
            api, pace=Pace(per_second), timeout_s=timeout_s, observer=lambda *request: told.append(request)
        )
        try:
            yield cluster, told
        finally:
            await cluster.close()
