"""A TCP proxy whose faults are switched while it runs: slow, hanging, refusing and resetting servers.

A fault also meets connections that are open already, as it does when a server or a network breaks.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lab import machine

Mode = Literal["pass", "delay", "hang", "refuse", "reset"]
_CHUNK_BYTES = 65_536
_DEADLINE_S = 10


@dataclass(frozen=True)
class _Fault:
    mode: Mode = "pass"
    delay_s: float = 0.0


class FaultyProxy:
    """Listens on 127.0.0.1 and hands everything on to `target_port`, as its mode allows.

    The port stays, as long as it lives.

    * `pass`: as if it were not there.
    * `delay`: each piece of an answer comes `delay_s` seconds later.
    * `hang`: connections are accepted, and nothing is ever answered.
    * `refuse`: open connections are closed, new ones refused.
    * `reset`: connections, open and new, end with a TCP reset.
    """

    def __init__(self, target_port: int, *, target_host: str = "127.0.0.1") -> None:
        self._target = (target_host, target_port)
        self._fault = _Fault()
        self._connections: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-proxy", daemon=True)
        self.host = "127.0.0.1"
        self.port = machine.free_port(self.host)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()
        self._do(self._listen())

    def close(self) -> None:
        """Close every connection and end the thread."""
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_DEADLINE_S)
        self._loop.close()

    def set(self, mode: Mode, *, delay_s: float = 0.0) -> None:
        """Switch to `mode`; when this returns it holds. `delay_s` is for `delay`."""
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, not {mode!r}")
        if (mode == "delay") != (delay_s > 0):
            raise ValueError("delay_s, in seconds, belongs to the mode delay, and only to it")
        self._do(self._set(_Fault(mode, delay_s)))

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_DEADLINE_S)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.host, self.port, limit=_CHUNK_BYTES)

    async def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _close(self) -> None:
        await self._stop_listening()
        await self._drop_connections()
        await asyncio.sleep(0)  # closed transports let go of their sockets

    async def _drop_connections(self) -> None:
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _set(self, fault: _Fault) -> None:
        self._fault = fault
        self._changed.set()
        self._changed = asyncio.Event()
        if fault.mode == "refuse":
            await self._stop_listening()
        elif self._server is None:
            await self._listen()
        if fault.mode in ("refuse", "reset"):
            await self._drop_connections()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if self._fault.mode != "reset":
                await self._hand_on(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # either side has gone, or the fault has ended the connection
        finally:
            self._connections.discard(task)
            if self._fault.mode == "reset":
                _reset_on_close(writer)
            writer.transport.abort() if self._fault.mode == "reset" else writer.close()

    async def _hand_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._while_hanging()
        server_reader, server_writer = await asyncio.open_connection(*self._target, limit=_CHUNK_BYTES)
        try:
            ways = [
                asyncio.create_task(self._pump(reader, server_writer, is_answer=False)),
                asyncio.create_task(self._pump(server_reader, writer, is_answer=True)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        finally:
            server_writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_answer: bool) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            if is_answer and self._fault.mode == "delay":
                await asyncio.sleep(self._fault.delay_s)
            await self._while_hanging()
            writer.write(data)
            await writer.drain()

    async def _while_hanging(self) -> None:
        while self._fault.mode == "hang":
            await self._changed.wait()


def _reset_on_close(writer: asyncio.StreamWriter) -> None:
    """Let the kernel send RST instead of FIN."""
    found = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextlib.contextmanager
def proxy_to(port: int, *, host: str = "127.0.0.1") -> Iterator[FaultyProxy]:
    """A running proxy for the block."""
    proxy = FaultyProxy(port, target_host=host)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.close()
