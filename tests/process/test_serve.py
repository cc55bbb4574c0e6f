"""The serving process: signals, drain, reload, and what it must never do."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import psutil
import pytest

from tests.fake_engine import FakeEngine
from tests.served import DEADLINE, KEY, ROOT, Penstock, chat_body, close, http_post, simple_config, until

HOLD = {"tokens": ["one", " two", " three"], "hold_after": 1}


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine() as running:
        yield running


class OpenStream:
    """A stream that the fake engine holds after its first token."""

    def __init__(self, gateway: Penstock) -> None:
        self._gateway = gateway
        self.text = b""

    async def open(self) -> None:
        self._reader, self._writer = await self._gateway.connect()
        self._writer.write(http_post("/v1/chat/completions", chat_body(stream=True, fake=HOLD)))
        async with asyncio.timeout(DEADLINE):
            while b'"one"' not in self.text:
                self.text += await self._reader.read(65536)

    async def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        async with asyncio.timeout(DEADLINE):
            self.text += await self._reader.read(-1)
            await close(self._writer)
        return self.text


async def started(stack: AsyncExitStack, config: str) -> Penstock:
    gateway = await stack.enter_async_context(Penstock(config))
    return await gateway.ready()


async def test_sigterm_ends_an_idle_gateway_with_0(engine: FakeEngine) -> None:
    async with Penstock(simple_config(engine.url)) as gateway:
        await gateway.ready()
        gateway.signal(signal.SIGTERM)
        assert await gateway.exit_code() == 0


async def test_sigterm_lets_streams_finish_and_takes_nothing_new(engine: FakeEngine) -> None:
    async with Penstock(simple_config(engine.url)) as gateway:
        await gateway.ready()
        stream = OpenStream(gateway)
        await stream.open()
        gateway.signal(signal.SIGTERM)
        await gateway.logged(lambda line: line["message"] == "draining")
        refused = await gateway.chat()
        assert refused.status == 503
        assert refused.error["code"] == "draining"
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["connection"] == "close"
        assert (await gateway.get("/health/ready")).status == 503
        assert (await gateway.get("/health/live")).status == 200
        await engine.release()
        text = await stream.rest()
        assert b'" three"' in text
        assert b"data: [DONE]" in text
        assert await gateway.exit_code() == 0


async def test_kept_connections_are_told_to_go_while_streams_finish(engine: FakeEngine) -> None:
    inference = http_post("/v1/chat/completions", chat_body())
    page = b"GET /health/live HTTP/1.1\r\nhost: test\r\n\r\n"
    async with Penstock(simple_config(engine.url)) as gateway:
        await gateway.ready()
        stream = OpenStream(gateway)
        await stream.open()
        kept = [await gateway.connect() for _ in range(2)]
        for reader, writer in kept:
            writer.write(page)
            await reader.readuntil(b"}")
        gateway.signal(signal.SIGTERM)
        await gateway.logged(lambda line: line["message"] == "draining")
        answers = []
        for (reader, writer), request in zip(kept, (inference, page), strict=True):
            writer.write(request)
            async with asyncio.timeout(DEADLINE):
                answers.append(await reader.read(-1))  # the gateway closes
            await close(writer)
        assert answers[0].startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: 1\r\n" in answers[0]
        assert b"\r\nconnection: close\r\n" in answers[0]
        assert b'"code":"draining"' in answers[0]
        assert answers[1].startswith(b"HTTP/1.1 200 ")
        await engine.release()
        assert b"data: [DONE]" in await stream.rest()
        assert await gateway.exit_code() == 0


async def test_streams_that_outlive_the_drain_end_with_an_error_event(engine: FakeEngine) -> None:
    config = simple_config(engine.url, more="server: {drain_timeout: 0.3}\n")
    async with Penstock(config) as gateway:
        await gateway.ready()
        stream = OpenStream(gateway)
        await stream.open()
        gateway.signal(signal.SIGTERM)
        text = await stream.rest()
        assert b'"code":"draining"' in text
        assert b"[DONE]" not in text
        assert await gateway.exit_code() == 0
        # and the engine was told to stop
        await engine.until(running=0)


async def test_a_second_sigterm_stops_at_once(engine: FakeEngine) -> None:
    async with Penstock(simple_config(engine.url)) as gateway:
        await gateway.ready()
        stream = OpenStream(gateway)
        await stream.open()
        gateway.signal(signal.SIGTERM)
        await gateway.logged(lambda line: line["message"] == "draining")
        gateway.signal(signal.SIGTERM)
        assert await gateway.exit_code() == 0
        assert b'"code":"draining"' in await stream.rest()


async def test_sighup_reads_keys_and_limits_again(engine: FakeEngine) -> None:
    async with Penstock(simple_config(engine.url)) as gateway:
        await gateway.ready()
        text = gateway.config.read_text()
        gateway.config.write_text(
            text.replace(KEY, "sk-another-key-0123").replace("limits: {}", "limits: {requests_per_minute: 7}")
        )
        gateway.signal(signal.SIGHUP)
        await gateway.logged(lambda line: line["message"] == "reloaded")
        assert (await gateway.chat()).status == 401
        answer = await gateway.chat(key="sk-another-key-0123")
        assert answer.status == 200
        assert answer.headers["x-ratelimit-limit-requests"] == "7"
        assert await gateway.metric("penstock_config_reloads_total", outcome="applied") == 1


async def test_what_was_used_before_a_reload_still_counts(engine: FakeEngine) -> None:
    config = simple_config(engine.url, limits="{requests_per_minute: 5}")
    async with Penstock(config) as gateway:
        await gateway.ready()
        assert [(await gateway.chat()).status for _ in range(3)] == [200, 200, 200]
        gateway.signal(signal.SIGHUP)
        await gateway.logged(lambda line: line["message"] == "reloaded")
        assert [(await gateway.chat()).status for _ in range(3)] == [200, 200, 429]


async def test_a_broken_config_changes_nothing(engine: FakeEngine) -> None:
    async with Penstock(simple_config(engine.url)) as gateway:
        await gateway.ready()
        gateway.config.write_text(gateway.config.read_text() + "servr: {}\n")
        gateway.signal(signal.SIGHUP)
        line = await gateway.logged(lambda line: line["message"].startswith("reload failed"))
        assert line["faults"] == [f"{gateway.config}:7: servr: unknown field; did you mean 'server'?"]
        assert (await gateway.chat()).status == 200
        assert await gateway.metric("penstock_config_reloads_total", outcome="failed") == 1


async def test_a_stream_survives_a_reload(engine: FakeEngine) -> None:
    async with Penstock(simple_config(engine.url)) as gateway:
        await gateway.ready()
        stream = OpenStream(gateway)
        await stream.open()
        gateway.signal(signal.SIGHUP)
        await gateway.logged(lambda line: line["message"] == "reloaded")
        await engine.release()
        gateway.signal(signal.SIGTERM)
        assert b"data: [DONE]" in await stream.rest()


async def test_an_engine_that_comes_back_is_used_again(engine: FakeEngine) -> None:
    async with Penstock(simple_config(engine.url)) as gateway:
        await gateway.ready()
        await engine.health(503)

        async def down() -> bool:
            return (await gateway.chat()).status == 503

        await until(down)
        refused = await gateway.chat()
        assert refused.error["code"] == "no_healthy_engine"
        assert int(refused.headers["retry-after"]) >= 1
        await engine.health(200)
        await gateway.ready()
        assert (await gateway.chat()).status == 200


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    config = tmp_path / "penstock.yaml"
    config.write_text(simple_config("http://127.0.0.1:9"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "gateway", "serve", "--config", str(config), "--port", str(port)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=DEADLINE,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == (
        f"penstock: cannot listen on 127.0.0.1:{port}: Address already in use. "
        "Choose another port with --port, or stop what listens there.\n"
    )


def test_the_gateway_never_imports_an_engine() -> None:
    program = "import sys, json, gateway.runtime, gateway.cli; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = set(json.loads(done.stdout))
    assert "gateway.serve" in loaded
    assert not loaded & {"torch", "vllm", "transformers", "numpy"}


async def test_the_gateway_is_small(engine: FakeEngine) -> None:
    async with Penstock(simple_config(engine.url)) as gateway:
        await gateway.ready()
        assert (await gateway.chat()).status == 200
        assert psutil.Process(gateway.pid).memory_info().rss <= 90 * 1024 * 1024
