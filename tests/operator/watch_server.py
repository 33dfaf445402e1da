"""A tiny API server for kopf: it lists what there is, streams what happens, and remembers every request."""

import asyncio
import contextlib
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from objects import SETTINGS

from phoenix_operator import handlers
from phoenix_operator.app import watched_kinds
from phoenix_operator.kinds import Kind
from phoenix_operator.observed import Object
from phoenix_operator.settings import Settings

NAMESPACES = Kind("", "v1", "Namespace", "namespaces")
DEFINITIONS = Kind("apiextensions.k8s.io", "v1", "CustomResourceDefinition", "customresourcedefinitions")

Told = tuple[Kind, str | None, str]


@dataclass(frozen=True)
class Seen:
    """A request that is no discovery."""

    verb: str
    kind: Kind
    namespace: str | None
    query: dict[str, str] = field(hash=False, default_factory=dict)


class WatchServer:
    """Serves these kinds."""

    def __init__(self, kinds: Iterable[Kind]) -> None:
        self.kinds = (*kinds, NAMESPACES, DEFINITIONS)
        self.objects: dict[Kind, list[Object]] = defaultdict(list)
        self.seen: list[Seen] = []
        self._streams: dict[Kind, list[asyncio.Queue[Object]]] = defaultdict(list)
        self._opened = asyncio.Event()

    async def watched(self, kinds: Iterable[Kind], *, times: int = 1) -> None:
        """Wait until each kind is watched so many times."""
        async with asyncio.timeout(20):
            while any(len(self._streams[kind]) < times for kind in kinds):
                self._opened.clear()
                await self._opened.wait()

    def tell(self, kind: Kind, type_: str, body: Object) -> None:
        """Send an event to those who watch the kind."""
        for stream in self._streams[kind]:
            stream.put_nowait({"type": type_, "object": body})

    async def reply(self, request: web.Request) -> web.StreamResponse:
        parts = request.path.strip("/").split("/")
        if parts == ["api"]:
            return web.json_response({"versions": ["v1"]})
        if parts == ["apis"]:
            return web.json_response({"groups": self._groups()})
        group, version, rest = ("", parts[1], parts[2:]) if parts[0] == "api" else (parts[1], parts[2], parts[3:])
        if not rest:
            return web.json_response({"resources": self._resources(group, version)})
        namespace, rest = (rest[1], rest[2:]) if rest[0] == "namespaces" and len(rest) > 2 else (None, rest)
        kind = next(kind for kind in self.kinds if (kind.group, kind.plural) == (group, rest[0]))
        is_watch = request.query.get("watch") == "true"
        verb = {"GET": "watch" if is_watch else "list" if len(rest) == 1 else "get"}.get(request.method, request.method)
        self.seen.append(Seen(verb, kind, namespace, dict(request.query)))
        if is_watch:
            return await self._stream(kind, request)
        return web.json_response({"items": self.objects[kind], "metadata": {"resourceVersion": "1"}})

    def _groups(self) -> list[Object]:
        groups = sorted({(kind.group, kind.version) for kind in self.kinds if kind.group})
        return [
            {"name": group, "preferredVersion": {"version": version}, "versions": [{"version": version}]}
            for group, version in groups
        ]

    def _resources(self, group: str, version: str) -> list[Object]:
        return [
            {
                "name": kind.plural,
                "singularName": kind.kind.lower(),
                "kind": kind.kind,
                "namespaced": kind not in (NAMESPACES, DEFINITIONS),
                "verbs": ["get", "list", "watch", "patch", "create", "delete"],
            }
            for kind in self.kinds
            if (kind.group, kind.version) == (group, version)
        ]

    async def _stream(self, kind: Kind, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        events: asyncio.Queue[Object] = asyncio.Queue()
        self._streams[kind].append(events)
        self._opened.set()
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            while True:
                await response.write(json.dumps(await events.get()).encode() + b"\n")
        return response


@asynccontextmanager
async def serving(server: WatchServer, folder: Path) -> AsyncIterator[Path]:
    """Serve on a free port; yield a kubeconfig."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.reply)
    runner = web.AppRunner(app, shutdown_timeout=0, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    config: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "it",
        "clusters": [{"name": "it", "cluster": {"server": address}}],
        "users": [{"name": "it", "user": {"token": "t"}}],
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
    }
    file = folder / "kubeconfig"
    file.write_text(yaml.safe_dump(config))
    try:
        yield file
    finally:
        await runner.cleanup()


class Sink:
    """What the watches told, and a way to wait for more."""

    def __init__(self) -> None:
        self.told: list[Told] = []
        self._more = asyncio.Event()

    def __call__(self, kind: Kind, type_: str | None, body: Object) -> None:
        self.told.append((kind, type_, body["metadata"]["name"]))
        self._more.set()

    async def until(self, holds: Callable[[list[Told]], bool]) -> None:
        async with asyncio.timeout(20):
            while not holds(self.told):
                self._more.clear()
                await self._more.wait()


def watching(
    server: WatchServer,
    folder: Path,
    patch: pytest.MonkeyPatch,
    talk: Callable[[Sink], Any],
    *,
    settings: Settings = SETTINGS,
    served: frozenset[Kind] = frozenset(),
    namespaces: tuple[str, ...] = (),
) -> Sink:
    """Watch while `talk` runs, then stop."""

    async def main() -> Sink:
        async with serving(server, folder) as kubeconfig:
            patch.setenv("KUBECONFIG", str(kubeconfig))
            sink, stop, ready = Sink(), asyncio.Event(), asyncio.Event()
            kinds = watched_kinds(settings, served)
            watch = handlers.watch(kinds, sink, settings, namespaces=namespaces, stop=stop, ready=ready)
            task = asyncio.create_task(watch)
            async with asyncio.timeout(20):
                await ready.wait()
            await talk(sink)
            stop.set()
            async with asyncio.timeout(20):
                await task
            return sink

    return asyncio.run(main())
