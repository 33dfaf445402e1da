"""The queue of keys, under virtual time."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import virtual_time
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_time import now, settle

from phoenix_operator.queue import KeyedQueue

Handle = Callable[[str], Awaitable[float | None]]


class Handler:
    """Records what it is given and when. A key stays with it for `takes_s`, or until `let_go` where `holds` says so."""

    def __init__(self, *, holds: bool = False, takes_s: float = 0) -> None:
        self._takes_s = takes_s
        self.overlaps: list[str] = []  # keys that two workers had at once
        self.seen: list[tuple[str, float]] = []
        self.active: list[str] = []
        self.failures: dict[str, int] = {}  # how often a key still fails
        self.delays: dict[str, float] = {}  # what a key's next handling returns
        self._gate = asyncio.Event()
        self.started = now()
        if not holds:
            self._gate.set()

    @property
    def keys(self) -> list[str]:
        return [key for key, _ in self.seen]

    def times(self, key: str) -> list[float]:
        return [round(at, 6) for seen, at in self.seen if seen == key]

    def let_go(self) -> None:
        self._gate.set()

    async def __call__(self, key: str) -> float | None:
        self.overlaps += [key] if key in self.active else []
        self.active.append(key)
        self.seen.append((key, now() - self.started))
        try:
            await self._gate.wait()
            if self._takes_s:
                await asyncio.sleep(self._takes_s)
            if self.failures.get(key, 0) > 0:
                self.failures[key] -= 1
                raise ValueError(key)
            return self.delays.pop(key, None)
        finally:
            self.active.remove(key)


def queue() -> KeyedQueue[str]:
    return KeyedQueue(jitter=lambda: 1.0)


def work(queue: KeyedQueue[str], handle: Handle, count: int = 1) -> list[asyncio.Task[None]]:
    return [asyncio.create_task(queue.work(handle)) for _ in range(count)]


def test_key_added_twice_is_handled_once() -> None:
    async def main() -> list[str]:
        waiting, handler = queue(), Handler()
        for key in ("a", "b", "a"):
            waiting.add(key)
        assert waiting.depth == 2
        work(waiting, handler)
        await settle()
        assert waiting.depth == 0
        return handler.keys

    assert virtual_time.run(main()) == ["a", "b"]


def test_key_added_while_it_is_handled_is_handled_once_more() -> None:
    async def main() -> list[str]:
        waiting, handler = queue(), Handler(holds=True)
        work(waiting, handler, 4)
        waiting.add("a")
        await settle()
        for _ in range(3):
            waiting.add("a")
            await settle()
        assert handler.keys == ["a"]
        handler.let_go()
        await settle()
        assert handler.overlaps == []
        return handler.keys

    assert virtual_time.run(main()) == ["a", "a"]


def test_keys_are_handled_side_by_side_up_to_the_number_of_workers() -> None:
    async def main() -> list[str]:
        waiting, handler = queue(), Handler(holds=True)
        work(waiting, handler, 2)
        for key in "abc":
            waiting.add(key)
        await settle()
        return sorted(handler.active)

    assert virtual_time.run(main()) == ["a", "b"]


def test_failing_key_comes_back_after_delays_that_double_up_to_the_cap() -> None:
    async def main() -> list[float]:
        waiting, handler = queue(), Handler()
        handler.failures["a"] = 12
        work(waiting, handler)
        waiting.add("a")
        await asyncio.sleep(3600)
        assert waiting.retries() == 0
        times = handler.times("a")
        return [after - before for before, after in itertools.pairwise(times)]

    assert virtual_time.run(main()) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]


def test_backoff_starts_anew_after_a_success() -> None:
    async def main() -> list[float]:
        waiting, handler = queue(), Handler()
        work(waiting, handler)
        for _ in range(2):
            handler.failures["a"] = 2
            waiting.add("a")
            await asyncio.sleep(100)
        return handler.times("a")

    assert virtual_time.run(main()) == [0, 1, 3, 100, 101, 103]


def test_thousandth_failure_still_has_a_finite_delay() -> None:
    async def main() -> int:
        waiting, handler = queue(), Handler()
        handler.failures["a"] = 2000
        work(waiting, handler)
        waiting.add("a")
        await asyncio.sleep(300 * 1100)
        return len(handler.keys)

    assert virtual_time.run(main()) > 1000


def test_jitter_stretches_the_delay() -> None:
    async def main() -> list[float]:
        waiting, handler = KeyedQueue[str](jitter=lambda: 1.2), Handler()
        handler.failures["a"] = 1
        work(waiting, handler)
        waiting.add("a")
        await asyncio.sleep(10)
        return handler.times("a")

    assert virtual_time.run(main()) == [0, 1.2]


def test_forgotten_key_has_neither_backoff_nor_a_delayed_entry() -> None:
    async def main() -> list[float]:
        waiting, handler = queue(), Handler()
        handler.failures["a"] = 3
        work(waiting, handler)
        waiting.add("a")
        await asyncio.sleep(4)  # failed at 0, 1 and 3; the next would be at 7
        waiting.forget("a")
        assert waiting.retries() == 0
        await asyncio.sleep(100)
        return handler.times("a")

    assert virtual_time.run(main()) == [0, 1, 3]


def test_event_does_not_wait_for_the_backoff() -> None:
    async def main() -> list[float]:
        waiting, handler = queue(), Handler()
        handler.failures["a"] = 1
        work(waiting, handler)
        waiting.add("a")
        await asyncio.sleep(0.5)
        waiting.add("a")
        await asyncio.sleep(100)
        return handler.times("a")

    assert virtual_time.run(main()) == [0, 0.5]


def test_delayed_keys_come_in_the_order_of_their_times() -> None:
    async def main() -> list[tuple[str, float]]:
        waiting, handler = queue(), Handler()
        work(waiting, handler)
        for key, delay_s in (("c", 3), ("a", 1), ("b", 2)):
            waiting.add_after(key, delay_s)
        await asyncio.sleep(10)
        return handler.seen

    assert virtual_time.run(main()) == [("a", 1), ("b", 2), ("c", 3)]


@pytest.mark.parametrize("delays", [(5, 2), (2, 5), (2, 2)])
def test_earliest_of_several_delays_wins(delays: tuple[float, ...]) -> None:
    async def main() -> list[float]:
        waiting, handler = queue(), Handler()
        work(waiting, handler)
        for delay_s in delays:
            waiting.add_after("a", delay_s)
        await asyncio.sleep(100)
        return handler.times("a")

    assert virtual_time.run(main()) == [2]


def test_delayed_key_that_is_added_at_once_does_not_come_again() -> None:
    async def main() -> list[float]:
        waiting, handler = queue(), Handler()
        work(waiting, handler)
        waiting.add_after("a", 5)
        waiting.add("a")
        waiting.add_after("a", 7)  # it waits already
        await asyncio.sleep(100)
        return handler.times("a")

    assert virtual_time.run(main()) == [0]


def test_handler_says_when_to_look_again() -> None:
    async def main() -> list[float]:
        waiting, handler = queue(), Handler()
        handler.delays["a"] = 15
        work(waiting, handler)
        waiting.add("a")
        await asyncio.sleep(100)
        return handler.times("a")

    assert virtual_time.run(main()) == [0, 15]


def test_wish_to_look_again_gives_way_to_a_key_added_meanwhile() -> None:
    async def main() -> list[float]:
        waiting, handler = queue(), Handler(holds=True)
        handler.delays["a"] = 15
        work(waiting, handler)
        waiting.add("a")
        await settle()
        waiting.add("a")
        handler.let_go()
        await asyncio.sleep(100)
        return handler.times("a")

    assert virtual_time.run(main()) == [0, 0]


def test_closed_queue_hands_out_nothing_and_lets_running_work_end() -> None:
    async def main() -> list[str]:
        waiting, handler = queue(), Handler(holds=True)
        workers = work(waiting, handler, 2)
        for key in "abc":
            waiting.add(key)
        await settle()
        waiting.close()
        await settle()
        assert not any(worker.done() for worker in workers)
        handler.let_go()
        await asyncio.gather(*workers)
        return handler.keys

    assert sorted(virtual_time.run(main())) == ["a", "b"]


def test_idle_workers_end_when_the_queue_is_closed() -> None:
    async def main() -> None:
        waiting = queue()
        waiting.add_after("a", 60)
        workers = work(waiting, Handler(), 3)
        await settle()
        waiting.close()
        await asyncio.gather(*workers)

    virtual_time.run(main())


def test_age_counts_waiting_and_handling() -> None:
    async def main() -> None:
        waiting, handler = queue(), Handler(holds=True)
        assert waiting.oldest_s() == 0
        waiting.add("a")
        await asyncio.sleep(2)
        assert waiting.oldest_s() == pytest.approx(2)
        work(waiting, handler)
        await asyncio.sleep(3)
        assert waiting.oldest_s() == pytest.approx(3)
        handler.let_go()
        await settle()
        assert waiting.oldest_s() == 0

    virtual_time.run(main())


def test_cancelled_worker_gives_its_key_back() -> None:
    async def main() -> list[str]:
        waiting, handler = queue(), Handler(holds=True)
        (worker,) = work(waiting, handler)
        waiting.add("a")
        await settle()
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker
        handler.let_go()
        work(waiting, handler)
        waiting.add("a")
        await settle()
        return handler.keys

    assert virtual_time.run(main()) == ["a", "a"]


STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "after", "fail", "forget", "sleep"]), st.sampled_from("abc"), st.integers(0, 9)),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.integers(1, 4))
def test_every_interleaving_handles_each_key_after_its_last_add(
    steps: list[tuple[str, str, int]], workers: int
) -> None:
    """And never are two workers on one key."""

    async def main() -> None:
        waiting, handler = queue(), Handler(takes_s=1.5)
        last_add: dict[str, float] = {}
        tasks = work(waiting, handler, workers)
        for what, key, number in steps:
            if what == "add":
                waiting.add(key)
                last_add[key] = now() - handler.started
            elif what == "after":
                waiting.add_after(key, number)
            elif what == "fail":
                handler.failures[key] = number
            elif what == "forget":
                waiting.forget(key)
            else:
                await asyncio.sleep(number / 2)
        await asyncio.sleep(10_000)
        assert waiting.depth == 0
        assert waiting.oldest_s() == 0
        assert handler.overlaps == []
        for key, at in last_add.items():
            assert handler.times(key)[-1] >= round(at, 6)
        assert not any(task.done() for task in tasks)

    virtual_time.run(main())
