"""The memory limiter against an oracle that keeps every event in a list.

Times are multiples of 1/1024 s, so that all sums and differences are exact.
"""

import gc
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings, strategies as st

from gateway.limits.base import Account, Lease, Limiter, Limits, Refused, Standing, Window
from gateway.limits.memory import MemoryLimiter

T = TypeVar("T")
TICK = 1 / 1024
BUCKET = 0.5


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The value of a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise AssertionError("suspended")


def refusal(limiter: Limiter, account: Account, prompt: int = 0, answer: int = 0) -> Refused:
    with pytest.raises(Refused) as caught:
        run(limiter.admit(account, prompt, answer))
    return caught.value


def state(holder: Any, now: float) -> object:
    """Everything that still decides anything at `now`."""
    account = holder.account
    live = [(b.slot, b.requests, b.tokens) for b in account.buckets if b.gone_at > now and (b.requests or b.tokens)]
    return live, sum(b[1] for b in live), sum(b[2] for b in live), account.parallel, account.limits


@dataclass
class Event:
    time: float
    requests: int
    tokens: int


@dataclass
class Oracle:
    """A key's history, and what its limits mean."""

    limits: Limits
    events: list[Event] = field(default_factory=list)
    open: int = 0

    def used(self, now: float, seconds: float) -> tuple[int, int]:
        """Requests and tokens of the last `seconds`, both ends included."""
        recent = [event for event in self.events if event.time >= now - seconds]
        return sum(event.requests for event in recent), sum(event.tokens for event in recent)

    def reserved(self, prompt: int, answer: int) -> int:
        limit = self.limits.tokens_per_minute
        return 0 if limit is None else min(prompt + answer, limit)

    def admits(self, now: float, prompt: int, answer: int, seconds: float) -> bool:
        requests, tokens = self.used(now, seconds)
        per_minute, token_limit, parallel = self.limits
        return (
            (per_minute is None or requests + 1 <= per_minute)
            and (
                token_limit is None or (tokens + self.reserved(prompt, answer) <= token_limit and prompt <= token_limit)
            )
            and (parallel is None or self.open + 1 <= parallel)
        )


# --- by example ------------------------------------------------------------------------------------------------------


def test_the_whole_limit_may_come_at_once_and_again_after_a_minute() -> None:
    clock = Clock()
    limiter = MemoryLimiter(clock)
    account = limiter.account("k", Limits(requests_per_minute=3))
    for left in (2, 1, 0):
        assert run(limiter.admit(account, 0, 0)).standing == Standing(Window(3, left, 60.5), None)
    refused = refusal(limiter, account)
    assert (refused.limit, refused.allowed, refused.retry_after) == ("requests", 3, 60.5)
    clock.now += 60.5 - TICK
    assert refusal(limiter, account).retry_after == TICK
    clock.now += TICK
    assert run(limiter.admit(account, 0, 0)).standing.requests == Window(3, 2, 60.5)


@pytest.mark.parametrize("offset", [0, TICK, BUCKET - TICK, BUCKET])
def test_an_event_anywhere_in_its_bucket_counts_for_its_own_60_seconds(offset: float) -> None:
    clock = Clock(1000 + offset)
    limiter = MemoryLimiter(clock)
    account = limiter.account("k", Limits(requests_per_minute=1))
    run(limiter.admit(account, 0, 0)).settle(None)
    run(limiter.admit(account, 0, 0))
    clock.now += 60
    wait = refusal(limiter, account).retry_after
    assert wait is not None
    assert 0 < wait <= BUCKET


def test_token_reservation_is_capped_at_the_limit_but_a_longer_prompt_is_refused_for_good() -> None:
    limiter = MemoryLimiter(Clock())
    account = limiter.account("k", Limits(tokens_per_minute=100))
    refused = refusal(limiter, account, 101, 0)
    assert (refused.limit, refused.retry_after, refused.allowed) == ("tokens", None, 100)
    assert refused.standing == Standing(None, Window(100, 100, 0.0))
    lease = run(limiter.admit(account, 100, 5000))
    assert lease.reserved == 100
    assert lease.standing == Standing(None, Window(100, 0, 60.5))


def test_settling_gives_back_or_adds_in_the_bucket_of_the_reservation() -> None:
    clock = Clock()
    limiter = MemoryLimiter(clock)
    account = limiter.account("k", Limits(tokens_per_minute=100))
    less, more = run(limiter.admit(account, 10, 30)), run(limiter.admit(account, 10, 30))
    clock.now += 30
    less.settle(15)
    more.settle(115)
    assert refusal(limiter, account, 1, 0).standing.tokens == Window(100, 0, 30.5)
    clock.now += 30.5
    assert run(limiter.admit(account, 100, 0)).standing.tokens == Window(100, 0, 60.5)


