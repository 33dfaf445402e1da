"""The second look: what the watches missed is found and repaired, what is merely on its way is not."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, cast

import virtual_time
from memory_cluster import Call, MemoryCluster
from virtual_time import settle

from phoenix_operator.cluster import ApiError, Cluster
from phoenix_operator.kinds import CONFIG_MAP, DEPLOYMENT, OPTIONAL, PHOENIX_MODEL, POD_MONITOR, Kind
from phoenix_operator.metrics import Metrics
from phoenix_operator.observed import Object
from phoenix_operator.queue import KeyedQueue
from phoenix_operator.resync import Resync
from phoenix_operator.store import Key, Store

LABELS = {"app.kubernetes.io/managed-by": "phoenix-operator", "phoenix-ml.io/model": "fraud"}
KEY = ("ml", "fraud")
_PERIOD_S, _GRACE_S = 20, 5


class Second:
    """A second look at a cluster in memory, with a store and a queue that remembers what it is given."""

    def __init__(self, kinds: Sequence[Kind] = (DEPLOYMENT,), namespaces: Sequence[str] = (), every_s: float = 600):
        self.cluster, self.store, self.queue, self.metrics = MemoryCluster(OPTIONAL), Store(), Queue(), Metrics()
        self.resync = Resync(
            cast(Cluster, self.cluster),
            self.store,
            cast(KeyedQueue[Key], self.queue),
            self.metrics,
            kinds=kinds,
            namespaces=namespaces,
            every_s=every_s,
        )

    def put(self, name: str = "fraud", *, kind: Kind = DEPLOYMENT, seen: bool = True, **metadata: Any) -> Object:
        """Store an object in the cluster; `seen` says whether the watch told of it."""
        body = {"metadata": {"name": name, "namespace": "ml", "labels": LABELS} | metadata}
        stored = self.cluster.put(kind, body)
        if seen:
            self.store.put(kind, stored)
        return stored

    def missed(self, kind: Kind = DEPLOYMENT) -> float:
        name, labels = "phoenix_operator_missed_events_total", {"kind": str(kind)}
        return self.metrics.registry.get_sample_value(name, labels) or 0


class Queue:
    """What was asked for."""

    def __init__(self) -> None:
        self.added: list[Key] = []
        self.later: list[tuple[Key, float]] = []

    def add(self, key: Key) -> None:
        self.added.append(key)

    def add_after(self, key: Key, delay_s: float) -> None:
        self.later.append((key, delay_s))


def simulated(main: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def test() -> None:
        virtual_time.run(main())

    test.__name__, test.__doc__ = main.__name__, main.__doc__
    return test


async def looks(second: Second, count: int = 1) -> None:
    """Let it look a few times."""
    task = asyncio.create_task(second.resync.look_at_kinds())
    await asyncio.sleep((_PERIOD_S + _GRACE_S) * count + 1)
    task.cancel()


@simulated
async def test_store_that_knows_everything_is_left_alone() -> None:
    second = Second()
    second.put()
    await looks(second, 3)
    assert second.queue.added == []
    assert (second.missed(), second.resync.stalled) == (0, [])


@simulated
async def test_missed_change_is_found_counted_and_reconciled() -> None:
    second = Second()
    second.put()
    stored = second.put(seen=False)
    await looks(second)
    assert second.queue.added == [KEY]
    assert second.missed() == 1
    assert second.store.versions(DEPLOYMENT) == {KEY: int(stored["metadata"]["resourceVersion"])}


@simulated
async def test_missed_deletion_is_found() -> None:
    second = Second()
    second.put()
    second.cluster.remove(DEPLOYMENT, "fraud")
    await looks(second)
    assert second.queue.added == [KEY]
    assert second.store.versions(DEPLOYMENT) == {}


@simulated
async def test_missed_loss_of_the_models_label_is_found() -> None:
    second = Second()
    second.put()
    second.put(seen=False, labels={"app.kubernetes.io/managed-by": "phoenix-operator"})
    await looks(second)
    assert second.queue.added == [KEY]
    await looks(second, 2)
    assert second.queue.added == [KEY], "and only once"


@simulated
async def test_change_that_arrives_within_the_grace_is_not_missed() -> None:
    second = Second()
    second.put()
    stored = second.put(seen=False)
    task = asyncio.create_task(second.resync.look_at_kinds())
    await asyncio.sleep(_PERIOD_S + 1)
    second.store.put(DEPLOYMENT, stored)
    await asyncio.sleep(_GRACE_S)
    task.cancel()
    assert second.queue.added == []
    assert second.missed() == 0


@simulated
async def test_what_the_watch_tells_after_the_list_is_not_taken_for_deleted() -> None:
    second = Second()
    await looks(second)
    later = {"metadata": {"name": "new", "namespace": "ml", "uid": "n", "resourceVersion": "9999", "labels": LABELS}}
    second.store.put(DEPLOYMENT, later)
    await looks(second)
    assert second.queue.added == []
    assert second.store.versions(DEPLOYMENT) == {("ml", "new"): 9999}


@simulated
async def test_object_of_our_label_that_belongs_to_no_model_is_nobodys_business() -> None:
    second = Second()
    second.put(seen=False, labels={"app.kubernetes.io/managed-by": "phoenix-operator"})
    await looks(second, 2)
    assert second.queue.added == []
    whole = [call for call in second.cluster.calls if call.verb == "list"]
    assert len(whole) == 2, "one list of metadata a look, nothing more"


@simulated
async def test_kind_that_misses_twice_in_a_row_is_stalled_until_a_look_finds_nothing() -> None:
    second = Second()
    second.put()
    for expected in ([], [DEPLOYMENT]):
        second.put(seen=False)
        await looks(second)
        assert second.resync.stalled == expected
    await looks(second)
    assert second.resync.stalled == []


@simulated
async def test_kinds_are_looked_at_in_turn_and_those_not_served_are_left_out() -> None:
    second = Second(kinds=(DEPLOYMENT, POD_MONITOR, CONFIG_MAP))
    second.cluster._served = frozenset()
    await looks(second, 3)
    assert [call.kind for call in second.cluster.calls] == [DEPLOYMENT, CONFIG_MAP]
    second.cluster._served = frozenset({POD_MONITOR})
    second.cluster.calls.clear()
    await looks(second, 3)
    assert [call.kind for call in second.cluster.calls] == [DEPLOYMENT, POD_MONITOR, CONFIG_MAP]
    assert second.resync.served_kinds == {POD_MONITOR}


@simulated
async def test_models_are_listed_without_a_label() -> None:
    second = Second(kinds=(PHOENIX_MODEL,))
    second.put(kind=PHOENIX_MODEL, labels={}, seen=False)
    await looks(second)
    assert second.queue.added == [KEY]


@simulated
async def test_namespaced_operator_lists_its_namespaces_only() -> None:
    second = Second(namespaces=("ml", "other"))
    for namespace in ("ml", "other", "third"):
        body = {"metadata": {"name": "fraud", "namespace": namespace, "labels": LABELS}}
        second.cluster.put(DEPLOYMENT, body)
    await looks(second)
    assert sorted(second.queue.added) == [("ml", "fraud"), ("other", "fraud")]


@simulated
async def test_api_server_that_is_down_is_asked_again_later() -> None:
    second = Second()
    second.put()

    def refuse(_: Call) -> None:
        raise ApiError(0, "", "no answer")

    second.cluster.refuse = refuse
    await looks(second)
    second.put(seen=False)
    second.cluster.refuse = lambda call: None
    await looks(second)
    assert second.queue.added == [KEY]


@simulated
async def test_every_model_is_looked_at_once_in_a_period_spread_over_a_tenth_of_it() -> None:
    second = Second(every_s=600)
    for number in range(50):
        second.put(f"m{number}", kind=PHOENIX_MODEL)
    task = asyncio.create_task(second.resync.look_at_models())
    await asyncio.sleep(479)
    assert second.queue.later == []
    await asyncio.sleep(242)
    await settle()
    task.cancel()
    assert len({key for key, _ in second.queue.later}) == len(second.queue.later) == 50
    assert all(0 <= delay_s <= 60 for _, delay_s in second.queue.later)
    assert len({round(delay_s) for _, delay_s in second.queue.later}) > 10


@simulated
async def test_discovery_tells_what_the_cluster_serves() -> None:
    second = Second()
    await second.resync.discover()
    assert second.resync.served_kinds == OPTIONAL
