"""An engine dies under a stream, and the client notices nothing."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.fake_engine import FakeEngine
from tests.flow.conftest import Start
from tests.served import Answer, Penstock, chat_body, simple_config, until

TOKENS = ["Two", " cities", ": 東京", " and", " São", " Paulo", " 🌍", ".", ' "Quoted"', " \\n", "\n", " end"]


@pytest.fixture
async def engines() -> AsyncIterator[tuple[FakeEngine, FakeEngine]]:
    """Two engines with the same model; the first one is idle, the second one is not, so the first one is picked."""
    async with FakeEngine() as first, FakeEngine() as second:
        await second.load(running=0, waiting=3, kv_cache_usage=0.1)
        yield first, second


async def pair(start: Start, engines: tuple[FakeEngine, FakeEngine], more: str = "") -> Penstock:
    gateway = await start(*(engine.url for engine in engines), more=more)

    async def loaded() -> bool:
        return await gateway.metric("penstock_engine_waiting_requests", replica="tiny/1") == 3

    await until(loaded)
    return gateway


def shape(answer: Answer) -> list[dict[str, Any]]:
    """A stream's chunks without what differs from run to run."""
    events = answer.body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""], answer.body
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert len({(c["id"], c["created"]) for c in chunks}) == 1
    return [{k: v for k, v in chunk.items() if k not in ("id", "created")} for chunk in chunks]


FATES = [{"cut_after": 5}, {"cut_after": 5, "cut_between": True}, {"error_event_after": 5}]


@pytest.mark.parametrize("fate", FATES, ids=lambda fate: next(iter(fate)))
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("usage", [True, False])
async def test_a_stream_goes_on_elsewhere(
    engines: tuple[FakeEngine, FakeEngine], start: Start, fate: dict[str, Any], path: str, usage: bool
) -> None:
    gateway = await pair(start, engines)
    body = chat_body(stream=True, max_tokens=12, temperature=0)
    if path == "/v1/completions":
        body = {"model": "tiny", "prompt": "hi there", "stream": True, "max_tokens": 12, "temperature": 0}
    if usage:
        body["stream_options"] = {"include_usage": True}
    whole = await gateway.post(path, body)
    await engines[0].script([fate])
    cut = await gateway.post(path, body)
    assert shape(cut) == shape(whole)
    assert await gateway.metric("penstock_failovers_total", model="tiny", outcome="resumed") == 1
    first, second = await gateway.access_log(2)
    assert (second["prompt_tokens"], second["completion_tokens"]) == (first["prompt_tokens"], 12)
    assert second["replica"] == "tiny/1"


async def test_at_every_token(engines: tuple[FakeEngine, FakeEngine], start: Start) -> None:
    gateway = await pair(start, engines)
    body = chat_body(stream=True, max_tokens=12, temperature=0, stream_options={"include_usage": True})
    await engines[0].script([{"tokens": TOKENS}])
    whole = shape(await gateway.post("/v1/chat/completions", body))
    for position in range(len(TOKENS)):
        assert (await gateway.chat()).status == 200  # an engine that failed each time would be left out
        await engines[0].script([{"tokens": TOKENS, "cut_after": position}])
        await engines[1].script([{"tokens": TOKENS}])
        cut = await gateway.post("/v1/chat/completions", body)
        assert shape(cut) == whole, position
    assert await gateway.metric("penstock_failovers_total", model="tiny", outcome="resumed") == len(TOKENS)


async def test_a_bound_that_was_reached_is_an_end(engines: tuple[FakeEngine, FakeEngine], start: Start) -> None:
    gateway = await pair(start, engines)
    body = chat_body(stream=True, max_tokens=4, temperature=0, stream_options={"include_usage": True})
    # The last token comes without its finish reason, and then the engine is gone.
    await engines[0].script([{"no_finish": True, "cut_after": 4, "cut_between": True}])
    answer = await gateway.post("/v1/chat/completions", body)
    chunks = shape(answer)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]) == " t0 t1 t2 t3"
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    assert [seen["path"] for seen in (await engines[1].stats())["last"]] == ["/detokenize"] * 2


async def test_two_deaths_in_one_stream(start: Start, engines: tuple[FakeEngine, FakeEngine]) -> None:
    async with FakeEngine() as third:
        await third.load(running=0, waiting=6, kv_cache_usage=0.1)
        gateway = await start(*(e.url for e in (*engines, third)))

        async def loaded() -> bool:
            return (
                await gateway.metric("penstock_engine_waiting_requests", replica="tiny/1") == 3
                and await gateway.metric("penstock_engine_waiting_requests", replica="tiny/2") == 6
            )

        await until(loaded)
        body = chat_body(stream=True, max_tokens=12, temperature=0)
        whole = shape(await gateway.post("/v1/chat/completions", body))
        await engines[0].script([{"cut_after": 3}])
        await engines[1].script([{"cut_after": 4}])
        assert shape(await gateway.post("/v1/chat/completions", body)) == whole
        assert await gateway.metric("penstock_failovers_total", model="tiny", outcome="resumed") == 2


