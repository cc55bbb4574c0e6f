"""CONTRACT.md §5: streams, byte by byte."""

import asyncio
import http.client
import json
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.fake_engine import FakeEngine
from tests.flow.conftest import Pair, Start
from tests.flow.talk import CHAT, Served, chunks, connect, events, exchange, logged, parse, plain, post, text_of
from tests.served import KEY, Answer, chat_body, http_post, simple_config

USAGE = {"stream_options": {"include_usage": True}}
TEXT = "/v1/completions"
WIRE: list[dict[str, Any]] = [
    {},
    {"split": 1},
    {"split": 7},
    {"crlf": True},
    {"crlf": True, "split": 1},
    {"comments": True},
    {"comments": True, "crlf": True, "split": 3},
    {"many_per_chunk": 3},
    {"many_per_chunk": 1000},
]


async def direct(engine: FakeEngine, path: str, body: dict[str, Any]) -> str:
    """What the engine itself answers, without what differs from one answer to the next."""

    def ask() -> bytes:
        host, _, port = engine.url.removeprefix("http://").partition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        headers = {"authorization": "Bearer sk-engine-secret", "content-type": "application/json"}
        try:
            connection.request("POST", path, json.dumps(body), headers)
            return connection.getresponse().read()
        finally:
            connection.close()

    return plain(await asyncio.to_thread(ask))


def body_of(path: str, **fields: Any) -> dict[str, Any]:
    body = chat_body(max_tokens=5, stream=True, **fields)
    if path == TEXT:
        body["prompt"] = "hi"
        del body["messages"]
    return body


def judge_stream(answer: Answer) -> None:
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "content-encoding" not in answer.headers


def error_of(answer: Answer) -> dict[str, Any]:
    """The error that ends a stream; nothing follows it."""
    judge_stream(answer)
    last = json.loads(events(answer.body)[-1].removeprefix(b"data: "))
    assert last.keys() == {"error"}
    assert list(last["error"]) == ["message", "type", "param", "code"]
    assert b"[DONE]" not in answer.body
    error: dict[str, Any] = last["error"]
    return error


# ---- the bytes


@pytest.mark.parametrize("fake", WIRE, ids=str)
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_with_usage_it_is_the_engines_byte_for_byte(served: Served, path: str, fake: dict[str, Any]) -> None:
    body = body_of(path, **USAGE)
    answer = await served.gateway.post(path, {**body, "fake": fake})
    judge_stream(answer)
    assert plain(answer.body) == await direct(served.engine, path, body)


@pytest.mark.parametrize("fake", WIRE, ids=str)
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_without_usage_it_is_what_the_engine_would_have_sent(
    served: Served, path: str, fake: dict[str, Any]
) -> None:
    body = body_of(path)
    answer = await served.gateway.post(path, {**body, "fake": fake})
    judge_stream(answer)
    assert plain(answer.body) == await direct(served.engine, path, body)
    [asked, _] = (await served.engine.stats())["last"]
    assert asked["json"]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    "fields",
    [
        {"n": 3},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "n": 2},
        {"return_token_ids": True},
        {"n": 128},
    ],
    ids=str,
)
async def test_variations(served: Served, path: str, fields: dict[str, Any]) -> None:
    body = {**body_of(path, **USAGE), **fields}
    answer = await served.gateway.post(path, body)
    judge_stream(answer)
    assert plain(answer.body) == await direct(served.engine, path, body)


async def test_several_prompts(served: Served) -> None:
    body = {**body_of(TEXT, **USAGE), "prompt": ["a", "b", "c"], "n": 2}
    answer = await served.gateway.post(TEXT, body)
    assert plain(answer.body) == await direct(served.engine, TEXT, body)


async def test_without_include_usage_no_usage_is_seen(served: Served) -> None:
    for options in ({"continuous_usage_stats": True}, {"include_usage": False}, None):
        answer = await served.gateway.chat(stream=True, stream_options=options, max_tokens=3)
        assert b'"usage"' not in answer.body
        assert text_of(answer.body) == " t0 t1 t2"


