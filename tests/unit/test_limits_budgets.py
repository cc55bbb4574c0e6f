"""Budgets, and limits that several keys share as a team, against an oracle that keeps every event in a list."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from gateway.limits.base import Budget, Lease, Limits, Period, Price, Refused, Standing, Window
from gateway.limits.budgets import month_end, month_start, period_end
from gateway.limits.memory import BudgetUse, MemoryLimiter
from tests.unit.test_limits_memory import Clock, Event, Oracle, refusal, run, state

DAY = 86_400
NOON = datetime(2026, 11, 24, 12, tzinfo=UTC).timestamp()
PRICE = Price(prompt=2.0, completion=10.0, cached=0.5)


def daily(amount: int) -> Budget:
    return Budget(amount, "tokens", "day")


class Clocks:
    """Both of a limiter's clocks, which go together."""

    def __init__(self) -> None:
        self.monotonic = Clock()
        self.calendar = Clock(NOON)
        self.limiter = MemoryLimiter(self.monotonic, self.calendar)

    def pass_(self, seconds: float) -> None:
        self.monotonic.now += seconds
        self.calendar.now += seconds


# --- by example ------------------------------------------------------------------------------------------------------


def test_a_budget_can_be_used_up_wholly_and_then_nothing_passes() -> None:
    limiter = MemoryLimiter()
    account = limiter.account("k", Limits(), [daily(100)])
    run(limiter.admit(account, 40, 20)).settle(60)
    run(limiter.admit(account, 40, 40)).settle(70)  # 40 are left: it may go beyond, once
    refused = refusal(limiter, account, 1, 1)
    assert (refused.limit, refused.retry_after, refused.allowed) == ("budget", None, 100)
    assert refused.budget == daily(100)


def test_open_requests_count_as_what_they_may_come_to() -> None:
    limiter = MemoryLimiter()
    account = limiter.account("k", Limits(), [daily(100)])
    leases = [run(limiter.admit(account, 10, 30)) for _ in range(3)]
    refused = refusal(limiter, account, 1, 1)
    assert (refused.limit, refused.retry_after) == ("budget", 1.0)  # they may give something back
    for lease in leases:
        lease.settle(20)
    run(limiter.admit(account, 10, 30)).settle(40)
    assert refusal(limiter, account).retry_after is None


def test_a_request_that_reached_no_engine_costs_nothing() -> None:
    limiter = MemoryLimiter()
    account = limiter.account("k", Limits(), [daily(10)])
    lease = run(limiter.admit(account, 10, 10))
    lease.settle(None, 99)
    lease.settle(50, 50)
    run(limiter.admit(account, 1, 1))


def test_money_is_counted_by_the_model_s_prices() -> None:
    limiter = MemoryLimiter()
    account = limiter.account("k", Limits(), [Budget(1000, "money", "total")])
    lease = run(limiter.admit(account, 100, 10, PRICE))  # 300
    lease.settle(110, PRICE.cost(100, 10, cached=80))  # 40 + 40 + 100
    use = limiter.use("k")
    assert use is not None
    assert use.budgets == (BudgetUse(Budget(1000, "money", "total"), 180, None),)
    run(limiter.admit(account, 1, 1)).settle(10**9, 0)  # another model, for free
    run(limiter.admit(account, 0, 82, PRICE)).settle(82, 820)
    assert refusal(limiter, account).limit == "budget"


@pytest.mark.parametrize(
    ("prompt", "completion", "cached", "cost"), [(0, 0, 0, 0), (10, 0, 0, 20), (10, 3, 4, 44), (2, 1, 5, 11)]
)
def test_prices(prompt: int, completion: int, cached: int, cost: int) -> None:
    assert PRICE.cost(prompt, completion, cached) == cost


