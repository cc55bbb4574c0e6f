"""Clients that send slowly, or do not read: they are sent away in time, cost next to nothing, and hold nobody else up."""

import asyncio
import contextlib
import resource
import time
from collections.abc import AsyncIterator

import psutil
import pytest
import pytest_asyncio

from tests.fake_engine import FakeEngine
from tests.flow.conftest import Start
from tests.flow.talk import CHAT, Client, connect, logged, parse, post
from tests.served import Penstock, chat_body, http_post, simple_config, until

MB = 1 << 20


@pytest_asyncio.fixture(loop_scope="session")
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine() as running:
        yield running


def resident(gateway: Penstock) -> int:
    """Bytes."""
    size: int = psutil.Process(gateway.pid).memory_info().rss
    return size


def p99(seconds: list[float]) -> float:
    return sorted(seconds)[-len(seconds) // 100]


async def probes(client: Client, count: int) -> list[float]:
    """Seconds that each of so many requests took, one after the other."""
    request = http_post(CHAT, chat_body(max_tokens=4))
    took = []
    for _ in range(count):
        began = time.monotonic()
        await client.send(request)
        assert (await client.answer()).status == 200
        took.append(time.monotonic() - began)
    return took


async def dribble(gateway: Penstock, beginning: bytes, crowd: asyncio.Barrier) -> int:
    """Sends a byte now and then, until there is an answer. Returns its status."""
    async with connect(gateway) as client:
        await client.send(beginning)
        await crowd.wait()
        reading = asyncio.create_task(client.to_end())
        while not reading.done():
            with contextlib.suppress(ConnectionError):
                await client.send(b"x")
            await asyncio.wait({reading}, timeout=1.5)
        [answer], _ = parse(reading.result())
        assert answer.error["code"] == "request_timeout"
        return answer.status


async def test_500_slow_clients(engine: FakeEngine) -> None:
    """Headers and bodies that never end, answers that nobody reads."""
    head = post()[:60]
    body = post(body=b"").replace(b"content-length: 0", b"content-length: 100000") + b'{"model": "ti'
    unread = http_post(CHAT, chat_body(stream=True, max_tokens=4, fake={"tokens": ["x" * 25_000] * 4}))
    config = simple_config(engine.url, more="server: {header_timeout: 4, body_timeout: 4}")
    async with Penstock(config) as gateway, connect(gateway) as prober, contextlib.AsyncExitStack() as stack:
        await gateway.ready()
        await probes(prober, 100)
        alone, before = await probes(prober, 300), resident(gateway)
        crowd = asyncio.Barrier(401)
        slow = [asyncio.create_task(dribble(gateway, one, crowd)) for one in [head] * 250 + [body] * 150]
        for _ in range(100):
            client = await stack.enter_async_context(connect(gateway, limit=1024))
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await client.send(unread)
        await engine.until(finished=400 + 100)
        await crowd.wait()
        beside, during = await probes(prober, 300), resident(gateway)
        assert {await one for one in slow} == {408}
        growth = max(during, resident(gateway)) - before
        print(
            f"p99 alone {p99(alone) * 1000:.2f} ms, beside 500 slow clients {p99(beside) * 1000:.2f} ms; +{growth / MB:.1f} MB"
        )
        assert growth < 30 * MB
        assert (await gateway.chat(max_tokens=1)).status == 200
        assert (await engine.stats())["requests"] == 100 + 700 + 1


async def test_slow_and_steady_is_served(engine: FakeEngine, start: Start) -> None:
    """body_timeout is for a body that does not come; one that comes at 100 KB a second has all the time that it takes."""
    gateway = await start(engine.url, more="server: {body_timeout: 0.3}")
    data = post(text="x" * 240_000, max_tokens=1)
    async with connect(gateway) as client:
        for at in range(0, len(data), 60_000):
            await client.send(data[at : at + 60_000])
            await asyncio.sleep(0.5)
        assert (await client.answer()).status == 200


async def test_a_refused_body_has_its_time_too(engine: FakeEngine, start: Start, door: str) -> None:
    """The rest of a body that nobody wants is waited for, but not for ever."""
    if door == "asgi":
        pytest.skip("uvicorn has no such deadline")
    gateway = await start(engine.url, more="server: {body_timeout: 0.3}")
    async with connect(gateway) as client:
        await client.send(post(key="sk-wrong").replace(b"connection: close\r\n", b"")[:-5])
        assert (await client.answer()).status == 401
        assert await client.to_end() == b""


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n",  # without a key
        b"POST /v1/nothing HTTP/1.1\r\nhost: x\r\n",
        b"GET /health/live HTTP/1.1\r\nhost: x\r\n",
    ],
)
async def test_a_body_that_nobody_wants_is_not_read_for_ever(
    engine: FakeEngine, start: Start, door: str, head: bytes
) -> None:
    if door == "asgi":
        pytest.skip("what uvicorn makes of it is not ours")
    gateway = await start(engine.url)
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    async with connect(gateway) as client:
        await client.send(head + b"transfer-encoding: chunked\r\n\r\n" + piece)
        await client.answer()
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 256 * MB and not client.reader.at_eof():
                await client.send(piece)
                sent += len(piece)
        assert sent < 64 * MB


