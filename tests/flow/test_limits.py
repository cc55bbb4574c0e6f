"""CONTRACT.md §4, limits: never more than they say, and their headers tell the truth."""

import asyncio
import math
import random
import re
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.fake_engine import FakeEngine
from tests.flow.conftest import Start
from tests.flow.talk import CHAT, Client, connect, post
from tests.served import Answer, Penstock, chat_body, simple_config, until

DURATION = re.compile(r"(?:(\d+)m)?(?:(\d+(?:\.\d{1,3})?)s)?|(\d+)ms")


def seconds(duration: str) -> float:
    found = DURATION.fullmatch(duration)
    assert found, duration
    minutes, rest, ms = found.groups()
    return int(minutes or 0) * 60 + float(rest or 0) + int(ms or 0) / 1000


def window(answer: Answer, kind: str) -> tuple[int, int, float]:
    """Limit, remaining, reset."""
    limit, remaining, reset = (answer.headers[f"x-ratelimit-{name}-{kind}"] for name in ("limit", "remaining", "reset"))
    return int(limit), int(remaining), seconds(reset)


def keys(count: int, limits: str) -> str:
    """A config's further keys, sk-key-00… and so on."""
    return "".join(
        f'  - {{name: key-{i:02}, key: sk-key-{i:02}-0123456789, models: ["*"], limits: {limits}}}\n'
        for i in range(count)
    )


async def test_300_requests_of_20_keys_at_once(engine: FakeEngine, start: Start) -> None:
    """All of them are there but for their last byte; then all of these come together, in any order."""
    gateway = await start(
        config=simple_config(engine.url) + keys(20, "{requests_per_minute: 10, tokens_per_minute: 100000}")
    )
    chance = random.Random(1)
    answers: dict[int, list[Answer]] = {i: [] for i in range(20)}
    async with AsyncExitStack() as stack:
        clients = []
        for number in range(300):
            client = await stack.enter_async_context(connect(gateway))
            fields: dict[str, Any] = {"max_tokens": chance.randrange(1, 30), "stream": chance.random() < 0.5}
            request = post(key=f"sk-key-{number % 20:02}-0123456789", **fields)
            await client.send(request[:-1])
            clients.append((number % 20, client, request[-1:]))
        chance.shuffle(clients)

        async def ask(key: int, client: Client, last: bytes) -> None:
            await client.send(last)
            answers[key].append(await client.answer())

        await asyncio.gather(*(ask(*one) for one in clients))
    for of_key in answers.values():
        admitted = [answer for answer in of_key if answer.status == 200]
        refused = [answer for answer in of_key if answer.status == 429]
        assert (len(admitted), len(refused)) == (10, 5)
        assert sorted(window(answer, "requests")[1] for answer in admitted) == list(range(10))
        for answer in of_key:
            limit, _, reset = window(answer, "requests")
            assert limit == 10
            assert 0 < reset <= 60.5
            assert window(answer, "tokens")[0] == 100_000
        for answer in refused:
            assert window(answer, "requests")[1] == 0
            ms = int(answer.headers["retry-after-ms"])
            assert 0 < ms <= 60_500
            assert int(answer.headers["retry-after"]) == math.ceil(ms / 1000)
            assert answer.error["type"] == "requests"
            assert "x-should-retry" not in answer.headers
    assert (await engine.stats())["requests"] == 200
    rejected = [
        await gateway.metric("penstock_limit_rejections_total", key=f"key-{i:02}", limit="requests") for i in range(20)
    ]
    assert rejected == [5] * 20


async def test_parallel_slots(engine: FakeEngine, start: Start) -> None:
    gateway = await start(engine.url, limits="{parallel_requests: 3}")
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(gateway)) for _ in range(10)]
        for number, client in enumerate(clients):
            await client.send(post(stream=number % 2 == 0, max_tokens=2, fake={"hold": True}))
        await engine.until(holding=3)
        refused: list[Answer] = []
        answering = [asyncio.create_task(client.answer()) for client in clients]
        while len(refused) < 7:
            done, _ = await asyncio.wait(answering, return_when=asyncio.FIRST_COMPLETED)
            refused += [task.result() for task in done]
            answering = [task for task in answering if task not in done]
        assert {answer.status for answer in refused} == {429}
        assert {answer.error["type"] for answer in refused} == {"requests"}
        assert "at most 3 requests may be open at once" in refused[0].error["message"]
        assert all(0 < int(answer.headers["retry-after-ms"]) <= 60_000 for answer in refused)
        await engine.release()
        assert {(await task).status for task in answering} == {200}
    assert (await engine.stats())["requests"] == 3
    # Slots come back with the last byte, also when the client leaves.
    for _ in range(3):
        async with AsyncExitStack() as stack:
            for _ in range(3):
                client = await stack.enter_async_context(connect(gateway))
                await client.send(post(stream=True, fake={"hold_after": 1}))
                await client.until(b" t0")
            assert (await gateway.chat(max_tokens=1)).status == 429
        await until(lambda: admitted(gateway))


async def admitted(gateway: Penstock) -> bool:
    return (await gateway.chat(max_tokens=1)).status == 200


async def test_one_after_the_other_never_waits_for_its_own_slot(engine: FakeEngine, start: Start) -> None:
    """Whoever has got the last byte may ask again at once."""
    gateway = await start(engine.url, limits="{parallel_requests: 1}")
    async with connect(gateway) as client:
        for number in range(60):
            request = post(stream=number % 3 > 0, max_tokens=2).replace(b"connection: close\r\n", b"")
            await client.send(request)
            assert (await client.answer()).status == 200