def test_a_settlement_after_the_minute_changes_only_the_parallel_count() -> None:
    clock = Clock()
    limiter = MemoryLimiter(clock)
    account = limiter.account("k", Limits(10, 100, 2))
    old = run(limiter.admit(account, 50, 0))
    clock.now += 100
    run(limiter.admit(account, 1, 1))
    assert refusal(limiter, account).limit == "parallel_requests"
    old.settle(1000)
    assert run(limiter.admit(account, 1, 1)).standing == Standing(Window(10, 8, 60.5), Window(100, 96, 60.5))


def test_a_request_that_never_reached_an_engine_is_given_back_whole() -> None:
    limiter = MemoryLimiter(Clock())
    account = limiter.account("k", Limits(1, 100, 1))
    run(limiter.admit(account, 10, 20)).settle(None)
    lease = run(limiter.admit(account, 10, 20))
    assert lease.standing == Standing(Window(1, 0, 60.5), Window(100, 70, 60.5))


def test_settling_twice_is_settling_once() -> None:
    limiter = MemoryLimiter(Clock())
    account = limiter.account("k", Limits(5, 100, 1))
    lease = run(limiter.admit(account, 10, 20))
    lease.settle(12)
    before = state(account, 1000)
    lease.settle(99)
    lease.settle(None)
    assert state(account, 1000) == before


def test_parallel_requests_are_open_leases() -> None:
    limiter = MemoryLimiter(Clock())
    account = limiter.account("k", Limits(parallel_requests=2))
    first, _ = run(limiter.admit(account, 1, 1)), run(limiter.admit(account, 1, 1))
    refused = refusal(limiter, account)
    assert (refused.limit, refused.retry_after, refused.allowed) == ("parallel_requests", 1.0, 2)
    assert refused.standing == Standing(None, None)
    first.settle(5)
    assert run(limiter.admit(account, 1, 1)).reserved == 0


@pytest.mark.parametrize(
    ("limits", "limit"),
    [
        (Limits(requests_per_minute=0), "requests"),
        (Limits(tokens_per_minute=0), "tokens"),
        (Limits(parallel_requests=0), "parallel_requests"),
    ],
)
def test_a_limit_of_zero_refuses_for_good(limits: Limits, limit: str) -> None:
    limiter = MemoryLimiter(Clock())
    refused = refusal(limiter, limiter.account("k", limits), 1, 1)
    assert (refused.limit, refused.retry_after, refused.allowed) == (limit, None, 0)


@pytest.mark.parametrize(
    ("limits", "prompt", "named"),
    [
        (Limits(1, 100, 1), 60, "requests"),  # 60.5 s, 60.5 s and 1 s: the first of the longest
        (Limits(2, 100, 1), 60, "tokens"),
        (Limits(2, 100, 1), 10, "parallel_requests"),
        (Limits(1, 100, 1), 101, "tokens"),  # for good
        (Limits(2, 100, 2), 10, None),
    ],
)
def test_of_several_limits_in_the_way_the_longest_wait_is_told(limits: Limits, prompt: int, named: str | None) -> None:
    limiter = MemoryLimiter(Clock())
    account = limiter.account("k", limits)
    run(limiter.admit(account, 20, 30))
    if named is None:
        run(limiter.admit(account, prompt, 0))
    else:
        assert refusal(limiter, account, prompt, 0).limit == named


def test_retry_after_waits_for_as_many_buckets_as_are_needed() -> None:
    clock = Clock()
    limiter = MemoryLimiter(clock)
    account = limiter.account("k", Limits(tokens_per_minute=100))
    for _ in range(5):
        run(limiter.admit(account, 20, 0))
        clock.now += 1
    waits = [refusal(limiter, account, tokens, 0).retry_after for tokens in (1, 20, 21, 60, 100)]
    assert waits == [55.5, 55.5, 56.5, 57.5, 59.5]


def test_remaining_and_reset_tell_the_truth_when_the_newest_bucket_is_empty() -> None:
    clock = Clock()
    limiter = MemoryLimiter(clock)
    account = limiter.account("k", Limits(2, 100, 9))
    run(limiter.admit(account, 40, 0))
    clock.now += 10
    assert run(limiter.admit(account, 0, 0)).standing == Standing(Window(2, 0, 60.5), Window(100, 60, 50.5))
    clock.now += 10
    assert refusal(limiter, account).standing == Standing(Window(2, 0, 50.5), Window(100, 60, 40.5))


def test_without_limits_nothing_is_counted() -> None:
    limiter = MemoryLimiter(Clock())
    account = limiter.account("k", Limits())
    lease = run(limiter.admit(account, 10**9, 10**9))
    assert (lease.standing, lease.reserved) == (Standing(None, None), 0)
    lease.settle(5)
    lease.settle(None)
    assert state(account, 1000) == ([], 0, 0, 0, Limits())