@pytest.mark.parametrize(
    ("period", "wait"),
    [("day", DAY // 2), ("month", datetime(2026, 12, 1, tzinfo=UTC).timestamp() - NOON), ("total", None)],
)
def test_a_budget_is_whole_again_with_the_next_period(period: Period, wait: float | None) -> None:
    clocks = Clocks()
    limiter = clocks.limiter
    account = limiter.account("k", Limits(), [Budget(5, "tokens", period)])
    run(limiter.admit(account, 1, 1)).settle(7)
    assert refusal(limiter, account).resets_at == (None if wait is None else NOON + wait)
    if wait is None:
        clocks.pass_(400 * DAY)
        assert refusal(limiter, account).retry_after is None
    else:
        clocks.pass_(wait - 1)
        assert refusal(limiter, account).retry_after is None
        clocks.pass_(1)
        run(limiter.admit(account, 1, 1))


def test_what_began_before_midnight_belongs_to_the_day_before() -> None:
    clocks = Clocks()
    limiter = clocks.limiter
    account = limiter.account("k", Limits(), [daily(10)])
    lease = run(limiter.admit(account, 5, 5))
    clocks.pass_(DAY)
    new = run(limiter.admit(account, 2, 2))
    lease.settle(100)
    new.settle(4)
    use = limiter.use("k")
    assert use is not None
    assert use.budgets[0].spent == 4


def test_a_team_s_limits_are_shared_by_its_keys() -> None:
    limiter = MemoryLimiter(Clock())
    team = limiter.account("team", Limits(requests_per_minute=3, parallel_requests=3))
    one, two = (limiter.account(name, Limits(requests_per_minute=2), (), team) for name in ("one", "two"))
    assert run(limiter.admit(one, 1, 1)).standing == Standing(Window(2, 1, 60.5), None)
    run(limiter.admit(one, 1, 1))
    own = refusal(limiter, one)
    assert (own.limit, own.allowed, own.of_team) == ("requests", 2, False)
    assert run(limiter.admit(two, 1, 1)).standing == Standing(Window(3, 0, 60.5), None)
    shared = refusal(limiter, two)
    assert (shared.limit, shared.allowed, shared.of_team) == ("requests", 3, True)


def test_a_refusal_by_the_team_takes_nothing_from_the_key() -> None:
    limiter = MemoryLimiter(Clock())
    team = limiter.account("team", Limits(parallel_requests=1))
    one = limiter.account("one", Limits(10, 1000, 10), [daily(1000)], team)
    lease = run(limiter.admit(one, 10, 10))
    before = state(one, 1000), state(team, 1000), limiter.use("one")
    assert refusal(limiter, one, 10, 10).of_team
    assert (state(one, 1000), state(team, 1000), limiter.use("one")) == before
    lease.settle(15)
    run(limiter.admit(one, 10, 10))


def test_a_team_s_budget_is_spent_by_all_its_keys() -> None:
    limiter = MemoryLimiter()
    team = limiter.account("team", Limits(), [daily(100)])
    one, two = (limiter.account(name, Limits(), (), team) for name in ("one", "two"))
    run(limiter.admit(one, 10, 10)).settle(60)
    run(limiter.admit(two, 10, 10)).settle(60)
    refused = refusal(limiter, one)
    assert (refused.limit, refused.of_team) == ("budget", True)


def test_of_all_that_stands_in_the_way_what_waiting_does_not_help_is_told() -> None:
    limiter = MemoryLimiter(Clock())
    team = limiter.account("team", Limits(), [daily(1)])
    one = limiter.account("one", Limits(requests_per_minute=1), (), team)
    run(limiter.admit(one, 10, 10)).settle(20)
    assert refusal(limiter, one).limit == "budget"


def test_new_terms_keep_what_was_counted() -> None:
    limiter = MemoryLimiter()
    account = limiter.account("k", Limits(), [daily(100), Budget(5, "money", "total")])
    run(limiter.admit(account, 1, 1)).settle(60)
    assert limiter.account("k", Limits(), [daily(50)]) is account
    assert refusal(limiter, account).allowed == 50
    limiter.account("k", Limits())
    run(limiter.admit(account, 1, 1)).settle(60)


def test_only_those_whose_terms_speak_of_tokens_have_them_counted() -> None:
    limiter = MemoryLimiter()
    team = limiter.account("team", Limits(tokens_per_minute=5))
    lazy = limiter.account("lazy team", Limits(requests_per_minute=5))
    counts = {
        "none": limiter.account("a", Limits(1, None, 1)).counts_tokens,
        "tokens": limiter.account("b", Limits(1, 1, 1)).counts_tokens,
        "budget": limiter.account("c", Limits(), [daily(1)]).counts_tokens,
        "team": limiter.account("d", Limits(), (), team).counts_tokens,
        "lazy": limiter.account("e", Limits(), (), lazy).counts_tokens,
    }
    assert counts == {"none": False, "tokens": True, "budget": True, "team": True, "lazy": False}


def test_a_mark_lets_what_all_processes_used_replace_what_this_one_counted() -> None:
    clocks = Clocks()
    limiter = clocks.limiter
    account = limiter.account("k", Limits(), [daily(1000), Budget(10**6, "money", "month")])
    run(limiter.admit(account, 1, 1)).settle(30, 300)
    mark = limiter.mark()
    run(limiter.admit(account, 1, 1)).settle(5, 50)  # not in the store yet
    limiter.restore(mark, {"k": {"day": (130, 1300), "month": (200, 2000), "total": (0, 0)}})
    use = limiter.use("k")
    assert use is not None
    assert [one.spent for one in use.budgets] == [135, 2050]
    mark = limiter.mark()
    clocks.pass_(DAY)
    limiter.mark()
    limiter.restore(mark, {"k": {"day": (999, 0), "month": (206, 2060), "total": (0, 0)}})  # of a day that is over
    assert [one.spent for one in limiter.use("k").budgets] == [0, 2060]  # type: ignore[union-attr]
    limiter.restore(mark, {})


def test_use_of_an_account_that_is_not_there() -> None:
    assert MemoryLimiter().use("nobody") is None


# --- by property -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 4_000_000_000))
def test_months_follow_one_another(now: int) -> None:
    start, end = month_start(now), month_end(now)
    assert start <= now < end
    assert month_start(end) == end
    assert datetime.fromtimestamp(start, UTC).day == 1
    assert 28 * DAY <= end - start <= 31 * DAY


@dataclass
class BudgetOracle:
    """Every use of one budget, with the time of its admission."""

    budget: Budget
    used: list[tuple[float, int]] = field(default_factory=list)
    open: list[tuple[float, int]] = field(default_factory=list)

    def of(self, tokens: int, cost: int) -> int:
        return cost if self.budget.unit == "money" else tokens

    def left(self, now: float) -> int:
        end = period_end(self.budget.period, now)
        counted = [amount for at, amount in self.used + self.open if period_end(self.budget.period, at) == end]
        return self.budget.amount - sum(counted)


@dataclass
class Owner:
    window: Oracle
    budgets: list[BudgetOracle]

    def admits(self, now: float, today: float, prompt: int, answer: int, seconds: float) -> bool:
        return self.window.admits(now, prompt, answer, seconds) and all(one.left(today) > 0 for one in self.budgets)


small = st.one_of(st.none(), st.integers(1, 6))
terms = st.tuples(
    st.builds(Limits, small, st.one_of(st.none(), st.integers(1, 120)), small),
    st.lists(
        st.builds(
            Budget,
            st.integers(1, 400),
            st.sampled_from(["tokens", "money"]),
            st.sampled_from(["day", "month", "total"]),
        ),
        max_size=3,
        unique_by=lambda budget: budget[1:],
    ),
)
steps = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.25, 20.0, 61.0, DAY / 2, 20.0 * DAY]),
        st.one_of(
            st.tuples(st.just("admit"), st.integers(0, 1), st.integers(0, 60), st.integers(0, 60)),
            st.tuples(st.just("settle"), st.integers(0, 9), st.none() | st.integers(0, 90), st.integers(0, 9)),
        ),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(terms, st.lists(terms, min_size=2, max_size=2), steps)
