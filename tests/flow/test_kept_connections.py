"""A connection whose requests all begin alike, as a client's do: from the third on their head is known, and what a client
sends apart, as most send head and body, is put together without the parser. To the client it is all the same."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest

from tests.fake_engine import FakeEngine
from tests.flow.conftest import Start
from tests.flow.talk import CHAT, Client, Served, chunked, connect
from tests.served import KEY, Penstock, chat_body, http_post, until


def request(text: str, more: str = "", **fields: object) -> bytes:
    return http_post(CHAT, chat_body(text, max_tokens=2, **fields), more=more)


@contextlib.asynccontextmanager
async def kept(gateway: Penstock, more: str = "") -> AsyncIterator[Client]:
    """A connection that has asked twice."""
    async with connect(gateway) as client:
        for _ in range(2):
            await client.send(request("hi", more))
            assert (await client.answer()).status == 200
        yield client


async def apart(gateway: Penstock, client: Client, *pieces: bytes) -> None:
    """Each piece is read before the next one is sent: other requests are answered in between."""
    for piece in pieces:
        await client.send(piece)
        for _ in range(2):
            await gateway.get("/health/live")


def halves(data: bytes) -> tuple[bytes, bytes]:
    head, end, body = data.partition(b"\r\n\r\n")
    return head + end, body


async def test_bodies_in_pieces_are_what_they_were(served: Served) -> None:
    async with kept(served.gateway) as client:
        for text, size in (("a", 1), ("bb", 7), ("c" * 3000, 1000), ("d" * 300_000, 100_000)):
            head, body = halves(request(text))
            await apart(served.gateway, client, head, *(body[i : i + size] for i in range(0, len(body), size)))
            answer = await client.answer()
            assert (answer.status, answer.json["usage"]["completion_tokens"]) == (200, 2)
            [last] = (await served.engine.stats())["last"][-1:]
            assert last["json"]["messages"] == [{"role": "user", "content": text}]


async def test_a_stream_and_what_follows_it(served: Served) -> None:
    async with kept(served.gateway) as client:
        head, body = halves(request("a", stream=True))
        following = request("b")
        await apart(served.gateway, client, head + body[:3], body[3:] + following[:-4])
        streamed = await client.answer()
        assert streamed.body.endswith(b"data: [DONE]\n\n")
        await client.send(following[-4:])
        assert (await client.answer()).json["choices"]


async def test_other_requests_in_between_are_read_as_ever(served: Served) -> None:
    async with kept(served.gateway) as client:
        data = json.dumps(chat_body("chunks", max_tokens=1)).encode()
        start = (
            f"POST {CHAT} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"
        )
        for other, size in (
            (start.encode() + b"transfer-encoding: chunked\r\n\r\n" + chunked(data[:9], data[9:]), 400),
            (start.encode() + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(data), 0),
            (b"GET /v1/models HTTP/1.1\r\nhost: test\r\nauthorization: Bearer %b\r\n\r\n" % KEY.encode(), 40),
        ):
            await apart(served.gateway, client, *halves(request("a")))
            assert (await client.answer()).status == 200
            await apart(served.gateway, client, other[:size], other[size:])
            if b"expect" in other:
                assert (await client.answer()).status == 100
                await client.send(data)
            assert (await client.answer()).status == 200
        # What was expected of one request is not of the next.
        await apart(served.gateway, client, *halves(request("a")))
        assert (await client.answer()).status == 200


async def test_a_fault_in_the_body_is_told_and_the_connection_goes_on(served: Served) -> None:
    async with kept(served.gateway) as client:
        head, body = halves(request("a"))
        await apart(served.gateway, client, head, body[:-1], b"!")
        answer = await client.answer()
        assert (answer.status, answer.error["code"]) == (400, "invalid_json")
        await client.send(request("b"))
        assert (await client.answer()).status == 200


async def test_a_body_that_is_too_large_is_refused_by_its_head(engine: FakeEngine, start: Start) -> None:
    gateway = await start(engine.url, more="server: {max_body_bytes: 2000}")
    async with kept(gateway) as client:
        head, _ = halves(request("x" * 2000))
        await client.send(head)
        answer = await client.answer()
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")


async def test_a_body_that_does_not_come(engine: FakeEngine, start: Start, door: str) -> None:
    if door == "asgi":
        pytest.skip("uvicorn has no such deadline")
    gateway = await start(engine.url, more="server: {body_timeout: 0.3}")
    async with kept(gateway) as client:
        await client.send(request("a")[:-5])
        answer = await client.answer()
        assert (answer.status, answer.error["code"]) == (408, "request_timeout")
        assert await client.to_end() == b""
    assert (await engine.stats())["requests"] == 2


async def test_who_leaves_before_the_body_is_there_is_in_the_log(served: Served) -> None:
    async with kept(served.gateway, "x-request-id: left-in-mid-body\r\n") as client:
        await apart(served.gateway, client, request("a", "x-request-id: left-in-mid-body\r\n")[:-5])
    log = served.gateway.folder / "access.log"

    async def told() -> bool:
        lines = [line for line in log.read_bytes().splitlines(keepends=True) if b"left-in-mid-body" in line]
        return len(lines) == 3 and lines[-1].endswith(b"\n")

    await until(told)
    entries = [json.loads(line) for line in log.read_bytes().splitlines() if b"left-in-mid-body" in line]
    assert [entry["status"] for entry in entries] == [200, 200, 499]
    assert (await served.engine.stats())["requests"] == 2


async def test_many_at_once(served: Served) -> None:
    async def one(number: int) -> None:
        async with kept(served.gateway) as client:
            for turn in range(5):
                head, body = halves(request(f"{number}-{turn}"))
                await client.send(head)
                await asyncio.sleep(0)
                await client.send(body)
                assert (await client.answer()).status == 200

    await asyncio.gather(*(one(number) for number in range(20)))
    assert (await served.engine.stats())["requests"] == 20 * 7
