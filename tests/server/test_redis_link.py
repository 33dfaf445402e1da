"""The one pipelined connection: answers reach who asked, and nothing unexpected shifts them to somebody else."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import pytest
from services import RedisServer

from phoenix_server.binding_state import BindingState
from phoenix_server.redis_address import RedisAddress, parse_redis_url, redis_url_of
from phoenix_server.redis_link import MAX_IN_FLIGHT, Commands, Fields, RedisLink, RedisUnavailable

FIELDS = Fields(("a", "b"))
PING = b"*1\r\n$4\r\nPING\r\n"
GOOD = b"*2\r\n$1\r\n1\r\n$-1\r\n"
DEADLINE_S = 30


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await work

    asyncio.run(bounded())


def link_to(port: int, state: BindingState, *, timeout_s: float = 5.0) -> RedisLink:
    return RedisLink(RedisAddress("127.0.0.1", port), state, timeout_s=timeout_s, ca_file=None)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - the state announces nothing
        await asyncio.sleep(0.005)


class Answering:
    """A server that answers PING properly and everything else with what a test wants; keeps what it was sent."""

    def __init__(self, answer: Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]) -> None:
        self._answer = answer
        self.connections = 0
        self.port = 0
        self._writers: list[asyncio.StreamWriter] = []
        self._serving: set[asyncio.Task[Any]] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Answering"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for writer in self._writers:
                writer.close()
            await asyncio.gather(*self._serving, return_exceptions=True)
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        self._writers.append(writer)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                if data.startswith(PING):
                    writer.write(b"+PONG\r\n")
                    data = data[len(PING) :]
                if data:
                    await self._answer(data, writer)
        writer.close()


def test_every_caller_gets_its_own_values_whoever_gives_up(redis_server: RedisServer) -> None:
    with redis_server.client() as client, client.pipeline(transaction=False) as pipe:
        for index in range(500):
            pipe.hset(f"k{index}", mapping={"a": index, "b": f"b{index}"})
        pipe.execute()

    async def work() -> None:
        rng = random.Random(5)

        async def caller(link: RedisLink) -> int:
            done = 0
            for _ in range(30):
                wanted = [rng.randrange(500) for _ in range(rng.choice((1, 1, 1, 7, 32)))]
                reading = asyncio.create_task(link.read(FIELDS.read([f"k{n}" for n in wanted])))
                if rng.random() < 0.3:
                    for _ in range(rng.randrange(3)):
                        await asyncio.sleep(0)
                    reading.cancel()
                try:
                    values = await reading
                except asyncio.CancelledError:
                    continue
                assert values == [[b"%d" % n, b"b%d" % n] for n in wanted]
                done += 1
            return done

        async with link_to(redis_server.port, BindingState("redis")) as link:
            done = await asyncio.gather(*(caller(link) for _ in range(50)))
            assert sum(done) > 500

    run(work())
    redis_server.flush()


SURPRISES = {
    "integer": b":1\r\n",
    "status": b"+OK\r\n",
    "text": b"$3\r\nabc\r\n",
    "null": b"$-1\r\n",
    "null list": b"*-1\r\n",
    "short list": b"*1\r\n$1\r\n1\r\n",
    "long list": b"*3\r\n$1\r\n1\r\n$1\r\n2\r\n$1\r\n3\r\n",
    "empty list": b"*0\r\n",
    "false of RESP3": b"#f\r\n" + GOOD,
    "map of RESP3": b"%1\r\n$1\r\na\r\n$1\r\n1\r\n",
    "push of RESP3": b">2\r\n$1\r\na\r\n$1\r\nb\r\n",
    "another protocol": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "one too many": GOOD + GOOD,
    "nothing, then the end": b"",
    "half": GOOD[:7],
}


@pytest.mark.parametrize("surprise", SURPRISES.values(), ids=list(SURPRISES))
def test_a_surprise_ends_the_connection_and_a_new_one_is_made(surprise: bytes) -> None:
    """Nobody gets an answer over a connection on which something unexpected came."""

    async def answer(data: bytes, writer: asyncio.StreamWriter) -> None:
        if server.connections == 1:
            writer.write(surprise)
            if not surprise or surprise == SURPRISES["half"]:
                writer.close()
        else:
            writer.write(GOOD * data.count(b"HMGET"))

    async def work() -> None:
        state = BindingState("redis")
        async with server.running(), link_to(server.port, state) as link:
            await until(lambda: bool(state.is_up))
            reads = await asyncio.gather(*(link.read(FIELDS.read(["k"])) for _ in range(3)), return_exceptions=True)
            # one proper reply may have come first; whatever came behind it answers nobody
            good = [read for read in reads if read == [[b"1", None]]]
            assert all(isinstance(read, RedisUnavailable) for read in reads if read not in good), reads
            await until(lambda: server.connections > 1)
            await until(lambda: bool(state.is_up))
            assert await link.read(FIELDS.read(["k"])) == [[b"1", None]]

    server = Answering(answer)
    run(work())


def test_a_late_answer_reaches_nobody() -> None:
    """A caller gives up; the next one on the connection must not get the answer that was meant for the first."""
    seen: list[bytes] = []
    release = asyncio.Event()

    async def answer(data: bytes, writer: asyncio.StreamWriter) -> None:
        seen.append(data)
        await release.wait()
        for key in (b"first", b"second"):
            for _ in range(data.count(key)):
                writer.write(b"*2\r\n$%d\r\n%s\r\n$-1\r\n" % (len(key), key))

    async def work() -> None:
        state = BindingState("redis")
        async with server.running(), link_to(server.port, state) as link:
            first = asyncio.create_task(link.read(FIELDS.read(["first"])))
            await until(lambda: bool(seen))
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            second = asyncio.create_task(link.read(FIELDS.read(["second"])))
            await asyncio.sleep(0)
            release.set()
            assert await second == [[b"second", None]]

    server = Answering(answer)
    run(work())


def test_what_is_not_answered_in_time_ends_the_connection_and_nobody_waits_after_that() -> None:
    async def answer(data: bytes, writer: asyncio.StreamWriter) -> None:
        pass

    async def work() -> None:
        state = BindingState("redis")
        async with server.running(), link_to(server.port, state, timeout_s=0.1) as link:
            await until(lambda: bool(state.is_up))
            with pytest.raises(RedisUnavailable, match=r"did not answer within 0\.1 s"):
                await link.read(FIELDS.read(["k"]))
            await until(lambda: server.connections > 1)

    server = Answering(answer)
    run(work())


def test_more_than_may_wait_is_refused_at_once() -> None:
    async def answer(data: bytes, writer: asyncio.StreamWriter) -> None:
        pass

    async def work() -> None:
        state = BindingState("redis")
        async with server.running(), link_to(server.port, state) as link:
            await until(lambda: bool(state.is_up))
            waiting = asyncio.create_task(link.read(FIELDS.read(["k"] * MAX_IN_FLIGHT)))
            await asyncio.sleep(0)
            with pytest.raises(RedisUnavailable, match=f"at most {MAX_IN_FLIGHT} may"):
                await link.read(FIELDS.read(["k"]))
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    server = Answering(answer)
    run(work())


def test_a_server_that_quotes_the_login_does_not_spread_it() -> None:
    """What a Redis without the command AUTH says: all that it was sent."""
    seen: list[bytes] = []

    async def answer(data: bytes, writer: asyncio.StreamWriter) -> None:
        seen.append(data)
        writer.write(b"-ERR unknown command 'AUTH', with args beginning with: 'fraud' 'hunter2'\r\n")

    async def work() -> None:
        state = BindingState("redis")
        async with server.running():
            address = RedisAddress("127.0.0.1", server.port, "fraud", "hunter2")
            async with RedisLink(address, state, timeout_s=5, ca_file=None):
                await until(lambda: state.is_up is False)
        assert b"hunter2" in seen[0]
        assert "Redis refuses the login: ERR unknown command 'AUTH'" in state.error
        assert "hunter2" not in state.error

    server = Answering(answer)
    run(work())


def test_ending_the_link_answers_who_waits() -> None:
    async def answer(data: bytes, writer: asyncio.StreamWriter) -> None:
        pass

    async def work() -> None:
        state = BindingState("redis")
        async with server.running():
            async with link_to(server.port, state) as link:
                await until(lambda: bool(state.is_up))
                waiting = asyncio.create_task(link.read(FIELDS.read(["k"])))
                await asyncio.sleep(0)
            with pytest.raises(RedisUnavailable):
                await waiting

    server = Answering(answer)
    run(work())


def test_a_connection_that_redis_closes_is_made_again_and_the_read_repeated(redis_server: RedisServer) -> None:
    async def work() -> None:
        state = BindingState("redis")
        async with link_to(redis_server.port, state) as link:
            await until(lambda: bool(state.is_up))
            for _ in range(3):
                with redis_server.client() as client:
                    client.client_kill_filter(_type="normal", skipme=True)
                assert await link.read(FIELDS.read(["k"])) == [[None, None]]

    run(work())


def test_a_command_holds_whatever_key_it_is_given() -> None:
    assert FIELDS.read(["k"]).payload == b"*4\r\n$5\r\nHMGET\r\n$1\r\nk\r\n$1\r\na\r\n$1\r\nb\r\n"
    for wild in ("a\r\n*1\r\n$8\r\nFLUSHALL\r\n", "é", "a" * 300, "€\r\n"):
        key = f"ü:{wild}:ß".encode()
        commands = Fields(("é",), "ü:", ":ß").read(["x", wild])
        assert commands.count == 2
        assert b"$%d\r\n%s\r\n$2\r\n\xc3\xa9\r\n" % (len(key), key) in commands.payload


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h", RedisAddress("h")),
        ("redis://h:7000/3", RedisAddress("h", 7000, database=3)),
        ("rediss://u:p%40%2Fw@h:1", RedisAddress("h", 1, "u", "p@/w", is_tls=True)),
        ("redis://:secret@[::1]:1/", RedisAddress("::1", 1, "", "secret")),
    ],
)
def test_urls_are_read(url: str, address: RedisAddress) -> None:
    assert parse_redis_url(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "", "h:6379", "http://u:hunter2@h", "redis://", "redis://u:hunter2@", "redis://u:hunter2@h:99999",
        "redis://u:hunter2@h:x", "redis://u:hunter2@h/one", "redis://u:hunter2@h/0?ssl_cert_reqs=none",
        "redis://u:hunter2#@h", "redis://u@h", "redis://u:hunter2/x@h",
    ],
)  # fmt: skip
def test_a_url_that_cannot_be_read_is_not_quoted(url: str) -> None:
    with pytest.raises(ValueError, match="expected redis://") as error:
        parse_redis_url(url)
    assert "hunter2" not in str(error.value)


def test_an_address_does_not_show_its_password() -> None:
    address = parse_redis_url("rediss://u:hunter2@h:1/2")
    assert "hunter2" not in f"{address!r} {address}"
    assert str(address) == "rediss://h:1/2"


def test_a_binding_without_a_url_is_put_together() -> None:
    parts = {"host": "h", "port": "1", "username": "u", "password": "p@/:w", "ssl": "true"}
    url = redis_url_of(parts)
    assert url is not None
    assert parse_redis_url(url) == RedisAddress("h", 1, "u", "p@/:w", is_tls=True)
    assert redis_url_of({"host": "::1"}) == "redis://[::1]:6379/0"
    assert redis_url_of({"password": "p"}) is None


# --- transactions ----------------------------------------------------------------------------------------------------


def test_transactions_and_reads_share_a_connection(redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        client.hset("h", mapping={"a": 1})

    async def work() -> None:
        state = BindingState("redis")
        async with link_to(redis_server.port, state) as link:
            add = Commands.transaction([("SET", "n", 5, "NX", "PX", 60_000), ("INCRBY", "n", 2)])
            asked = [link.transact(add) if index % 2 else link.read(FIELDS.read(["h"])) for index in range(20)]
            answers = await asyncio.gather(*asked)
            assert answers[::2] == [[[b"1", None]]] * 10
            assert answers[1::2] == [[b"OK" if index == 0 else None, 7 + 2 * index] for index in range(10)]

    run(work())
    redis_server.flush()


def test_refused_command_of_a_transaction_is_told_and_the_connection_stays(redis_server: RedisServer) -> None:
    async def work() -> None:
        state = BindingState("redis")
        async with link_to(redis_server.port, state) as link:
            await link.transact(Commands.transaction([("SET", "text", "x")]))
            with pytest.raises(RedisUnavailable, match="Redis refuses what the rate limit needs: ERR value is not an"):
                await link.transact(Commands.transaction([("SET", "n", 1), ("INCRBY", "text", 1)]))
            with pytest.raises(RedisUnavailable, match="Redis refuses what the rate limit needs: ERR unknown command"):
                await link.transact(Commands.transaction([("SET", "n", 2), ("NONSENSE",)]))
            assert await link.transact(Commands.transaction([("INCRBY", "n", 1)])) == [2]
            assert state.is_up

    run(work())
    redis_server.flush()


@pytest.mark.parametrize(
    "surprise",
    [
        b"+OK\r\n+QUEUED\r\n+QUEUED\r\n+OK\r\n",
        b"+OK\r\n+QUEUED\r\n:1\r\n*2\r\n:1\r\n:2\r\n",
        b"*2\r\n:1\r\n:2\r\n",
        b"+OK\r\n+QUEUED\r\n+QUEUED\r\n*1\r\n:1\r\n",
    ],
    ids=["no list", "a number", "list first", "short list"],
)
@pytest.mark.parametrize("is_split", [False, True], ids=["at once", "byte by byte"])
def test_surprise_in_a_transaction_ends_the_connection_and_it_is_not_asked_again(
    surprise: bytes, is_split: bool
) -> None:
    seen: list[bytes] = []

    async def answer(data: bytes, writer: asyncio.StreamWriter) -> None:
        seen.append(data)
        for part in [surprise[at : at + 1] for at in range(len(surprise))] if is_split else [surprise]:
            writer.write(part)
            await writer.drain()

    async def work() -> None:
        state = BindingState("redis")
        async with server.running(), link_to(server.port, state) as link:
            await until(lambda: bool(state.is_up))
            with pytest.raises(RedisUnavailable, match="of another form"):
                await link.transact(Commands.transaction([("INCRBY", "n", 1), ("PTTL", "n")]))
            await until(lambda: server.connections > 1)
            assert sum(data.count(b"INCRBY") for data in seen) == 1

    server = Answering(answer)
    run(work())
