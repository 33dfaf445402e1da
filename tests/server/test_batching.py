"""The batcher under virtual time with a fake engine: grouping, deadlines, cancellation, poisoned rows."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phoenix_server.batching import Batcher
from phoenix_server.engine import Run
from phoenix_server.errors import Code, PhoenixError
from phoenix_server.metrics import ModelMetrics

POISON = -1.0


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        real_select = self._selector.select  # type: ignore[attr-defined]

        def select(timeout: float | None = None) -> Any:
            events = real_select(0)
            if not events:
                assert timeout is not None, "the loop would wait for ever"
                self._now += timeout
            return events

        self._selector.select = select  # type: ignore[attr-defined]

    def time(self) -> float:
        return self._now


def run(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main)


class FakeRunner:
    """Doubles its input; a run takes `seconds` of virtual time; a row of POISON fails the whole run."""

    def __init__(self, seconds: float = 1.0, slots: int = 1) -> None:
        self.slots = slots
        self.seconds = seconds
        self.runs: list[list[float]] = []
        self.running = 0

    def start(self, run: Run, done: Callable[[Run], None]) -> None:
        rows = run.inputs["x"]
        self.runs.append([float(value) for value in rows[:, 0]])
        self.running += 1
        assert self.running <= self.slots

        def finish() -> None:
            self.running -= 1
            if (rows == POISON).any():
                run.error = PhoenixError(Code.INTERNAL, "poisoned")
            else:
                run.outputs = [rows * 2]
            done(run)

        asyncio.get_running_loop().call_later(self.seconds, finish)

    def close(self) -> None:
        pass


def new_batcher(runner: FakeRunner, **options: Any) -> Batcher:
    defaults: dict[str, Any] = {"max_rows": 4, "max_queued_rows": 100, "timeout_s": 100.0}
    return Batcher(runner, ModelMetrics("m", "1"), **(defaults | options))


def rows(*values: float, width: int = 1) -> dict[str, Any]:
    return {"x": np.array([[value] * width for value in values], dtype=np.float32)}


def submit(batcher: Batcher, *values: float, width: int = 1, timeout_us: int = 0) -> "asyncio.Future[list[Any]]":
    return batcher.submit(rows(*values, width=width), ("y",), len(values), timeout_us=timeout_us)


def test_batch_is_what_queued_while_the_last_one_ran() -> None:
    async def main() -> None:
        runner = FakeRunner()
        batcher = new_batcher(runner)
        first = submit(batcher, 1)
        await asyncio.sleep(0.5)
        others = [submit(batcher, value) for value in (2, 3, 4)]
        assert batcher.queued_rows == 3
        answers = await asyncio.gather(first, *others)
        assert [float(answer[0][0, 0]) for answer in answers] == [2, 4, 6, 8]
        assert runner.runs == [[1], [2, 3, 4]]
        assert asyncio.get_running_loop().time() == 2.0

    run(main())


def test_lone_request_starts_at_once() -> None:
    async def main() -> None:
        runner = FakeRunner(seconds=0.0)
        await submit(new_batcher(runner), 1)
        assert asyncio.get_running_loop().time() == 0.0

    run(main())


def test_requests_of_one_turn_share_a_run() -> None:
    async def main() -> None:
        runner = FakeRunner()
        batcher = new_batcher(runner)
        await asyncio.gather(*(submit(batcher, value) for value in (1, 2, 3)))
        assert runner.runs == [[1, 2, 3]]

    run(main())


def test_max_rows_bounds_a_run_and_a_larger_request_runs_alone() -> None:
    async def main() -> None:
        runner = FakeRunner()
        batcher = new_batcher(runner)
        await asyncio.gather(
            submit(batcher, 1, 2, 3), submit(batcher, 4, 5), submit(batcher, 6), submit(batcher, *range(10, 20))
        )
        assert runner.runs == [[1, 2, 3, 6], [4, 5], list(range(10, 20))]

    run(main())


def test_other_shapes_and_outputs_never_share_a_run() -> None:
    async def main() -> None:
        runner = FakeRunner()
        batcher = new_batcher(runner)
        other = batcher.submit(rows(9), ("z",), 1)
        await asyncio.gather(submit(batcher, 1), submit(batcher, 2, width=3), other, submit(batcher, 3))
        assert runner.runs == [[9], [1, 3], [2]]

    run(main())


def test_max_rows_one_never_batches() -> None:
    async def main() -> None:
        runner = FakeRunner()
        batcher = new_batcher(runner, max_rows=1)
        await asyncio.gather(*(submit(batcher, value) for value in (1, 2, 3)))
        assert runner.runs == [[1], [2], [3]]

    run(main())


def test_all_slots_are_used() -> None:
    async def main() -> None:
        runner = FakeRunner(slots=2)
        batcher = new_batcher(runner, max_rows=2)
        await asyncio.gather(*(submit(batcher, value) for value in range(4)))
        assert runner.runs == [[0, 1], [2, 3]]
        assert asyncio.get_running_loop().time() == 1.0

    run(main())


def test_max_delay_waits_for_rows_and_no_longer() -> None:
    async def main() -> None:
        runner = FakeRunner(seconds=0.0)
        batcher = new_batcher(runner, max_delay_s=0.25)
        first = submit(batcher, 1)
        await asyncio.sleep(0.1)
        await asyncio.gather(first, submit(batcher, 2))
        assert runner.runs == [[1, 2]]
        assert asyncio.get_running_loop().time() == pytest.approx(0.25)
        await asyncio.gather(*(submit(batcher, value) for value in range(4)))  # full: no reason to wait
        assert asyncio.get_running_loop().time() == pytest.approx(0.25)

    run(main())


def test_full_queue_refuses_and_says_when_to_come_back() -> None:
    async def main() -> None:
        runner = FakeRunner()
        batcher = new_batcher(runner, max_rows=1, max_queued_rows=2)
        running = submit(batcher, 0)
        await asyncio.sleep(0.1)
        waiting = [submit(batcher, 1), submit(batcher, 2)]
        assert batcher.is_full
        with pytest.raises(PhoenixError, match="2 rows wait, at most 2") as refused:
            submit(batcher, 3)
        assert refused.value.code is Code.OVERLOADED
        assert refused.value.retry_after_s == 1
        waiting[0].cancel()  # a caller that goes frees its place
        await asyncio.gather(running, waiting[1], submit(batcher, 4))
        assert runner.runs == [[0], [2], [4]]

    run(main())


@pytest.mark.parametrize("timeout_us", [0, 500_000])
def test_deadline_passes_in_the_queue(timeout_us: int) -> None:
    async def main() -> None:
        runner = FakeRunner(seconds=10)
        batcher = new_batcher(runner, max_rows=1, timeout_s=0.5 if not timeout_us else 50)
        running = submit(batcher, 1, timeout_us=timeout_us)
        waiting = submit(batcher, 2, timeout_us=timeout_us)
        for future in (running, waiting):
            with pytest.raises(PhoenixError, match="deadline") as late:
                await future
            assert late.value.code is Code.DEADLINE
        assert asyncio.get_running_loop().time() == 0.5
        assert batcher.queued_rows == 0
        await batcher.drain()
        assert runner.runs == [[1]]

    run(main())


def test_cancelled_neighbour_harms_nobody() -> None:
    async def main() -> None:
        runner = FakeRunner()
        batcher = new_batcher(runner)
        futures = [submit(batcher, value) for value in (1, 2, 3)]
        await asyncio.sleep(0.5)
        futures[1].cancel()
        assert [float((await futures[i])[0][0, 0]) for i in (0, 2)] == [2, 6]
        assert runner.runs == [[1, 2, 3]]

    run(main())


def test_poisoned_row_fails_alone() -> None:
    async def main() -> None:
        runner = FakeRunner()
        batcher = new_batcher(runner)
        answers = await asyncio.gather(*(submit(batcher, value) for value in (1, POISON, 3)), return_exceptions=True)
        assert isinstance(answers[1], PhoenixError)
        assert [float(answers[i][0][0, 0]) for i in (0, 2)] == [2, 6]  # type: ignore[index]
        assert runner.runs == [[1, POISON, 3], [1], [POISON], [3]]
        assert batcher.queued_rows == 0

    run(main())


def test_drain_waits_for_queue_and_run() -> None:
    async def main() -> None:
        batcher = new_batcher(FakeRunner(), max_rows=1)
        futures = [submit(batcher, value) for value in (1, 2)]
        await batcher.drain()
        assert all(future.done() for future in futures)
        assert asyncio.get_running_loop().time() == 2.0

    run(main())


actions = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "submit", "cancel", "wait"]),
        st.integers(0, 5),
        st.sampled_from([1, 1, 2]),
        st.sampled_from([0, 0, 700_000]),
        st.booleans(),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(actions, st.integers(1, 3), st.integers(1, 6))
def test_every_caller_gets_exactly_its_own_rows(steps: list[Any], slots: int, max_rows: int) -> None:
    async def main() -> None:
        runner = FakeRunner(slots=slots)
        batcher = new_batcher(runner, max_rows=max_rows, timeout_s=3.0)
        pending: list[tuple[asyncio.Future[list[Any]], np.ndarray[Any, Any]]] = []
        serial = 0.0
        for action, number, width, timeout_us, is_poisoned in steps:
            if action == "submit":
                values = [serial + i for i in range(number)]
                serial += 10
                if is_poisoned and values:
                    values[0] = POISON
                sent = np.array([[value] * width for value in values], dtype=np.float32).reshape(len(values), width)
                pending.append((batcher.submit({"x": sent}, ("y",), len(values), timeout_us=timeout_us), sent))
            elif action == "cancel" and pending:
                pending[number % len(pending)][0].cancel()
            else:
                await asyncio.sleep(number * 0.3)
        await asyncio.gather(*(future for future, _ in pending), return_exceptions=True)
        for future, sent in pending:
            if future.cancelled() or isinstance(future.exception(), PhoenixError):
                continue
            np.testing.assert_array_equal(future.result()[0], sent * 2)
            assert not (sent == POISON).any()
        await batcher.drain()
        assert batcher.queued_rows == 0

    run(main())