async def test_text_that_looks_like_protocol(served: Served) -> None:
    """What a model says is never taken for what the engine means."""
    odd = [
        '"usage":{"prompt_tokens":1}',
        '"finish_reason":"stop"',
        '{"error":{"code":400}}',
        "data: [DONE]\n\n",
        "[DONE]",
        "\r\n\r\n",
        "\u2028\u2029\u0085",
        "🌍",
        ": keep-alive\n\n",
        'event: error\ndata: {"error"',
    ]
    answer = await served.gateway.chat(stream=True, max_tokens=50, fake={"tokens": odd, "split": 5})
    assert text_of(answer.body) == "".join(odd)
    assert chunks(answer.body)[-1]["choices"][0]["finish_reason"] == "stop"


async def test_the_engines_own_name_is_what_it_is_asked_for(start: Start) -> None:
    async with FakeEngine(models=("org/Real-Name",)) as engine:
        config = simple_config(engine.url).replace("aliases: [default]", "served_model_name: org/Real-Name")
        gateway = await start(config=config)
        assert text_of((await gateway.chat(stream=True, max_tokens=2)).body) == " t0 t1"
        [seen] = (await engine.stats())["last"]
        assert seen["json"]["model"] == "org/Real-Name"


@pytest.mark.parametrize("fake", [{}, {"split": 1}, {"crlf": True}, {"many_per_chunk": 1000}], ids=str)
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_named_events_pass_untouched(served: Served, path: str, fake: dict[str, Any]) -> None:
    body = {**body_of(path), "input": "hi", "max_output_tokens": 5}
    if path == "/v1/responses":
        del body["messages"], body["max_tokens"]
    answer = await served.gateway.post(path, {**body, "fake": fake})
    judge_stream(answer)
    assert plain(answer.body) == await direct(served.engine, path, body)
    assert answer.body.startswith(b"event: ")


# ---- how streams end


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    "fake",
    [
        {"error_event_after": 2},
        {"error_event_after": 2, "many_per_chunk": 1000},
        {"no_finish": True},
        {"no_finish": True, "no_done": True},
        {"cut_after": 2},
        {"cut_after": 2, "close": "rst", "delay": 0.01},
        {"cut_after": 2, "cut_between": True},
        {"cut_after": 2, "many_per_chunk": 1000},
    ],
    ids=str,
)
async def test_a_broken_stream_ends_with_one_error_event(served: Served, path: str, fake: dict[str, Any]) -> None:
    body = body_of(path, **({"n": 2} if "no_finish" not in fake else {}))
    answer = await served.gateway.post(path, {**body, "fake": fake}, headers={"x-request-id": "broken"})
    assert error_of(answer)["code"] == "engine_failed"
    assert error_of(answer)["type"] == "server_error"
    if "cut_after" in fake or "error_event_after" in fake:
        *whole, _ = events(answer.body)
        said = [json.loads(event.removeprefix(b"data: "))["choices"][0] for event in whole]
        text = "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in said if c["index"] == 0)
        assert text == " t0 t1"
    assert (await served.engine.stats())["requests"] == 1


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_a_stream_with_every_finish_reason_is_whole(served: Served, path: str) -> None:
    """The engine's [DONE] is missing; the client's is not."""
    answer = await served.gateway.post(path, {**body_of(path), "fake": {"no_done": True}})
    judge_stream(answer)
    assert text_of(answer.body) == " t0 t1 t2 t3 t4"


async def test_engine_that_stalls_in_mid_stream(engine: FakeEngine, start: Start) -> None:
    config = simple_config(engine.url).replace("aliases: [default]", "stall_timeout: 0.3")
    gateway = await start(config=config)
    answer = await gateway.chat(stream=True, fake={"hang_after": 2})
    assert error_of(answer)["code"] == "engine_failed"
    await engine.until(disconnects=1, running=0)


async def test_request_timeout_in_mid_stream(engine: FakeEngine, start: Start) -> None:
    config = simple_config(engine.url).replace("aliases: [default]", "request_timeout: 0.3")
    gateway = await start(config=config)
    answer = await gateway.chat(stream=True, fake={"hang_after": 2})
    assert error_of(answer)["code"] == "timeout"
    await engine.until(disconnects=1, running=0)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("fake", [{"cut_after": 2}, {"no_done": True}, {"error_event_after": 2}], ids=str)
