"""The real engine: from a cold start to the first token, and down again without a trace."""

import asyncio
import json
import os
import signal
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from engines.fleet import Fleet
from engines.sources import ModelSource
from engines.spec import EngineSpec
from engines.types import EngineEvent, EventKind, Replica, ReplicaState

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


class Engine:
    """A real engine under a fleet, and what was told of it."""

    def __init__(self, spec: EngineSpec, log_dir: Path) -> None:
        self.events: list[EngineEvent] = []
        self._others = psutil.Process().children(recursive=True)  # of other tests
        spec = spec.model_copy(update={"env": {"VLLM_CPU_KVCACHE_SPACE": "1"}})
        self.fleet = Fleet({"m": ModelSource(engine=spec)}, base_dir=ROOT, log_dir=log_dir, on_event=self.events.append)

    def processes(self) -> list[psutil.Process]:
        """The engine's processes. By descent: vLLM overwrites its processes' names and environments."""
        return [process for process in psutil.Process().children(recursive=True) if process not in self._others]


@asynccontextmanager
async def running(spec: EngineSpec, log_dir: Path) -> AsyncIterator[Engine]:
    engine = Engine(spec, log_dir)
    seen: list[psutil.Process] = []
    await engine.fleet.start()
    try:
        yield engine
        seen = engine.processes()
    finally:
        await engine.fleet.stop()
    assert engine.processes() == []
    assert [process for process in seen if process.is_running()] == []


async def ask(replica: Replica, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        replica.url + path,
        json.dumps({"model": replica.served_name, **body}).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {replica.api_key}"},
    )

    def send() -> Any:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)

    return await asyncio.to_thread(send)


async def test_a_chat_engine_from_cold_start_over_a_crash_to_its_end(tmp_path: Path) -> None:
    spec = EngineSpec(
        model=".models/SmolLM2-135M-Instruct",
        args={"dtype": "float32", "max-model-len": 2048, "enforce-eager": True},
    )
    question = {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 16,
        "temperature": 0,
    }
    async with running(spec, tmp_path) as engine:
        replica = await engine.fleet.wait_ready("m", 300)
        assert replica.max_model_len == 2048
        answer = await ask(replica, "/v1/chat/completions", question)
        assert "Paris" in answer["choices"][0]["message"]["content"]

        # The part that computes dies; the HTTP server lives on and is made to go.
        first_life = engine.processes()
        core = next(process for process in first_life if "EngineCore" in process.name())
        os.kill(core.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while not any(event.kind is EventKind.DIED for event in engine.events):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        assert engine.fleet.view.ready("m") == []
        assert [process for process in first_life if process.is_running()] == []
        again = await engine.fleet.wait_ready("m", 300)
        assert again.restarts == 1
        answer = await ask(again, "/v1/chat/completions", question)
        assert "Paris" in answer["choices"][0]["message"]["content"]
    assert engine.fleet.view.of("m")[0].state is ReplicaState.STOPPED


async def test_a_sentence_encoder(tmp_path: Path) -> None:
    spec = EngineSpec(
        model=".models/all-MiniLM-L6-v2", args={"runner": "pooling", "dtype": "float32", "enforce-eager": True}
    )
    async with running(spec, tmp_path) as engine:
        replica = await engine.fleet.wait_ready("m", 300)
        texts = ["a cat sits on the mat", "a kitten rests on a rug", "the stock market fell"]
        answer = await ask(replica, "/v1/embeddings", {"input": texts})
        cat, kitten, market = (item["embedding"] for item in answer["data"])
        assert len(cat) == 384
        assert dot(cat, kitten) > dot(cat, market) + 0.2


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


async def test_a_flag_that_vllm_does_not_know_is_named_and_not_tried_again(tmp_path: Path) -> None:
    spec = EngineSpec(model=".models/SmolLM2-135M-Instruct", args={"no-such-flag": 1})
    async with running(spec, tmp_path) as engine:
        with pytest.raises(Exception, match="vLLM does not know this flag: --no-such-flag=1"):
            await engine.fleet.wait_ready("m", 120)
        assert sum(event.kind is EventKind.STARTED for event in engine.events) == 1
