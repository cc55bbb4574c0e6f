"""Use: rows, their sums, and what is asked of them."""

from collections import defaultdict
from datetime import UTC, datetime

import pytest
from hypothesis import given, strategies as st

from gateway.store.base import Spent, StoreError, UsageRow, UsageSum
from gateway.store.db import Store
from gateway.store.sums import DAY, HOUR, split, sum_up
from tests.stores import open_store

NOON = datetime(2026, 11, 24, 12, 30, tzinfo=UTC).timestamp()


def row(number: int, time: float = NOON, **more: object) -> UsageRow:
    made = UsageRow(
        row_id=f"{number:08}",
        time=time,
        request_id=f"req-{number}",
        key_id="key_1",
        team_id=None,
        model="tiny",
        endpoint="/v1/chat/completions",
        status=200,
        outcome="completed",
        error=None,
        replica="tiny/0",
        prompt=10,
        completion=5,
        cached=2,
        cost=30,
        ttft=0.1,
        duration=0.5,
        attempts=1,
    )
    return made._replace(**more)  # type: ignore[arg-type]


async def test_no_use_is_no_sums(store: Store) -> None:
    assert await store.usage(0, NOON, ("key",)) == []
    assert await store.usage(0, NOON, ()) == []


async def test_sums_by_key_team_model_day_and_hour(store: Store) -> None:
    await store.add_usage(
        [
            row(1),
            row(2, key_id="key_2", team_id="team_1", model="big", prompt=100),
            row(3, NOON + HOUR, status=502, outcome="engine_failed", completion=0),
            row(4, NOON + DAY, outcome="client_cancelled", status=499),
        ]
    )
    end = NOON + 2 * DAY
    assert await store.usage(0, end, ()) == [UsageSum((), 4, 1, 130, 15, 8, 120)]
    assert await store.usage(0, end, ("key",)) == [
        UsageSum(("key_1",), 3, 1, 30, 10, 6, 90),
        UsageSum(("key_2",), 1, 0, 100, 5, 2, 30),
    ]
    assert [(one.group, one.requests) for one in await store.usage(0, end, ("team", "model"))] == [
        (("", "tiny"), 3),
        (("team_1", "big"), 1),
    ]
    assert [(one.group, one.requests) for one in await store.usage(0, end, ("day",))] == [
        (("2026-11-24",), 3),
        (("2026-11-25",), 1),
    ]
    assert [(one.group, one.requests) for one in await store.usage(0, end, ("hour", "key"))] == [
        (("2026-11-24T12:00:00Z", "key_1"), 1),
        (("2026-11-24T12:00:00Z", "key_2"), 1),
        (("2026-11-24T13:00:00Z", "key_1"), 1),
        (("2026-11-25T12:00:00Z", "key_1"), 1),
    ]


async def test_a_range_takes_the_hours_that_begin_in_it(store: Store) -> None:
    midnight = NOON // DAY * DAY
    hours = [midnight + n * HOUR for n in range(-30, 54)]
    await store.add_usage([row(n, hour + 1800.5) for n, hour in enumerate(hours)])
    for start, end in ((-30, 54), (-24, 24), (-25, 1), (-23, 23), (0, 24), (3, 7), (5, 5), (7, 49)):
        wanted = end - start
        for groups in ((), ("day",), ("hour",)):
            found = await store.usage(midnight + start * HOUR, midnight + end * HOUR, groups)
            assert sum(one.requests for one in found) == wanted, (start, end, groups)


async def test_a_row_counts_once_however_often_it_comes(store: Store) -> None:
    rows = [row(n) for n in range(10)]
    await store.add_usage(rows[:6])
    await store.add_usage(rows)
    await store.add_usage([*rows, rows[0]])
    await store.add_usage([row(10), row(10)])
    assert await store.usage(0, NOON + DAY, ()) == [UsageSum((), 11, 0, 110, 55, 22, 330)]


async def test_many_rows_at_once(store: Store) -> None:
    await store.add_usage([row(n) for n in range(3000)])
    await store.add_usage([row(n) for n in range(1000, 4000)])
    assert (await store.usage(0, NOON + DAY, ("model",)))[0].requests == 4000


async def test_two_processes_add_up(url: str) -> None:
    import asyncio

    stores = [await open_store(url) for _ in range(2)]
    batches = [[row(1000 * n + m, key_id=f"key_{m % 7}") for m in range(50)] for n in range(12)]
    await asyncio.gather(*(stores[n % 2].add_usage(batch) for n, batch in enumerate(batches)))
    assert sum(one.requests for one in await stores[0].usage(0, NOON + DAY, ("key",))) == 600
    for store in stores:
        await store.close()


async def test_what_is_spent_by_day_month_and_in_total(store: Store) -> None:
    await store.add_usage(
        [
            row(1, team_id="team_1"),
            row(2, NOON - DAY, team_id="team_1", key_id="key_2"),
            row(3, NOON - 40 * DAY),
            row(4, key_id="key_3"),
        ]
    )
    found = await store.spent([("key", "key_1"), ("team", "team_1"), ("key", "nobody")], NOON)
    assert found == {
        ("key", "key_1"): {"day": Spent(15, 30), "month": Spent(15, 30), "total": Spent(30, 60)},
        ("team", "team_1"): {"day": Spent(15, 30), "month": Spent(30, 60), "total": Spent(30, 60)},
        ("key", "nobody"): {"day": Spent(), "month": Spent(), "total": Spent()},
    }


async def test_old_rows_go_and_their_sums_stay(store: Store) -> None:
    await store.add_usage([row(n, NOON - 10 * DAY) for n in range(7000)])
    await store.add_usage([row(n, NOON) for n in range(7000, 7010)])
    assert await store.prune(NOON - DAY) == 7000
    assert await store.prune(NOON - DAY) == 0
    assert (await store.usage(0, NOON + DAY, ()))[0].requests == 7010
    assert await store.prune(NOON + 1) == 10


async def test_text_that_databases_trip_over(store: Store) -> None:
    await store.add_usage([row(1, model="m'\";--", request_id="é" * 128, error=None, ttft=None, replica=None)])
    assert (await store.usage(0, NOON + DAY, ("model",)))[0].group == ("m'\";--",)


@pytest.mark.parametrize("url", ["sqlite:////nowhere/at/all.db", "postgresql://postgres@/x?host=/nowhere"])
async def test_a_store_that_is_not_there(url: str) -> None:
    with pytest.raises(StoreError) as caught:
        await open_store(url)
    assert "nowhere" not in str(caught.value)


# ---- pure

TIMES = st.integers(0, 40 * DAY)


@given(st.lists(TIMES, max_size=60), TIMES, TIMES, st.booleans())
def test_spans_cover_each_hour_of_the_range_once(times: list[int], start: int, end: int, whole_days: bool) -> None:
    start, end = start // HOUR * HOUR, end // HOUR * HOUR
    totals = sum_up(row(n, time) for n, time in enumerate(times))
    by_start: dict[bool, dict[int, int]] = {True: defaultdict(int), False: defaultdict(int)}
    for days, sums in ((True, totals.days), (False, totals.hours)):
        for bucket, amounts in sums.items():
            by_start[days][bucket[0]] += amounts[0]
    found = sum(
        count
        for span in split(start, end, whole_days=whole_days)
        for at, count in by_start[span.days].items()
        if span.start <= at < span.end
    )
    assert found == sum(start <= time // HOUR * HOUR < end for time in times)
    assert sum(amounts[0] for amounts in totals.hours.values()) == len(times)
