"""Every lifetime of the metrics API, its routes, and how each failure becomes an answer.

Order: probes → API server → front proxy and certificate → the TLS port, which opens once both are known. Prometheus is
no part of being ready: a restart would not mend it, and an APIService without endpoints disturbs the whole cluster.
"""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from aiohttp import web

from phoenix_operator import probes
from phoenix_operator.cluster import ApiError, Cluster
from phoenix_operator.metrics import MetricsApiMetrics
from phoenix_operator.metrics_api import discovery
from phoenix_operator.metrics_api.answers import Document, Failure, Question, value_list
from phoenix_operator.metrics_api.authentication import Caller, FrontProxyConfig, Unauthenticated, authenticate
from phoenix_operator.metrics_api.authorization import Authorizer
from phoenix_operator.metrics_api.certificates import CertificateError, expiry
from phoenix_operator.metrics_api.label_selector import Selector, SelectorError, parse_selector
from phoenix_operator.metrics_api.metrics import METRICS, Metric
from phoenix_operator.metrics_api.models import Models
from phoenix_operator.metrics_api.names import GROUP, RESOURCE, VERSIONS
from phoenix_operator.metrics_api.prometheus import PrometheusClient, PrometheusError
from phoenix_operator.metrics_api.readings import Absence, Reading, Readings, Series, choose
from phoenix_operator.metrics_api.serving import MountedCertificate, OwnCertificate, Source
from phoenix_operator.metrics_api.tls_server import TlsServer
from phoenix_operator.settings import Settings, SettingsError

