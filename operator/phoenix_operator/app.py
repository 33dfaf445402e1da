"""Owns every lifetime of a running operator: what is started, in which order, and how it ends.

Order: probes → API server → lease → watches, workers, second look. SIGTERM: the watches end, running reconciles are
finished, the lease is given back. A lost lease or a broken watch ends the process at once: somebody else leads, or the
next start begins from what the cluster says.
"""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from phoenix_operator import handlers, probes
from phoenix_operator.backend_pool import BackendPool
from phoenix_operator.bindings import Bindings
from phoenix_operator.cluster import ApiError, Cluster
from phoenix_operator.kinds import (
    CHILDREN,
    HTTP_ROUTE,
    PHOENIX_MODEL,
    POD,
    POD_MONITOR,
    SCALED_OBJECT,
    SERVICE_MONITOR,
    TRIGGER_AUTHENTICATION,
    Kind,
)
from phoenix_operator.leader import Lease
from phoenix_operator.metrics import Metrics
from phoenix_operator.metrics_api.latencies import Latencies
from phoenix_operator.observed import Object
from phoenix_operator.placement import Placement
from phoenix_operator.pod_state import PodStates
from phoenix_operator.queue import KeyedQueue
from phoenix_operator.reconcile import Parts, Reconciler
from phoenix_operator.recorder import Recorder
from phoenix_operator.resync import Resync
from phoenix_operator.settings import AutoscalingProvider, MonitorKind, RouteKind, Settings
from phoenix_operator.store import Key, Store

