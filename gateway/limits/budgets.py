"""Budgets: what may be used up in a day or month of UTC's calendar, or at all. Pure."""

import math
from datetime import UTC, datetime
from typing import Final, NamedTuple

from gateway.limits.base import Budget, Period

_DAY: Final = 86_400  # seconds; epoch time has no leap seconds


def month_start(now: float) -> int:
    """When the month of `now` began, in UTC. All times here are seconds since the epoch."""
    at = datetime.fromtimestamp(now, UTC)
    return int(datetime(at.year, at.month, 1, tzinfo=UTC).timestamp())


def month_end(now: float) -> int:
    """When the month after it begins."""
    at = datetime.fromtimestamp(now, UTC)
    return int(datetime(at.year + at.month // 12, at.month % 12 + 1, 1, tzinfo=UTC).timestamp())


def period_end(period: Period, now: float) -> float:
    """When a budget of this period is whole again; infinite: never."""
    if period == "day":
        return float((now // _DAY + 1) * _DAY)
    return float(month_end(now)) if period == "month" else math.inf


class Held(NamedTuple):
    """What one open request holds of one budget."""

    tally: "Tally"
    until: float  # of the period in which it was admitted, to which its use belongs
    amount: int


class Tally:
    """One budget, and what of it is used.

    A request is let in while anything is left, and open ones count as what they may come to: so a budget can be used up
    wholly, and no more than the last request goes beyond it, as long as none uses more than it was taken for.
    """

    __slots__ = ("budget", "in_money", "known", "reserved", "spent", "until")

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.in_money = budget.unit == "money"  # never changes, nor does the period
        self.until = -math.inf
        self.spent = 0
        self.reserved = 0  # by open requests
        self.known = False  # `spent` holds what was used before this process counted

    @property
    def resets_at(self) -> float | None:
        """When it is whole again; None: never."""
        return None if self.until == math.inf else self.until

    def roll(self, now: float) -> None:
        """Begins a new period, if there is one."""
        if now >= self.until:
            self.until = period_end(self.budget.period, now)
            self.spent = self.reserved = 0

    def hold(self, tokens: int, cost: int) -> Held:
        amount = cost if self.in_money else tokens
        self.reserved += amount
        return Held(self, self.until, amount)

    def settle(self, held: Held, tokens: int, cost: int) -> None:
        if held.until == self.until:
            self.reserved -= held.amount
            self.spent += cost if self.in_money else tokens
