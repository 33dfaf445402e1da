"""What the metrics API talks to, for its tests: an API server and a Prometheus on sockets, which hold what they are
told, and a front proxy with real certificates."""

import asyncio
import base64
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from kubernetes.aio import client
from lab import certificates
from yarl import URL

from phoenix_operator.cluster import Cluster, Pace
from phoenix_operator.metrics import MetricsApiMetrics
from phoenix_operator.metrics_api import app
from phoenix_operator.metrics_api.names import API_SERVICES, GROUP, NAME
from phoenix_operator.settings import Settings

NAMESPACE = "phoenix-system"
HPA = "system:serviceaccount:kube-system:horizontal-pod-autoscaler"
CONFIG = "configmaps/extension-apiserver-authentication"
Object = dict[str, Any]


def model(name: str, **labels: str) -> Object:
    return {"metadata": {"name": name, "labels": labels}}


def api_service(name: str, *, service: str = NAME) -> Object:
    group_version = name.partition(".")
    return {
        "apiVersion": "apiregistration.k8s.io/v1",
        "kind": "APIService",
        "metadata": {"name": name},
        "spec": {
            "group": GROUP,
            "version": group_version[0],
            "service": {"namespace": NAMESPACE, "name": service, "port": 443},
        },
    }


def config_map(authorities: str, *names: str) -> Object:
    """Return the ConfigMap as the API server writes it."""
    return {
        "metadata": {"name": "extension-apiserver-authentication", "namespace": "kube-system"},
        "data": {
            "client-ca-file": "not this one",
            "requestheader-allowed-names": json.dumps(list(names)),
            "requestheader-client-ca-file": authorities,
            "requestheader-extra-headers-prefix": '["X-Remote-Extra-"]',
            "requestheader-group-headers": '["X-Remote-Group"]',
            "requestheader-uid-headers": '["X-Remote-Uid"]',
            "requestheader-username-headers": '["X-Remote-User"]',
        },
    }


@dataclass
class Kubernetes:
    """An API server as far as it is asked: objects by path, models by namespace, who may what."""

    objects: dict[str, Object] = field(default_factory=dict)
    models: dict[str, list[Object]] = field(default_factory=dict)
    allows: Callable[[Object], bool] = lambda spec: True
    reviews: list[Object] = field(default_factory=list)
    lists: int = 0
    # what is done before an answer; raises what is answered instead
    before: Callable[[web.Request], None] = lambda request: None

    def __post_init__(self) -> None:
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": NAME, "namespace": NAMESPACE}}
        self.objects[f"secrets/{NAME}"] = secret | {"type": "Opaque"}
        self.objects |= {f"apiservices/{name}": api_service(name) for name in API_SERVICES}
        self.version = 0
        for body in self.objects.values():
            self.touch(body)

    def touch(self, body: Object) -> None:
        self.version += 1
        body["metadata"]["resourceVersion"] = str(self.version)

    def secret(self) -> dict[str, bytes]:
        data = self.objects[f"secrets/{NAME}"].get("data", {})
        return {key: base64.b64decode(value) for key, value in data.items()}

    def bundle(self, name: str = API_SERVICES[0]) -> bytes:
        return base64.b64decode(self.objects[f"apiservices/{name}"]["spec"].get("caBundle", ""))

    async def reply(self, request: web.Request) -> web.StreamResponse:
        try:
            self.before(request)
            return web.json_response(await self._reply(request))
        except web.HTTPException as error:
            status = {"kind": "Status", "message": error.text, "reason": error.reason, "code": error.status}
            return web.json_response(status, status=error.status)

    async def _reply(self, request: web.Request) -> Object:
        body = await request.json() if request.can_read_body else None
        parts = request.path.strip("/").split("/")
        key = "/".join(parts[-2:])
        if parts[-1] == "subjectaccessreviews":
            self.reviews.append(body["spec"])
            return body | {"status": {"allowed": self.allows(body["spec"])}}
        if parts[-1] == "phoenixmodels":
            self.lists += 1
            return {"metadata": {"resourceVersion": "1"}, "items": self.models.get(parts[-2], [])}
        if key not in self.objects:
            raise web.HTTPNotFound(text=f"{key} not found")
        live = self.objects[key]
        if request.method == "PUT":
            if body["metadata"]["resourceVersion"] != live["metadata"]["resourceVersion"]:
                raise web.HTTPConflict(text="the object has been modified")
            self.touch(body)
            self.objects[key] = body
        if request.method == "PATCH":
            live["spec"] |= body["spec"]
            self.touch(live)
        return self.objects[key]


