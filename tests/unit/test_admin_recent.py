"""The ring of recent requests, and the one of figures."""

import asyncio
from itertools import count

from gateway.admin.figures import Look, look
from gateway.admin.pulse import STRIDE, Pulse
from gateway.admin.recent import Recent
from gateway.observe.access import AccessRecord
from gateway.observe.metrics import Metrics


def record(key: str, status: int = 200) -> AccessRecord:
    return AccessRecord(
        0.0,
        "req_1",
        key,
        "m",
        "/v1/chat/completions",
        "m/0",
        status,
        1,
        2,
        0,
        0.1,
        0.2,
        1,
        "completed",
        None,
        None,
        "c",
    )


def test_the_newest_come_first_and_the_oldest_are_forgotten() -> None:
    ring = Recent(room=3)
    ring.extend([record(str(i)) for i in range(4)])
    ring.extend([record("4")])
    found = ring.select(lambda _: True, 10)
    assert [(entry.seq, entry.record.key) for entry in found] == [(5, "4"), (4, "3"), (3, "2")]


def test_going_on_from_a_seq() -> None:
    ring = Recent()
    ring.extend([record(str(i)) for i in range(10)])
    first = ring.select(lambda _: True, 4)
    second = ring.select(lambda _: True, 4, before=first[-1].seq)
    assert [entry.record.key for entry in first + second] == ["9", "8", "7", "6", "5", "4", "3", "2"]


def test_the_limit_counts_what_is_wanted() -> None:
    ring = Recent()
    ring.extend([record("a" if i % 2 else "b") for i in range(10)])
    assert [entry.seq for entry in ring.select(lambda r: r.key == "a", 3)] == [10, 8, 6]


async def test_pulse_tells_who_watches_and_keeps_an_hour() -> None:
    metrics, clock = Metrics(), count()
    pulse = Pulse(lambda: look(metrics, float(next(clock))), _seconds("live"), _seconds("past"), tick=0.002)
    running = asyncio.create_task(pulse.run())
    seen = []
    async for point in pulse.watch():
        seen.append(point)
        if len(pulse.history) == 2:
            pulse.close()
    running.cancel()
    assert pulse.watchers == 0
    assert set(seen) == {("live", 1.0)}
    assert 2 * STRIDE - 2 <= len(seen) <= 2 * STRIDE  # the first may be under way when watching begins
    assert list(pulse.history) == [("past", float(STRIDE))] * 2


async def test_pulse_looks_seldom_while_nobody_watches() -> None:
    looks = 0

    def seen() -> Look:
        nonlocal looks
        looks += 1
        return look(Metrics(), float(looks))

    pulse = Pulse(seen, _seconds("live"), _seconds("past"), tick=0.001)
    running = asyncio.create_task(pulse.run())
    while len(pulse.history) < 3:  # noqa: ASYNC110 - it has no event for it, on purpose
        await asyncio.sleep(0.001)
    running.cancel()
    assert looks == 4


def _seconds(name: str):  # type: ignore[no-untyped-def]
    return lambda before, after: (name, after.at - before.at)
