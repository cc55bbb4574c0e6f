"""Use by hour and by day. Pure."""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Final, NamedTuple

from gateway.store.base import Group, UsageRow

HOUR: Final = 3600  # seconds
DAY: Final = 86_400  # seconds; epoch time has no leap seconds

FINE: Final = frozenset({"completed", "client_cancelled"})  # outcomes that are no errors

Bucket = tuple[int, str, str, str]  # its start in seconds since the epoch, key, team ("": none), model
Amounts = list[int]  # requests, errors, prompt, completion, cached, cost


class Totals(NamedTuple):
    hours: dict[Bucket, Amounts]
    days: dict[Bucket, Amounts]


def sum_up(rows: Iterable[UsageRow]) -> Totals:
    """In the order in which every process takes them, so that two never wait for one another's rows."""
    hours: dict[Bucket, Amounts] = {}
    for row in rows:
        bucket = (int(row.time) // HOUR * HOUR, row.key_id, row.team_id or "", row.model)
        amounts = hours.get(bucket)
        if amounts is None:
            amounts = hours[bucket] = [0, 0, 0, 0, 0, 0]
        amounts[0] += 1
        amounts[1] += row.outcome not in FINE
        amounts[2] += row.prompt
        amounts[3] += row.completion
        amounts[4] += row.cached
        amounts[5] += row.cost
    days: dict[Bucket, Amounts] = {}
    for (start, *rest), amounts in hours.items():
        bucket = (start // DAY * DAY, *rest)  # type: ignore[assignment]
        days[bucket] = [a + b for a, b in zip(days.get(bucket, [0] * 6), amounts, strict=True)]
    return Totals(dict(sorted(hours.items())), dict(sorted(days.items())))


class Span(NamedTuple):
    start: int  # seconds since the epoch
    end: int
    days: bool  # whole days, for which their own sums do


def split(start: float, end: float, *, whole_days: bool) -> Iterator[Span]:
    """[start, end) in as few sums as there are: whole days, and the hours before and after them."""
    first, last = int(start), int(end)
    first_day, last_day = -(-first // DAY) * DAY, last // DAY * DAY
    if not whole_days or first_day >= last_day:
        parts = [Span(first, last, days=False)]
    else:
        parts = [
            Span(first, first_day, days=False),
            Span(first_day, last_day, days=True),
            Span(last_day, last, days=False),
        ]
    return (part for part in parts if part.start < part.end)


def text_of(group: Group, value: str | int) -> str:
    """A group's value as it is told."""
    if group == "day":
        return datetime.fromtimestamp(int(value), UTC).strftime("%Y-%m-%d")
    if group == "hour":
        return datetime.fromtimestamp(int(value), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return str(value)
