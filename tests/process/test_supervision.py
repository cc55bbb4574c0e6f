"""A gateway with engines of its own that freeze, die and do not start, seen by its clients and its operator."""

import asyncio
import os
import re
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.process.world import marked
from tests.served import DEADLINE, KEY, Penstock, chat_body, close, http_post, until

HERE = Path(__file__).parent
ADMIN = "sk-admin-0123456789"
TOKENS = 60
PATIENCE = 60.0  # seconds for engines that start one after the other on a busy machine


class Engines:
    """The engines of a gateway under test."""

    def __init__(self, folder: Path, marker: str) -> None:
        self.marker = marker
        self.broken = folder / "broken"
        (folder / "model").mkdir()
        python = folder / "python-with-fake-vllm"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / "fake_as_vllm.py"} "$@"\n')
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        env = f'{{STANDIN_MARKER: "{marker}", FAKE_BROKEN: "{self.broken}"}}'
        self.config = (
            "models:\n"
            "  tiny:\n"
            "    stall_timeout: 1\n"
            f'    engine: {{model: "{folder}/model", python: "{python}", replicas: 2, env: {env}}}\n'
            f"keys: [{{name: test, key: {KEY}}}]\n"
            f"admin_key: {ADMIN}\n"
        )

    def mains(self) -> list[psutil.Process]:
        return [p for p in marked(self.marker) if "fake_engine.py" in " ".join(p.cmdline()[:2])]


@pytest.fixture
def engines(tmp_path: Path, marker: str) -> Engines:
    return Engines(tmp_path, marker)


async def all_ready(gateway: Penstock) -> None:
    async def ready() -> bool:
        return (await gateway.get("/metrics")).body.count(b"penstock_engine_up{") == 2 and len(
            re.findall(rb"penstock_engine_up\{[^}]*\} 1\.0", (await gateway.get("/metrics")).body)
        ) == 2

    try:
        await until(ready, PATIENCE)
    except TimeoutError:
        said = [f"{line.get('replica')}: {line['message']}" for line in gateway.log]
        raise AssertionError("\n".join(map(str, ["not both ready:", *await shown(gateway), *said]))) from None


async def shown(gateway: Penstock) -> list[dict[str, object]]:
    found: list[dict[str, object]] = (await gateway.get("/admin/api/engines", ADMIN)).json["data"]
    return found


async def busy(gateway: Penstock, engines: Engines) -> psutil.Process:
    """The engine that has a request open."""
    (url,) = [str(one["url"]) for one in await shown(gateway) if one["open_requests"]]
    port = url.rpartition(":")[2]
    (engine,) = [p for p in engines.mains() if p.cmdline()[p.cmdline().index("--port") + 1] == port]
    return engine


def freeze(engine: psutil.Process) -> None:
    engine.suspend()


def freeze_group(engine: psutil.Process) -> None:
    os.killpg(os.getpgid(engine.pid), signal.SIGSTOP)


def kill(engine: psutil.Process) -> None:
    engine.kill()


def kill_keeper(engine: psutil.Process) -> None:
    keeper = engine.parent()
    assert keeper is not None
    assert "keeper.py" in " ".join(keeper.cmdline())
    keeper.kill()


@pytest.mark.parametrize("harm", [freeze, freeze_group, kill, kill_keeper], ids=lambda f: f.__name__)
async def test_a_stream_outlives_its_engine_which_comes_back(
    engines: Engines, harm: Callable[[psutil.Process], None]
) -> None:
    async with Penstock(engines.config) as gateway:
        await all_ready(gateway)
        reader, writer = await gateway.connect()
        body = chat_body(stream=True, max_tokens=TOKENS, temperature=0, fake={"delay": 0.02})
        writer.write(http_post("/v1/chat/completions", body, more="connection: close\r\n"))
        async with asyncio.timeout(DEADLINE):
            answer = await reader.readuntil(b"t3")
            victim = await busy(gateway, engines)
            harm(victim)
            answer += await reader.read(-1)
        await close(writer)
        text = b"".join(re.findall(rb'"content":"([^"]*)"', answer))
        assert text == b"".join(b" t%d" % i for i in range(TOKENS))
        assert b"data: [DONE]" in answer
        async with asyncio.timeout(PATIENCE):
            while victim.is_running():  # noqa: ASYNC110 - another process has no event to offer
                await asyncio.sleep(0.05)
        await all_ready(gateway)
        assert sorted(one["restarts"] for one in await shown(gateway)) == [0, 1]  # type: ignore[type-var]
        left = psutil.Process(gateway.pid).children(recursive=True)
        assert [p for p in left if p.status() == psutil.STATUS_ZOMBIE] == []
        assert len(left) == 4  # two keepers with an engine each
        gateway.signal(signal.SIGTERM)
        assert await gateway.exit_code() == 0


async def test_a_crash_loop_is_contained_shown_and_ended_by_an_operator(engines: Engines) -> None:
    engines.broken.touch()
    async with Penstock(engines.config) as gateway:

        async def failed() -> bool:
            return [one["state"] for one in await shown(gateway)] == ["failed"] * 2

        await until(failed, PATIENCE)
        assert {str(one["reason"]) for one in await shown(gateway)} == {
            "exited with code 1: RuntimeError: no kernel image is available"
        }
        started = [line["replica"] for line in gateway.log if line["message"] == "engine started"]
        assert sorted(started) == ["tiny/0"] * 5 + ["tiny/1"] * 5
        refused = await gateway.chat()
        assert (refused.status, refused.error["code"]) == (503, "no_healthy_engine")
        assert (await gateway.get("/health/ready")).status == 503
        engines.broken.unlink()
        for i in range(2):
            assert (await gateway.post(f"/admin/api/engines/tiny/{i}/restart", {}, ADMIN)).status == 202
        await all_ready(gateway)
        assert (await gateway.chat()).status == 200


async def test_a_gateway_that_is_killed_leaves_no_engine(engines: Engines) -> None:
    async with Penstock(engines.config) as gateway:
        await all_ready(gateway)
        assert len(marked(engines.marker)) == 4
        gateway.signal(signal.SIGKILL)
        await gateway.exit_code()
        async with asyncio.timeout(DEADLINE):
            while marked(engines.marker):  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.05)
