"""Two real replicas: one is killed in mid-answer, and the client gets the bytes that it would have got without that."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
import pytest_asyncio

from tests.served import Penstock, close, http_post, until
from tests.vllm.real import CHAT, chat, config, engine_metrics, engine_url, family, serving, until_ready

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

REPLICAS = ("smollm2/0", "smollm2/1")
TWO = CHAT.replace("    engine:\n", "    engine:\n      replicas: 2\n")
ANSWERS: list[dict[str, Any]] = [
    chat("List ten animals, each with its emoji.", max_tokens=90, stream_options={"include_usage": True}),
    chat("Write a long sentence in Japanese and in Chinese about the sea.", max_tokens=90),
    chat(
        "Count from one to forty in words.",
        max_tokens=90,
        stop=["twelve", "thirty-one"],
        stream_options={"include_usage": True},
    ),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def penstock() -> AsyncIterator[Penstock]:
    async with serving(config(TWO)) as gateway:
        await until_ready(gateway, "smollm2/1")
        yield gateway


def shape(stream: bytes) -> list[dict[str, Any]]:
    """A stream's chunks without what differs from run to run; it has one id throughout."""
    *events, end = stream.decode().split("\n\n")
    assert end == ""
    assert events[-1] == "data: [DONE]", stream[-500:]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert len({(c["id"], c["created"]) for c in chunks}) == 1
    return [{k: v for k, v in chunk.items() if k not in ("id", "created")} for chunk in chunks]


def body_of(answer: bytes) -> bytes:
    """What came in chunks, joined."""
    _, _, rest = answer.partition(b"\r\n\r\n")
    out = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        out, rest = out + rest[:length], rest[length + 2 :]
    return out


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])


async def busy_engine(gateway: Penstock) -> psutil.Process:
    """The engine process that works on the one open request."""
    found: list[str] = []

    async def one_is_busy() -> bool:
        busy = [r for r in REPLICAS if (await engine_metrics(gateway, r))["vllm:num_requests_running"]]
        found.extend(busy)
        return bool(busy)

    await until(one_is_busy)
    port = f"--port={engine_url(gateway, found[0]).rpartition(':')[2]}"
    # Its keeper has the same words in its command line, and is the parent.
    *_, engine = [p for p in family(gateway.pid) if port in p.cmdline()]
    return engine


@pytest.mark.parametrize(("number", "events"), [(0, 12), (1, 33), (2, 25)])
async def test_killed_in_mid_answer(penstock: Penstock, number: int, events: int) -> None:
    asked = {**ANSWERS[number], "stream": True}
    whole = await penstock.post("/v1/chat/completions", asked)
    expected = shape(whole.body)
    starts = [x for x in penstock.log if x["message"] == "engine ready"]
    resumed = await penstock.metric("penstock_failovers_total", model="smollm2", outcome="resumed")

    reader, writer = await penstock.connect()
    writer.write(http_post("/v1/chat/completions", asked, more="connection: close\r\n"))
    came = b""
    finding = asyncio.create_task(busy_engine(penstock))
    for _ in range(events):
        came += await reader.readuntil(b'"delta":{"content":')
    os.kill((await finding).pid, signal.SIGKILL)
    came += await reader.read()
    await close(writer)

    cut = shape(body_of(came))
    assert text_of(cut) == text_of(expected)
    assert cut == expected
    assert await penstock.metric("penstock_failovers_total", model="smollm2", outcome="resumed") == resumed + 1

    # and the service is whole again before the next one
    async def both() -> bool:
        return len([x for x in penstock.log if x["message"] == "engine ready"]) > len(starts)

    await until(both, 300)
