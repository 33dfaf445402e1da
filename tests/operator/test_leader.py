"""The lease: who leads, by its own clock only, under virtual time."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, cast

import pytest
import virtual_time
from memory_cluster import Call, MemoryCluster
from virtual_time import now

from phoenix_operator.cluster import ApiError, Cluster
from phoenix_operator.kinds import LEASE
from phoenix_operator.leader import Lease
from phoenix_operator.observed import Object

SECONDS = 15


def lease(cluster: MemoryCluster, identity: str = "a") -> Lease:
    return Lease(
        cast(Cluster, cluster), namespace="phoenix-system", name="phoenix-operator", identity=identity, seconds=SECONDS
    )


def stored(cluster: MemoryCluster) -> Object:
    (body,) = cluster.of_kind(LEASE)
    spec: Object = body["spec"]
    return spec


def simulated(main: Callable[[MemoryCluster], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Make a test of a coroutine that runs under virtual time with a cluster in memory."""

    def test() -> None:
        virtual_time.run(main(MemoryCluster()))

    test.__name__, test.__doc__ = main.__name__, main.__doc__
    return test


def fail(call: Call) -> None:
    raise ApiError(0, "", "no answer")


async def hang(*_: Any, **__: Any) -> None:
    await asyncio.sleep(10_000)


@simulated
async def test_lease_that_nobody_holds_is_taken_at_once(cluster: MemoryCluster) -> None:
    await lease(cluster).acquire()
    held = stored(cluster)
    assert (held["holderIdentity"], held["leaseDurationSeconds"], held["leaseTransitions"]) == ("a", SECONDS, 0)
    assert held["renewTime"].endswith("Z")
    assert [call.verb for call in cluster.calls] == ["get", "create"]


@simulated
async def test_lease_without_a_holder_is_taken_at_once(cluster: MemoryCluster) -> None:
    cluster.put(LEASE, {"metadata": {"name": "phoenix-operator", "namespace": "phoenix-system"}, "spec": {}})
    started = now()
    await lease(cluster).acquire()
    assert now() == started
    assert stored(cluster)["holderIdentity"] == "a"


@simulated
async def test_live_lease_is_waited_for(cluster: MemoryCluster) -> None:
    first = lease(cluster, "a")
    await first.acquire()
    holding = asyncio.create_task(first.hold())
    waiting = asyncio.create_task(lease(cluster, "b").acquire())
    await asyncio.sleep(1000)
    assert not waiting.done()
    assert not holding.done()
    assert stored(cluster)["holderIdentity"] == "a"
    holding.cancel()
    waiting.cancel()


@simulated
async def test_silent_lease_is_taken_after_its_time(cluster: MemoryCluster) -> None:
    await lease(cluster, "a").acquire()
    started = now()
    await lease(cluster, "b").acquire()
    assert SECONDS < now() - started <= SECONDS + 2
    assert (stored(cluster)["holderIdentity"], stored(cluster)["leaseTransitions"]) == ("b", 1)


@simulated
async def test_holders_clock_is_not_trusted(cluster: MemoryCluster) -> None:
    """Its renewTime may be hours old or in the future: only that it changes counts."""
    await lease(cluster, "a").acquire()
    for stamp in ("2000-01-01T00:00:00.000000Z", "2100-01-01T00:00:00.000000Z"):
        cluster.edit(
            LEASE, "phoenix-operator", lambda body, at=stamp: body["spec"].update(renewTime=at), "phoenix-system"
        )
        started = now()
        waiting = asyncio.create_task(lease(cluster, "b").acquire())
        await asyncio.sleep(SECONDS - 1)
        assert not waiting.done()
        await waiting
        assert now() - started <= SECONDS + 2
        cluster.edit(LEASE, "phoenix-operator", lambda body: body["spec"].update(holderIdentity="a"), "phoenix-system")


@simulated
async def test_promise_of_the_holder_counts_not_that_of_the_standby(cluster: MemoryCluster) -> None:
    await lease(cluster, "a").acquire()
    cluster.edit(LEASE, "phoenix-operator", lambda body: body["spec"].update(leaseDurationSeconds=60), "phoenix-system")
    started = now()
    await lease(cluster, "b").acquire()
    assert 60 < now() - started <= 62


@simulated
async def test_released_lease_is_taken_within_the_next_look(cluster: MemoryCluster) -> None:
    first = lease(cluster, "a")
    await first.acquire()
    waiting = asyncio.create_task(lease(cluster, "b").acquire())
    await asyncio.sleep(5.5)
    started = now()
    await first.release()
    await waiting
    assert now() - started <= 1
    assert stored(cluster)["leaseTransitions"] == 1


@simulated
async def test_released_lease_promises_nothing_to_those_who_do_not_look_at_the_holder(cluster: MemoryCluster) -> None:
    first = lease(cluster)
    await first.acquire()
    await first.release()
    assert (stored(cluster)["holderIdentity"], stored(cluster)["leaseDurationSeconds"]) == ("", 1)


@simulated
async def test_release_without_the_lease_does_nothing_and_a_failing_one_is_no_error(cluster: MemoryCluster) -> None:
    held = lease(cluster)
    await held.release()
    assert cluster.calls == []
    await held.acquire()
    cluster.refuse = fail
    await held.release()
    cluster.refuse = lambda call: None
    cluster.calls.clear()
    await held.release()
    assert cluster.calls == []