async def test_named_streams_that_break_end_in_their_own_words(served: Served, path: str, fake: dict[str, Any]) -> None:
    body = {**body_of(path), "input": "hi", "max_output_tokens": 5, "fake": fake}
    answer = await served.gateway.post(path, body)
    judge_stream(answer)
    name, data = events(answer.body)[-1].split(b"\n")
    assert name == b"event: error"
    error = json.loads(data.removeprefix(b"data: "))
    assert error["type"] == "error"
    if path == "/v1/messages":
        assert error["error"]["type"] == "api_error"
    else:
        assert error["code"] == "engine_failed"


async def test_sdk_raises_in_mid_stream(served: Served) -> None:
    async with AsyncOpenAI(base_url=f"{served.gateway.url}/v1", api_key=KEY, max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            extra_body={"fake": {"cut_after": 2}},
        )
        said = [(await anext(stream)).choices[0].delta.content for _ in range(3)]
        assert said == ["", " t0", " t1"]
        with pytest.raises(openai.APIError) as failed:
            await anext(stream)
        assert failed.value.code == "engine_failed"


# ---- before the first byte


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "behaviour",
    [
        {"accept_then_close": True},
        {"accept_then_close": True, "close": "rst"},
        {"cut_after": -1},
        {"cut_after": -1, "close": "rst"},
        {"error_first": True},
        {"status": 500},
        {"status": 503},
        {"raw": "garbage\r\n"},
        {"raw": "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 100\r\n\r\n"},
    ],
    ids=str,
)
async def test_another_replica_takes_over(pair: Pair, stream: bool, behaviour: dict[str, Any]) -> None:
    """Chance picks the replica: ask until the failing one has been picked. No client ever sees anything of it."""
    gateway, engine = pair
    await engine.script([behaviour] * 2)  # a pooled connection that breaks is tried again on a fresh one
    while (await engine.stats())["scripted"]:
        answer = await gateway.chat(max_tokens=3, stream=stream)
        assert answer.status == 200, answer.body
        said = text_of(answer.body) if stream else answer.json["choices"][0]["message"]["content"]
        assert said == " t0 t1 t2"
    outcomes = [await gateway.metric("penstock_attempts_total", model="tiny", outcome=o) for o in FAILURES]
    assert sum(outcomes) >= 1


FAILURES = ("engine_failed", "upstream_error", "overloaded")


async def test_a_client_error_is_not_tried_again(pair: Pair) -> None:
    gateway, engine = pair
    answer = await gateway.chat(fake={"status": 400})
    assert answer.status == 400
    assert [(await engine.stats(i))["requests"] for i in (0, 1)] in ([1, 0], [0, 1])


# ---- connections


async def test_pipelined_requests_are_answered_in_order_and_each_by_its_own_key(served: Served) -> None:
    keep = (b"connection: close\r\n", b"")
    packet = b"".join(
        [
            post(max_tokens=2, fake={"first_delay": 0.05}).replace(*keep),
            post(key=None).replace(*keep),
            b"GET /v1/models/tiny HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\n\r\n" % KEY.encode(),
            b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
            post(max_tokens=3, stream=True).replace(*keep),
            post("/v1/nothing").replace(*keep),
            post(max_tokens=1, model="other"),
        ]
    )
    answers = await exchange(served.gateway, packet)
    assert [answer.status for answer in answers] == [200, 401, 200, 401, 200, 404, 200]
    assert answers[0].json["choices"][0]["message"]["content"] == " t0 t1"
    assert answers[2].json["id"] == "tiny"
    assert text_of(answers[4].body) == " t0 t1 t2"
    assert answers[6].json["model"] == "other"


async def test_pipelined_byte_by_byte(served: Served) -> None:
    packet = post(max_tokens=1).replace(b"connection: close\r\n", b"") + post(max_tokens=2, stream=True)
    async with connect(served.gateway) as client:
        for i in range(len(packet)):
            await client.send(packet[i : i + 1])
            await asyncio.sleep(0)
        answers, rest = parse(await client.to_end())
    assert [answer.status for answer in answers] == [200, 200]
    assert rest == b""