_log = logging.getLogger(__name__)
_DEADLINE_S = 25.0  # of a request; the API server gives up after 30
_MOST_AT_ONCE = 1000
_CERTIFICATE_EVERY_S, _CERTIFICATE_RETRY_S = 30.0, 2.0
_LATE_S = 10.0
_CALLER = web.RequestKey("caller", Caller)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process runs, and for how long it waits for others.

    `drain_s`: after SIGTERM, until nobody comes any more. `settle_s`: before a new certificate is served, until every
    API server trusts it.
    """

    namespace: str
    drain_s: float = 5.0
    settle_s: float = 10.0


async def run(settings: Settings, place: Place) -> None:
    """Serve until SIGTERM or SIGINT. Raises `SettingsError` without an address, `OSError` for a taken port."""
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    metrics = MetricsApiMetrics()
    cluster = await Cluster.connect(
        per_second=settings.api_requests_per_second,
        timeout_s=settings.request_timeout_seconds,
        observer=metrics.on_request,
    )
    try:
        async with serving(settings, place, cluster, metrics) as server:
            await server.run(stop, drain_s=place.drain_s)
    finally:
        await cluster.close()
    _log.info("stopped")


@contextlib.asynccontextmanager
async def serving(
    settings: Settings, place: Place, cluster: Cluster, metrics: MetricsApiMetrics
) -> AsyncIterator["MetricsApi"]:
    """Open probes and the TLS port, and close everything in the end."""
    if settings.autoscaling.prometheus.url is None:
        raise SettingsError("autoscaling.prometheus.url: expected the address of Prometheus, got none")
    async with contextlib.AsyncExitStack() as stack:
        client = PrometheusClient(settings.autoscaling.prometheus, observer=metrics.on_query)
        stack.push_async_callback(client.close)
        api = Api(cluster, client, metrics, settings)
        stack.push_async_callback(api.close)
        server = MetricsApi(api, cluster, _source(settings, place, cluster), metrics)
        runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=10, keepalive_timeout=120)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        server.open(TlsServer(runner, settings.autoscaling.https_port))
        stack.callback(server.close)
        watching = await probes.serve(settings.http_port, metrics, health=server.health, readiness=server.readiness)
        stack.push_async_callback(watching.cleanup)
        server.probe_addresses = watching.addresses
        yield server


def _source(settings: Settings, place: Place, cluster: Cluster) -> Source:
    wanted = settings.autoscaling.certificate
    if wanted.folder is not None:
        return MountedCertificate(Path(wanted.folder))
    lifetime = timedelta(days=wanted.lifetime_days)
    return OwnCertificate(cluster, namespace=place.namespace, lifetime=lifetime, settle_s=place.settle_s)


class Api:
    """What is answered to a caller that is known. Raises `Failure`, whatever goes wrong."""

    def __init__(
        self, cluster: Cluster, client: PrometheusClient, metrics: MetricsApiMetrics, settings: Settings
    ) -> None:
        autoscaling = settings.autoscaling
        self._metrics = metrics
        self._models, self._authorizer = Models(cluster), Authorizer(cluster)
        self._readings = Readings(client, cache_s=autoscaling.cache_seconds, max_age_s=autoscaling.max_age_seconds)

    async def close(self) -> None:
        """Ask nobody any more."""
        for part in (self._readings, self._models, self._authorizer):
            await part.close()

    async def answer(self, caller: Caller, question: Question, labels: str, metric_labels: str) -> Document:
        """Return the values that a question asks for; the two selectors are as in the query."""
        await self._authorize(caller, question)
        metric = METRICS.get(question.metric)
        if metric is None or question.resource != RESOURCE:
            raise _no_metric(question, f"known for {RESOURCE}: {', '.join(METRICS)}")
        chosen, of_metric = _selector(labels), _selector(metric_labels)
        if question.is_about_all:
            models = await self._known_models(question.namespace, chosen)
            series = await self._series(metric, question.namespace)
            found = [(name, self._choose(series, name, metric, of_metric)) for name in sorted(models)]
            return value_list(question, [(name, row) for name, row in found if isinstance(row, Reading)], of_metric)
        await self._expect_model(question)
        reading = self._choose(await self._series(metric, question.namespace), question.name, metric, of_metric)
        if isinstance(reading, Absence):
            raise _no_metric(question, reading.words)
        return value_list(question, [(question.name, reading)], of_metric)

    async def _authorize(self, caller: Caller, question: Question) -> None:
        try:
            is_allowed = await self._authorizer.allows(caller, question)
        except ApiError as error:
            raise Failure(503, "ServiceUnavailable", f"nobody says who may ask: {error.message}") from error
        if not is_allowed:
            what = f'{question.resource}.{GROUP} "{question.name}" is forbidden: User "{caller.name}" cannot get'
            where = f'"{question.resource}/{question.metric}" in API group "{GROUP}" in the namespace'
            raise Failure(403, "Forbidden", f'{what} resource {where} "{question.namespace}"')

    async def _known_models(self, namespace: str, selector: Selector) -> Iterable[str]:
        try:
            models = await self._models.of(namespace)
        except ApiError as error:
            raise _unknown_models(error) from error
        return [name for name, labels in models.items() if selector.matches(labels)]

    async def _expect_model(self, question: Question) -> None:
        try:
            is_there = await self._models.exists(question.namespace, question.name)
        except ApiError as error:
            raise _unknown_models(error) from error
        if not is_there:
            self._metrics.absences.labels("no_model").inc()
            raise _no_metric(question, "there is no such model")

    async def _series(self, metric: Metric, namespace: str) -> Series:
        try:
            return await self._readings.series(metric, namespace)
        except PrometheusError as error:
            raise Failure(503, "ServiceUnavailable", str(error)) from error

    def _choose(self, series: Series, name: str, metric: Metric, selector: Selector) -> Reading | Absence:
        found = choose(series.get(name, ()), metric, selector)
        if isinstance(found, Absence):
            self._metrics.absences.labels(found.reason).inc()
        return found


class MetricsApi:
    """A running server."""

    def __init__(self, api: Api, cluster: Cluster, source: Source, metrics: MetricsApiMetrics) -> None:
        self._api, self._source, self._metrics = api, source, metrics
        self._changed = asyncio.Event()
        self._proxy = FrontProxyConfig(cluster, changed=self._changed.set)
        self._tls: TlsServer | None = None
        self._served: object = None
        self._is_stopping, self._in_flight, self._seen_at = False, 0, time.monotonic()
        self.probe_addresses: list[tuple[str, int]] = []

    @property
    def port(self) -> int:
        """The TLS port."""
        assert self._tls is not None
        return self._tls.port

    def open(self, tls: TlsServer) -> None:
        """Take the socket to serve on."""
        self._tls = tls

    def close(self) -> None:
        """Close it."""
        if self._tls is not None:
            self._tls.close()

    async def run(self, stop: asyncio.Event, *, drain_s: float) -> None:
        """Serve until `stop`, then a little longer. Raises what ends one of its chores."""
        chores = [
            asyncio.create_task(chore) for chore in (self._proxy.follow(), self._follow_certificate(), self._beat())
        ]
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({stopping, *chores}, return_when=asyncio.FIRST_COMPLETED)
            self._is_stopping = True
            if stopping.done():
                await asyncio.sleep(drain_s)
        finally:
            for task in (stopping, *chores):
                task.cancel()
            ended = await asyncio.gather(*chores, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error

    def health(self) -> list[str]:
        """Return what is wrong with the process."""
        late_s = time.monotonic() - self._seen_at
        return [f"the event loop is {late_s:.0f} s late"] if late_s > _LATE_S else []

    def readiness(self) -> list[str]:
        """Return what is missing to serve."""
        wrong = ["it is being stopped"] if self._is_stopping else []
        if self._proxy.current is None:
            wrong.append("the front proxy of the API server is not known yet")
        if self._served is None:
            wrong.append("there is no serving certificate yet")
        return wrong

    def application(self) -> web.Application:
        """Return the routes; each answers to callers that the API server vouches for."""
        app = web.Application(middlewares=[self._count, self._guard], client_max_size=1024)
        add = app.router.add_get
        add("/apis", _document(discovery.group_list()))
        add(f"/apis/{GROUP}", _document(discovery.group()))
        for version in VERSIONS:
            add(f"/apis/{GROUP}/{version}", _document(discovery.resource_list(version)))
        versions = "|".join(VERSIONS)
        metric = f"/apis/{GROUP}/{{version:{versions}}}/namespaces/{{namespace}}/{{resource}}/{{name}}/{{metric}}"
        add(metric, self._metric)
        return app

    async def _metric(self, request: web.Request) -> web.StreamResponse:
        question = Question(**request.match_info)
        if not question.is_possible:
            raise web.HTTPNotFound()
        query = request.query
        selectors = query.get("labelSelector", ""), query.get("metricLabelSelector", "")
        return web.json_response(await self._api.answer(request[_CALLER], question, *selectors))

    @web.middleware
    async def _count(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Turn failures into Status objects, bound how much is done at once and for how long, count."""
        started, code = time.monotonic(), 500
        self._in_flight += 1
        try:
            response = await self._before_the_deadline(request, handler)
            code = response.status
        except Failure as failure:
            code = failure.code
            response = web.json_response(failure.document(), status=code)
            if code == 401:
                response.force_close()
        finally:
            self._in_flight -= 1
            self._metrics.requests.labels(str(code)).inc()
            self._metrics.request_seconds.observe(time.monotonic() - started)
        return response

    async def _before_the_deadline(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        if self._in_flight > _MOST_AT_ONCE:
            raise Failure(429, "TooManyRequests", f"more than {_MOST_AT_ONCE} requests at once; try again")
        try:
            async with asyncio.timeout(_DEADLINE_S):
                return await handler(request)
        except TimeoutError as error:
            raise Failure(504, "Timeout", f"there was no answer within {_DEADLINE_S:g} s") from error
        except web.HTTPNotFound as error:
            raise Failure(404, "NotFound", "the server could not find the requested resource") from error
        except web.HTTPMethodNotAllowed as error:
            raise Failure(405, "MethodNotAllowed", f"expected GET, got {request.method}") from error
        except (Failure, web.HTTPException):
            raise
        except Exception as error:
            _log.exception("a request failed")
            raise Failure(500, "InternalError", f"failed with {type(error).__name__}; see the log") from error

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Let nobody pass for whom the API server does not vouch."""
        transport, tls, proxy = request.transport, self._tls, self._proxy.current
        connection = transport.get_extra_info("ssl_object") if transport else None
        try:
            if transport is None or connection is None or tls is None or proxy is None:
                raise Unauthenticated("expected a connection of the API server")
            if not tls.is_current(connection):
                raise Unauthenticated("the authority of the front proxy has changed; connect again")
            request[_CALLER] = authenticate(proxy, connection.getpeercert(), request.headers)
        except Unauthenticated as error:
            raise Failure(401, "Unauthorized", f"Unauthorized: {error}") from error
        with tls.answering(transport):
            return await handler(request)

    async def _follow_certificate(self) -> None:
        """Keep certificate and authorities of the port current; what is served goes on while there is nothing new."""
        told = ""
        while True:
            self._changed.clear()
            try:
                await self._serve_current()
                told, wait_s = "", _CERTIFICATE_EVERY_S
            except (CertificateError, ApiError) as error:
                if str(error) != told:
                    told = str(error)
                    _log.error("the serving certificate is not as it should be", extra={"cause": told})
                wait_s = _CERTIFICATE_EVERY_S if self._served else _CERTIFICATE_RETRY_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait_s)

    async def _serve_current(self) -> None:
        pair, proxy = await self._source.current(), self._proxy.current
        if proxy is None or self._tls is None:
            return
        wanted = (pair.certificate, pair.key, proxy.authorities_pem)
        if wanted != self._served:
            await self._tls.use(pair, proxy.authorities_pem)
            self._served = wanted
            self._metrics.certificate_expiry.set(expiry(pair).timestamp())
            _log.info("serving", extra={"port": self._tls.port})

    async def _beat(self) -> None:
        """Show that the loop goes round, and send away who holds connections for nothing."""
        while True:
            self._seen_at = time.monotonic()
            if self._tls is not None:
                self._tls.end_strangers(self._seen_at)
            await asyncio.sleep(1)


def _document(document: Document) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.json_response(document)

    return answer


def _selector(text: str) -> Selector:
    try:
        return parse_selector(text)
    except SelectorError as error:
        raise Failure(400, "BadRequest", str(error)) from error


def _no_metric(question: Question, why: str) -> Failure:
    of = f"{question.resource} {question.namespace}/{question.name}"
    return Failure(404, "NotFound", f"the metric {question.metric} of {of} is not there: {why}")


def _unknown_models(error: ApiError) -> Failure:
    return Failure(503, "ServiceUnavailable", f"the PhoenixModels are not known: {error.message}")
