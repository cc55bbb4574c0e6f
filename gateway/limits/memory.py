"""Limits kept in this process: a sliding minute in a ring of half-second buckets.

A bucket counts whole until 60 s after its *end*: so no 60 s ever hold more than the limit, and whatever would fit a
perfect window of 60.5 s is admitted (60 / 60.5 > 99 %). Only the buckets in which something came are kept, at most 121.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from operator import attrgetter
from typing import Final, Literal

from gateway.limits.base import Account, Lease, Limits, Refused, Standing, Window

_PER_SECOND: Final = 2  # buckets; a power of two, so that their edges are exact floats
_KEPT: Final = 60 * _PER_SECOND + 1  # from a bucket's own slot to the first in which it no longer counts
_PARALLEL_RETRY: Final = 1.0  # seconds; nobody knows when a stream will end

_NO_LIMITS: Final = Limits()

# A NamedTuple's own constructor costs as much as the whole decision.
_new: Final = tuple.__new__


class _Bucket:
    __slots__ = ("gone_at", "requests", "slot", "tokens")

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.gone_at = (slot + _KEPT) / _PER_SECOND
        self.requests = 0
        self.tokens = 0


_REQUESTS: Final[Callable[[_Bucket], int]] = attrgetter("requests")
_TOKENS: Final[Callable[[_Bucket], int]] = attrgetter("tokens")


class _Account:
    """What one key used in the last minute, and holds now."""

    __slots__ = (
        "buckets",
        "limits",
        "max_parallel",
        "max_requests",
        "max_reserved",
        "max_tokens",
        "newest",
        "newest_end",
        "parallel",
        "requests",
        "tokens",
        "unlimited",
    )

    def __init__(self, limits: Limits) -> None:
        self.buckets: deque[_Bucket] = deque()  # oldest first
        self.newest = _Bucket(-_KEPT)
        self.newest_end = -math.inf
        self.requests = 0  # sums over the buckets
        self.tokens = 0
        self.parallel = 0
        self.limit(limits)

    def limit(self, limits: Limits) -> None:
        self.limits = limits
        self.unlimited = limits == _NO_LIMITS
        # No limit as infinity spares the request path comparisons with None.
        self.max_requests, self.max_tokens, self.max_parallel = (math.inf if n is None else n for n in limits)
        self.max_reserved = limits.tokens_per_minute or 0

    def advance(self, now: float) -> None:
        slot = int(now * _PER_SECOND)
        while self.buckets and self.buckets[0].slot + _KEPT <= slot:
            gone = self.buckets.popleft()
            self.requests -= gone.requests
            self.tokens -= gone.tokens
        self.newest = _Bucket(slot)
        self.newest_end = (slot + 1) / _PER_SECOND
        self.buckets.append(self.newest)

    def standing(self, now: float) -> Standing:
        request_limit, token_limit, _ = self.limits
        newest = self.newest
        requests = tokens = None
        if request_limit is not None:
            empty_at = newest.gone_at if newest.requests else self.empty_at(_REQUESTS, now)
            requests = _window(request_limit, self.requests, empty_at - now)
        if token_limit is not None:
            empty_at = newest.gone_at if newest.tokens else self.empty_at(_TOKENS, now)
            tokens = _window(token_limit, self.tokens, empty_at - now)
        return _new(Standing, (requests, tokens))

    def empty_at(self, amount: Callable[[_Bucket], int], now: float) -> float:
        """When the last bucket with anything in it will have left."""
        return next((bucket.gone_at for bucket in reversed(self.buckets) if amount(bucket)), now)

    def wait(self, over: float, amount: Callable[[_Bucket], int], now: float) -> float:
        """Seconds until buckets that hold at least `over` have left; infinite if all of them hold less."""
        if over <= 0:
            return 0.0
        for bucket in self.buckets:
            over -= amount(bucket)
            if over <= 0:
                return bucket.gone_at - now
        return math.inf

    def refusal(self, now: float, prompt_tokens: int, reserved: int) -> Refused:
        """The verdict on a request that does not fit: of the limits in its way, the one with the longest wait."""
        requests = self.wait(self.requests + 1 - self.max_requests, _REQUESTS, now)
        tokens = self.wait(self.tokens + reserved - self.max_tokens, _TOKENS, now)
        if prompt_tokens > self.max_tokens:
            tokens = math.inf
        parallel = 0.0
        if self.parallel >= self.max_parallel:
            parallel = _PARALLEL_RETRY if self.max_parallel else math.inf
        waits: list[tuple[float, Literal["requests", "tokens", "parallel_requests"], float]] = [
            (requests, "requests", self.max_requests),
            (tokens, "tokens", self.max_tokens),
            (parallel, "parallel_requests", self.max_parallel),
        ]
        longest, limit, allowed = max(waits, key=lambda one: one[0])
        return Refused(limit, None if longest == math.inf else longest, self.standing(now), int(allowed))


def _window(limit: int, used: int, reset: float) -> Window:
    return _new(Window, (limit, limit - used if used < limit else 0, reset))


class _Lease:
    __slots__ = ("_account", "_bucket", "reserved", "standing")

    def __init__(self, account: _Account, bucket: _Bucket, reserved: int, standing: Standing) -> None:
        self._account: _Account | None = account
        self._bucket = bucket
        self.reserved = reserved
        self.standing = standing

    def settle(self, tokens: int | None) -> None:
        account = self._account
        if account is None:
            return
        self._account = None
        account.parallel -= 1
        bucket = self._bucket
        if bucket.slot + _KEPT <= account.newest.slot:
            return
        if tokens is None:
            bucket.requests -= 1
            account.requests -= 1
            tokens = 0
        more = tokens - self.reserved
        bucket.tokens += more
        account.tokens += more


class _Unlimited:
    """The lease of every request without limits: there is nothing to give back."""

    standing: Final = Standing(None, None)
    reserved: Final = 0

    def settle(self, tokens: int | None) -> None:
        pass


_UNLIMITED: Final = _Unlimited()


class MemoryLimiter:
    """Exact within this process. For one event loop: `admit` never suspends, so no decision is interleaved.

    `clock` gives seconds and never goes back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def account(self, key_id: str, limits: Limits) -> Account:
        account = self._accounts.get(key_id)
        if account is None:
            account = self._accounts[key_id] = _Account(limits)
        else:
            account.limit(limits)
        return account

    async def admit(self, account: Account, prompt_tokens: int, answer_tokens: int) -> Lease:
        if not isinstance(account, _Account):
            raise TypeError("an account of another limiter")
        if account.unlimited:
            return _UNLIMITED
        now = self._clock()
        if now >= account.newest_end:
            account.advance(now)
        reserved = min(prompt_tokens + answer_tokens, account.max_reserved)
        if (
            account.requests >= account.max_requests
            or account.tokens + reserved > account.max_tokens
            or account.parallel >= account.max_parallel
            or prompt_tokens > account.max_tokens
        ):
            raise account.refusal(now, prompt_tokens, reserved)
        bucket = account.newest
        bucket.requests += 1
        account.requests += 1
        bucket.tokens += reserved
        account.tokens += reserved
        account.parallel += 1
        return _Lease(account, bucket, reserved, account.standing(now))