class Prometheus:
    """Answers each query with the rows of the series that it names, or as `reply` says."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str, str], list[str]] = {}  # series, namespace, model
        self.queries: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.reply: Callable[[web.Request], web.StreamResponse] | None = None
        self.waits: asyncio.Event | None = None

    def put(self, series: str, value: str, *more: str, model: str = "fraud", namespace: str = "ml") -> None:
        self.values[series, namespace, model] = [value, *more]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        query = request.query["query"]
        self.queries.append(query)
        self.headers.append(dict(request.headers))
        if self.waits is not None:
            await self.waits.wait()
        if self.reply is not None:
            return self.reply(request)
        rows = [
            {"metric": {"__name__": series, "namespace": namespace, "model": name}, "value": [1795834800.5, value]}
            for (series, namespace, name), values in self.values.items()
            if query.startswith(f'{series}{{namespace="{namespace}"}} and ')
            for value in values
        ]
        return web.json_response({"status": "success", "data": {"resultType": "vector", "result": rows}})


@asynccontextmanager
async def on_socket(
    handler: Callable[[web.Request], Any], *, context: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """Serve every path with a handler; yield the address."""
    served = web.Application()
    served.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(served, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    try:
        yield f"{'https' if context else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def cluster_at(address: str) -> AsyncIterator[Cluster]:
    api = client.ApiClient(client.Configuration(host=address))
    cluster = Cluster(api, pace=Pace(1000), timeout_s=30, observer=lambda verb, code, seconds: None)
    try:
        yield cluster
    finally:
        await cluster.close()


class FrontProxy:
    """Authorities and client certificates in a folder, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for authority in ("front-proxy-ca", "other-ca"):
            certificates.make_authority(folder, authority)
        for name, authority in (
            ("front-proxy", "front-proxy-ca"),
            ("stranger", "front-proxy-ca"),
            ("other", "other-ca"),
        ):
            certificates.make_certificate(folder, name, subject=f"/CN={name}-client", authority=authority)

    def authority(self, name: str = "front-proxy-ca") -> str:
        return (self.folder / f"{name}.crt").read_text()

    def context(self, bundle: bytes, name: str | None = "front-proxy") -> ssl.SSLContext:
        """Return the TLS of a client that trusts a bundle; `name` is its certificate."""
        context = ssl.create_default_context(cadata=bundle.decode())
        if name is not None:
            context.load_cert_chain(self.folder / f"{name}.crt", self.folder / f"{name}.key")
        return context


@dataclass(frozen=True)
class Answer:
    code: int
    body: Any
    headers: Any


class World:
    """A running metrics API with what it talks to."""

    def __init__(self, proxy: FrontProxy) -> None:
        self.proxy = proxy
        self.kubernetes, self.prometheus = Kubernetes(), Prometheus()
        self.kubernetes.objects[CONFIG] = config_map(proxy.authority(), "front-proxy-client")
        self.metrics = MetricsApiMetrics()
        self.settings: Object = {"cacheSeconds": 0}
        self.timeout_s: float = 5
        self.server: app.MetricsApi
        self.running: asyncio.Task[None]
        self.stop: asyncio.Event
        self.writers: list[asyncio.StreamWriter] = []

    @asynccontextmanager
    async def running_api(self, *, is_ready: bool = True) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            self.stop = asyncio.Event()
            address = await stack.enter_async_context(on_socket(self.kubernetes.reply))
            source = await stack.enter_async_context(on_socket(self.prometheus.answer))
            cluster = await stack.enter_async_context(cluster_at(address))
            asked = {"url": source, "timeoutSeconds": self.timeout_s}
            autoscaling = {"prometheus": asked, "httpsPort": 0} | self.settings
            settings = Settings.model_validate({"autoscaling": autoscaling, "httpPort": 0}, by_alias=True)
            place = app.Place(NAMESPACE, drain_s=0, settle_s=0)
            self.server = await stack.enter_async_context(app.serving(settings, place, cluster, self.metrics))
            self.running = asyncio.create_task(self.server.run(self.stop, drain_s=0))
            try:
                if is_ready:
                    await until(lambda: not self.server.readiness())
                yield
            finally:
                for writer in self.writers:
                    writer.close()
                self.stop.set()
                await self.running

    async def ask(
        self,
        path: str | URL,
        *,
        certificate: str | None = "front-proxy",
        bundle: bytes | None = None,
        method: str = "GET",
        **headers: str,
    ) -> Answer:
        """Ask as the API server does, on behalf of the autoscaler."""
        bundle = self.kubernetes.bundle() if bundle is None else bundle
        names = {"X-Remote-User": HPA} | {name.replace("_", "-"): value for name, value in headers.items()}
        connector = aiohttp.TCPConnector(ssl=self.proxy.context(bundle, certificate))
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.request(
                method,
                URL(f"https://127.0.0.1:{self.server.port}").join(URL(path)),
                headers={name: value for name, value in names.items() if value},
                server_hostname=f"{NAME}.{NAMESPACE}.svc",
            ) as response,
        ):
            return Answer(response.status, await response.json() if method != "HEAD" else None, response.headers)

    async def probe(self, name: str) -> tuple[int, str]:
        """Ask the plain port."""
        port = next(address[1] for address in self.server.probe_addresses if address[0] == "0.0.0.0")
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/{name}") as response:
            return response.status, await response.text()

    def counted(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0


async def until(is_so: Callable[[], bool]) -> None:
    """Wait for something, at most 20 s."""
    async with asyncio.timeout(20):
        while not is_so():  # noqa: ASYNC110 - what is waited for knows no event
            await asyncio.sleep(0.01)


def path(
    metric: str = "inference_latency_seconds_concurrency",
    *,
    name: str = "fraud",
    namespace: str = "ml",
    version: str = "v1beta2",
    resource: str = "phoenixmodels.phoenix-ml.io",
) -> str:
    return f"/apis/{GROUP}/{version}/namespaces/{namespace}/{resource}/{name}/{metric}"