_log = logging.getLogger(__name__)
_LEASE = "phoenix-operator"
_STUCK_S, _LATE_S = 300.0, 10.0
_LAST_RECONCILES_S = 10.0
_BEFORE_LISTS_S, _AFTER_LISTS_S = 1.0, 0.5


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process runs, and what it is responsible for. Without `namespaces`: the whole cluster."""

    namespace: str
    identity: str
    namespaces: tuple[str, ...] = ()


def watched_kinds(settings: Settings, served: frozenset[Kind]) -> tuple[Kind, ...]:
    """Return the kinds to watch: all that the settings lead to, and those that other settings may have led to.

    An HTTPRoute or monitor that the settings no longer ask for is deleted, so it must be seen where its kind is served.
    """
    switched = {
        HTTP_ROUTE: settings.routes.kind is RouteKind.HTTP_ROUTE,
        POD_MONITOR: settings.monitoring.kind is MonitorKind.POD_MONITOR,
        TRIGGER_AUTHENTICATION: settings.autoscaling.provider is AutoscalingProvider.KEDA,
        SCALED_OBJECT: settings.autoscaling.provider is AutoscalingProvider.KEDA,
        SERVICE_MONITOR: settings.monitoring.kind is MonitorKind.SERVICE_MONITOR,
    }
    return (PHOENIX_MODEL, POD, *(kind for kind in CHILDREN if switched.get(kind, True) or kind in served))


async def run(settings: Settings, place: Place) -> None:
    """Run until SIGTERM or SIGINT. Raises `OSError` for a taken port, and whatever ends the watches."""
    stop = asyncio.Event()
    _on_signals(stop)
    async with _operator(settings, place) as operator:
        await operator.run(stop)
    _log.info("stopped")


@contextlib.asynccontextmanager
async def _operator(settings: Settings, place: Place) -> AsyncIterator["_Operator"]:
    async with contextlib.AsyncExitStack() as stack:
        metrics = Metrics()
        cluster = await Cluster.connect(
            per_second=settings.api_requests_per_second,
            timeout_s=settings.request_timeout_seconds,
            observer=metrics.on_request,
        )
        stack.push_async_callback(cluster.close)
        states = PodStates(metrics, timeout_s=settings.state_timeout_seconds)
        stack.push_async_callback(states.close)
        pool = BackendPool(cluster, settings, metrics, namespace=place.namespace)
        stack.push_async_callback(pool.close)
        latencies = Latencies(settings.autoscaling)
        stack.push_async_callback(latencies.close)
        operator = _Operator(settings, place, cluster, states, pool, latencies, metrics)
        runner = await probes.serve(settings.http_port, metrics, health=operator.health, readiness=operator.readiness)
        stack.push_async_callback(runner.cleanup)
        yield operator


class _Operator:
    """The parts of a running operator."""

    def __init__(
        self,
        settings: Settings,
        place: Place,
        cluster: Cluster,
        states: PodStates,
        pool: BackendPool,
        latencies: Latencies,
        metrics: Metrics,
    ) -> None:
        self._settings, self._place, self._metrics = settings, place, metrics
        self._cluster = cluster
        self._store = Store()
        self._queue: KeyedQueue[Key] = KeyedQueue()
        self._resync = Resync(
            cluster,
            self._store,
            self._queue,
            metrics,
            kinds=(PHOENIX_MODEL, POD, *CHILDREN),
            namespaces=place.namespaces,
            every_s=settings.resync_seconds,
        )
        recorder = Recorder(cluster, metrics, host=place.identity)
        self._reconcile = Reconciler(
            Parts(
                cluster=cluster,
                store=self._store,
                settings=settings,
                metrics=metrics,
                states=states,
                placement=Placement(cluster),
                recorder=recorder,
                bindings=Bindings(cluster, self._store, pool, recorder, settings),
                operator_namespace=place.namespace,
                served_kinds=lambda: self._resync.served_kinds,
                latency_s=latencies.of,
            )
        )
        self._lease = Lease(
            cluster,
            namespace=place.namespace,
            name=_LEASE,
            identity=place.identity,
            seconds=settings.lease_seconds,
        )
        self._is_leading = False
        self._watches_up = asyncio.Event()
        self._listed_at = 0.0
        self._lag_s = 0.0

    async def run(self, stop: asyncio.Event) -> None:
        """Wait for the lease, work until `stop`, give the lease back."""
        if not await _done_before(stop, self._lease.acquire()):
            return
        self._is_leading = True
        self._metrics.leader.set(1)
        try:
            await self._resync.discover()
        except ApiError:
            await self._lease.release()  # a standby may have more luck
            raise
        workers = [asyncio.create_task(self._work(stop)) for _ in range(self._settings.workers)]
        endless: tuple[Coroutine[Any, Any, None], ...] = (
            self._measure(),
            self._resync.look_at_models(),
            self._resync.look_at_kinds(),
        )
        chores = [asyncio.create_task(chore) for chore in endless]
        signals = asyncio.create_task(self._take_signals_back(stop))
        holding = asyncio.create_task(self._lease.hold())
        stop_watching = asyncio.Event()
        watching = asyncio.create_task(
            handlers.watch(
                watched_kinds(self._settings, self._resync.served_kinds),
                self._take,
                self._settings,
                namespaces=self._place.namespaces,
                stop=stop_watching,
                ready=self._watches_up,
            )
        )
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({holding, watching, stopping, *chores}, return_when=asyncio.FIRST_COMPLETED)
        if holding.done():
            _leave()
        for task in (signals, *chores):
            task.cancel()
        stop_watching.set()
        # the lease is held until the last reconcile is done
        settling = asyncio.create_task(_settle(self._finish(workers)))
        await asyncio.wait({holding, settling}, return_when=asyncio.FIRST_COMPLETED)
        if holding.done():
            _leave()
        holding.cancel()
        await asyncio.wait({holding})
        self._metrics.leader.set(0)
        await self._lease.release()
        await asyncio.wait({watching}, timeout=20)
        stopping.cancel()
        watching.cancel()
        for task in (watching, *chores):
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error

    def health(self) -> list[str]:
        """Return what is wrong with the work."""
        wrong = [f"the watch of {kind} misses changes" for kind in self._resync.stalled]
        if self._queue.oldest_s() > _STUCK_S:
            wrong.append(f"a model waits or is worked on for {self._queue.oldest_s():.0f} s")
        if self._lag_s > _LATE_S:
            wrong.append(f"the event loop is {self._lag_s:.0f} s late")
        return wrong

    def readiness(self) -> list[str]:
        """A standby is ready to take over; a leader once its watches are up."""
        return ["the watches are not up yet"] if self._is_leading and not self._watches_up.is_set() else []

    def _take(self, kind: Kind, type_: str | None, body: Object) -> None:
        """Put an event's object into the store and its model into the queue."""
        self._metrics.watch_events.labels(str(kind), type_ or "LISTED").inc()
        if type_ is None:
            self._listed_at = time.monotonic()
        is_gone = type_ == "DELETED"
        for key in self._store.discard(kind, body) if is_gone else self._store.put(kind, body):
            if is_gone and kind is PHOENIX_MODEL:
                self._queue.forget(key)
            self._queue.add(key)

    async def _work(self, stop: asyncio.Event) -> None:
        """Work off the queue, not before the first lists are in: each child not listed yet would be asked for."""
        if await _done_before(stop, self._first_lists()):
            await self._queue.work(self._reconcile)

    async def _first_lists(self) -> None:
        """Return when nothing has been listed for a moment; kopf does not say when its lists are complete."""
        await self._watches_up.wait()
        wait_s = _BEFORE_LISTS_S
        while wait_s > 0:
            await asyncio.sleep(wait_s)
            wait_s = self._listed_at + _AFTER_LISTS_S - time.monotonic()

    async def _measure(self) -> None:
        """Keep the gauges and the loop's lag current."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(1)
            self._lag_s = time.monotonic() - before - 1
            self._metrics.loop_lag.set(self._lag_s)
            self._metrics.queue_depth.set(self._queue.depth)
            self._metrics.queue_oldest.set(self._queue.oldest_s())
            self._metrics.retries.set(self._queue.retries())
            self._metrics.models.set(len(self._store.models()))

    async def _take_signals_back(self, stop: asyncio.Event) -> None:
        """Undo kopf's own signal handlers. (A signal before that ends the watches cleanly, which is a stop too.)"""
        await self._watches_up.wait()
        _on_signals(stop)

    async def _finish(self, workers: Sequence["asyncio.Task[None]"]) -> None:
        """Let running reconciles end; what waits is for the next leader."""
        self._queue.close()
        await asyncio.gather(*workers, return_exceptions=True)


def _on_signals(stop: asyncio.Event) -> None:
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)


def _leave() -> NoReturn:
    """End the process on the spot: somebody else may lead already, so there must not be one more write."""
    _log.error("the lease is lost; ending")
    logging.shutdown()
    os._exit(1)


async def _settle(work: Coroutine[Any, Any, None]) -> None:
    """Do it for a bounded time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LAST_RECONCILES_S):
            await work


async def _done_before(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Return whether the work was done before `stop` was set; else it is cancelled."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if working.done():
        await working
        return True
    working.cancel()
    return False
