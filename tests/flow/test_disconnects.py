"""A client that leaves: the engine stops within a second, the slot is back, what was used is counted."""

import asyncio
import socket
import struct
import time
from typing import Any

import pytest

from tests.fake_engine import FakeEngine
from tests.flow.conftest import Start
from tests.flow.talk import CHAT, Client, Served, connect, logged, parse, post, text_of
from tests.served import chat_body, http_post, until

PROMISED = 1.0  # seconds

# How a request is under way when its client leaves.
WAYS: list[dict[str, Any]] = [
    {"stream": True, "fake": {"hold_after": 3}},
    {"stream": True, "fake": {"hold": True}},
    {"stream": True, "fake": {"delay": 0.02}, "max_tokens": 1000},
    {"stream": False, "fake": {"hold": True}},
    {"stream": True, "n": 2, "fake": {"hold_after": 3}},
]


def reset(client: Client) -> None:
    """Leaves as a process that is killed with unread bytes does."""
    sock = client.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.writer.transport.abort()


async def noticed(engine: FakeEngine, left: float) -> dict[str, Any]:
    stats = await engine.until(disconnects=1, running=0)
    [departure] = stats["departures"]
    assert departure["noticed"] - left < PROMISED
    found: dict[str, Any] = departure
    return found


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("way", WAYS, ids=str)
async def test_the_engine_stops(served: Served, way: dict[str, Any], how: str) -> None:
    request_id = f"leaver-{WAYS.index(way)}-{how}"
    async with connect(served.gateway) as client:
        await client.send(post(more=f"x-request-id: {request_id}\r\n", **way))
        if "hold" in str(way):
            await served.engine.until(holding=1)
        else:
            await client.until(b" t3")
        left = time.monotonic()
        if how == "reset":
            reset(client)
        else:
            client.writer.close()
        await noticed(served.engine, left)
    entry = await logged(served.gateway, request_id)
    assert (entry["status"], entry["outcome"], entry["code"]) == (499, "client_cancelled", None)


async def test_a_client_that_has_only_finished_sending_gets_its_stream(served: Served, door: str) -> None:
    if door == "asgi":
        pytest.skip("to uvicorn it has left")
    async with connect(served.gateway) as client:
        await client.send(post(stream=True, max_tokens=5, fake={"hold_after": 2}))
        await client.until(b" t1")
        client.writer.write_eof()
        await client.until(b": keep-alive")
        await served.engine.release()
        [answer], rest = parse(await client.to_end())
    assert rest == b""
    assert text_of(answer.body.replace(b": keep-alive\n\n", b"")) == " t0 t1 t2 t3 t4"


async def test_what_was_delivered_is_counted(served: Served) -> None:
    gateway = served.gateway
    kinds = ("prompt", "completion")
    before = [await gateway.metric("penstock_tokens_total", model="tiny", kind=kind) for kind in kinds]
    async with connect(gateway) as client:
        request = post("/v1/chat/completions", chat_body("one two", stream=True, fake={"hold_after": 3}))
        await client.send(request.replace(b"connection: close", b"x-request-id: partial"))
        await client.until(b" t2")
    entry = await logged(gateway, "partial")
    assert (entry["prompt_tokens"], entry["completion_tokens"]) == (2, 3)
    assert entry["ttft"] is not None
    after = [await gateway.metric("penstock_tokens_total", model="tiny", kind=kind) for kind in kinds]
    assert [a - b for a, b in zip(after, before, strict=True)] == [2, 3]
    assert await gateway.metric("penstock_requests_total", model="tiny", endpoint=CHAT, status="499") >= 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_that_was_worked_on_is_counted(served: Served, stream: bool) -> None:
    request_id = f"prompt-only-{stream}"
    async with connect(served.gateway) as client:
        await client.send(post(more=f"x-request-id: {request_id}\r\n", stream=stream, fake={"hold": True}))
        await served.engine.until(holding=1)
    entry = await logged(served.gateway, request_id)
    assert entry["prompt_tokens"] > 0
    assert entry["completion_tokens"] == 0


async def test_after_the_role_the_prompt_is_counted_too(served: Served) -> None:
    async with connect(served.gateway) as client:
        await client.send(post(more="x-request-id: role-only\r\n", stream=True, fake={"hold_after": 0}))
        await client.until(b'"role"')
    entry = await logged(served.gateway, "role-only")
    assert entry["prompt_tokens"] > 0
    assert entry["completion_tokens"] == 0


@pytest.mark.parametrize("way", WAYS, ids=str)
async def test_the_slot_is_back(engine: FakeEngine, start: Start, way: dict[str, Any]) -> None:
    gateway = await start(engine.url, limits="{parallel_requests: 1, tokens_per_minute: 100000}")
    async with connect(gateway) as client:
        await client.send(post(**way))
        if "hold" in str(way):
            await engine.until(holding=1)
        else:
            await client.until(b" t3")
        assert (await gateway.chat(max_tokens=1)).status == 429

    async def free() -> bool:
        return (await gateway.chat(max_tokens=1)).status == 200

    await until(free)
    # The reservation of 1000 tokens has been settled to what was used.
    answer = await gateway.chat(max_tokens=1)
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) > 99_700
    assert await gateway.metric("penstock_inflight_requests", model="tiny") == 0


async def test_before_the_body_is_there_no_engine_is_asked(served: Served) -> None:
    async with connect(served.gateway) as client:
        await client.send(post(more="x-request-id: half-a-body\r\n")[:-5])
        await client.send(b"")
        await asyncio.sleep(0)
    entry = await logged(served.gateway, "half-a-body")
    assert (entry["status"], entry["outcome"]) == (499, "client_cancelled")
    assert (await served.engine.stats())["requests"] == 0


async def test_with_requests_in_the_pipeline_the_running_one_is_told(served: Served, door: str) -> None:
    if door == "asgi":
        pytest.skip("uvicorn tells only the newest request of a connection")
    async with connect(served.gateway) as client:
        first = http_post(CHAT, chat_body(stream=True, fake={"hold_after": 1}))
        await client.send(first + post() + post())
        await served.engine.until(holding=1)
        left = time.monotonic()
    await noticed(served.engine, left)
    assert (await served.engine.stats())["requests"] == 1


async def test_a_client_that_leaves_without_having_read(engine: FakeEngine, start: Start) -> None:
    """Its engine is paused at that time."""
    gateway = await start(engine.url)
    await engine.script([{"tokens": ["x" * 20_000] * 1500}])
    async with connect(gateway, limit=4096) as client:
        await client.send(post(stream=True, max_tokens=1500))
        before, now = -1, 0
        while now != before:
            await asyncio.sleep(0.3)
            before, now = now, (await engine.stats())["completion_tokens"]
        assert now < 1500
        left = time.monotonic()
        reset(client)
        await noticed(engine, left)
    assert (await gateway.chat(max_tokens=1)).status == 200


async def test_a_crowd_leaves(served: Served) -> None:
    gateway, engine = served.gateway, served.engine
    async with asyncio.TaskGroup() as group:

        async def leaver(number: int) -> None:
            async with connect(gateway) as client:
                await client.send(post(**WAYS[number % 2]))
                await engine.until(requests=60)

        for number in range(60):
            group.create_task(leaver(number))
    stats = await engine.until(disconnects=60, running=0)
    assert stats["finished"] == 0

    async def idle() -> bool:
        return await gateway.metric("penstock_inflight_requests", model="tiny") == 0

    await until(idle)
    assert (await gateway.chat(max_tokens=1)).status == 200