TOOLS = [{"type": "function", "function": {"name": "f"}}]
REFUSED: list[dict[str, Any]] = [
    {"n": 2},
    {"response_format": {"type": "json_object"}},
    {"frequency_penalty": 0.5},
    {"presence_penalty": -0.5},
    {"logprobs": True},
    {"bad_words": ["no"]},
    {"structured_outputs": {"regex": "[a-z]+"}},
    {"return_token_ids": True},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}},
    {"response_format": {"type": "structural_tag", "structures": [], "triggers": []}},
    {"structured_outputs": {"choice": ["yes", "no"]}},
    {"tools": TOOLS, "tool_choice": "required"},
    {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
    {"logprobs": True, "top_logprobs": 2},
    {"logprob_token_ids": [5]},
    {"repetition_detection": {"max_pattern_size": 3}},
    {"thinking_token_budget": 50},
    {"watermarking": True},
    {"include_reasoning": False},
    {"truncate_prompt_tokens": 5},
    {"echo": True},
    {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}
        ]
    },
    {"path": "/v1/completions", "logprobs": 0},
    {"path": "/v1/completions", "prompt": ["one", "two"]},
    {"path": "/v1/completions", "echo": True},
]
# What only the answer tells: the parser of another engine would begin in the middle.
BEGUN = [
    {"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}]},
    {"reasoning": "Hm"},
    {"content": "said", "tool_calls": [{"index": 0, "function": {"arguments": '"},"logprobs":null'}}]},
]


async def test_what_cannot_be_exact_ends_with_an_error(engines: tuple[FakeEngine, FakeEngine], start: Start) -> None:
    gateway = await pair(start, engines)
    for number, fields in enumerate(REFUSED, start=1):
        assert (await gateway.chat()).status == 200  # an engine that failed each time would be left out
        await engines[0].script([{"cut_after": 5}])
        body = {**chat_body(stream=True, max_tokens=12), "prompt": "hi", **fields}
        answer = await gateway.post(body.pop("path", "/v1/chat/completions"), body)
        await refused(gateway, answer, number)
    assert (await engines[1].stats())["requests"] == 0


async def refused(gateway: Penstock, answer: Answer, number: int) -> None:
    assert answer.status == 200, answer.body
    *_, last, end = answer.body.decode().split("\n\n")
    assert end == ""
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed", answer.body
    assert b"[DONE]" not in answer.body
    assert await gateway.metric("penstock_failovers_total", model="tiny", outcome="refused") == number


async def test_a_call_or_a_thought_that_has_begun_is_not_continued(
    engines: tuple[FakeEngine, FakeEngine], start: Start
) -> None:
    gateway = await pair(start, engines)
    for number, delta in enumerate(BEGUN, start=1):
        head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "tiny"}
        more = {"logprobs": None, "finish_reason": None}
        role = {"index": 0, "delta": {"role": "assistant", "content": ""}, **more}
        begun = {"index": 0, "delta": delta, **more, "token_ids": [5]}
        chunks = [{**head, "choices": [role], "prompt_token_ids": [1]}, {**head, "choices": [begun]}]
        raw = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
        raw += "".join(f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n" for chunk in chunks)
        await engines[0].script([{"raw": raw}])
        await refused(gateway, await gateway.chat(stream=True, max_tokens=12, tools=TOOLS), number)
    assert (await engines[1].stats())["requests"] == 0


async def test_an_engine_that_stops_before_its_first_event_is_left(
    engines: tuple[FakeEngine, FakeEngine], start: Start
) -> None:
    gateway = await pair(start, engines)
    gateway.patience = 60  # that it is silent takes two health checks
    fake = {"hold": True}
    held = [asyncio.create_task(gateway.chat(stream=stream, max_tokens=4, fake=fake)) for stream in (True, False)]
    await engines[0].until(holding=2)
    engines[0].stop()
    await engines[1].until(holding=2)
    await engines[1].release()
    assert [answer.status for answer in await asyncio.gather(*held)] == [200, 200]
    assert [(line["replica"], line["attempts"]) for line in await gateway.access_log(2)] == [("tiny/1", 2)] * 2


async def test_failover_off_asks_for_no_ids_and_ends_with_an_error(
    start: Start, engines: tuple[FakeEngine, FakeEngine]
) -> None:
    config = simple_config(*(e.url for e in engines)).replace("aliases:", 'failover: "off"\n    aliases:')
    gateway = await start(config=config)
    for engine in engines:
        await engine.script([{"cut_after": 5}])
    answer = await gateway.chat(stream=True, max_tokens=12)
    assert b'"code":"engine_failed"' in answer.body
    asked = [seen["json"] for engine in engines for seen in (await engine.stats())["last"]]
    assert all("return_token_ids" not in body for body in asked)
    assert asked


async def test_without_another_replica_the_stream_ends_with_an_error(engine: FakeEngine, start: Start) -> None:
    gateway = await start(engine.url)
    await engine.script([{"cut_after": 5}])
    answer = await gateway.chat(stream=True, max_tokens=12)
    assert b'"code":"engine_failed"' in answer.body
    assert b"[DONE]" not in answer.body
    assert await gateway.metric("penstock_failovers_total", model="tiny", outcome="failed") == 1


async def test_a_cut_stream_waits_for_its_only_replica_to_come_back(engine: FakeEngine, start: Start) -> None:
    config = simple_config(engine.url).replace("aliases:", "failover_wait: 15\n    aliases:")
    gateway = await start(config=config)
    body = chat_body(stream=True, max_tokens=12, temperature=0)
    whole = shape(await gateway.post("/v1/chat/completions", body))
    await engine.script([{"cut_after": 5}])
    assert shape(await gateway.post("/v1/chat/completions", body)) == whole


async def test_more_open_requests_than_allowed_are_refused_at_once(engine: FakeEngine, start: Start) -> None:
    config = simple_config(engine.url).replace("aliases:", "max_open_requests: 2\n    max_queue: 0\n    aliases:")
    gateway = await start(config=config)
    held = [asyncio.create_task(gateway.chat(fake={"hold": True})) for _ in range(2)]
    await engine.until(holding=2)
    refused = await gateway.chat()
    assert refused.status == 503
    assert refused.error["code"] == "overloaded"
    assert refused.headers["retry-after"] == "1"
    await engine.release()
    assert [answer.status for answer in await asyncio.gather(*held)] == [200, 200]
    assert (await gateway.chat()).status == 200
