"""An engine that dies under a gateway, and a gateway that is told to end: what clients see, and what is left."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import psutil
import pytest
import pytest_asyncio

from tests.served import Penstock, close, http_post, until
from tests.vllm.real import (
    CHAT,
    START,
    alive,
    chat,
    chunks_of,
    config,
    data_of,
    engine_url,
    family,
    mapped_files,
    running,
    serving,
    until_gone,
    until_ready,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]

STORY = "Tell me a long story."


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def penstock() -> AsyncIterator[Penstock]:
    async with serving(config(CHAT)) as gateway:
        yield gateway


async def test_the_gateway_itself_is_light(penstock: Penstock) -> None:
    """Its tokenizer is loaded, torch is not."""
    files = mapped_files(penstock.pid)
    assert "httptools" in files  # they are the right process's
    assert "torch" not in files
    rss = psutil.Process(penstock.pid).memory_info().rss / 2**20
    print(f"the gateway's RSS after start: {rss:.1f} MB")
    assert rss <= 90


async def test_engine_killed_in_mid_stream(penstock: Penstock) -> None:
    first_life, first_url = family(penstock.pid), engine_url(penstock, "smollm2/0")
    [keeper] = psutil.Process(penstock.pid).children()
    [engine] = keeper.children()
    body = chat(STORY, max_tokens=1500, ignore_eos=True)
    streamed = asyncio.create_task(penstock.post("/v1/chat/completions", {**body, "stream": True}))
    whole = asyncio.create_task(penstock.post("/v1/chat/completions", body))
    reader, writer = await penstock.connect()
    writer.write(http_post("/v1/chat/completions", {**body, "stream": True}, more="connection: close\r\n"))

    async def all_run() -> bool:
        return await running(penstock) == 3

    await until(all_run)
    for _ in range(5):
        await reader.readuntil(b'"delta":{"content":')
    os.kill(engine.pid, signal.SIGKILL)

    # What was under way: an error each, and never an end that looks like a good one.
    rest = await reader.read()
    assert rest.count(b'"code":"engine_failed"') == 1
    assert b"[DONE]" not in rest
    assert b'"finish_reason":"' not in rest
    await close(writer)
    *chunks, last = data_of(await streamed)
    assert chunks
    assert not any('"error"' in chunk or "[DONE]" in chunk for chunk in chunks)
    assert '"code":"engine_failed"' in last
    answer = await whole
    assert answer.status == 502
    assert answer.error["code"] == "engine_failed"

    async def known() -> bool:
        return (await penstock.get("/health/ready")).status == 503

    # A dead process of some gigabytes takes a moment to be gone: so long its port takes connections, and breaks them.
    await until(known, 2)

    # Until the engine is back:
    answer = await penstock.post("/v1/chat/completions", chat())
    assert answer.status == 503
    assert answer.error["code"] == "no_healthy_engine"
    assert int(answer.headers["retry-after"]) > 0
    assert (await penstock.get("/health/live")).status == 200
    assert await penstock.metric("penstock_engine_up", model="smollm2", replica="smollm2/0") == 0
    await until_gone(first_life)

    await until_ready(penstock, "smollm2/0", times=2)
    answer = await penstock.post("/v1/chat/completions", chat())
    assert "Paris" in answer.json["choices"][0]["message"]["content"]
    assert await penstock.metric("penstock_engine_up", model="smollm2", replica="smollm2/0") == 1
    assert await penstock.metric("penstock_engine_restarts_total", model="smollm2", replica="smollm2/0") == 1
    assert engine_url(penstock, "smollm2/0") != first_url


async def test_a_gateway_told_to_end_finishes_its_streams_and_leaves_nothing(penstock: Penstock) -> None:
    await penstock.ready(START)
    processes = [psutil.Process(penstock.pid), *family(penstock.pid)]
    assert len(alive(processes)) >= 3
    stream = asyncio.create_task(
        penstock.post("/v1/chat/completions", chat(STORY, max_tokens=32, ignore_eos=True, stream=True))
    )

    async def runs() -> bool:
        return await running(penstock) == 1

    await until(runs)
    penstock.signal(signal.SIGTERM)
    chunks = chunks_of(await stream)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert await penstock.exit_code(60) == 0
    assert alive(processes) == []