@simulated
async def test_restarted_holder_takes_its_own_lease_back(cluster: MemoryCluster) -> None:
    await lease(cluster, "a").acquire()
    acquired = stored(cluster)["acquireTime"]
    started = now()
    await lease(cluster, "a").acquire()
    assert now() == started
    assert (stored(cluster)["leaseTransitions"], stored(cluster)["acquireTime"]) == (0, acquired)


@simulated
async def test_lease_that_another_took_ends_holding(cluster: MemoryCluster) -> None:
    held = lease(cluster)
    await held.acquire()
    holding = asyncio.create_task(held.hold())
    await asyncio.sleep(4)
    cluster.edit(LEASE, "phoenix-operator", lambda body: body["spec"].update(holderIdentity="b"), "phoenix-system")
    await asyncio.wait_for(holding, SECONDS)
    assert stored(cluster)["holderIdentity"] == "b", "it is not taken back"


@simulated
async def test_lease_that_somebody_deleted_is_made_again(cluster: MemoryCluster) -> None:
    held = lease(cluster)
    await held.acquire()
    holding = asyncio.create_task(held.hold())
    cluster.remove(LEASE, "phoenix-operator", "phoenix-system")
    await asyncio.sleep(100)
    assert not holding.done()
    assert stored(cluster)["holderIdentity"] == "a"
    holding.cancel()


@simulated
async def test_label_that_somebody_writes_at_the_same_moment_takes_no_lease_away(cluster: MemoryCluster) -> None:
    held = lease(cluster)
    await held.acquire()
    holding = asyncio.create_task(held.hold())

    def scribble(call: Call) -> None:
        if call.verb == "update":
            cluster.refuse = lambda call: None
            cluster.edit(LEASE, "phoenix-operator", lambda body: body["metadata"].update(labels={}), "phoenix-system")

    for _ in range(10):
        cluster.refuse = scribble
        await asyncio.sleep(SECONDS / 5)
    assert not holding.done()
    holding.cancel()


@simulated
async def test_short_silence_of_the_api_server_is_survived(cluster: MemoryCluster) -> None:
    held = lease(cluster)
    await held.acquire()
    holding = asyncio.create_task(held.hold())
    await asyncio.sleep(30.5)
    cluster.refuse = fail
    await asyncio.sleep(SECONDS * 2 / 3 - 4)
    cluster.refuse = lambda call: None
    await asyncio.sleep(100)
    assert not holding.done()
    holding.cancel()


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_holding_ends_before_a_standby_may_begin(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thirds of the time that the lease promises, from the last renewal, however long a request may take."""

    async def main() -> float:
        cluster = MemoryCluster()
        held = lease(cluster)
        await held.acquire()
        last = now()
        if how == "fails":
            cluster.refuse = fail
        else:
            monkeypatch.setattr(cluster, "get", hang)
        await held.hold()
        return now() - last

    took_s = virtual_time.run(main())
    assert took_s <= SECONDS * 2 / 3 + 0.01
    assert took_s >= SECONDS / 3


@simulated
async def test_time_between_taking_and_holding_counts(cluster: MemoryCluster) -> None:
    held = lease(cluster)
    await held.acquire()
    await asyncio.sleep(SECONDS)
    cluster.calls.clear()
    await held.hold()
    assert cluster.calls == []


@simulated
async def test_candidate_that_was_too_slow_waits_again(cluster: MemoryCluster) -> None:
    """Somebody else creates or takes the lease between the look and the write: 409 is no error."""
    theirs = {"metadata": {"name": "phoenix-operator", "namespace": "phoenix-system"}}
    spec = {"holderIdentity": "b", "leaseDurationSeconds": SECONDS, "leaseTransitions": 0}

    def appear(call: Call) -> None:
        if call.verb == "create":
            cluster.refuse = lambda call: None
            cluster.put(LEASE, theirs | {"spec": spec})

    cluster.refuse = appear
    waiting = asyncio.create_task(lease(cluster, "a").acquire())
    await asyncio.sleep(3)
    assert not waiting.done()

    def overtake(call: Call) -> None:
        if call.verb == "update":
            cluster.refuse = lambda call: None
            cluster.put(LEASE, theirs | {"spec": spec | {"holderIdentity": "c"}})

    cluster.refuse = overtake
    await asyncio.sleep(SECONDS)
    assert not waiting.done()
    assert stored(cluster)["holderIdentity"] == "c"
    await waiting
    assert stored(cluster)["holderIdentity"] == "a"


@simulated
async def test_candidate_survives_an_api_server_that_is_down(cluster: MemoryCluster) -> None:
    cluster.refuse = fail
    waiting = asyncio.create_task(lease(cluster).acquire())
    await asyncio.sleep(600)
    assert not waiting.done()
    cluster.refuse = lambda call: None
    await asyncio.wait_for(waiting, 2)


@simulated
async def test_of_many_candidates_one_leads_at_any_time(cluster: MemoryCluster) -> None:
    leading: list[str] = []
    most = 0

    async def candidate(identity: str, works_s: float) -> None:
        nonlocal most
        held = lease(cluster, identity)
        await held.acquire()
        leading.append(identity)
        most = max(most, len(leading))
        holding = asyncio.create_task(held.hold())
        await asyncio.wait({holding}, timeout=works_s)
        holding.cancel()
        leading.remove(identity)
        await held.release()

    await asyncio.gather(*(candidate(name, 20 + 7 * number) for number, name in enumerate("abcde")))
    assert most == 1
    assert stored(cluster)["leaseTransitions"] == 4
