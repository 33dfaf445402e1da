"""One pipelined connection to Redis that is always there, or being made again.

Hides RESP, login, TLS, reconnecting and timeouts. `features` asks; whatever goes wrong is `RedisUnavailable`, whose
text names no secret. redis-py's client costs a multiple of what hiredis, its parser, does (see docs/decisions), and an
inference takes less time than one call of it. So this speaks the little that is needed itself: what is asked in one
turn of the loop leaves in one write, and replies are matched to what was asked by their order. That order is
everything: a connection on which anything unexpected arrives is closed, never resynchronised, so that no request can
get another one's answer.
"""

import asyncio
import logging
import os
import random
import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

import hiredis

from phoenix_server.binding_state import BindingState
from phoenix_server.redis_address import RedisAddress

_log = logging.getLogger(__name__)
# Commands that may wait for replies at once; beyond, Redis is not keeping up and more would only wait longer.
MAX_IN_FLIGHT = 65_536
_FIRST_DELAY_S, _MAX_DELAY_S = 0.05, 5.0
_PROBE_S = 5.0
# A connection that lived this long, or served a read, was a good one: when it ends, the next is made at once.
_STABLE_S = 5.0
# Timers run before sockets are read in a turn of the loop: look once more before calling a reply late.
_GRACE_S = 0.02
_INCOMPLETE = object()
_STATUS = 0

Reply = list[bytes | None] | None


class RedisUnavailable(Exception):
    """Redis did not answer, or refused; the text says why and is fit for logs, states and callers."""


@dataclass(frozen=True, slots=True)
class Fields:
    """Makes HMGET commands for `names` of hashes whose keys are `before`, an entity, and `after`."""

    names: tuple[str, ...]
    before: str = ""
    after: str = ""
    _head: str = field(init=False, repr=False)
    _tail: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_head", f"*{2 + len(self.names)}\r\n$5\r\nHMGET\r\n$")
        names = "".join(f"${len(name.encode())}\r\n{name}\r\n" for name in self.names)
        object.__setattr__(self, "_tail", f"{self.after}\r\n{names}")

    def read(self, entities: Sequence[str]) -> "Commands":
        """Return the HMGET of each entity as RESP: lengths go before strings, so no key can be anything else."""
        around = len(self.before.encode()) + len(self.after.encode())
        head, before, tail = self._head, self.before, self._tail
        if "".join(entities).isascii():
            parts = [f"{head}{around + len(entity)}\r\n{before}{entity}{tail}" for entity in entities]
        else:
            parts = [f"{head}{around + len(entity.encode())}\r\n{before}{entity}{tail}" for entity in entities]
        return Commands("".join(parts).encode(), len(entities), len(self.names))


@dataclass(frozen=True, slots=True)
class Commands:
    """Commands that leave together: RESP, how many they are, and the elements of each reply (0: one line).

    Of a transaction only the last reply has elements: it answers EXEC, with what each command in it gave.
    """

    payload: bytes = field(repr=False)  # may hold a login
    count: int
    width: int
    is_transaction: bool = False

    @classmethod
    def transaction(cls, commands: Sequence[Sequence[str | int]]) -> "Commands":
        """Return commands that Redis runs together, with no other between them."""
        words: list[tuple[Any, ...]] = [("MULTI",), *map(tuple, commands), ("EXEC",)]
        payload = b"".join(map(hiredis.pack_command, words))
        return cls(payload, len(words), len(commands), is_transaction=True)


@dataclass(slots=True, eq=False)
class _Asked:
    """Commands that were sent and the replies that have come."""

    commands: Commands
    future: "asyncio.Future[list[Any]]"
    sent_at: float
    replies: list[Any] = field(default_factory=list)


