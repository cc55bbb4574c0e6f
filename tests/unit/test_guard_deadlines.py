"""What the edge does when time passes: by a clock that the test holds, on a transport that remembers."""

import asyncio
import time
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from gateway.edge.protocol import WRITE_TIMEOUT, EdgeProtocol, Stage, Timeouts, bound
from tests.bare import bare_gateway

TIMEOUTS = Timeouts(header=10, body=30, idle=75)


class Wire(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.said = b""
        self.ended: list[str] = []
        self.unread = 0

    def write(self, data: Any) -> None:
        self.said += bytes(data)

    def write_eof(self) -> None:
        self.ended.append("eof")

    def can_write_eof(self) -> bool:
        return True

    def close(self) -> None:
        self.ended.append("close")

    def abort(self) -> None:
        self.ended.append("abort")

    def is_closing(self) -> bool:
        return bool(self.ended)

    def get_write_buffer_size(self) -> int:
        return self.unread

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass


async def connected() -> tuple[EdgeProtocol, Wire, float]:
    """A connection, its other end, and now."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    config = uvicorn.Config(app, lifespan="off", log_config=None)
    config.load()
    protocol, wire = bound(bare_gateway(), TIMEOUTS)(config, ServerState(), {}), Wire()
    protocol.connection_made(wire)
    return protocol, wire, time.monotonic()


async def test_a_connection_that_says_nothing_is_closed_without_a_word() -> None:
    protocol, wire, now = await connected()
    protocol.tick(now + 74)
    assert wire.ended == []
    protocol.tick(now + 76)
    assert (wire.ended, wire.said) == (["close"], b"")


async def test_the_first_head_has_its_time_from_the_beginning() -> None:
    protocol, wire, now = await connected()
    protocol.data_received(b"\r\nGET / HTT")
    protocol.tick(now + 9)
    protocol.data_received(b"P/1.1\r\n")  # more bytes give no more time
    assert wire.said == b""
    protocol.tick(now + 11)
    assert wire.said.startswith(b"HTTP/1.1 408 ")
    assert wire.ended == ["eof"]
    protocol.data_received(b"host: x\r\n\r\n")
    assert wire.said.count(b"HTTP/1.1") == 1


async def test_whoever_takes_nothing_is_cut_off() -> None:
    protocol, wire, _ = await connected()
    protocol.stage = Stage.ANSWER
    wire.unread = 300_000
    protocol.pause_writing()
    now = time.monotonic()
    protocol.tick(now + WRITE_TIMEOUT - 1)
    wire.unread = 299_999  # a byte is progress
    protocol.tick(now + WRITE_TIMEOUT)
    wire.unread = 300_013  # what is added to what waits is none
    protocol.tick(now + 2 * WRITE_TIMEOUT - 1)
    assert wire.ended == []
    protocol.tick(now + 2 * WRITE_TIMEOUT + 1)
    assert wire.ended == ["abort"]


async def test_whoever_reads_on_is_not() -> None:
    protocol, wire, _ = await connected()
    protocol.stage = Stage.ANSWER
    wire.unread = 300_000
    protocol.pause_writing()
    protocol.resume_writing()
    protocol.tick(time.monotonic() + WRITE_TIMEOUT + 1)
    assert wire.ended == []


@pytest.mark.parametrize("data", [b"\r\n" * 10, b"G", b"GET / HTTP/1.1\r\nhost:"])
async def test_half_a_head_is_waited_for(data: bytes) -> None:
    protocol, wire, _ = await connected()
    for at in range(len(data)):
        protocol.data_received(data[at : at + 1])
    assert (wire.said, wire.ended) == (b"", [])


async def test_the_next_head_has_its_time_from_its_first_byte() -> None:
    protocol, wire, now = await connected()
    protocol._next()
    protocol.tick(now + 60)  # between requests, idle_timeout alone counts
    assert (wire.said, wire.ended) == (b"", [])
    protocol.since = now - 60  # as if it had waited so long
    protocol.data_received(b"GET / HTT")
    protocol.tick(time.monotonic() + 9)
    assert (wire.said, wire.ended) == (b"", [])
    protocol.tick(time.monotonic() + 11)
    assert wire.said.startswith(b"HTTP/1.1 408 ")


async def test_a_body_has_its_time_and_more_the_more_of_it_comes() -> None:
    protocol, wire, now = await connected()
    protocol.stage = Stage.BODY
    protocol.since = now
    protocol.tick(now + 29)
    protocol._came = 500_000
    protocol.tick(now + 34)
    assert (wire.said, wire.ended) == (b"", [])
    protocol.tick(now + 36)
    assert wire.said.startswith(b"HTTP/1.1 408 ")
    assert wire.ended == ["eof"]


async def test_an_answer_takes_the_time_that_it_takes() -> None:
    protocol, wire, now = await connected()
    protocol.stage = Stage.ANSWER
    protocol.tick(now + 10_000)
    assert (wire.said, wire.ended) == (b"", [])