async def test_a_connection_is_used_again(served: Served) -> None:
    async with connect(served.gateway) as client:
        for n in range(1, 4):
            for stream in (False, True):
                await client.send(http_post(CHAT, chat_body(max_tokens=n, stream=stream)))
                answer = await client.answer()
                assert answer.status == 200
                assert "connection" not in answer.headers
            await client.send(http_post(CHAT, b"{"))
            assert (await client.answer()).status == 400
            await client.send(b"HEAD /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
            await client.until(b"\r\n\r\n")
            client.forget()


async def test_expect_continue(served: Served) -> None:
    request = post(more="expect: 100-continue\r\n", max_tokens=1)
    head, _, body = request.partition(b"\r\n\r\n")
    async with connect(served.gateway) as client:
        await client.send(head + b"\r\n\r\n")
        assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(body)
        answers, _ = parse(await client.to_end())
        assert [answer.status for answer in answers] == [100, 200]
    async with connect(served.gateway) as client:
        await client.send(head.replace(KEY.encode(), b"sk-wrong") + b"\r\n\r\n")
        assert (await client.answer()).status == 401


async def test_http_1_0(served: Served, door: str) -> None:
    old = (b"HTTP/1.1\r\nhost: test\r\n", b"HTTP/1.0\r\n")
    [answer] = await exchange(served.gateway, post(max_tokens=1).replace(*old))
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    if door == "asgi":
        return  # uvicorn sends chunks to a client that may not know them
    [answer] = await exchange(served.gateway, post(max_tokens=2, stream=True).replace(*old))
    assert "transfer-encoding" not in answer.headers
    assert answer.headers["connection"] == "close"
    assert text_of(answer.body) == " t0 t1"


async def test_stale_pooled_connection_is_no_failure(served: Served) -> None:
    await served.gateway.chat(max_tokens=1)
    assert (await served.engine.stats())["idle_connections"] >= 1
    await served.engine.script([{"accept_then_close": True}])
    answer = await served.gateway.post(CHAT, chat_body(max_tokens=1), headers={"x-request-id": "stale"})
    assert answer.status == 200
    assert (await served.engine.stats())["requests"] == 3
    entry = await logged(served.gateway, "stale")
    assert (entry["attempts"], entry["outcome"]) == (1, "completed")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fake", [{}, {"split": 1}], ids=str)  # vLLM writes the end of a stream apart from its [DONE]
async def test_engine_connections_are_used_again(served: Served, stream: bool, fake: dict[str, Any]) -> None:
    await served.engine.close_idle()
    for _ in range(5):
        await served.gateway.chat(max_tokens=3, stream=stream, fake=fake)
    stats = await served.engine.until(finished=5)
    assert stats["requests"] == 5
    # Two where the next request was faster than the end of the answer before.
    assert stats["connections"] == stats["idle_connections"] <= 2


# ---- a client that does not read


async def test_a_client_that_does_not_read_pauses_its_engine(engine: FakeEngine, start: Start) -> None:
    gateway = await start(engine.url)
    words = [f" {i}:" + "x" * 20_000 for i in range(1500)]
    await engine.script([{"tokens": words}])
    async with connect(gateway, limit=4096) as client:
        await client.send(post(stream=True, max_tokens=len(words)))
        before, now = -1, 0
        while now != before:
            await asyncio.sleep(0.3)
            before, now = now, (await engine.stats())["completion_tokens"]
        assert now < len(words)
        assert (await gateway.chat(max_tokens=1)).status == 200  # nobody else is held up
        [answer], rest = parse(await client.to_end())
    assert rest == b""
    assert text_of(answer.body) == "".join(words)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_slow_client_does_not_spoil_its_engines_connection(
    engine: FakeEngine, start: Start, stream: bool
) -> None:
    """The last bytes of a large answer wait for the client while the engine is done already."""
    gateway = await start(engine.url)
    await engine.script([{"tokens": ["x" * 12_000_000], "many_per_chunk": 1000}])
    async with connect(gateway, limit=4096) as client:
        await client.send(post(stream=stream, max_tokens=2))
        await engine.until(finished=1)
        assert (await gateway.chat(max_tokens=1)).status == 200
        [answer], _ = parse(await client.to_end())
        assert len(answer.body) > 12_000_000
    for _ in range(3):
        assert (await gateway.chat(max_tokens=1)).status == 200


async def test_the_next_request_waits_until_the_last_answer_is_read(
    engine: FakeEngine, start: Start, door: str
) -> None:
    """Or who sends and never reads would fill the memory, answer by answer."""
    if door == "asgi":
        pytest.skip("what uvicorn makes of it is not ours")
    gateway = await start(engine.url)
    await engine.script([{"tokens": ["x" * 12_000_000]}])
    async with connect(gateway, limit=4096) as client:
        await client.send(post(max_tokens=2).replace(b"connection: close\r\n", b"") + post(max_tokens=1))
        await engine.until(finished=1)
        assert (await gateway.chat(max_tokens=1)).status == 200
        assert (await engine.stats())["requests"] == 2
        answers, rest = parse(await client.to_end())
    assert [answer.status for answer in answers] == [200, 200]
    assert rest == b""


# ---- usage


ENDPOINTS: list[tuple[str, dict[str, Any], int, int]] = [
    (CHAT, {**chat_body("one two three"), "max_tokens": 4}, 3, 4),
    (CHAT, {**chat_body("one two three"), "max_tokens": 4, "n": 2}, 3, 8),
    (TEXT, {"model": "tiny", "prompt": "one two", "max_tokens": 4}, 2, 4),
    ("/v1/responses", {"model": "tiny", "input": "one two", "max_output_tokens": 4}, 2, 4),
    ("/v1/messages", {**chat_body("one two"), "max_tokens": 4}, 2, 4),
    ("/v1/embeddings", {"model": "vec", "input": ["one two", "three"]}, 3, 0),
    ("/v1/rerank", {"model": "vec", "query": "one", "documents": ["two", "three four"]}, 5, 0),
    ("/v1/score", {"model": "vec", "text_1": "one", "text_2": "two"}, 2, 0),
    ("/v1/classify", {"model": "vec", "input": "one two"}, 2, 0),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "prompt", "completion"), ENDPOINTS, ids=[row[0] for row in ENDPOINTS])
