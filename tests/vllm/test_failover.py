"""Two real replicas: one is killed in mid-answer, and the client gets the bytes that it would have got without that."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.served import Penstock, close, http_post, until
from tests.vllm.real import CHAT, chat, config, engine_url, family, serving, until_ready

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

REPLICAS = ("smollm2/0", "smollm2/1")
TWO = CHAT.replace("    engine:\n", "    engine:\n      replicas: 2\n")
USAGE = {"include_usage": True}
ANSWERS: list[dict[str, Any]] = [
    chat("List ten animals, each with its emoji.", max_tokens=64, stream_options=USAGE),
    chat("Write a long sentence in Japanese and in Chinese about the sea.", max_tokens=64),
    chat("Count from one to forty in words.", max_tokens=64, stop=["twelve", "thirty-one"], stream_options=USAGE),
    chat("Repeat this line five times: 🦊 狐 🌍 世界 café", max_tokens=64, stream_options=USAGE),
    chat("Write the Korean and the Arabic alphabet.", max_tokens=64, stop=["\n\n\n"]),
    chat("Tell me a short story about a lighthouse.", max_tokens=48, stream_options=USAGE),
    chat("Count from one to twenty.", max_tokens=64, stop=[" 9", "nine"], include_stop_str_in_output=True),
    chat("Give me the flags of six countries as emoji.", max_tokens=64, min_tokens=20, stop=["."], stream_options=USAGE),
]  # fmt: skip
PROCESSES = ("API server", "EngineCore", "Worker")
# Each kill costs the start of an engine. PENSTOCK_KILLS asks for more of them.
KILLS = int(os.environ.get("PENSTOCK_KILLS", "5"))


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


def kill(gateway: Penstock, replica: str, process: str) -> str:
    """SIGKILL to one of an engine's processes; returns its name. Where EngineCore works without a worker of its own, it is
    that in the worker's place."""
    port = f"--port={engine_url(gateway, replica).rpartition(':')[2]}"
    # A keeper has its engine's words in its command line, and is its parent.
    *_, server = [p for p in family(gateway.pid) if port in p.cmdline()]
    victim = server
    if process != PROCESSES[0]:
        [victim] = [p for p in server.children(recursive=True) if "EngineCore" in p.name()]
    if process == PROCESSES[2]:
        victim = next((p for p in victim.children(recursive=True) if "Worker" in p.name()), victim)
    name = victim.name()
    os.kill(victim.pid, signal.SIGKILL)
    return name


class Stream:
    """A stream that is read as it comes."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self._asked = {**asked, "stream": True}
        self.came = b""
        self.begun = asyncio.Event()

    async def read(self, gateway: Penstock, begun_after: int) -> list[dict[str, Any]]:
        """`begun` is set once so many tokens have come, or all."""
        reader, writer = await gateway.connect()
        writer.write(http_post("/v1/chat/completions", self._asked, more="connection: close\r\n"))
        while piece := await reader.read(1 << 16):
            self.came += piece
            if self.came.count(b'"delta":{"content":') > begun_after:
                self.begun.set()
        self.begun.set()
        await close(writer)
        return shape(body_of(self.came))

    @property
    def ended(self) -> bool:
        return b"[DONE]" in self.came


def essence(chunks: list[dict[str, Any]]) -> tuple[str, list[Any], list[Any]]:
    """Text, finish reason, usage but for the cache's part."""
    reasons = [(c["choices"][0]["finish_reason"], c["choices"][0].get("stop_reason")) for c in chunks if c["choices"]]
    usage = [
        [c["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
        for c in chunks
        if not c["choices"]
    ]
    return text_of(chunks), [r for r in reasons if r[0]], usage


@pytest.mark.timeout(300 + 120 * KILLS)
async def test_killed_in_mid_answer(penstock: Penstock) -> None:
    whole = [essence(await Stream(asked).read(penstock, 0)) for asked in ANSWERS]
    assert any(not text.isascii() for text, *_ in whole)
    cut = 0
    for number in range(KILLS):
        replica, process = REPLICAS[number % 2], PROCESSES[number % 3]
        ready = len([x for x in penstock.log if x["message"] == "engine ready"])
        resumed = await penstock.metric("penstock_failovers_total", model="smollm2", outcome="resumed")
        streams = [Stream(asked) for asked in ANSWERS]
        reading = [asyncio.create_task(s.read(penstock, 3 + 5 * (number % 4))) for s in streams]
        await asyncio.gather(*(s.begun.wait() for s in streams))
        name = kill(penstock, replica, process)
        answers = [essence(chunks) for chunks in await asyncio.gather(*reading)]
        for asked, answer, expected in zip(ANSWERS, answers, whole, strict=True):
            assert answer == expected, (number, replica, process, asked)
        more = await penstock.metric("penstock_failovers_total", model="smollm2", outcome="resumed") - resumed
        assert more, "the kill came too late"
        cut += int(more)
        print(
            f"kill {number + 1}, {process} ({name}) of {replica}: {int(more)} answers cut, {len(answers)} of {len(answers)} equal"
        )

        # and the service is whole again before the next one
        async def both(ready: int = ready) -> bool:
            return len([x for x in penstock.log if x["message"] == "engine ready"]) > ready

        await until(both, 300)
    assert cut >= KILLS
