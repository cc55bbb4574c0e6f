"""A coroutine that goes on in the very callback that it waited for."""

import asyncio
from collections.abc import Awaitable

import pytest

from gateway.drive import Drive, Event


class Story:
    """What a coroutine went through."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.ended: list[Drive] = []

    async def of(self, *waits: Awaitable[object]) -> None:
        try:
            for wait in waits:
                self.lines.append("waits")
                await wait
        except Exception as error:  # noqa: BLE001 - a driven coroutine never raises
            self.lines.append(f"caught {error}")
        except asyncio.CancelledError:
            self.lines.append("cancelled")
        self.lines.append("ends")

    def drive(self, *waits: Awaitable[object]) -> Drive:
        made = Drive(self.of(*waits), self.ended.append)
        made.step()
        return made


def test_it_runs_at_once_and_goes_on_within_the_event() -> None:
    story, first, second = Story(), Event(), Event()
    drive = story.drive(first, second)
    assert story.lines == ["waits"]
    first.happen()
    assert story.lines == ["waits", "waits"]
    assert not story.ended
    second.happen()
    assert story.lines[-1] == "ends"
    assert story.ended == [drive]


def test_what_has_happened_is_not_waited_for() -> None:
    story, event = Story(), Event()
    event.happen()
    story.drive(event)
    assert story.lines == ["waits", "ends"]


def test_an_event_happens_once_and_brings_its_error() -> None:
    story, event = Story(), Event()
    story.drive(event)
    event.happen(ValueError("first"))
    event.happen(ValueError("second"))
    assert story.lines == ["waits", "caught first", "ends"]
    assert str(event.error) == "first"


def test_one_that_ends_may_wake_another() -> None:
    story, event, inner = Story(), Event(), Event()

    async def wakes() -> None:
        await event
        inner.happen()
        story.lines.append("woke it")

    story.drive(inner)
    Drive(wakes(), story.ended.append).step()
    event.happen()
    assert story.lines == ["waits", "ends", "woke it"]


async def test_futures_and_turns_of_the_loop_are_waited_for_too() -> None:
    story: Story = Story()
    future = asyncio.get_running_loop().create_future()
    story.drive(asyncio.sleep(0), future)
    assert story.lines == ["waits"]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert story.lines == ["waits", "waits"]
    future.set_result(None)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert story.lines[-1] == "ends"


@pytest.mark.parametrize("kind", ["event", "future", "task"])
async def test_it_can_be_cancelled_where_it_waits(kind: str) -> None:
    story, event = Story(), Event()
    loop = asyncio.get_running_loop()
    waits: Awaitable[object] = event
    if kind == "future":
        waits = loop.create_future()
    elif kind == "task":
        waits = loop.create_task(asyncio.sleep(3600))
    drive = story.drive(waits)
    drive.cancel()
    while not story.ended:  # noqa: ASYNC110 - turns of the loop, not time
        await asyncio.sleep(0)
    assert story.lines == ["waits", "cancelled", "ends"]
    event.happen()
    assert story.lines[-1] == "ends"
    assert len(story.lines) == 3


async def test_an_event_can_be_awaited_in_a_task() -> None:
    story, event = Story(), Event()
    task = asyncio.create_task(story.of(event))
    await asyncio.sleep(0)
    event.happen(ValueError("no"))
    assert story.lines == ["waits"]
    await task
    assert story.lines == ["waits", "caught no", "ends"]
    other = asyncio.create_task(story.of(never := Event()))
    await asyncio.sleep(0)
    other.cancel()
    await asyncio.gather(other, return_exceptions=True)
    assert story.lines[-2:] == ["cancelled", "ends"]
    never.happen()
