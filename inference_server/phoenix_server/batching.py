"""Batches requests without a timer: a batch is what queued while the last one ran.

Hides queueing, grouping, deadlines, cancellation and the retry of a failed batch. `DataPlane` submits, a `Runner`
(see `engine`) executes. Everything here happens on the event loop's thread; only the runner may use another.

Rules, each a test: only requests of one key (dtypes, trailing shapes, outputs) share a run; at most `max_rows` rows in
a run (a larger request runs alone); a caller that is cancelled or out of time frees its place and never harms its
neighbours; a batch that fails is run once more request by request, so that one poisoned row fails alone; each future
resolves exactly once.
"""

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from phoenix_server.engine import Run, Runner
from phoenix_server.errors import Code, PhoenixError
from phoenix_server.metrics import ModelMetrics
from phoenix_server.tensors import Array

_clock_ns = time.perf_counter_ns


@dataclass(slots=True, eq=False)
class _Waiting:
    """One request in the queue or in a run."""

    inputs: dict[str, Array]
    output_names: tuple[str, ...]
    rows: int
    key: object
    future: "asyncio.Future[list[Array]]"
    queued_at: float
    deadline: float
    queued_ns: int = field(default_factory=_clock_ns)


class Batcher:
    """The queue in front of one loaded model. Times are in seconds unless the name says otherwise."""

    def __init__(
        self,
        runner: Runner,
        metrics: ModelMetrics,
        *,
        max_rows: int,
        max_queued_rows: int,
        max_delay_s: float = 0.0,
        timeout_s: float,
    ) -> None:
        """`max_rows` 1 turns batching off. `timeout_s` bounds a request's time in queue and run."""
        self._loop = asyncio.get_running_loop()
        self._runner = runner
        self._metrics = metrics
        self._max_rows = max_rows
        self._max_queued_rows = max_queued_rows
        self._max_delay_s = max_delay_s
        self._timeout_s = timeout_s
        self._queue: deque[_Waiting] = deque()
        self._deadlines: deque[_Waiting] = deque()
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._free_slots = runner.slots
        self._is_dispatch_due = False
        self._is_dispatching = False
        self._delay_timer: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self.queued_rows = 0

    @property
    def is_full(self) -> bool:
        """Whether a new request would be refused."""
        if self.queued_rows < self._max_queued_rows:
            return False
        self._drop_abandoned()
        return self.queued_rows >= self._max_queued_rows

    def waiting_rows(self) -> int:
        """Return the rows that somebody still waits for; exact, and slower than `queued_rows`."""
        self._drop_abandoned()
        return self.queued_rows

    def overloaded(self) -> PhoenixError:
        """Return the refusal for a full queue."""
        return PhoenixError(
            Code.OVERLOADED,
            f"the queue is full: {self.queued_rows} rows wait, at most {self._max_queued_rows} may; try again later",
            retry_after_s=1,
        )

    def submit(
        self, inputs: dict[str, Array], output_names: tuple[str, ...], rows: int, *, timeout_us: int = 0
    ) -> "asyncio.Future[list[Array]]":
        """Queue a request; the future gives its outputs, in the order of `output_names`, with exactly its rows.

        Raises `PhoenixError(OVERLOADED)` when the queue is full. The future fails with DEADLINE or INTERNAL.
        """
        if self.is_full:
            raise self.overloaded()
        loop = self._loop
        # Trailing shapes and dtypes decide with whom a request may share a run.
        key: object = object()
        if self._max_rows > 1:
            key = (output_names, *[(array.dtype, array.shape[1:]) for array in inputs.values()])
        future: asyncio.Future[list[Array]] = loop.create_future()
        now = loop.time()
        waiting = _Waiting(inputs, output_names, rows, key, future, now, now + self._timeout_s)
        self._queue.append(waiting)
        self.queued_rows += rows
        self._idle.clear()
        if timeout_us and timeout_us * 1e-6 < self._timeout_s:
            waiting.deadline = now + timeout_us * 1e-6
            timer = loop.call_at(waiting.deadline, self._expire, waiting)
            future.add_done_callback(lambda _: timer.cancel())
        else:
            self._watch_deadline(waiting)
        if not self._is_dispatch_due:
            self._is_dispatch_due = True
            # Not at once: requests decoded in the same turn of the loop then share a run.
            loop.call_soon(self._dispatch)
        return future

    async def drain(self) -> None:
        """Wait until nothing is queued or running."""
        await self._idle.wait()

    def _watch_deadline(self, waiting: _Waiting) -> None:
        """Keep the one timer that serves all requests with the model's own timeout, which expire in order."""
        deadlines = self._deadlines
        while deadlines and deadlines[0].future.done():
            deadlines.popleft()
        deadlines.append(waiting)
        if self._deadline_timer is None:
            self._deadline_timer = self._loop.call_at(deadlines[0].deadline, self._expire_oldest)

    def _expire_oldest(self) -> None:
        self._deadline_timer = None
        deadlines, now = self._deadlines, self._loop.time()
        while deadlines and (deadlines[0].future.done() or deadlines[0].deadline <= now):
            self._expire(deadlines.popleft())
        if deadlines:
            self._deadline_timer = self._loop.call_at(deadlines[0].deadline, self._expire_oldest)

    def _expire(self, waiting: _Waiting) -> None:
        if not waiting.future.done():
            waited_s = self._loop.time() - waiting.queued_at
            waiting.future.set_exception(
                PhoenixError(Code.DEADLINE, f"the deadline passed after {waited_s:.3f} s in queue and run")
            )
            self._drop_abandoned()

    def _dispatch(self) -> None:
        """Start as many runs as there are free slots."""
        self._is_dispatch_due = False
        self._is_dispatching = True
        while self._queue and self._free_slots:
            if self._max_delay_s and self._must_wait():
                break
            if batch := self._take():
                self._start(batch)
        self._is_dispatching = False
        if not self._queue and self._free_slots == self._runner.slots:
            self._idle.set()

    def _drop_abandoned(self) -> None:
        """Forget queued requests whose caller is gone or out of time."""
        for waiting in [w for w in self._queue if w.future.done()]:
            self._queue.remove(waiting)
            self.queued_rows -= waiting.rows

    def _must_wait(self) -> bool:
        """Whether the manifest's `maxDelayMilliseconds` asks to wait for more rows; arms the timer if so."""
        oldest = self._queue[0]
        left_s = oldest.queued_at + self._max_delay_s - self._loop.time()
        if left_s <= 0 or sum(w.rows for w in self._queue if w.key == oldest.key) >= self._max_rows:
            return False
        if self._delay_timer is None:
            self._delay_timer = self._loop.call_later(left_s, self._delay_over)
        return True

    def _delay_over(self) -> None:
        self._delay_timer = None
        self._dispatch()

    def _take(self) -> list[_Waiting]:
        """Remove the oldest request and all that may share its run, oldest first; those without a caller just go."""
        queue, left = self._queue, deque[_Waiting]()
        batch: list[_Waiting] = []
        rows, max_rows = 0, self._max_rows
        while queue and (not batch or rows < max_rows):
            waiting = queue.popleft()
            if waiting.future.done():
                self.queued_rows -= waiting.rows
            elif not batch or (waiting.key == batch[0].key and rows + waiting.rows <= max_rows):
                batch.append(waiting)
                rows += waiting.rows
            else:
                left.append(waiting)
        queue.extendleft(reversed(left))
        self.queued_rows -= rows
        return batch

    def _start(self, batch: list[_Waiting]) -> None:
        started_ns = _clock_ns()
        for waiting in batch:
            self._metrics.queue.observe((started_ns - waiting.queued_ns) * 1e-9)
        first = batch[0]
        if len(batch) == 1:
            run = Run(first.inputs, first.output_names, first.rows)
        else:
            inputs = {name: np.concatenate([w.inputs[name] for w in batch]) for name in first.inputs}
            run = Run(inputs, first.output_names, sum(w.rows for w in batch))
        gathered_ns = _clock_ns() - started_ns
        self._free_slots -= 1
        self._runner.start(run, lambda run: self._finish(run, batch, gathered_ns))

    def _finish(self, run: Run, batch: list[_Waiting], gathered_ns: int) -> None:
        self._free_slots += 1
        if run.error is None:
            started_ns = _clock_ns()
            self._deliver(run, batch)
            split_ns = _clock_ns() - started_ns
            self._metrics.observe_batch(run.rows, len(batch), (gathered_ns, run.compute_ns, split_ns))
        elif len(batch) == 1:
            if not batch[0].future.done():
                batch[0].future.set_exception(run.error)
        else:
            self._retry_alone(batch)
        if not self._is_dispatching:  # an inline runner is still inside `_dispatch`, which goes on by itself
            self._dispatch()

    @staticmethod
    def _deliver(run: Run, batch: list[_Waiting]) -> None:
        if len(batch) == 1:
            if not batch[0].future.done():
                batch[0].future.set_result(list(run.outputs))
            return
        wrong = [n for n, out in zip(run.output_names, run.outputs, strict=True) if out.shape[:1] != (run.rows,)]
        begin = 0
        for waiting in batch:
            end = begin + waiting.rows
            if not waiting.future.done():
                if wrong:
                    waiting.future.set_exception(
                        PhoenixError(Code.INTERNAL, f"outputs {wrong} do not have one row for each input row")
                    )
                else:
                    waiting.future.set_result([output[begin:end] for output in run.outputs])
            begin = end

    def _retry_alone(self, batch: list[_Waiting]) -> None:
        """Queue each request of a failed batch once more, to run alone and before all others."""
        for waiting in reversed(batch):
            if not waiting.future.done():
                waiting.key = object()
                self._queue.appendleft(waiting)
                self.queued_rows += waiting.rows
