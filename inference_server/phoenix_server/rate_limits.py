"""Enforces `spec.networking.rateLimit`: a limit for each loaded model that has one, with the buckets behind it.

Per client, every replica counts for itself. Per model, replicas share one bucket in Redis where this process has one:
a replica takes tokens in advance, for some hundredths of a second, and answers from those without asking. What it takes
at once follows what it is asked for, and never waits long: a Redis that does not answer leaves the replica its own part
of the limit, by the number of replicas that were last seen. Hides Redis, clocks and what is remembered between reloads.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Protocol
from weakref import WeakValueDictionary

from phoenix_api import Manifest, RateLimitScope
from phoenix_server.clients import Clients
from phoenix_server.errors import Code, PhoenixError
from phoenix_server.features import Features, default_prefix
from phoenix_server.metrics import ModelMetrics
from phoenix_server.rate_limit import Bucket, ClientTable, Grant, SharedBucket, retry_after_s
from phoenix_server.redis_link import Commands, RedisLink, RedisUnavailable
from phoenix_server.settings import Settings

_log = logging.getLogger(__name__)
# Clients that have a bucket of their own at a time; some 100 bytes each.
_MOST_CLIENTS = 100_000
# What a replica takes in advance: tokens for that long.
_AHEAD_S = 0.05
# The most that is asked for at once on behalf of who waits already.
_MOST_ASKED = 64
# What was taken in advance and is not used within this time is not used at all.
_RESERVE_S = 1.0
# The least burst of a shared bucket, in seconds of its rate: what is spread over replicas cannot be finer.
_LEAST_BURST_S = 0.1
# Shortest time between being told that the bucket is empty and asking again.
_PAUSE_S = 0.01
# Longest time that a request waits for tokens from Redis, and how long none is asked for after a failure.
_PATIENCE_S = 0.1
_DOWN_S = 0.5
# Requests that wait for tokens at once; more are decided by the replica's own part.
_MOST_WAITING = 10_000
# How often replicas are counted.
_CENSUS_MS = 10_000
# The clock is the time that a key has left, so that all replicas read one; it begins again after this long.
_CLOCK_MS = 1 << 45


class Limit(Protocol):
    """The rate limit of one model."""

    def take(self, peer: str, authorization: str, forwarded: str) -> Awaitable[None] | None:
        """Let a request through, at once or once the awaitable is done; either may raise `PhoenixError(LIMITED)`."""


class RateLimits:
    """Makes limits. A limit that stays the same over a reload goes on as it was, as do those of a model's versions."""

    def __init__(
        self, settings: Settings, features: Features | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`features` has the connection to Redis."""
        self._settings = settings
        self._features = features
        self._clock = clock
        self._clients = Clients(is_keyed=settings.api_keys_file is not None, proxies=settings.proxy_networks)
        self._limits: WeakValueDictionary[tuple[object, ...], ClientLimit | ModelLimit | SharedLimit] = (
            WeakValueDictionary()
        )

    def of(self, manifest: Manifest, metrics: ModelMetrics) -> Limit | None:
        """Return the limit of a model; None if its manifest has none."""
        spec, metadata = manifest.model.spec.networking.rate_limit, manifest.model.metadata
        if spec is None:
            return None
        key = (metadata.namespace, metadata.name, spec.requests_per_second, spec.burst, spec.per)
        limit = self._limits.get(key)
        if limit is None:
            limit = self._limits[key] = self._new(manifest, metrics)
        return limit

    def _new(self, manifest: Manifest, metrics: ModelMetrics) -> "ClientLimit | ModelLimit | SharedLimit":
        spec, name = manifest.model.spec.networking.rate_limit, manifest.model.metadata.name
        assert spec is not None
        rate, burst = spec.requests_per_second, spec.burst or spec.requests_per_second
        if spec.per is RateLimitScope.CLIENT:
            return ClientLimit(rate, burst, self._clients, self._clock)
        if self._features is None or self._features.link is None:
            return ModelLimit(rate, burst, self._clock)
        prefix = self._settings.redis_key_prefix
        prefix = default_prefix(manifest) if prefix is None else f"{prefix}{name}:"
        self._features.state.models.add(name)
        bucket = SharedBucket(rate, max(burst, -int(-rate * _LEAST_BURST_S // 1)))
        source = RedisBucket(self._features.link, bucket, prefix, self._clock)
        return SharedLimit(bucket, source, metrics, self._clock, name=name)


class ClientLimit:
    """Each client has its own bucket."""

    def __init__(self, rate: int, burst: int, clients: Clients, clock: Callable[[], float]) -> None:
        self._table = ClientTable(rate, burst, _MOST_CLIENTS)
        self._clients = clients
        self._clock = clock
        self._text = f"a client may send {_per_second(rate)} to this model"

    def take(self, peer: str, authorization: str, forwarded: str) -> None:
        """Let a request through or raise."""
        wait_s = self._table.take(self._clients.of(peer, authorization, forwarded), self._clock())
        if wait_s:
            raise _limited(self._text, wait_s)


class ModelLimit:
    """All clients share one bucket, which this replica shares with no other."""

    def __init__(self, rate: int, burst: int, clock: Callable[[], float]) -> None:
        self._bucket = Bucket(rate, burst)
        self._clock = clock
        self._text = f"this model takes {_per_second(rate)}"

    def take(self, peer: str, authorization: str, forwarded: str) -> None:
        """Let a request through or raise."""
        wait_s = self._bucket.take(self._clock())
        if wait_s:
            raise _limited(self._text, wait_s)


class TokenSource(Protocol):
    """Where a shared limit gets its tokens from."""

    replicas: int

    async def take(self, asked: int) -> Grant:
        """Take tokens; raises `RedisUnavailable`."""


class SharedLimit:
    """All clients of all replicas share one bucket."""

    def __init__(
        self,
        bucket: SharedBucket,
        source: TokenSource,
        metrics: ModelMetrics,
        clock: Callable[[], float],
        *,
        name: str,
    ) -> None:
        self._bucket = bucket
        self._source = source
        self._metrics = metrics
        self._clock = clock
        self._name = name
        self._text = f"this model takes {_per_second(bucket.rate)} over all its replicas"
        self._most_ahead = max(1, int(bucket.rate * _AHEAD_S))
        self._most_asked = max(self._most_ahead, min(_MOST_ASKED, bucket.burst))
        # Tokens taken in advance, and when they are no longer good.
        self._reserve = 0
        self._reserve_until = 0.0
        self._ahead = 0  # how many were wanted in advance the last time
        # Requests since tokens were asked for the last time, and when that was.
        self._seen = 0
        self._asked_at = clock()
        self._empty_until = 0.0
        # The replica's own part of the limit; what Redis grants is taken off it too. What the part let through is owed
        # to the bucket in Redis.
        self._own = Bucket(bucket.rate, bucket.burst)
        self._own_parts = 1
        self._owed = 0
        self._down_until = 0.0
        self._is_down = False
        self._waiting: deque[asyncio.Future[float | None]] = deque()
        self._taking: asyncio.Task[None] | None = None

    def take(self, peer: str, authorization: str, forwarded: str) -> Awaitable[None] | None:
        """Let a request through, or return what to wait for, or raise."""
        now = self._clock()
        self._seen += 1
        if self._reserve and now < self._reserve_until:
            self._reserve -= 1
            self._own_at(now).debit(now)
            if 2 * self._reserve < self._ahead and self._taking is None and now >= self._empty_until:
                self._begin_taking()
            return None
        self._reserve = 0
        if now < self._down_until or len(self._waiting) >= _MOST_WAITING:
            self._take_own(now)
            return None
        if now < self._empty_until:
            raise _limited(self._text, self._empty_until - now)
        return self._wait()

    async def _wait(self) -> None:
        future: asyncio.Future[float | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        if self._taking is None:
            self._begin_taking()
        try:
            async with asyncio.timeout(_PATIENCE_S):
                wait_s = await future
        except TimeoutError:
            wait_s = None
        if wait_s is None:
            self._take_own(self._clock())
        elif wait_s:
            raise _limited(self._text, wait_s)

    def _take_own(self, now: float) -> None:
        self._metrics.unshared_limits += 1
        wait_s = self._own_at(now).take(now)
        if wait_s:
            raise _limited(self._text, wait_s)
        self._owed += 1

    def _own_at(self, now: float) -> Bucket:
        """Return the replica's own part, by the number of replicas now."""
        parts = self._source.replicas
        if parts != self._own_parts:
            self._own_parts = parts
            self._own.resize(self._bucket.rate / parts, max(self._bucket.burst / parts, 1), now)
        return self._own

    # --- taking tokens from Redis ------------------------------------------------------------------------------------

    def _begin_taking(self) -> None:
        self._taking = asyncio.get_running_loop().create_task(self._take_until_nobody_waits())

    async def _take_until_nobody_waits(self) -> None:
        try:
            while True:
                self._hand_out(await self._grant())
                if not self._waiting:
                    return
        except RedisUnavailable as error:
            self._fails(str(error))
        except Exception:  # a limit that stopped asking would need a restart
            _log.exception("the rate limit's tokens could not be taken in a way of its own")
            self._fails("an unexpected failure")
        finally:
            self._taking = None
            self._answer_all(None)

    async def _grant(self) -> Grant:
        """Take tokens, and those that are owed: or each outage would be a burst, and a slow Redis a second limit."""
        now = self._clock()
        # Of what was let through in a long outage only that is missing which the part has not got back.
        owed = min(self._owed, self._own_at(now).lacking(now))
        self._owed = 0
        try:
            grant = await self._source.take(self._wanted(now) + owed)
        except BaseException:
            self._owed += owed
            raise
        if self._is_down:
            self._is_down = False
            _log.info("the rate limit is shared again", extra={"model": self._name})
        owed += self._owed  # meanwhile
        self._owed = max(owed - grant.tokens, 0)
        return replace(grant, tokens=max(grant.tokens - owed, 0))

    def _wanted(self, now: float) -> int:
        """Return how many tokens to take: for who waits, and for what the near future will bring, by the near past."""
        passed_s = max(now - self._asked_at, 0.001)
        self._ahead = min(int(self._seen / passed_s * _AHEAD_S), self._most_ahead)
        self._seen, self._asked_at = 0, now
        waiting = sum(not future.done() for future in self._waiting)
        return max(min(waiting, self._most_asked), self._ahead, 1)

    def _hand_out(self, grant: Grant) -> None:
        now, tokens = self._clock(), grant.tokens
        if self._reserve and now >= self._reserve_until:
            self._reserve = 0
        while tokens and self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(0.0)
                self._own_at(now).debit(now)
                tokens -= 1
        self._reserve += tokens
        self._reserve_until = now + _RESERVE_S
        if grant.wait_s:
            self._empty_until = now + max(grant.wait_s, _PAUSE_S)
            self._answer_all(self._empty_until - now)

    def _answer_all(self, answer: float | None) -> None:
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(answer)

    def _fails(self, cause: str) -> None:
        self._down_until = self._clock() + _DOWN_S
        if not self._is_down:
            self._is_down = True
            extra = {"model": self._name, "cause": cause, "parts": self._source.replicas}
            _log.warning("the rate limit is not shared: this replica keeps to its part", extra=extra)


class RedisBucket:
    """The shared bucket in Redis, and how many replicas take from it.

    A transaction takes the tokens and reads the clock. The counter lives until its bucket is full, so that a bucket
    nobody uses is full and not there.
    """

    def __init__(self, link: RedisLink, bucket: SharedBucket, prefix: str, clock: Callable[[], float]) -> None:
        self.replicas = 1
        self._link = link
        self._bucket = bucket
        self._clock = clock
        # Another limit is another bucket: its counter would mean something else.
        self._key = f"{prefix}rate:{bucket.rate}:{bucket.burst}"
        self._clock_key = f"{self._key}:clock"
        self._offset_s: float | None = None  # from this process's clock to that of Redis
        self._period = -1
        self._corrections: set[asyncio.Task[None]] = set()

    async def take(self, asked: int) -> Grant:
        """Take tokens. Raises `RedisUnavailable`."""
        if self._offset_s is None:
            self._offset_s = await self._read_clock() / 1000 - self._clock()
        now_ms = int((self._clock() + self._offset_s) * 1000)
        if now_ms // _CENSUS_MS != self._period:
            await self._count_replicas(now_ms // _CENSUS_MS)
        held_ms, full = self._milliseconds(asked / self._bucket.rate), self._bucket.full(now_ms)
        is_new_clock, left, is_new, counter, _ = await self._run(
            ("SET", self._clock_key, 1, "NX", "PX", _CLOCK_MS),
            ("PTTL", self._clock_key),
            ("SET", self._key, full, "NX", "PX", held_ms),
            ("INCRBY", self._key, asked),
            ("PEXPIRE", self._key, held_ms, "GT"),
        )
        clock_ms = _CLOCK_MS - left
        # What a full bucket begins with was reckoned with the clock as it was expected to be.
        error = self._bucket.full(clock_ms) - full if is_new else 0
        grant = None if is_new_clock else self._bucket.grant(asked, counter + error, clock_ms)
        if grant is None:
            self._offset_s = None
            await self._run(("DEL", self._key))
            raise RedisUnavailable("the counter in Redis was not this limit's, and is begun again")
        self._offset_s = clock_ms / 1000 - self._clock()
        task = asyncio.get_running_loop().create_task(self._correct(grant.correction + error, grant.full_in_s))
        self._corrections.add(task)
        task.add_done_callback(self._corrections.discard)
        return grant

    async def _correct(self, tokens: int, full_in_s: float) -> None:
        """Put right what was taken too much, and have the counter kept until the bucket is full."""
        commands: list[tuple[str | int, ...]] = [("PEXPIRE", self._key, self._milliseconds(full_in_s), "GT")]
        if tokens:
            commands.insert(0, ("INCRBY", self._key, tokens))
        try:
            await self._run(*commands)
        except RedisUnavailable as error:  # tokens that are not put back are lost: the limit is kept
            _log.debug("the rate limit's counter was not corrected", extra={"cause": str(error)})

    async def _read_clock(self) -> int:
        is_new, left = await self._run(
            ("SET", self._clock_key, 1, "NX", "PX", _CLOCK_MS),
            ("PTTL", self._clock_key),
        )
        if is_new:  # what was counted by another clock means nothing
            await self._run(("DEL", self._key))
        return _CLOCK_MS - left

    async def _count_replicas(self, period: int) -> None:
        """Be counted in this period, and read how many were in the last one."""
        now, before = (f"{self._key}:replicas:{number}" for number in (period, period - 1))
        counted, _, last, _ = await self._run(
            ("INCRBY", now, 1),
            ("PEXPIRE", now, 3 * _CENSUS_MS),
            ("INCRBY", before, 0),
            ("PEXPIRE", before, 3 * _CENSUS_MS),
        )
        self._period = period
        self.replicas = max(counted, last, 1)

    async def _run(self, *commands: tuple[str | int, ...]) -> list[int]:
        """Run a transaction; a SET gives whether it was done."""
        results = await self._link.transact(Commands.transaction(commands))
        return [result if type(result) is int else int(result is not None) for result in results]

    @staticmethod
    def _milliseconds(seconds: float) -> int:
        return max(1, -int(-seconds * 1000 // 1))


def _limited(text: str, wait_s: float) -> PhoenixError:
    again_s = retry_after_s(wait_s)
    return PhoenixError(Code.LIMITED, f"rate limit: {text}; try again in {again_s} s", retry_after_s=again_s)


def _per_second(rate: int) -> str:
    return f"{rate} request{'' if rate == 1 else 's'} a second"
