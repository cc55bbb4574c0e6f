"""Limits kept in this process: a sliding minute in a ring of half-second buckets.

A bucket counts whole until 60 s after its *end*: so no 60 s ever hold more than the limit, and whatever would fit a
perfect window of 60.5 s is admitted (60 / 60.5 > 99 %). Only the buckets in which something came are kept, at most 121.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Final, Literal, NamedTuple
from weakref import WeakValueDictionary

from mypy_extensions import mypyc_attr

from gateway.limits.base import FREE, Account, Budget, Lease, Limits, Period, Price, Refused, Standing, Window
from gateway.limits.budgets import Held, Tally

_PER_SECOND: Final = 2  # buckets; a power of two, so that their edges are exact floats
_KEPT: Final = 60 * _PER_SECOND + 1  # from a bucket's own slot to the first in which it no longer counts
_PARALLEL_RETRY: Final = 1.0  # seconds; nobody knows when a stream will end
_BUDGET_RETRY: Final = 1.0  # seconds, where open requests may give back enough

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
    """What one key or team used in the last minute, and holds now."""

    __slots__ = (
        "bound",
        "buckets",
        "counts_tokens",
        "limits",
        "max_parallel",
        "max_requests",
        "max_reserved",
        "max_tokens",
        "newest",
        "newest_end",
        "parallel",
        "requests",
        "tallies",
        "team",
        "tokens",
        "unlimited",
    )

    def __init__(self) -> None:
        self.buckets: deque[_Bucket] = deque()  # oldest first
        self.newest = _Bucket(-_KEPT)
        self.newest_end = -math.inf
        self.requests = 0  # sums over the buckets
        self.tokens = 0
        self.parallel = 0
        self.tallies: list[Tally] = []
        self.team: _Account | None
        self.unlimited: bool
        self.counts_tokens: bool
        self.limit(_NO_LIMITS)

    def limit(self, limits: Limits, budgets: Sequence[Budget] = (), team: "_Account | None" = None) -> None:
        """Fixes the terms. What was counted before stays; of a budget too, whatever its amount."""
        self.limits = limits
        # No limit as infinity spares the request path comparisons with None.
        self.max_requests, self.max_tokens, self.max_parallel = (math.inf if n is None else n for n in limits)
        self.max_reserved = limits.tokens_per_minute or 0
        counted = {(tally.budget.unit, tally.budget.period): tally for tally in self.tallies}
        self.tallies = [counted.get((budget.unit, budget.period)) or Tally(budget) for budget in budgets]
        for tally, budget in zip(self.tallies, budgets, strict=True):
            tally.budget = budget
        self.team = None if team is None or team.unlimited else team
        self.bound = bool(self.tallies) or self.team is not None
        self.unlimited = limits == _NO_LIMITS and not self.bound
        self.counts_tokens = (
            limits.tokens_per_minute is not None
            or bool(self.tallies)
            or (self.team is not None and self.team.counts_tokens)
        )

    def advance(self, now: float) -> None:
        slot = int(now * _PER_SECOND)
        while self.buckets and self.buckets[0].slot + _KEPT <= slot:
            gone = self.buckets.popleft()
            self.requests -= gone.requests
            self.tokens -= gone.tokens
        self.newest = _Bucket(slot)
        self.newest_end = (slot + 1) / _PER_SECOND
        self.buckets.append(self.newest)

    def idle(self, now: float) -> bool:
        """Whether nothing is counted here that could refuse a request."""
        return not self.parallel and (now >= self.newest.gone_at or not (self.requests or self.tokens))

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

    def lease(self, now: float, tokens: int) -> "_Lease":
        """As `MemoryLimiter.admit` does for the many keys that have neither team nor budget."""
        bucket, reserved = self.newest, min(tokens, self.max_reserved)
        bucket.requests += 1
        self.requests += 1
        bucket.tokens += reserved
        self.tokens += reserved
        self.parallel += 1
        return _Lease(self, bucket, reserved, self.standing(now))

    def refusals(self, now: float, today: float, prompt_tokens: int, answer_tokens: int) -> list[Refused]:
        """What stands in a request's way here: limits, and budgets."""
        if now >= self.newest_end:
            self.advance(now)
        found = []
        reserved = min(prompt_tokens + answer_tokens, self.max_reserved)
        if (
            self.requests >= self.max_requests
            or self.tokens + reserved > self.max_tokens
            or self.parallel >= self.max_parallel
            or prompt_tokens > self.max_tokens
        ):
            found.append(self.refusal(now, prompt_tokens, reserved))
        for tally in self.tallies:
            tally.roll(today)
            budget = tally.budget
            if tally.spent + tally.reserved >= budget.amount:
                wait = _BUDGET_RETRY if tally.spent < budget.amount else None
                standing, until = self.standing(now), tally.resets_at
                found.append(Refused("budget", wait, standing, budget.amount, budget=budget, resets_at=until))
        return found

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


