"""Token buckets under virtual time: never more than burst and rate allow, never less, whoever shares them."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix_server.errors import Code, PhoenixError
from phoenix_server.metrics import ModelMetrics
from phoenix_server.rate_limit import Bucket, ClientTable, Grant, SharedBucket, retry_after_s
from phoenix_server.rate_limits import SharedLimit
from phoenix_server.redis_link import RedisUnavailable

RATES = st.sampled_from([1, 3, 7, 100, 12_345, 1_000_000])
BURSTS = st.sampled_from([1, 2, 5, 100, 1_000_000])


def most(rate: float, burst: float, passed_s: float) -> float:
    """The most that a bucket may give in that time."""
    return burst + rate * passed_s + 0.01


@given(RATES, BURSTS, st.lists(st.tuples(st.floats(0, 3), st.integers(1, 8)), max_size=40))
def test_bucket_never_gives_more_than_burst_and_rate(rate: int, burst: int, turns: list[tuple[float, int]]) -> None:
    bucket, now, given_at = Bucket(rate, burst), 1000.0, []
    for pause, tries in turns:
        now += pause / rate
        for _ in range(tries):
            wait_s = bucket.take(now)
            assert 0 <= wait_s <= 1 / rate * 1.001
            if not wait_s:
                given_at.append(now)
    for index, begin in enumerate(given_at):
        for count, end in enumerate(given_at[index:], start=1):
            assert count <= most(rate, burst, end - begin)


@given(RATES, BURSTS)
def test_bucket_gives_what_it_promises_when_it_promised(rate: int, burst: int) -> None:
    bucket, now = Bucket(rate, min(burst, 50)), 5000.0
    assert [bucket.take(now) for _ in range(min(burst, 50))] == [0.0] * min(burst, 50)
    wait_s = bucket.take(now)
    assert wait_s > 0
    assert bucket.take(now + wait_s * 0.9) > 0
    assert bucket.take(now + wait_s * 1.001) == 0
    assert bucket.take(now + wait_s * 1.001) > 0


def test_twice_the_limit_offered_gives_the_limit() -> None:
    bucket = Bucket(100, 20)
    passed = sum(not bucket.take(index / 200) for index in range(10 * 200))
    assert passed == int(20 + 9.995 * 100)  # the last one came after 9.995 s


def test_bucket_of_another_size_lacks_the_same_part() -> None:
    bucket = Bucket(10, 10)
    for _ in range(5):
        bucket.take(0.0)
    bucket.resize(100, 4, 0.0)
    assert [bool(bucket.take(0.0)) for _ in range(3)] == [False, False, True]


@given(st.integers(1, 5), st.integers(1, 3), st.lists(st.tuples(st.integers(0, 9), st.floats(0, 2)), max_size=120))
def test_clients_of_a_full_table_never_gain_a_token(burst: int, most_clients: int, turns: list[Any]) -> None:
    """Buckets that nobody ever forgets are debited with all that the bounded table gives: none may be overdrawn."""
    table, now = ClientTable(1, burst, most_clients), 100.0
    truth = {client: Bucket(1, burst) for client in range(10)}
    for client, pause in turns:
        now += pause
        if not table.take(client, now):
            assert truth[client].take(now) == 0
        assert len(table) <= most_clients


@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 9), st.floats(0, 2)), max_size=120))
def test_clients_that_all_have_a_place_do_not_feel_each_other(burst: int, turns: list[Any]) -> None:
    table, now = ClientTable(1, burst, 10), 100.0
    alone = {client: Bucket(1, burst) for client in range(10)}
    for client, pause in turns:
        now += pause
        assert table.take(client, now) == alone[client].take(now)


def test_table_forgets_who_has_gone() -> None:
    table = ClientTable(10, 10, 1000)
    for index in range(5000):
        assert table.take(index, index * 1.0) == 0
    assert len(table) <= 2


def test_many_clients_at_once_share_what_the_newcomers_have() -> None:
    table = ClientTable(1, 2, 100)
    assert sum(not table.take(index, 1.0) for index in range(10_000)) == 100 + 2
    # A while later every bucket is full again, and the places are given to others.
    assert sum(not table.take(f"new {index}", 10.0) for index in range(100)) == 100


@pytest.mark.parametrize(("wait_s", "told"), [(0.0001, 1), (1.0, 1), (1.01, 2), (59.5, 60)])
def test_retry_after_is_never_too_early(wait_s: float, told: int) -> None:
    assert retry_after_s(wait_s) == told


# --- a bucket that replicas share ------------------------------------------------------------------------------------


class Memory:
    """What Redis keeps of a shared bucket, in this process and under a clock of the test's."""

    def __init__(self, bucket: SharedBucket, now: Callable[[], float]) -> None:
        self._bucket, self._now = bucket, now
        self._counter, self._expires_at = 0, 0.0
        self.replicas = 1
        self.error = ""
        self.is_silent = False
        self.takes_s = 0.0
        self.calls = 0

    async def take(self, asked: int) -> Grant:
        self.calls += 1
        if self.is_silent:
            await asyncio.Event().wait()
        if self.error:
            raise RedisUnavailable(self.error)
        await asyncio.sleep(self.takes_s)
        now, clock_ms = self._now(), int(self._now() * 1000)
        if now >= self._expires_at:
            self._counter = self._bucket.full(clock_ms)
        self._counter += asked
        grant = self._bucket.grant(asked, self._counter, clock_ms)
        assert grant is not None
        self._counter += grant.correction
        self._expires_at = max(self._expires_at, now + grant.full_in_s)
        return grant


