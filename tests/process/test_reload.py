"""Reload of a serving process: what comes into force, what is refused, and that no request notices."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.config.watch import Settling, watch
from tests.fake_engine import FakeEngine
from tests.process.load import Load
from tests.process.world import World, engine_pids
from tests.served import DEADLINE, KEY, Penstock, chat_body, close, http_post, simple_config, until

Line = dict[str, Any]


def ended(line: Line) -> bool:
    return str(line["message"]) == "reloaded" or str(line["message"]).startswith("reload failed")


async def reload(gateway: Penstock, text: str, ask: bool = True) -> Line:
    """Writes the file, and asks for it to be read. Returns the line that tells how that went."""
    before = sum(map(ended, gateway.log))
    other = gateway.config.with_suffix(".new")
    other.write_text(text)
    os.replace(other, gateway.config)
    if ask:
        gateway.signal(signal.SIGHUP)
    return await nth(gateway, ended, before + 1)


async def nth(gateway: Penstock, wanted: Callable[[Line], bool], count: int) -> Line:
    left = count

    def last(line: Line) -> bool:
        nonlocal left
        left -= wanted(line)
        return left == 0

    return await gateway.logged(last)


async def test_twenty_reloads_under_load_cost_no_request() -> None:
    async with FakeEngine(replicas=3) as engine:
        one, two, three = engine.urls
        steps = [(one, two), (two, three), (three,), (one,), (one, two, three)]
        async with Penstock(simple_config(*steps[0])) as gateway:
            await gateway.ready()
            load = Load(gateway.port, clients=4)
            async with load.running():
                await load.more(20)
                for i in range(20):
                    text = simple_config(*steps[(i + 1) % len(steps)], limits=f"{{requests_per_minute: {100_000 + i}}}")
                    assert (await reload(gateway, text))["message"] == "reloaded"
                    await load.more(8)
            assert load.failures == []
            assert load.finished > 180
            assert await gateway.metric("penstock_config_reloads_total", outcome="applied") == 20
            # each of them was used, and what is gone is not left behind
            assert all([(await engine.stats(i))["requests"] for i in range(3)])

            async def two_are_left() -> bool:
                return (await gateway.get("/metrics")).body.count(b"penstock_engine_up{") == 2

            await until(two_are_left)


async def test_an_endpoint_that_goes_ends_its_streams_first() -> None:
    async with FakeEngine(replicas=2) as engine, Penstock(simple_config(engine.urls[0])) as gateway:
        await gateway.ready()
        reader, writer = await gateway.connect()
        writer.write(http_post("/v1/chat/completions", {**CHAT, "stream": True, "fake": {"hold_after": 1}}))
        async with asyncio.timeout(DEADLINE):
            await reader.readuntil(b"t0")
        line = await reload(gateway, simple_config(engine.urls[1]))
        assert line["notes"] == ["tiny/1: comes", "tiny/0: goes"]
        await gateway.logged(lambda line: "no longer in the configuration" in str(line.get("detail")))
        assert (await gateway.chat()).status == 200
        assert (await engine.stats(1))["requests"] == 1
        await engine.release()
        async with asyncio.timeout(DEADLINE):
            assert b"data: [DONE]" in await reader.readuntil(b"[DONE]")
        await close(writer)

        async def gone() -> bool:
            return b'replica="tiny/0"' not in (await gateway.get("/metrics")).body

        await until(gone)


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


async def test_what_can_change_under_server_does_and_what_cannot_is_named() -> None:
    async with FakeEngine() as engine, Penstock(simple_config(engine.url)) as gateway:
        await gateway.ready()
        assert (await gateway.chat("x" * 9000)).status == 200
        server = '{port: 9, host: 127.0.0.2, max_body_bytes: 1024, cors_origins: ["https://a.example"]}'
        line = await reload(gateway, simple_config(engine.url, more=f"server: {server}\n"))
        # The port was given on the command line, so the file's is not in force anyway.
        assert line["notes"] == ["server.host: a change comes into force with a restart; all else has"]
        assert (await gateway.chat("x" * 9000)).status == 413
        page = await gateway.request("GET", "/health", {"origin": "https://a.example"})
        assert page.headers["access-control-allow-origin"] == "https://a.example"
        line = await reload(gateway, simple_config(engine.url, more="server: {drain_timeout: 0.2}\n"))
        page = await gateway.request("GET", "/health", {"origin": "https://a.example"})
        assert "access-control-allow-origin" not in page.headers
        gateway.signal(signal.SIGTERM)
        assert (await gateway.logged(lambda line: line["message"] == "draining"))["timeout"] == 0.2


@pytest.mark.parametrize("door", ["edge", "asgi"])
@pytest.mark.parametrize("stream", [False, True])
async def test_web_pages_may_read_answers_as_long_as_their_origin_is_listed(door: str, stream: bool) -> None:
    origin = "https://a.example"

    async with FakeEngine() as engine, Penstock(simple_config(engine.url), door=door) as gateway:
        await gateway.ready()
        reader, writer = await gateway.connect()
        request = http_post("/v1/chat/completions", chat_body(stream=stream), more=f"origin: {origin}\r\n")

        async def allowed() -> bool:
            """Over one connection, as browsers do."""
            writer.write(request)
            async with asyncio.timeout(DEADLINE):
                head = await reader.readuntil(b"\r\n\r\n")
                if b"content-length" in head:
                    await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r")[0]))
                else:
                    assert b"data: [DONE]" in await reader.readuntil(b"\r\n0\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            return b"access-control-allow-origin: " + origin.encode() in head

        answers = [await allowed() for _ in range(3)]
        await reload(gateway, simple_config(engine.url, more=f'server: {{cors_origins: ["{origin}"]}}\n'))
        answers += [await allowed() for _ in range(3)]
        await reload(gateway, simple_config(engine.url))
        answers += [await allowed()]
        assert answers == [False] * 3 + [True] * 3 + [False]
        await close(writer)


async def test_a_shorter_idle_timeout_holds_for_connections_that_are_there() -> None:
    async with FakeEngine() as engine, Penstock(simple_config(engine.url)) as gateway:
        await gateway.ready()
        reader, writer = await gateway.connect()
        writer.write(http_post("/v1/chat/completions", CHAT))
        await reader.readuntil(b"\r\n\r\n")
        await reload(gateway, simple_config(engine.url, more="server: {idle_timeout: 0.1}\n"))
        async with asyncio.timeout(DEADLINE):
            await reader.read(-1)  # ends
        await close(writer)


async def test_reloads_that_come_at_the_same_time_are_done_one_after_the_other() -> None:
    async with FakeEngine() as engine, Penstock(simple_config(engine.url)) as gateway:
        await gateway.ready()
        for _ in range(5):
            gateway.signal(signal.SIGHUP)
        await reload(gateway, simple_config(engine.url).replace(KEY, "sk-the-last-one-counts"))

        async def in_force() -> bool:
            return (await gateway.chat(key="sk-the-last-one-counts")).status == 200

        await until(in_force)
        assert not [line for line in gateway.log if line["message"].startswith("reload failed")]


async def test_an_engine_of_ours_that_did_not_change_is_not_restarted(world: World) -> None:
    def config(limits: str, model: Path = world.tmp_path / "model", more: str = "") -> str:
        env = ", ".join(f'{name}: "{value}"' for name, value in world.spec().env.items())
        return (
            f'models: {{tiny: {{engine: {{model: "{model}", python: "{world.python}", env: {{{env}}}{more}}}}}}}\n'
            f"keys: [{{name: test, key: {KEY}, limits: {limits}}}]\n"
        )

    async with Penstock(config("{}")) as gateway:
        await gateway.ready()
        before = engine_pids(world.marker)
        line = await reload(gateway, config("{requests_per_minute: 5}", more=", stop_timeout: 1.0"))
        assert line["notes"] == []
        assert engine_pids(world.marker) == before
        line = await reload(gateway, config("{}", more=", args: {dtype: float32}"))
        assert line["notes"] == ["tiny/1: comes", "tiny/0: goes"]

        async def replaced() -> bool:
            pids = engine_pids(world.marker)
            return len(pids) == 1 and pids != before

        await until(replaced)
        assert (await gateway.get("/health/ready")).status == 200
        gateway.signal(signal.SIGTERM)
        assert await gateway.exit_code() == 0


# ---- on change of the file


async def test_watch_reloads_when_the_file_changes_and_survives_a_broken_one() -> None:
    async with FakeEngine() as engine, Penstock(simple_config(engine.url), options=["--watch"]) as gateway:
        await gateway.ready()
        text = simple_config(engine.url)
        line = await reload(gateway, text[: len(text) // 2], ask=False)
        assert line["message"] == "reload failed; the old configuration stays"
        assert (await gateway.chat()).status == 200
        before = sum(map(ended, gateway.log))
        gateway.config.write_text(text.replace(KEY, "sk-in-the-same-file"))  # not by another one that takes its name
        assert (await nth(gateway, ended, before + 1))["message"] == "reloaded"
        assert (await gateway.chat(key="sk-in-the-same-file")).status == 200
        assert len([line for line in gateway.log if ended(line)]) == 2


A, B, C = (1, 1, 1, 1), (1, 2, 1, 1), (1, 2, 1, 2)


@pytest.mark.parametrize(
    ("looks", "told"),
    [
        ([A, A], []),
        ([B, B, B], [1]),
        ([B, C, C], [2]),  # half-written at the first look
        ([B, A, A], []),
        ([None, None, A, A], []),
        ([None, B, B], [2]),
        ([B, B, A, A], [1, 3]),
    ],
)
def test_a_change_is_told_when_it_is_over(looks: list[tuple[int, int, int, int] | None], told: list[int]) -> None:
    settling = Settling(A)
    assert [i for i, now in enumerate(looks) if settling.changed(now)] == told


async def test_a_file_is_followed_through_a_symbolic_link(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text("same")
    link = tmp_path / "link"
    link.symlink_to("one")
    changed = asyncio.Event()

    async def on_change() -> None:
        changed.set()

    task = asyncio.create_task(watch(link, on_change, interval=0.01))
    await asyncio.sleep(0)
    (tmp_path / "next").symlink_to("two")
    os.replace(tmp_path / "next", link)
    async with asyncio.timeout(DEADLINE):
        await changed.wait()
    task.cancel()
