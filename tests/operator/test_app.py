"""A running operator, with a cluster in memory and watches that the test drives, under virtual time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import virtual_time
from memory_cluster import Call, MemoryCluster
from objects import document
from world import KEY, States

from phoenix_operator import app
from phoenix_operator.backend_pool import BackendPool
from phoenix_operator.cluster import ApiError, Cluster
from phoenix_operator.kinds import CHILDREN, DEPLOYMENT, LEASE, OPTIONAL, PHOENIX_MODEL, POD, Kind
from phoenix_operator.leader import Lease
from phoenix_operator.metrics import Metrics
from phoenix_operator.metrics_api.latencies import Latencies
from phoenix_operator.observed import Object
from phoenix_operator.pod_state import PodStates
from phoenix_operator.settings import Settings

PLACE = app.Place("phoenix-system", "operator-1")


class Exited(Exception):
    """The process would have ended on the spot."""


class Watches:
    """Stands in for kopf: lists what there is when it starts, and lets the test tell the rest."""

    def __init__(self, cluster: MemoryCluster) -> None:
        self._cluster = cluster
        self.kinds: tuple[Kind, ...] = ()
        self.tell: Callable[[Kind, str | None, Object], None]
        self.broken = asyncio.Event()
        self.is_slow = False

    async def watch(self, kinds: Any, sink: Any, settings: Settings, *, namespaces: Any, stop: Any, ready: Any) -> None:
        self.kinds, self.tell = tuple(kinds), sink
        if self.is_slow:
            await asyncio.sleep(100)
        for kind, bodies in self._cluster.watched().items():
            for body in bodies:
                sink(kind, None, body)
        ready.set()
        ends = {asyncio.create_task(stop.wait()), asyncio.create_task(self.broken.wait())}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if self.broken.is_set():
            raise RuntimeError("the watch stream failed")


class Running:
    """An operator that runs, and the way to stop it."""

    def __init__(self, patch: pytest.MonkeyPatch, cluster: MemoryCluster, settings: Settings) -> None:
        self.cluster, self.watches, self.metrics = cluster, Watches(cluster), Metrics()
        self.stop = asyncio.Event()
        patch.setattr("phoenix_operator.handlers.watch", self.watches.watch)
        patch.setattr("phoenix_operator.app._on_signals", lambda stop: None)
        patch.setattr("logging.shutdown", lambda: None)
        patch.setattr("os._exit", self._exit)
        states = cast(PodStates, States())
        pool = BackendPool(cast(Cluster, cluster), settings, self.metrics, namespace=PLACE.namespace)
        latencies = Latencies(settings.autoscaling)
        self.operator = app._Operator(settings, PLACE, cast(Cluster, cluster), states, pool, latencies, self.metrics)
        self.task = asyncio.create_task(self.operator.run(self.stop))

    def _exit(self, code: int) -> None:
        raise Exited(code)

    def lose_the_lease(self) -> None:
        def take(body: Object) -> None:
            body["spec"]["holderIdentity"] = "other"

        self.cluster.edit(LEASE, "phoenix-operator", take, "phoenix-system")

    def value(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"phoenix_operator_{name}")

    def holder(self) -> str:
        (lease,) = self.cluster.of_kind(LEASE)
        holder: str = lease["spec"]["holderIdentity"]
        return holder


@asynccontextmanager
async def running(
    patch: pytest.MonkeyPatch, cluster: MemoryCluster | None = None, settings: Settings | None = None
) -> AsyncIterator[Running]:
    found = Running(patch, cluster or MemoryCluster(OPTIONAL), settings or Settings(workers=2))
    try:
        yield found
    finally:
        found.stop.set()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(found.task, 60)


def lease(cluster: MemoryCluster) -> Lease:
    """Return the lease as another process sees it."""
    names = {"namespace": "phoenix-system", "name": "phoenix-operator"}
    return Lease(cast(Cluster, cluster), **names, identity="operator-2", seconds=5)


Talk = Callable[[pytest.MonkeyPatch], Coroutine[Any, Any, None]]


def simulated(main: Talk) -> Callable[[pytest.MonkeyPatch], None]:
    def test(monkeypatch: pytest.MonkeyPatch) -> None:
        virtual_time.run(main(monkeypatch))

    test.__name__, test.__doc__ = main.__name__, main.__doc__
    return test


def with_a_model() -> MemoryCluster:
    cluster = MemoryCluster(OPTIONAL)
    cluster.put(PHOENIX_MODEL, document())
    return cluster


@simulated
async def test_operator_leads_reconciles_what_is_listed_and_lets_go_when_stopped(patch: pytest.MonkeyPatch) -> None:
    async with running(patch, with_a_model()) as it:
        await asyncio.sleep(5)
        assert it.holder() == "operator-1"
        assert it.cluster.of_kind(DEPLOYMENT)
        assert (it.value("leader"), it.value("models"), it.value("queue_depth")) == (1, 1, 0)
        assert it.operator.health() == it.operator.readiness() == []
        it.stop.set()
        await asyncio.wait_for(it.task, 5)
        assert it.holder() == ""
        assert it.value("leader") == 0


@simulated
async def test_every_kind_that_old_settings_may_have_led_to_is_watched(patch: pytest.MonkeyPatch) -> None:
    async with running(patch) as it:
        await asyncio.sleep(1)
        assert set(it.watches.kinds) == {PHOENIX_MODEL, POD, *CHILDREN}


@simulated
async def test_standby_waits_and_does_nothing_and_is_ready(patch: pytest.MonkeyPatch) -> None:
    cluster = with_a_model()
    spec = {"holderIdentity": "other", "leaseDurationSeconds": 15}
    cluster.put(LEASE, {"metadata": {"name": "phoenix-operator", "namespace": "phoenix-system"}, "spec": spec})
    async with running(patch, cluster) as standby:
        await asyncio.sleep(5)
        assert {call.kind for call in cluster.calls} == {LEASE}
        assert cluster.writes == []
        assert standby.operator.readiness() == standby.operator.health() == []
        standby.stop.set()
        await asyncio.wait_for(standby.task, 1)
        assert standby.holder() == "other", "what it does not have it does not give back"


@simulated
async def test_leader_is_not_ready_before_its_watches_are_up(patch: pytest.MonkeyPatch) -> None:
    async with running(patch) as it:
        it.watches.is_slow = True
        await asyncio.sleep(50)
        assert it.operator.readiness() == ["the watches are not up yet"]
        await asyncio.sleep(60)
        assert it.operator.readiness() == []


@simulated
async def test_event_of_a_child_reconciles_its_model(patch: pytest.MonkeyPatch) -> None:
    async with running(patch, with_a_model()) as it:
        await asyncio.sleep(5)
        it.cluster.edit(DEPLOYMENT, "fraud", lambda body: body["spec"].update(replicas=9))
        it.watches.tell(DEPLOYMENT, "MODIFIED", it.cluster.objects[DEPLOYMENT, "ml", "fraud"])
        await asyncio.sleep(1)
        assert it.cluster.objects[DEPLOYMENT, "ml", "fraud"]["spec"]["replicas"] == 1


@simulated
async def test_child_whose_label_was_changed_is_set_back(patch: pytest.MonkeyPatch) -> None:
    async with running(patch, with_a_model()) as it:
        await asyncio.sleep(5)
        it.cluster.edit(
            DEPLOYMENT, "fraud", lambda body: body["metadata"]["labels"].update({"phoenix-ml.io/model": "x"})
        )
        it.watches.tell(DEPLOYMENT, "MODIFIED", it.cluster.objects[DEPLOYMENT, "ml", "fraud"])
        await asyncio.sleep(1)
        labels = it.cluster.objects[DEPLOYMENT, "ml", "fraud"]["metadata"]["labels"]
        assert labels["phoenix-ml.io/model"] == "fraud"


@simulated
async def test_deleted_model_is_forgotten_with_its_backoff(patch: pytest.MonkeyPatch) -> None:
    async with running(patch, with_a_model()) as it:

        def refuse(call: Call) -> None:
            if call.kind is DEPLOYMENT:
                raise ApiError(500, "", "down")

        it.cluster.refuse = refuse
        await asyncio.sleep(30)
        assert it.value("failing_models") == 1
        body = it.cluster.objects[PHOENIX_MODEL, *KEY]
        it.cluster.remove(PHOENIX_MODEL, "fraud")
        it.watches.tell(PHOENIX_MODEL, "DELETED", body)
        await asyncio.sleep(2)
        assert (it.value("failing_models"), it.value("models")) == (0, 0)
        assert it.operator.health() == []


@simulated
async def test_lost_lease_ends_the_process_at_once(patch: pytest.MonkeyPatch) -> None:
    async with running(patch, with_a_model()) as it:
        await asyncio.sleep(5)
        it.lose_the_lease()
        writes = len(it.cluster.writes)
        with pytest.raises(Exited, match="1"):
            await asyncio.wait_for(it.task, 10)
        assert len(it.cluster.writes) == writes
        assert it.holder() == "other"


@simulated
async def test_broken_watch_ends_the_operator_and_lets_a_standby_in(patch: pytest.MonkeyPatch) -> None:
    async with running(patch) as it:
        await asyncio.sleep(5)
        it.watches.broken.set()
        with pytest.raises(RuntimeError, match="stream failed"):
            await asyncio.wait_for(it.task, 30)
        assert it.holder() == ""


@simulated
async def test_chore_that_breaks_ends_the_operator_instead_of_being_missed(patch: pytest.MonkeyPatch) -> None:
    async def broken(self: object) -> None:
        await asyncio.sleep(3)
        raise KeyError("metadata")

    patch.setattr("phoenix_operator.resync.Resync.look_at_kinds", broken)
    async with running(patch) as it:
        with pytest.raises(KeyError):
            await asyncio.wait_for(it.task, 30)
        assert it.holder() == ""


@simulated
async def test_running_reconcile_is_finished_before_the_lease_is_given_back(patch: pytest.MonkeyPatch) -> None:
    cluster = with_a_model()
    plain, begun = cluster.apply, asyncio.Event()

    async def slow(kind: Kind, manifest: Object, *, is_first: bool = False) -> Object:
        begun.set()
        await asyncio.sleep(1)
        return await plain(kind, manifest, is_first=is_first)

    patch.setattr(cluster, "apply", slow)
    async with running(patch, cluster) as it:
        await begun.wait()
        it.stop.set()
        await it.task
        kinds = [call.kind for call in cluster.writes]
        assert DEPLOYMENT in kinds
        assert kinds[-1] is LEASE


@simulated
async def test_standby_begins_only_after_the_last_reconcile_of_the_leader(patch: pytest.MonkeyPatch) -> None:
    cluster = with_a_model()
    plain, begun = cluster.apply, asyncio.Event()

    async def slow(kind: Kind, manifest: Object, *, is_first: bool = False) -> Object:
        begun.set()
        await asyncio.sleep(1.5)
        return await plain(kind, manifest, is_first=is_first)

    patch.setattr(cluster, "apply", slow)
    async with running(patch, cluster, Settings(workers=1, lease_seconds=5)) as it:
        await begun.wait()
        standby = lease(cluster)
        taking = asyncio.create_task(standby.acquire())
        it.stop.set()
        await asyncio.wait({taking, it.task}, return_when=asyncio.FIRST_COMPLETED)
        assert it.task.done()
        assert cluster.of_kind(DEPLOYMENT), "the reconcile took longer than the lease"
        await asyncio.wait_for(taking, 2)


@simulated
async def test_reconcile_that_hangs_holds_the_end_up_for_a_bounded_time(patch: pytest.MonkeyPatch) -> None:
    cluster = with_a_model()

    async def hang(*_: Any, **__: Any) -> Object:
        await asyncio.sleep(10_000)
        return {}

    patch.setattr(cluster, "apply", hang)
    async with running(patch, cluster) as it:
        await asyncio.sleep(5)
        it.stop.set()
        await asyncio.wait_for(it.task, 15)
        assert it.holder() == ""


@simulated
async def test_model_that_is_stuck_and_a_watch_that_misses_are_unhealthy(patch: pytest.MonkeyPatch) -> None:
    cluster = with_a_model()

    async def hang(*_: Any, **__: Any) -> Object:
        await asyncio.sleep(10_000)
        return {}

    patch.setattr(cluster, "apply", hang)
    async with running(patch, cluster) as it:
        await asyncio.sleep(250)
        assert it.operator.health() == []
        await asyncio.sleep(100)
        assert any("a model waits or is worked on for" in words for words in it.operator.health())
        patch.setattr(type(it.operator._resync), "stalled", [POD])
        assert "the watch of Pod misses changes" in it.operator.health()


@simulated
async def test_late_loop_is_unhealthy(patch: pytest.MonkeyPatch) -> None:
    async with running(patch, settings=Settings(lease_seconds=300)) as it:
        await asyncio.sleep(5)
        loop = cast(virtual_time.VirtualTimeLoop, asyncio.get_running_loop())
        loop.block(20)
        await asyncio.sleep(0.5)
        assert any("the event loop is" in words for words in it.operator.health())
        assert (it.value("event_loop_lag_seconds") or 0) > 10
        await asyncio.sleep(3)
        assert it.operator.health() == []


@simulated
async def test_stop_before_the_lease_is_had_is_a_clean_end(patch: pytest.MonkeyPatch) -> None:
    cluster = MemoryCluster()

    def refuse(_: Call) -> None:
        raise ApiError(0, "", "no answer")

    cluster.refuse = refuse
    async with running(patch, cluster) as it:
        await asyncio.sleep(5)
        it.stop.set()
        await asyncio.wait_for(it.task, 1)
        assert cluster.writes == []