async def test_usage_is_counted(
    served: Served, path: str, body: dict[str, Any], prompt: int, completion: int, stream: bool
) -> None:
    if stream and not completion:
        pytest.skip("does not stream")
    gateway, model = served.gateway, body["model"]

    async def counted() -> list[float]:
        kinds = ("prompt", "completion")
        of_model = [await gateway.metric("penstock_tokens_total", model=model, kind=kind) for kind in kinds]
        return of_model + [await gateway.metric("penstock_key_tokens_total", key="test", kind=kind) for kind in kinds]

    before = await counted()
    request_id = f"usage-{path.replace('/', '.')}-{stream}-{body.get('n', 1)}"
    answer = await gateway.post(
        path, {**body, "stream": stream} if completion else body, headers={"x-request-id": request_id}
    )
    assert answer.status == 200, answer.body
    entry = await logged(gateway, request_id)
    assert (entry["prompt_tokens"], entry["completion_tokens"]) == (prompt, completion)
    assert (entry["key"], entry["model"], entry["endpoint"]) == ("test", model, path)
    assert (entry["status"], entry["outcome"], entry["code"], entry["attempts"]) == (200, "completed", None, 1)
    assert entry["replica"] == f"{model}/0"
    assert 0 < entry["ttft"] <= entry["duration"]
    assert [after - was for after, was in zip(await counted(), before, strict=True)] == [prompt, completion] * 2


async def test_tokenize_and_back(served: Served) -> None:
    asked = await served.gateway.post("/tokenize", {"model": "tiny", "prompt": "one two"})
    assert asked.json["count"] == 2
    back = await served.gateway.post("/detokenize", {"model": "tiny", "tokens": asked.json["tokens"]})
    assert back.json == {"prompt": "one two"}
    counted = await served.gateway.post("/v1/messages/count_tokens", chat_body("one two three"))
    assert counted.json["input_tokens"] == 3


async def test_usage_that_an_engine_does_not_tell(served: Served) -> None:
    """Then what was delivered is counted, and an explicit zero is a zero."""
    for number, (usage, prompt, completion) in enumerate(
        [(None, None, 3), ({"prompt_tokens": 7, "completion_tokens": 0}, 7, 0)]
    ):
        request_id = f"untold-{number}"
        body = chat_body(stream=True, max_tokens=3, fake={"usage": usage})
        await served.gateway.post(CHAT, body, headers={"x-request-id": request_id})
        entry = await logged(served.gateway, request_id)
        assert entry["completion_tokens"] == completion
        assert prompt is None or entry["prompt_tokens"] == prompt
        assert entry["prompt_tokens"] > 0
