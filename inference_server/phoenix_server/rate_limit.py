"""The arithmetic of rate limits: no clock, no I/O; the caller says what time it is, in seconds that only go up.

A bucket holds `burst` tokens, gets `rate` a second, and each request takes one. One number says all of it: the time at
which the bucket will be full again (the generic cell rate algorithm). `ClientTable` keeps one for each client and stays
within a bound; `grant` is the same bucket where several replicas share it, as one counter of all tokens ever taken.
"""

from collections.abc import Hashable
from dataclasses import dataclass

# What adding up fractions of a second may lose, as a part of the time between two tokens.
_ROUNDING = 1e-3
# How many clients are looked at, for buckets that are full again, whenever another one is taken in.
_SWEPT = 4
# Tokens and time by which a shared counter can be off while others put back what they asked for too much; beyond, it is
# not that of this bucket.
_ODD_BURSTS, _ODD_S = 1000, 10
# The longest that a shared bucket is remembered beyond the time at which it is full.
_SLACK_S = 10


class Bucket:
    """One token bucket, full at first."""

    __slots__ = ("_depth_s", "_full_at", "_interval_s")

    def __init__(self, rate: float, burst: float) -> None:
        """`rate` in tokens a second."""
        self._interval_s = 1 / rate
        self._depth_s = (burst + _ROUNDING) / rate
        self._full_at = 0.0

    def take(self, now: float) -> float:
        """Take a token and return 0, or return in how many seconds there will be one."""
        full_at = max(self._full_at, now) + self._interval_s
        if full_at - now <= self._depth_s:
            self._full_at = full_at
            return 0.0
        return full_at - now - self._depth_s

    def debit(self, now: float) -> None:
        """Take a token that was granted elsewhere: of an empty bucket nothing."""
        self.take(now)

    def lacking(self, now: float) -> int:
        """Return how many tokens the bucket is short of its burst."""
        return max(0, round((self._full_at - now) / self._interval_s))

    def resize(self, rate: float, burst: float, now: float) -> None:
        """Become a bucket of another size that lacks the same part of its tokens."""
        lacking_s = max(self._full_at - now, 0.0) / self._depth_s
        self._interval_s, self._depth_s = 1 / rate, (burst + _ROUNDING) / rate
        self._full_at = now + lacking_s * self._depth_s


class ClientTable:
    """A bucket for each client, of at most `most` clients at a time.

    Only a client whose bucket is full is forgotten, so forgetting gives nobody a token. While every place is taken by
    others, newcomers share one bucket, and who gets a place then begins with what that one lacks.
    """

    def __init__(self, rate: float, burst: float, most: int) -> None:
        self._interval_s = 1 / rate
        self._depth_s = (burst + _ROUNDING) / rate
        self._most = most
        self._full_at: dict[Hashable, float] = {}
        self._newcomers_full_at = 0.0

    def __len__(self) -> int:
        """Return how many clients have a place."""
        return len(self._full_at)

    def take(self, client: Hashable, now: float) -> float:
        """Take a token of that client and return 0, or return in how many seconds there will be one."""
        known = self._full_at.get(client)
        if known is None:
            self._sweep(now)
            before = self._newcomers_full_at
        else:
            before = known
        full_at = max(before, now) + self._interval_s
        if full_at - now > self._depth_s:
            return full_at - now - self._depth_s
        if known is not None or len(self._full_at) < self._most:
            self._full_at[client] = full_at
        else:
            self._newcomers_full_at = full_at
        return 0.0

    def _sweep(self, now: float) -> None:
        """Forget some clients whose buckets are full; the others go to the end, so that all have their turn."""
        for client in [client for client, _ in zip(self._full_at, range(_SWEPT), strict=False)]:
            full_at = self._full_at.pop(client)
            if full_at > now:
                self._full_at[client] = full_at


@dataclass(frozen=True, slots=True)
class Grant:
    """What came of asking a shared bucket for tokens."""

    tokens: int
    correction: int  # to be added to the counter: less what was not there, and what no longer fitted into the bucket
    wait_s: float  # until there is one more; 0: there may be more at once
    full_in_s: float  # until the bucket is full, and need not be remembered


@dataclass(frozen=True, slots=True)
class SharedBucket:
    """A bucket that is one counter of tokens taken, and a clock in milliseconds that all who share it read.

    By the time `clock_ms`, `rate` times that many seconds have been minted. What is minted and not taken is in the
    bucket. The counter of a full bucket is not kept: `full` is what it begins with.
    """

    rate: int
    burst: int

    def full(self, clock_ms: int) -> int:
        """Return the counter of a full bucket."""
        return self.rate * clock_ms // 1000 - self.burst

    def grant(self, asked: int, counter: int, clock_ms: int) -> Grant | None:
        """Return what `asked` tokens got, when the counter is `counter` with them in it; None for an odd counter.

        An odd one is not this bucket's: its clock or itself was lost. It has to be thrown away.
        """
        minted = self.rate * clock_ms // 1000
        there = minted - (counter - asked)
        if there > self.burst + self.rate * _ODD_S or there < -_ODD_BURSTS * self.burst - self.rate * _ODD_S:
            return None
        spilt = max(there - self.burst, 0)
        there -= spilt
        tokens = max(min(there, asked), 0)
        left = there - tokens
        # The next one is minted by then, whatever others asked for too much: they put it back.
        next_ms = -(-(minted + 1) * 1000 // self.rate) - clock_ms
        return Grant(
            tokens=tokens,
            correction=spilt - (asked - tokens),
            wait_s=0.0 if tokens == asked else next_ms / 1000,
            full_in_s=min((self.burst - left) / self.rate, self.longest_s),
        )

    @property
    def longest_s(self) -> float:
        """Seconds after which the bucket is full, whatever was taken."""
        return self.burst / self.rate + _SLACK_S


def retry_after_s(wait_s: float) -> int:
    """Return whole seconds for `Retry-After`: never too early, at least one."""
    return max(1, -int(-wait_s // 1))