class _Connection(asyncio.Protocol):
    """One connection: sends, matches replies by order, and ends at the first surprise or late reply."""

    def __init__(self, timeout_s: float, on_lost: "Callable[[_Connection], None]") -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout_s = timeout_s
        self._on_lost = on_lost
        self._reader: Any = hiredis.Reader(notEnoughData=_INCOMPLETE)
        self._transport: asyncio.Transport | None = None
        self._asked: deque[_Asked] = deque()
        self._outbox: list[bytes] = []
        self._in_flight = 0
        self._timer: asyncio.TimerHandle | None = None
        self._cause = ""
        self.is_late = False
        self.is_useful = False
        self.lost: asyncio.Future[str] = self._loop.create_future()

    def ask(self, commands: Commands) -> "asyncio.Future[list[Any]]":
        """Send commands with the next flush; the future gives their replies in order."""
        count = commands.count
        if self.lost.done():
            raise RedisUnavailable(self.lost.result())
        if self._in_flight + count > MAX_IN_FLIGHT:
            raise RedisUnavailable(f"{self._in_flight} look-ups wait for Redis, at most {MAX_IN_FLIGHT} may")
        asked = _Asked(commands, self._loop.create_future(), self._loop.time())
        self._asked.append(asked)
        self._in_flight += count
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(commands.payload)
        if self._timer is None:
            self._timer = self._loop.call_at(asked.sent_at + self._timeout_s, self._look, False)
        return asked.future

    def close(self, cause: str) -> None:
        """End the connection; whoever waits learns the cause."""
        self._cause = self._cause or cause
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio calls these -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        if self._cause:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        cause = self._cause or (f"the connection broke: {_described(exc)}" if exc else "Redis closed the connection")
        if self._timer is not None:
            self._timer.cancel()
        self.lost.set_result(cause)
        self._on_lost(self)  # before anybody learns that an answer will not come, and asks again
        for asked in self._asked:
            if not asked.future.done():
                asked.future.set_exception(RedisUnavailable(cause))
        self._asked.clear()
        self._outbox.clear()

    def data_received(self, data: bytes) -> None:
        if self._cause:
            return
        gets, found = self._reader.gets, []
        try:
            self._reader.feed(data)
            while (reply := gets()) is not _INCOMPLETE:
                found.append(reply)
        except hiredis.HiredisError:
            return self.close("what answers does not speak Redis' protocol")
        begin, asked = 0, self._asked
        while begin < len(found):
            if not asked:
                return self.close("Redis sent a reply that nothing asked for")
            first = asked[0]
            commands = first.commands
            part = found[begin : begin + commands.count - len(first.replies)]
            is_answer = (
                _is_answer_to_transaction(part, commands, len(first.replies))
                if commands.is_transaction
                else _is_answer(part, commands.width)
            )
            if not is_answer:
                return self.close("Redis sent a reply of another form than was asked for")
            begin += len(part)
            first.replies += part
            if len(first.replies) == commands.count:
                asked.popleft()
                self._in_flight -= commands.count
                self.is_useful |= commands.width != _STATUS
                if not first.future.done():  # else its caller has gone
                    first.future.set_result(first.replies)

    # -----------------------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        if self._outbox and self._transport is not None and not self._cause:
            self._transport.write(b"".join(self._outbox))
        self._outbox.clear()

    def _look(self, is_second_look: bool) -> None:
        """Close the connection if the oldest reply is late. One timer serves all, since replies come in order."""
        self._timer = None
        if not self._asked:
            return
        due_at = self._asked[0].sent_at + self._timeout_s
        now = self._loop.time()
        if now < due_at:
            self._timer = self._loop.call_at(due_at, self._look, False)
        elif not is_second_look:
            self._timer = self._loop.call_at(now + _GRACE_S, self._look, True)
        else:
            self.is_late = True
            self.close(f"Redis did not answer within {self._timeout_s:g} s")


def _is_answer(replies: list[Any], width: int) -> bool:
    """Whether replies have the form that was asked for: lists of `width` elements, lines, or errors."""
    if width != _STATUS and set(map(type, replies)) == {list}:
        return set(map(len, replies)) == {width}
    return all(
        isinstance(reply, hiredis.ReplyError)
        or (type(reply) is bytes if width == _STATUS else type(reply) is list and len(reply) == width)
        for reply in replies
    )


def _is_answer_to_transaction(replies: list[Any], commands: Commands, begin: int) -> bool:
    """Whether replies, of which the first is the one of that index, are lines and at last a list, or errors."""
    lines = replies[: commands.count - 1 - begin]
    return _is_answer(lines, _STATUS) and _is_answer(replies[len(lines) :], commands.width)