async def test_a_refused_request_consumes_nothing(engine: FakeEngine, start: Start) -> None:
    gateway = await start(engine.url, limits="{requests_per_minute: 4, parallel_requests: 1, tokens_per_minute: 5000}")
    async with connect(gateway) as client:
        await client.send(post(max_tokens=10, fake={"hold": True}))
        await engine.until(holding=1)
        before = [await gateway.chat(max_tokens=10) for _ in range(6)]
        assert {answer.status for answer in before} == {429}
        assert {window(answer, "requests")[1] for answer in before} == {3}
        assert len({window(answer, "tokens")[1] for answer in before}) == 1
        await engine.release()
        assert (await client.answer()).status == 200
    too_many = [await gateway.chat(max_tokens=100_000) for _ in range(2)]  # as much as the limit itself
    assert {answer.status for answer in too_many} == {429}
    assert {answer.error["type"] for answer in too_many} == {"tokens"}
    bad: dict[str, Any]
    for bad in ({"temperature": 9}, {"model": "nobody"}, {"messages": []}):
        answer = await gateway.chat(**bad)
        assert answer.status in (400, 404)
        assert "x-ratelimit-limit-requests" not in answer.headers
    rest = [await gateway.chat(max_tokens=10) for _ in range(4)]
    assert [answer.status for answer in rest] == [200, 200, 200, 429]
    assert [window(answer, "requests")[1] for answer in rest] == [2, 1, 0, 0]


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_are_reserved_and_settled(engine: FakeEngine, start: Start, stream: bool) -> None:
    gateway = await start(engine.url, limits="{tokens_per_minute: 1000}")
    three = {"tokens": [" a", " b", " c"]}
    async with connect(gateway) as client:
        await client.send(post(max_tokens=400, stream=stream, fake={**three, "hold": True}))
        await engine.until(holding=1)
        # While it runs, all that it might use is taken.
        refused = await gateway.chat(max_tokens=600)
        assert refused.status == 429
        limit, remaining, _ = window(refused, "tokens")
        assert limit == 1000
        assert 500 < remaining < 600
        await engine.release()
        answer = await client.answer()
        assert window(answer, "tokens")[1] == remaining
    # Afterwards what it has used: a word and three tokens, with the end of the text that makes four.
    second = await gateway.chat(max_tokens=1)
    used = 1000 - window(second, "tokens")[1]
    assert 5 + 1 + 1 <= used <= 5 + 1 + 60


async def test_without_max_tokens_the_models_answers_are_the_measure(engine: FakeEngine, start: Start) -> None:
    gateway = await start(engine.url, limits="{tokens_per_minute: 100000}")
    first = await gateway.chat()
    assert 100_000 - window(first, "tokens")[1] > 200
    for _ in range(16):
        await gateway.chat()
    later = window(await gateway.chat(), "tokens")[1]
    assert later - window(await gateway.chat(), "tokens")[1] < 60  # 16 tokens each, and what is reserved for one more


@pytest.mark.parametrize(
    "fake", [{"status": 500}, {"cut_after": -1}, {"garbage": True}, {"error_first": True}], ids=str
)
async def test_what_an_engine_spoils_is_given_back(engine: FakeEngine, start: Start, fake: dict[str, object]) -> None:
    gateway = await start(engine.url, limits="{requests_per_minute: 1, tokens_per_minute: 2000, parallel_requests: 1}")
    for _ in range(3):
        answer = await gateway.chat(max_tokens=1000, stream=True, fake=fake)
        assert answer.status == 502
        assert window(answer, "requests")[:2] == (1, 0)
    assert (await gateway.chat(max_tokens=1)).status == 200
    assert (await gateway.chat(max_tokens=1)).status == 429


async def test_a_broken_stream_costs_what_was_delivered(engine: FakeEngine, start: Start) -> None:
    gateway = await start(engine.url, limits="{tokens_per_minute: 2000}")
    await gateway.chat(max_tokens=1000, stream=True, fake={"cut_after": 3})
    remaining = window(await gateway.chat(max_tokens=1), "tokens")[1]
    assert 2000 - 70 < remaining <= 2000 - 3 - 1


async def test_keys_do_not_share(engine: FakeEngine, start: Start) -> None:
    gateway = await start(config=simple_config(engine.url, limits="{requests_per_minute: 1}") + keys(2, "{}"))
    assert [(await gateway.chat(max_tokens=1)).status for _ in range(2)] == [200, 429]
    for key in ("sk-key-00-0123456789", "sk-key-01-0123456789"):
        for _ in range(3):
            answer = await gateway.chat(max_tokens=1, key=key)
            assert answer.status == 200
            assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


async def test_every_endpoint_is_limited(engine: FakeEngine, start: Start) -> None:
    gateway = await start(engine.url, limits="{requests_per_minute: 4}")
    bodies = {
        CHAT: chat_body(max_tokens=1),
        "/v1/completions": {"model": "tiny", "prompt": "hi", "max_tokens": 1},
        "/v1/messages": chat_body(max_tokens=1),
        "/tokenize": {"model": "tiny", "prompt": "hi"},
        "/v1/responses": {"model": "tiny", "input": "hi"},
    }
    answers = [await gateway.post(path, body) for path, body in bodies.items()]
    assert [answer.status for answer in answers] == [200, 200, 200, 200, 429]
    assert [window(answer, "requests")[1] for answer in answers] == [3, 2, 1, 0, 0]
    for _ in range(3):
        assert (await gateway.get("/v1/models")).status == 200  # asking what there is costs nothing
