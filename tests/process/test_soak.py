"""A day's work in minutes: memory, objects and descriptors are at its end what they were when it began."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Iterator

import psutil
import pytest

from tests.fake_engine import FakeEngine
from tests.served import Penstock, chat_body, http_post, leaked, simple_config

CHAT = "/v1/chat/completions"
MB = 1 << 20
CLIENTS = 32
LENGTH = re.compile(rb"content-length: (\d+)")


def good(stream: bool) -> bytes:
    return http_post(CHAT, chat_body(stream=stream, max_tokens=16 if stream else 4))


# Each with the status that it deserves.
BAD = [
    (http_post(CHAT, chat_body(), "sk-nobody"), 401),
    (http_post(CHAT, b'{"model": '), 400),
    (http_post(CHAT, chat_body(model="nobody")), 404),
    (http_post(CHAT, chat_body(temperature=9)), 400),
    (http_post("/v1/nothing", {}), 404),
    (http_post("/health", {}), 405),
    (http_post(CHAT, chat_body(fake={"status": 400})), 400),
    (http_post(CHAT, chat_body(fake={"status": 500})), 502),
    (http_post(CHAT, chat_body(stream=True, fake={"error_first": True})), 502),
    (http_post(CHAT, chat_body()).replace(b"application/json", b"text/plain"), 415),
]


def work(requests: int, streams: int, errors: int) -> Iterator[tuple[bytes, int]]:
    """Requests with the statuses that they deserve, evenly mixed."""
    plain, streamed = good(False), good(True)
    for i in range(requests):
        yield plain, 200
        if i * streams // requests != (i + 1) * streams // requests:
            yield streamed, 200
        if i * errors // requests != (i + 1) * errors // requests:
            yield BAD[i * errors // requests % len(BAD)]


async def client(port: int, todo: Iterator[tuple[bytes, int]], done: Counter[int]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for request, status in todo:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        assert int(head[9:12]) == status, (request, head)
        length = LENGTH.search(head)
        if length:
            await reader.readexactly(int(length[1]))
        else:
            await reader.readuntil(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        done[status] += 1
    writer.close()
    await writer.wait_closed()


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_nothing_grows() -> None:
    async with FakeEngine() as engine, Penstock(simple_config(engine.url), "watched") as gateway:
        await gateway.ready()
        process = psutil.Process(gateway.pid)

        async def rounds(requests: int, streams: int, errors: int) -> Counter[int]:
            todo, done = work(requests, streams, errors), Counter[int]()
            async with asyncio.TaskGroup() as group:
                for _ in range(CLIENTS):
                    group.create_task(client(gateway.port, todo, done))
            return done

        async def look() -> tuple[int, int, dict[str, int]]:
            """Memory, descriptors and objects, once nothing goes on and idle connections are closed."""
            await engine.close_idle()
            census, descriptors = await gateway.settled()
            return process.memory_info().rss, descriptors, census

        await rounds(10_000, 1_000, 500)
        memory, descriptors, objects = await look()
        done = await rounds(100_000, 10_000, 5_000)
        memory_after, descriptors_after, objects_after = await look()

        assert done.total() == 115_000
        assert done[200] == 110_000
        growth = memory_after - memory
        print(json.dumps({"memory MB": memory / MB, "growth MB": growth / MB, "descriptors": descriptors_after}))
        assert growth <= 20 * MB
        assert descriptors_after <= descriptors
        assert leaked(objects, objects_after) == {}
        assert await gateway.metric("penstock_inflight_requests", model="tiny") == 0