def test_an_account_outlives_a_reload_and_keeps_what_was_used() -> None:
    limiter = MemoryLimiter(Clock())
    account = limiter.account("k", Limits(requests_per_minute=10))
    leases = [run(limiter.admit(account, 10, 10)) for _ in range(4)]
    leases[0].settle(15)
    assert limiter.account("k", Limits(3, 100, 4)) is account
    assert refusal(limiter, account).standing == Standing(Window(3, 0, 60.5), Window(100, 85, 60.5))
    limiter.account("k", Limits(5))
    assert run(limiter.admit(account, 0, 0)).standing.requests == Window(5, 0, 60.5)
    assert limiter.account("other", Limits(5)) is not account


def test_memory_stays_constant() -> None:
    clock = Clock()
    limiter = MemoryLimiter(clock)
    account: Any = limiter.account("k", Limits(requests_per_minute=10**6))
    for _ in range(1000):
        clock.now += 0.3
        run(limiter.admit(account, 0, 0)).settle(0)
    assert len(account.account.buckets) <= 121


def test_a_client_that_hammers_gets_at_least_99_percent_and_never_more_than_all() -> None:
    clock = Clock()
    limiter = MemoryLimiter(clock)
    account = limiter.account("k", Limits(requests_per_minute=50))
    admitted = 0
    while clock.now < 1000 + 20 * 60:
        try:
            run(limiter.admit(account, 0, 0))
            admitted += 1
        except Refused:
            pass
        clock.now += 10 * TICK
    assert 0.99 * 50 * 20 <= admitted <= 50 * 20


def test_an_account_of_another_limiter_is_a_programming_error() -> None:
    class Foreign:
        limits = Limits()
        counts_tokens = False

    with pytest.raises(TypeError):
        run(MemoryLimiter().admit(Foreign(), 0, 0))


# --- by property -----------------------------------------------------------------------------------------------------

ticks = st.integers(0, 1024).map(lambda n: n * TICK)
edges = st.sampled_from([0, BUCKET, 59.5, 60, 60.5, 61, 121]).flatmap(
    lambda edge: st.sampled_from([-TICK, 0, TICK]).map(lambda off: max(0, edge + off))
)
pauses = st.one_of(st.just(0.0), ticks, edges, st.integers(0, 70 * 1024).map(lambda n: n * TICK))
limit = st.one_of(st.none(), st.integers(1, 6))
limits_ = st.builds(Limits, limit, st.one_of(st.none(), st.integers(1, 120)), limit)


@dataclass(frozen=True)
class Admit:
    pause: float
    prompt: int
    answer: int


@dataclass(frozen=True)
class Settle:
    pause: float
    which: int  # of the open leases
    tokens: int | None


steps = st.lists(
    st.one_of(
        st.builds(Admit, pauses, st.integers(0, 130), st.integers(0, 60)),
        st.builds(Settle, pauses, st.integers(0, 100), st.one_of(st.none(), st.integers(0, 200))),
    ),
    max_size=60,
)


def copied(holder: Any) -> Any:
    """What is counted on an account, on another one."""
    old = holder.account
    new = type(old)()
    new.limit(old.limits)
    for name in ("newest_end", "requests", "tokens", "parallel"):
        setattr(new, name, getattr(old, name))
    for bucket in old.buckets:
        new.newest = type(bucket)(bucket.slot)
        new.newest.requests, new.newest.tokens = bucket.requests, bucket.tokens
        new.buckets.append(new.newest)
    return type(holder)(new)


def passes(limiter: MemoryLimiter, account: Account, admit: Admit, clock: Clock, after: float) -> bool:
    """Whether a request would pass `after` seconds if nothing else came; asked of a copy."""
    now, clock.now = clock.now, clock.now + after
    try:
        run(limiter.admit(copied(account), admit.prompt, admit.answer))
    except Refused:
        return False
    finally:
        clock.now = now
    return True


def check_refusal(refused: Refused, limiter: MemoryLimiter, account: Account, step: Admit, clock: Clock) -> None:
    wait = refused.retry_after
    if wait is None:
        assert refused.limit == "tokens"
        assert step.prompt > refused.allowed
    elif refused.limit == "parallel_requests":
        assert wait == 1.0
    else:
        assert 0 < wait <= 60.5
        assert not passes(limiter, account, step, clock, wait - TICK)
        relaxed = copied(account)
        relaxed.account.limit(relaxed.limits._replace(parallel_requests=None))
        assert passes(limiter, relaxed, step, clock, wait)