@mypyc_attr(native_class=False)  # or nothing could refer to it weakly
class _Holder:
    """What callers hold of an account: when the last of them is gone, it may be forgotten."""

    def __init__(self, account: _Account) -> None:
        self.account = account

    @property
    def limits(self) -> Limits:
        return self.account.limits

    @property
    def counts_tokens(self) -> bool:
        return self.account.counts_tokens


class _Lease:
    __slots__ = ("_account", "_bucket", "reserved", "standing")

    def __init__(self, account: _Account, bucket: _Bucket, reserved: int, standing: Standing) -> None:
        self._account: _Account | None = account
        self._bucket = bucket
        self.reserved = reserved
        self.standing = standing

    def settle(self, tokens: int | None, cost: int = 0) -> None:
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


class _Joint:
    """The lease of a request that a team or a budget has a say in too."""

    __slots__ = ("_held", "_leases", "reserved", "standing")

    def __init__(self, leases: list[_Lease], held: list[Held], standing: Standing) -> None:
        self._leases = leases
        self._held = held
        self.reserved = leases[0].reserved
        self.standing = standing

    def settle(self, tokens: int | None, cost: int = 0) -> None:
        for lease in self._leases:
            lease.settle(tokens)
        held, self._held = self._held, []
        for one in held:
            one.tally.settle(one, tokens or 0, 0 if tokens is None else cost)


class _Unlimited:
    """The lease of every request without limits: there is nothing to give back."""

    standing: Final = Standing(None, None)
    reserved: Final = 0

    def settle(self, tokens: int | None, cost: int = 0) -> None:
        pass


_UNLIMITED: Final = _Unlimited()


class BudgetUse(NamedTuple):
    budget: Budget
    spent: int  # in the budget's unit; open requests not counted
    resets_at: float | None  # seconds since the epoch; None: never


class Use(NamedTuple):
    """An account as it stands. Where it has no limits at all, nothing is counted."""

    requests: int  # in the last minute
    tokens: int
    parallel: int  # open now
    budgets: tuple[BudgetUse, ...]


Mark = Mapping[
    str, Sequence[tuple[Tally, float, int]]
]  # by owner: each budget's tally, its period's end, what is spent