def test_a_key_s_and_its_team_s_terms_hold_together_or_not_at_all(
    team_terms: Any, key_terms: list[Any], schedule: list[Any]
) -> None:
    clocks = Clocks()
    limiter = clocks.limiter
    team = limiter.account("team", *team_terms)
    keys = [limiter.account(f"key{n}", limits, budgets, team) for n, (limits, budgets) in enumerate(key_terms)]
    oracles = [
        Owner(Oracle(limits), [BudgetOracle(budget) for budget in budgets])
        for limits, budgets in (*key_terms, team_terms)
    ]
    leases: list[tuple[Lease, list[tuple[Owner, Event, list[tuple[BudgetOracle, tuple[float, int]]]]]]] = []

    told: list[tuple[Budget | None, list[Budget]]] = []

    def everything() -> object:
        now = clocks.monotonic.now
        return [state(account, now) for account in (*keys, team)], [limiter.use(o) for o in ("key0", "key1", "team")]

    for pause, (what, which, first, second) in schedule:
        clocks.pass_(pause)
        now, today = clocks.monotonic.now, clocks.calendar.now
        if what == "settle":
            if not leases:
                continue
            lease, parts = leases.pop(which % len(leases))
            tokens, cost = first, second
            lease.settle(tokens, cost)
            lease.settle(3, 3)
            for owner, event, held in parts:
                owner.window.open -= 1
                event.requests, event.tokens = int(tokens is not None), tokens or 0
                for one, reservation in held:
                    one.open.remove(reservation)
                    one.used.append((reservation[0], one.of(tokens, cost) if tokens is not None else 0))
            continue
        owners = [oracles[which], oracles[2]]
        before = everything()
        try:
            lease = run(limiter.admit(keys[which], first, second, PRICE))
        except Refused as refused:
            assert not all(owner.admits(now, today, first, second, 60.5) for owner in owners)
            assert everything() == before
            told.append((refused.budget, [one.budget for one in owners[refused.of_team].budgets]))
        else:
            assert all(owner.admits(now, today, first, second, 60) for owner in owners)
            parts = []
            for owner in owners:
                event = Event(now, 1, owner.window.reserved(first, second))
                owner.window.events.append(event)
                owner.window.open += 1
                held = [(one, (today, one.of(first + second, PRICE.cost(first, second)))) for one in owner.budgets]
                for one, reservation in held:
                    one.open.append(reservation)
                parts.append((owner, event, held))
            leases.append((lease, parts))
    assert all(budget is None or budget in budgets for budget, budgets in told)
    for owner, name in zip(oracles, ("key0", "key1", "team"), strict=True):
        found = limiter.use(name)
        assert found is not None
        for tally, one in zip(found.budgets, owner.budgets, strict=True):
            end = period_end(one.budget.period, clocks.calendar.now)
            settled = sum(amount for at, amount in one.used if period_end(one.budget.period, at) == end)
            assert (tally.spent, tally.resets_at) == (settled, None if end == math.inf else end)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=60), st.integers(1, 9))
def test_a_budget_is_overrun_by_less_than_one_request(
    amount: int, requests: list[tuple[int, int]], parallel: int
) -> None:
    """Each uses at most what it was taken for."""
    limiter = MemoryLimiter()
    account = limiter.account("k", Limits(), [Budget(amount, "tokens", "total")])
    open_: list[tuple[Lease, int]] = []
    used, largest = 0, 0
    for prompt, answer in requests:
        try:
            open_.append((run(limiter.admit(account, prompt, answer)), prompt + answer))
        except Refused:
            continue
        largest = max(largest, prompt + answer)
        if len(open_) >= parallel:
            lease, tokens = open_.pop(0)
            lease.settle(tokens)
            used += tokens
    for lease, tokens in open_:
        lease.settle(tokens)
        used += tokens
    assert used < amount + max(1, largest)


def test_only_owners_with_budgets_are_marked() -> None:
    limiter = MemoryLimiter()
    limiter.account("plain", Limits(1))
    limiter.account("budgeted", Limits(), [daily(1)])
    mark: Mapping[str, object] = limiter.mark()
    assert list(mark) == ["budgeted"]