def check_standing(standing: Standing, oracle: Oracle, clock: Clock) -> None:
    """Remaining as in a window between 60 and 60.5 s; whole again at `reset`, and not before."""
    for number, (window, allowed) in enumerate(zip(standing, oracle.limits, strict=False)):
        if allowed is None:
            assert window is None
            continue
        assert window is not None
        assert window.limit == allowed
        most, least = (max(0, allowed - oracle.used(clock.now, seconds)[number]) for seconds in (60, 60.5))
        assert least <= window.remaining <= most
        amounts = [(event.time, (event.requests, event.tokens)[number]) for event in oracle.events]
        last = max((time for time, amount in amounts if amount), default=-1000.0)
        if window.reset:
            assert last + 60 < clock.now + window.reset <= last + 60.5
        else:
            assert last + 60 < clock.now


@settings(max_examples=400, deadline=None)
@given(limits_, steps, ticks)
def test_it_does_what_the_oracle_does(limits: Limits, schedule: list[Admit | Settle], start: float) -> None:
    clock = Clock(1000 + start)
    limiter = MemoryLimiter(clock)
    account = limiter.account("k", limits)
    oracle = Oracle(limits)
    leases: list[tuple[Lease, Event]] = []
    for step in schedule:
        clock.now += step.pause
        match step:
            case Settle(which=which, tokens=tokens) if leases:
                lease, event = leases.pop(which % len(leases))
                lease.settle(tokens)
                lease.settle(7)
                oracle.open -= 1
                event.tokens = tokens or 0
                event.requests = 0 if tokens is None else 1
            case Admit(prompt=prompt, answer=answer):
                before = state(account, clock.now)
                try:
                    lease = run(limiter.admit(account, prompt, answer))
                except Refused as refused:
                    # Whatever fits a perfect window of 60.5 s is admitted: 60 / 60.5 > 99 %.
                    assert not oracle.admits(clock.now, prompt, answer, 60.5)
                    assert state(account, clock.now) == before
                    check_refusal(refused, limiter, account, step, clock)
                    check_standing(refused.standing, oracle, clock)
                else:
                    # Whatever is admitted fits a perfect window of 60 s.
                    assert oracle.admits(clock.now, prompt, answer, 60)
                    event = Event(clock.now, 1, oracle.reserved(prompt, answer))
                    oracle.events.append(event)
                    oracle.open += 1
                    assert lease.reserved == event.tokens
                    if limits != Limits():
                        leases.append((lease, event))
                    check_standing(lease.standing, oracle, clock)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(limits_, min_size=20, max_size=20),
    st.lists(
        st.tuples(st.integers(0, 19), ticks, st.integers(0, 100), st.integers(0, 60), st.none() | st.integers(0, 150)),
        min_size=300,
        max_size=300,
    ),
)
def test_keys_do_not_touch_each_other(
    limits: list[Limits], requests: list[tuple[int, float, int, int, int | None]]
) -> None:
    """Each key fares as it would alone, and what is left at the end is what was used."""

    def fate(only: int | None) -> tuple[dict[int, list[str]], MemoryLimiter, dict[int, list[tuple[float, int]]]]:
        clock = Clock()
        limiter = MemoryLimiter(clock)
        verdicts: dict[int, list[str]] = {}
        used: dict[int, list[tuple[float, int]]] = {}
        for key, pause, prompt, answer, tokens in requests:
            clock.now += pause
            if only not in (None, key):
                continue
            account = limiter.account(str(key), limits[key])
            try:
                run(limiter.admit(account, prompt, answer)).settle(tokens)
                used.setdefault(key, []).append((clock.now, tokens or 0))
                verdicts.setdefault(key, []).append("admitted")
            except Refused as refused:
                verdicts.setdefault(key, []).append(f"{refused.limit} {refused.retry_after} {refused.standing}")
        return verdicts, limiter, used

    together, limiter, used = fate(None)
    assert together == {key: verdicts for only in range(20) for key, verdicts in fate(only)[0].items()}
    for key, events in used.items():
        holder: Any = limiter.account(str(key), limits[key])
        account = holder.account
        oldest = account.buckets[0].slot / 2 if account.buckets else 0
        if limits[key] != Limits():
            assert account.tokens == sum(tokens for time, tokens in events if time >= oldest)


def test_an_account_is_kept_as_long_as_somebody_holds_it_or_something_is_counted() -> None:
    clock = Clock()
    limiter = MemoryLimiter(clock)
    limits = Limits(requests_per_minute=2, parallel_requests=2)
    account: Account | None = limiter.account("k", limits)
    assert account is not None
    lease = run(limiter.admit(account, 0, 0))
    limiter.sweep()
    account = None
    clock.now += 59
    limiter.sweep()
    assert limiter.use("k") is not None  # within its minute
    clock.now += 10
    limiter.sweep()
    assert limiter.use("k") is not None  # its request is open
    lease.settle(0)
    del lease
    limiter.sweep()
    gc.collect()
    assert limiter.use("k") is None
    held = limiter.account("held", limits)
    clock.now += 1000
    limiter.sweep()
    assert limiter.account("held", limits) is held