class MemoryLimiter:
    """Exact within this process. For one event loop: `admit` never suspends, so no decision is interleaved.

    `clock` gives seconds and never goes back; `calendar` gives seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, calendar: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._calendar = calendar
        # Whoever may make requests holds an account; what is counted holds it too, until it counts no longer.
        self._holders: WeakValueDictionary[str, _Holder] = WeakValueDictionary()
        self._counting: set[_Holder] = set()

    def account(
        self, owner: str, limits: Limits, budgets: Sequence[Budget] = (), team: Account | None = None
    ) -> Account:
        holder = self._holders.get(owner)
        if holder is None:
            holder = self._holders[owner] = _Holder(_Account())
            self._counting.add(holder)
        holder.account.limit(limits, budgets, None if team is None else _own(team))
        return holder

    def sweep(self) -> None:
        """Forgets the accounts that nobody holds any more, once nothing is counted on them. To be called now and then,
        and before keys go."""
        now = self._clock()
        self._counting = {holder for holder in self._holders.values() if not holder.account.idle(now)}

    async def admit(self, account: Account, prompt_tokens: int, answer_tokens: int, price: Price = FREE) -> Lease:
        return self.decide(_own(account), prompt_tokens, answer_tokens, price)

    def decide(self, account: _Account, prompt_tokens: int, answer_tokens: int, price: Price) -> Lease:
        """As `admit`."""
        if account.unlimited:
            return _UNLIMITED
        now = self._clock()
        if account.bound:
            return self._admit_all(account, now, prompt_tokens, answer_tokens, price)
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

    def _admit_all(self, account: _Account, now: float, prompt: int, answer: int, price: Price) -> Lease:
        team, today = account.team, self._calendar()
        refusals = account.refusals(now, today, prompt, answer)
        if team is not None:
            of_team = team.refusals(now, today, prompt, answer)
            for refused in of_team:
                refused.of_team = True
            refusals += of_team
        if refusals:
            raise max(refusals, key=lambda refused: math.inf if refused.retry_after is None else refused.retry_after)
        tokens, cost = prompt + answer, price.cost(prompt, answer)
        lease = account.lease(now, tokens)
        held = [tally.hold(tokens, cost) for tally in account.tallies]
        if team is None:
            return _Joint([lease], held, lease.standing)
        of_team_too = team.lease(now, tokens)
        held += [tally.hold(tokens, cost) for tally in team.tallies]
        return _Joint([lease, of_team_too], held, _tighter(lease.standing, of_team_too.standing))

    def use(self, owner: str) -> Use | None:
        """How an account stands; None if there is none. Not for the request path."""
        holder = self._holders.get(owner)
        if holder is None:
            return None
        account = holder.account
        now, today = self._clock(), self._calendar()
        if now >= account.newest_end:
            account.advance(now)
        for tally in account.tallies:
            tally.roll(today)
        return Use(
            account.requests,
            account.tokens,
            account.parallel,
            tuple(BudgetUse(tally.budget, tally.spent, tally.resets_at) for tally in account.tallies),
        )

    def mark(self) -> Mark:
        """What all budgets have counted by now. Rolls those whose period is over."""
        today = self._calendar()
        marks: dict[str, list[tuple[Tally, float, int]]] = {}
        for owner, holder in self._holders.items():
            for tally in holder.account.tallies:
                tally.roll(today)
                marks.setdefault(owner, []).append((tally, tally.until, tally.spent))
        return marks

    def restore(self, mark: Mark, spent: Mapping[str, Mapping[Period, tuple[int, int]]]) -> None:
        """Puts what was really used until `mark`, by this process and all others, in the place of what was counted here.

        `spent`: tokens and cost by owner and period.
        """
        for owner, marks in mark.items():
            for tally, until, counted in marks:
                if owner in spent and tally.until == until:
                    tally.known = True
                    tally.spent += spent[owner][tally.budget.period][tally.in_money] - counted


def has_news(mark: Mark) -> bool:
    """Whether of some budget it is not known yet what was used before."""
    return any(not tally.known for marks in mark.values() for tally, _, _ in marks)


def _own(account: Account) -> _Account:
    if not isinstance(account, _Holder):
        raise TypeError("an account of another limiter")
    return account.account


def _tighter(one: Standing, other: Standing) -> Standing:
    """Of each kind of window the one in which less is left."""
    return Standing(_less(one.requests, other.requests), _less(one.tokens, other.tokens))


def _less(one: Window | None, other: Window | None) -> Window | None:
    if one is None or other is None:
        return one or other
    return min(one, other, key=attrgetter("remaining"))