class RedisLink:
    """Keeps a connection, as an async context manager. `state` tells whether Redis answers.

    While it is known to be down, look-ups fail at once: no request waits for what will not come.
    """

    def __init__(
        self, address: RedisAddress, state: BindingState, *, timeout_s: float, ca_file: Path | None, probe: str = ""
    ) -> None:
        """`probe`: a key to look at when nothing else is asked; without one, PING.

        Raises `ValueError` for a CA file that is none.
        """
        self._address = address
        self._state = state
        self._timeout_s = timeout_s
        self._tls = _tls(ca_file) if address.is_tls else None
        self._probe = Fields(("_",)).read([probe]) if probe else Commands(b"*1\r\n$4\r\nPING\r\n", 1, _STATUS)
        self._is_refused = False
        self._connection: _Connection | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._attempt = asyncio.Event()

    async def __aenter__(self) -> "RedisLink":
        self._keeper = asyncio.create_task(self._keep())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._keeper is not None
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)
        if (connection := self._connection) is not None:
            connection.close("the server is stopping")
            await connection.lost
        self._attempt.set()  # there will be no other

    async def read(self, commands: Commands) -> list[Reply]:
        """Return the values that each HMGET of `commands` asks for, None where a key holds no hash.

        Raises `RedisUnavailable`, at the latest after the link's timeout for connecting and the same for the replies.
        """
        connection = self._connection
        try:
            replies = await (self._read_anew(commands) if connection is None else connection.ask(commands))
        except RedisUnavailable:
            if connection is None or connection.is_late or not connection.lost.done():
                raise
            # Reading twice does no harm.
            replies = await self._read_anew(commands)
        for index, reply in enumerate(replies):
            if type(reply) is not list:
                if str(reply).startswith("WRONGTYPE"):
                    replies[index] = None
                else:
                    self._refused(str(reply), commands)
        return replies

    async def transact(self, commands: Commands) -> list[Any]:
        """Return what each command of a transaction gave. It is not asked twice: it may have been done.

        Raises `RedisUnavailable`, also where Redis refuses one of them.
        """
        connection = self._connection
        replies = await (self._read_anew(commands) if connection is None else connection.ask(commands))
        results = replies[-1] if type(replies[-1]) is list else []
        refused = [str(reply) for reply in (*replies, *results) if isinstance(reply, hiredis.ReplyError)]
        if refused:
            raise RedisUnavailable(f"Redis refuses what the rate limit needs: {refused[0][:200]}")
        return results

    async def _read_anew(self, commands: Commands) -> list[Any]:
        """Ask over the next connection, unless it is known that there is no hope of one at the moment."""
        try:
            async with asyncio.timeout(self._timeout_s):
                if self._connection is None and self._state.is_up is not False:
                    await self._attempt.wait()
                if self._connection is None:
                    raise RedisUnavailable(self._state.error or "no connection to Redis")
                return await self._connection.ask(commands)
        except TimeoutError:
            raise RedisUnavailable(f"no connection to Redis within {self._timeout_s:g} s") from None

    def _refused(self, reply: str, commands: Commands) -> NoReturn:
        """Remember what was refused, so that the probe finds out when it no longer is, and raise."""
        text = f"Redis refuses to read features: {reply[:200]}"
        self._is_refused = True
        self._probe = commands
        self._state.fails(text)
        raise RedisUnavailable(text)

    # --- the keeper --------------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Connect, watch, connect again, for ever."""
        loop = asyncio.get_running_loop()
        delay_s = 0.0
        while True:
            started = loop.time()
            try:
                connection = await self._connect()
            except (OSError, RedisUnavailable) as error:  # TimeoutError and ssl.SSLError are OSErrors
                self._give_up(_described(error))
            except Exception as error:  # a link that stops trying would need a restart
                _log.exception("connecting to Redis failed in a way of its own; trying again")
                self._give_up(type(error).__name__)
            else:
                self._connection = connection
                self._attempt.set()
                cause = await self._watch(connection)
                _log.debug("connection to Redis lost", extra={"cause": cause})
                if connection.is_late:
                    self._give_up(cause)
                elif connection.is_useful or loop.time() - started > _STABLE_S:
                    delay_s = 0.0
                    continue  # Redis closes connections for reasons of its own (idle, fail-over)
                elif delay_s:
                    self._give_up(cause)
            delay_s = min(max(delay_s * 2, _FIRST_DELAY_S), _MAX_DELAY_S)
            await asyncio.sleep(delay_s * random.uniform(0.75, 1.25))

    def _give_up(self, cause: str) -> None:
        """Redis is down for now: tell, and let nobody wait for it."""
        self._state.fails(cause)
        self._attempt.set()
        self._attempt.clear()

    def _lost(self, connection: _Connection) -> None:
        if connection is self._connection:
            self._connection = None
            self._attempt.clear()

    async def _connect(self) -> _Connection:
        """Return a connection that is logged in and has answered."""
        address, connection = self._address, _Connection(self._timeout_s, self._lost)
        try:
            async with asyncio.timeout(4 * self._timeout_s):
                await asyncio.get_running_loop().create_connection(
                    lambda: connection,
                    address.host,
                    address.port,
                    ssl=self._tls,
                    server_hostname=address.host if self._tls else None,
                )
                if address.password:
                    login = ("AUTH", address.username, address.password) if address.username else (
                        "AUTH", address.password)  # fmt: skip
                    await self._expect_ok(connection, login, "the login")
                if address.database:
                    await self._expect_ok(connection, ("SELECT", str(address.database)), "the database")
                await self._try(connection)
            if connection.lost.done():
                raise RedisUnavailable(connection.lost.result())
        except TimeoutError:
            connection.close("the attempt was given up")
            raise RedisUnavailable(f"no connection to Redis within {4 * self._timeout_s:g} s") from None
        except BaseException:
            connection.close("the attempt was given up")
            raise
        return connection

    async def _expect_ok(self, connection: _Connection, words: tuple[Any, ...], what: str) -> None:
        (reply,) = await connection.ask(Commands(hiredis.pack_command(words), 1, _STATUS))
        if not isinstance(reply, bytes):
            raise RedisUnavailable(f"Redis refuses {what}: {self._address.without_password(str(reply))[:200]}")

    async def _try(self, connection: _Connection) -> None:
        """Ask the probe, and tell the state what came."""
        probe = self._probe
        errors = [str(reply) for reply in await connection.ask(probe) if isinstance(reply, hiredis.ReplyError)]
        text = next((error for error in errors if not error.startswith("WRONGTYPE")), "")
        if text.startswith(("NOAUTH", "LOADING", "MASTERDOWN")):
            raise RedisUnavailable(f"Redis is not ready to answer: {text[:200]}")
        # Who may not PING may still read hashes; anything but a refusal of the read itself is an answer.
        if text and probe.width != _STATUS:
            self._is_refused = True
            self._state.fails(f"Redis refuses to read features: {text[:200]}")
        else:
            self._is_refused = False
            self._state.works()

    async def _watch(self, connection: _Connection) -> str:
        """Probe now and then until the connection is lost; return why."""
        while True:
            done, _ = await asyncio.wait([connection.lost], timeout=1.0 if self._is_refused else _PROBE_S)
            if done:
                return connection.lost.result()
            try:
                await self._try(connection)
            except RedisUnavailable as error:
                connection.close(str(error))
                return await connection.lost


def _tls(ca_file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        cause = "it holds no certificate in PEM form" if isinstance(error, ssl.SSLError) else error.strerror
        raise ValueError(f"{ca_file}: {cause}") from None


def _described(error: BaseException) -> str:
    """Return what happened to a connection in words that stay the same from attempt to attempt."""
    if isinstance(error, RedisUnavailable):
        return str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: the certificate of Redis is refused: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or 'the handshake failed'}"
    if isinstance(error, socket.gaierror):
        return "the host of Redis is not known to DNS"
    if isinstance(error, OSError) and error.errno:
        return f"no connection to Redis: {os.strerror(error.errno)}"
    return f"no connection to Redis: {type(error).__name__}"