class World:
    """Replicas of one model, with a clock."""

    def __init__(self, rate: int, burst: int, replicas: int = 3) -> None:
        self.now = 50.0
        bucket = SharedBucket(rate, burst)
        self.memory = Memory(bucket, lambda: self.now)
        self.refusals: list[PhoenixError] = []
        self.metrics = [ModelMetrics("m", "1") for _ in range(replicas)]
        self.limits = [
            SharedLimit(bucket, self.memory, metrics, lambda: self.now, name="m") for metrics in self.metrics
        ]

    async def ask(self, replica: int) -> bool:
        """Whether a replica lets a request through."""
        try:
            pending = self.limits[replica].take("", "", "")
            if pending is not None:
                await pending
        except PhoenixError as error:
            self.refusals.append(error)
            return False
        await asyncio.sleep(0)  # what was begun in the background has its turn
        return True

    async def offer(self, per_second: float, seconds: float, choose: Callable[[], int]) -> int:
        """How many of so many requests, spread evenly in time, are let through."""
        passed = 0
        for _ in range(int(per_second * seconds)):
            self.now += 1 / per_second
            passed += await self.ask(choose())
        return passed


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work

    asyncio.run(bounded())


@pytest.mark.parametrize("shares", [(1, 1, 1), (8, 1, 1), (1, 0, 0)], ids=["even", "uneven", "one"])
@pytest.mark.parametrize(("rate", "burst"), [(1, 1), (7, 3), (100, 10), (1000, 1000), (5, 300)])
def test_replicas_together_give_the_limit(rate: int, burst: int, shares: tuple[int, ...]) -> None:
    async def work() -> None:
        world, rng = World(rate, burst), random.Random(3)
        seconds = max(10, 4 * burst // rate)
        passed = await world.offer(2 * rate, seconds, lambda: rng.choices(range(3), shares)[0])
        if seconds * rate > burst:
            assert passed == pytest.approx(burst + rate * seconds, rel=0.05, abs=2)
        assert passed <= burst + rate * seconds + 1
        assert {error.code for error in world.refusals} == {Code.LIMITED}
        assert all(error.retry_after_s == 1 for error in world.refusals)

    run(work())


def test_below_the_limit_nothing_is_refused() -> None:
    async def work() -> None:
        world, rng = World(100, 100), random.Random(4)
        assert await world.offer(90, 20, lambda: rng.randrange(3)) == 90 * 20

    run(work())


def test_idle_bucket_gives_its_burst_and_no_more() -> None:
    async def work() -> None:
        world = World(10, 40)
        for _ in range(3):
            passed = [await world.ask(index % 3) for index in range(100)]
            assert sum(passed) == 40
            world.now += 60

    run(work())


def test_busy_replica_asks_redis_seldom() -> None:
    async def work() -> None:
        world = World(10_000, 10_000, replicas=1)
        assert await world.offer(9000, 2, lambda: 0) == 18_000
        assert world.memory.calls < 200
        world.memory.calls = 0
        await world.offer(40_000, 2, lambda: 0)
        assert world.memory.calls <= 2 / 0.01 + 50

    run(work())


def test_without_redis_each_replica_keeps_to_its_part(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        world, rng = World(90, 90), random.Random(5)
        world.memory.replicas = 3
        await world.offer(180, 5, lambda: rng.randrange(3))
        world.memory.error = "gone"
        passed = await world.offer(180, 10, lambda: rng.randrange(3))
        assert passed == pytest.approx(900, rel=0.05)
        assert sum(metrics.unshared_limits for metrics in world.metrics) == pytest.approx(1800, rel=0.05)
        world.memory.error = ""
        assert await world.offer(180, 10, lambda: rng.randrange(3)) == pytest.approx(900, rel=0.15)

    with caplog.at_level("INFO", "phoenix_server.rate_limits"):
        run(work())
    lines = [record.getMessage() for record in caplog.records]
    assert sorted(set(lines)) == [
        "the rate limit is not shared: this replica keeps to its part", "the rate limit is shared again",
    ]  # fmt: skip
    assert len(lines) == 6  # one of each for each replica


def test_redis_that_comes_and_goes_opens_nothing() -> None:
    async def work() -> None:
        world, passed = World(100, 100, replicas=1), 0
        for turn in range(40):
            world.memory.error = "gone" if turn % 2 else ""
            passed += await world.offer(200, 0.7, lambda: 0)
        assert passed <= 1.15 * (100 + 100 * 28)

    run(work())


def test_redis_that_is_silent_holds_nobody_up() -> None:
    async def work() -> None:
        world = World(10, 10, replicas=1)
        world.memory.is_silent = True
        passed = await asyncio.gather(*(world.ask(0) for _ in range(30)))
        assert sum(passed) == 10
        assert world.metrics[0].unshared_limits == 30

    run(work())


def test_redis_that_is_too_slow_is_no_second_limit() -> None:
    async def work() -> None:
        world, passed = World(10, 10, replicas=1), 0
        world.memory.takes_s = 0.15  # longer than anybody waits
        for _ in range(11):
            passed += sum(await asyncio.gather(*(world.ask(0) for _ in range(40))))
            await asyncio.sleep(world.memory.takes_s)
            world.now += 0.5
        assert 0.9 * (10 + 10 * 5) <= passed <= 1.1 * (10 + 10 * 5)

    run(work())


def test_waiting_caller_that_goes_takes_nothing_with_it() -> None:
    async def work() -> None:
        world = World(5, 5, replicas=1)
        callers = [asyncio.create_task(world.ask(0)) for _ in range(5)]
        await asyncio.sleep(0)
        for caller in callers[:3]:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        assert [await world.ask(0) for _ in range(4)].count(True) >= 3

    run(work())


@given(st.integers(1, 1000), st.integers(1, 1000), st.lists(st.tuples(st.integers(0, 400), st.integers(1, 70))))
def test_shared_bucket_never_gives_more_than_burst_and_rate(rate: int, burst: int, turns: list[Any]) -> None:
    async def work() -> None:
        world = World(rate, burst)
        given_at: list[tuple[float, int]] = []
        for pause_ms, asked in turns:
            world.now += pause_ms / 1000
            given_at.append((world.now, (await world.memory.take(asked)).tokens))
        for index, (begin, _) in enumerate(given_at):
            total = 0
            for end, tokens in given_at[index:]:
                total += tokens
                assert total <= burst + rate * (end - begin + 0.002) + 1

    run(work())


@pytest.mark.parametrize("counter", [-(10**9), 10**9])
def test_counter_that_is_another_ones_is_told(counter: int) -> None:
    assert SharedBucket(10, 10).grant(1, counter, 60_000) is None


@pytest.mark.parametrize(
    ("asked", "there", "tokens", "correction", "wait_s"),
    [
        (3, 10, 3, 0, 0.0),
        (10, 10, 10, 0, 0.0),
        (15, 10, 10, -5, 0.1),
        (1, 0, 0, -1, 0.1),
        (4, -7, 0, -4, 0.1),  # others ask for too much, and put it back
        (15, 20, 10, 5, 0.1),  # remembered for too long: what did not fit is taken too
    ],
)
def test_grant_is_what_is_there(asked: int, there: int, tokens: int, correction: int, wait_s: float) -> None:
    grant = SharedBucket(10, 10).grant(asked, 600 - there + asked, 60_000)
    assert grant is not None
    assert (grant.tokens, grant.correction, grant.wait_s) == (tokens, correction, wait_s)
    assert grant.full_in_s == (10 - min(there, 10) + tokens) / 10
