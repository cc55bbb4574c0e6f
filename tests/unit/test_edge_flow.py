"""Flow control of uvicorn's own lane: writers wait for a client that reads slowly, and only then."""

import asyncio
from typing import cast

from gateway.edge.flow import Flow


class Transport:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def pause_reading(self) -> None:
        self.told.append("pause")

    def resume_reading(self) -> None:
        self.told.append("resume")


def flow() -> tuple[Flow, list[str]]:
    transport = Transport()
    return Flow(cast(asyncio.Transport, transport)), transport.told


async def finished(task: asyncio.Task[None]) -> bool:
    for _ in range(3):
        await asyncio.sleep(0)
    return task.done()


async def test_nobody_waits_for_a_client_that_reads() -> None:
    one, _ = flow()
    assert not one.write_paused
    assert await finished(asyncio.create_task(one.drain()))


async def test_all_writers_wait_until_the_client_has_read() -> None:
    one, _ = flow()
    for _ in range(2):
        one.pause_writing()
        one.pause_writing()
        writers = [asyncio.create_task(one.drain()) for _ in range(2)]
        assert [await finished(writer) for writer in writers] == [False, False]
        writers.pop().cancel()
        one.resume_writing()
        assert await finished(writers[0])
        one.resume_writing()
        assert not one.write_paused
        assert await finished(asyncio.create_task(one.drain()))


async def test_reading_is_paused_and_resumed_once() -> None:
    one, told = flow()
    for step in (one.pause_reading, one.pause_reading, one.resume_reading, one.resume_reading):
        step()
    assert told == ["pause", "resume"]