async def test_what_waits_for_a_reader_is_bounded(engine: FakeEngine, start: Start) -> None:
    config = simple_config(engine.url).replace("aliases:", "failover: off\n    aliases:")  # else what was sent is kept
    gateway = await start(config=config)
    await gateway.chat(max_tokens=1)
    readers, words = 20, ["x" * 20_000] * 1500
    before = resident(gateway)
    await engine.script([{"tokens": words}] * readers)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(readers):
            client = await stack.enter_async_context(connect(gateway, limit=1024))
            await client.send(post(stream=True, max_tokens=len(words)))
        seen, now = -1, 0
        while now != seen:
            await asyncio.sleep(0.5)
            seen, now = now, (await engine.stats())["completion_tokens"]
        assert now < readers * len(words) // 2
        assert resident(gateway) - before < readers * MB
        assert (await gateway.chat(max_tokens=1)).status == 200
    await engine.until(running=0)


@pytest.mark.slow
async def test_a_reader_that_takes_nothing_is_cut_off(engine: FakeEngine) -> None:
    """After a minute: its engine stops, its slot is back, the connection is gone."""
    async with Penstock(simple_config(engine.url, limits="{parallel_requests: 1}")) as gateway:
        await gateway.ready()
        await engine.script([{"tokens": ["x" * 20_000] * 1500}])
        async with connect(gateway, limit=1024) as client:
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await client.send(post(stream=True, max_tokens=1500, more="x-request-id: never-reads\r\n"))
            await engine.until(streams=1)
            assert (await gateway.chat(max_tokens=1)).status == 429
            descriptors = gateway.descriptors()

            async def closed() -> bool:
                return gateway.descriptors() < descriptors

            async def cut() -> bool:
                return bool((await engine.stats())["disconnects"])

            await until(cut, 80)
            assert (await engine.stats())["departures"][0]["after"] > 59
            entry = await logged(gateway, "never-reads")
            assert (entry["status"], entry["outcome"]) == (499, "client_cancelled")
            assert (await gateway.chat(max_tokens=1)).status == 200
            await until(closed)


async def test_as_many_connections_as_the_system_allows(engine: FakeEngine) -> None:
    """Descriptors are what slow clients use up first: the 1024 that most shells allow are no bound."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))  # is handed down
    try:
        async with Penstock(simple_config(engine.url)) as gateway, contextlib.AsyncExitStack() as stack:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await gateway.ready()
            for _ in range(400):
                client = await stack.enter_async_context(connect(gateway))
                await client.send(post()[:20])
            assert (await gateway.chat(max_tokens=1)).status == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
