"""A client that leaves: the engine stops within a second, the slot is back, what was used is counted."""

import asyncio
import contextlib
import random
import socket
import struct
import time
from typing import Any, NamedTuple

import pytest

from tests.fake_engine import FakeEngine
from tests.flow.conftest import Start
from tests.flow.talk import CHAT, Client, Served, connect, logged, parse, post, text_of
from tests.served import Penstock, chat_body, http_post, leaked, simple_config, until

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


# ---- a thousand, at any moment


def _chat(**fields: Any) -> dict[str, Any]:
    return chat_body("one two three", max_tokens=60, **fields)


# Every endpoint, streaming and not.
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, _chat()),
    (CHAT, _chat(stream=True)),
    (CHAT, _chat(stream=True, n=2)),
    ("/v1/completions", {"model": "tiny", "prompt": "one two", "max_tokens": 60}),
    ("/v1/completions", {"model": "tiny", "prompt": "one two", "max_tokens": 60, "stream": True}),
    ("/v1/responses", {"model": "tiny", "input": "one two", "max_output_tokens": 60}),
    ("/v1/responses", {"model": "tiny", "input": "one two", "max_output_tokens": 60, "stream": True}),
    ("/v1/messages", _chat()),
    ("/v1/messages", _chat(stream=True)),
    ("/v1/messages/count_tokens", chat_body("one two")),
    ("/tokenize", {"model": "tiny", "prompt": "one two"}),
    ("/detokenize", {"model": "tiny", "tokens": [10_001]}),
    ("/v1/embeddings", {"model": "vec", "input": "one two"}),
    ("/v1/rerank", {"model": "vec", "query": "one", "documents": ["two"]}),
    ("/v1/score", {"model": "vec", "text_1": "one", "text_2": "two"}),
    ("/v1/classify", {"model": "vec", "input": "one"}),
]
# Waiting for an engine, and worked on by one.
PACES: list[dict[str, Any]] = [{"hold": True}, {"hold_after": 3}, {"delay": 0.01}, {"first_delay": 0.1}]
MOMENTS = ("in the head", "in the body", "at once", "soon", "soon", "at the first byte")
SLOTS = 60


class Left(NamedTuple):
    name: str
    at: float  # monotonic seconds
    asked: bool  # all of the request was sent


async def leave_somewhere(gateway: Penstock, number: int, chance: random.Random) -> Left:
    name = f"leaver-{number}"
    path, body = chance.choice(REQUESTS)
    data = http_post(path, {**body, "user": name, "fake": chance.choice(PACES)}, more=f"x-request-id: {name}\r\n")
    moment = chance.choice(MOMENTS)
    head = data.index(b"\r\n\r\n") + 4
    end = {"in the head": chance.randrange(head), "in the body": chance.randrange(head, len(data))}.get(
        moment, len(data)
    )
    async with connect(gateway) as client:
        await client.send(data[:end])
        if moment == "at the first byte":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await client.reader.read(1)
        elif moment != "at once":
            await asyncio.sleep(chance.random() * 0.2)
        left = time.monotonic()
        reset(client) if chance.random() < 0.3 else client.writer.close()
    return Left(name, left, end == len(data))


async def test_1000_leave_at_any_moment() -> None:
    chance = random.Random(5)
    limits = f"{{parallel_requests: {SLOTS}, tokens_per_minute: 100000000}}"
    async with FakeEngine() as chat, FakeEngine("--pooling", models=("vec",)) as pooling:
        config = simple_config(chat.url, limits=limits).replace(
            "keys:", f'  vec: {{endpoints: ["{pooling.url}"]}}\nkeys:'
        )
        async with Penstock(config, "watched") as gateway:

            async def up() -> bool:
                return await gateway.metric("penstock_engine_up", model="vec") == 1

            await gateway.ready()
            await until(up)
            crowd = asyncio.Semaphore(SLOTS - 20)

            async def leaver(number: int) -> Left:
                async with crowd:
                    return await leave_somewhere(gateway, number, chance)

            async def all_left(numbers: range) -> list[Left]:
                return await asyncio.gather(*map(leaver, numbers))

            async def settled() -> tuple[dict[str, int], int]:
                """What lives in the gateway once nothing goes on; idle connections to engines are closed in seconds."""
                for engine in (chat, pooling):
                    await engine.until(running=0)
                    await engine.close_idle()
                return await gateway.settled()

            await all_left(range(-100, 0))
            census, descriptors = await settled()
            before = [await engine.stats() for engine in (chat, pooling)]
            left = {one.name: one for one in await all_left(range(1000))}
            assert (await settled())[1] <= descriptors
            after = [await engine.stats() for engine in (chat, pooling)]

            # Whatever an engine worked on, it either finished before its client left, or stopped within a second.
            asked, finished, gone = (
                sum(a[name] - b[name] for a, b in zip(after, before, strict=True))
                for name in ("requests", "finished", "disconnects")
            )
            departures = [
                d for a, b in zip(after, before, strict=True) for d in a["departures"][len(b["departures"]) :]
            ]
            assert asked == finished + gone
            assert len(departures) == gone > 300
            late = sorted(one["noticed"] - left[one["user"]].at for one in departures)
            print(
                f"{asked} requests, {gone} stopped: p50 {late[len(late) // 2]:.4f} s, p99 {late[-len(late) // 100]:.4f} s"
            )
            assert late[-len(late) // 100] < PROMISED

            # What was used is written down, and no more than that.
            entries: dict[str, dict[str, Any]] = {}

            async def all_logged() -> bool:
                entries.update({entry["request_id"]: entry for entry in await gateway.access_log(0)})
                return all(one["user"] in entries for one in departures)

            await until(all_logged)
            for one in departures:
                entry = entries[one["user"]]
                assert (entry["status"], entry["outcome"]) == (499, "client_cancelled")
                assert entry["prompt_tokens"] > 0
                assert entry["completion_tokens"] <= 2 * one["tokens"]  # two choices

            # Nothing is left behind: slots, objects, descriptors.
            assert await gateway.metric("penstock_inflight_requests", model="tiny") == 0
            assert await gateway.metric("penstock_inflight_requests", model="vec") == 0
            assert leaked(census, (await settled())[0]) == {}
            async with contextlib.AsyncExitStack() as stack:
                held = [await stack.enter_async_context(connect(gateway)) for _ in range(SLOTS)]
                for client in held:
                    await client.send(post(fake={"hold": True}))
                await chat.until(holding=SLOTS)
                assert (await gateway.chat()).status == 429
                await chat.release()
                assert {(await client.answer()).status for client in held} == {200}
