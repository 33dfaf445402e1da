"""Runs blocking calls with a deadline that holds: in a thread that is given up when a call does not return."""

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_Call = tuple[Callable[[], object], "queue.SimpleQueue[tuple[object, BaseException | None]]"]


class Abandoned(Exception):
    """A call did not return in time. It may yet; whatever it holds is never to be used again."""


class AbandonableThread:
    """One thread for calls of a library that may hang. A daemon: a hanging call does not keep the process."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, args=(self._calls,), name=name, daemon=True).start()

    def call(self, function: Callable[[], T], within_s: float) -> T:
        """Return what `function` returns or raise what it raises; raise `Abandoned` after `within_s` seconds."""
        answer: queue.SimpleQueue[tuple[object, BaseException | None]] = queue.SimpleQueue()
        self._calls.put((function, answer))
        try:
            value, error = answer.get(timeout=within_s)
        except queue.Empty:
            raise Abandoned(f"no return within {within_s:g} s") from None
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def end(self) -> None:
        """Let the thread end, once it returns from what it does."""
        self._calls.put(None)

    @staticmethod
    def _run(calls: "queue.SimpleQueue[_Call | None]") -> None:
        while (call := calls.get()) is not None:
            function, answer = call
            try:
                answer.put((function(), None))
            except BaseException as error:
                answer.put((None, error))
            # What the call used is let go in this thread: to free a client may block.
            del call, function, answer
