"""An event loop whose clock jumps: when nothing can run and no socket speaks, time moves on to the next timer.

`time.monotonic` is the loop's clock meanwhile. Sockets are real, so a client and a server in the same loop talk as they
always do; a silence of a tenth of a real second is what makes the clock jump, which a busy machine keeps too.
"""

import asyncio
import selectors
import time
from collections.abc import Coroutine
from typing import Any, TypeVar
from unittest.mock import patch

T = TypeVar("T")
_SILENCE_S = 0.1
_DEADLOCK_S = 5.0


class _JumpingSelector(selectors.DefaultSelector):
    """A selector that lets the clock of its loop jump instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            if not (events := super().select(_DEADLOCK_S)):
                raise RuntimeError("no task can run, no timer is set and no socket speaks: this would wait for ever")
            return events
        # one entry is the loop's own wake-up pipe: with no other socket there is nothing to listen for
        events = super().select(_SILENCE_S if timeout > 0 and len(self.get_map()) > 1 else 0)
        if not events and timeout > 0:
            self.now += timeout
        return events


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop in which an hour takes no time."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now

    def block(self, seconds: float) -> None:
        """Let time pass while nothing can run, as a call that blocks does."""
        self._jumping.now += seconds


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine under virtual time; what it leaves running is cancelled."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        loop = runner.get_loop()
        with patch.object(time, "monotonic", loop.time):
            return runner.run(main)


def now() -> float:
    """Return the virtual time."""
    return asyncio.get_running_loop().time()


async def settle() -> None:
    """Let every task run until it waits for time or a socket."""
    for _ in range(50):
        await asyncio.sleep(0)
