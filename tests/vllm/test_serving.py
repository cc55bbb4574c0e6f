"""Two models on real engines behind one gateway: what clients get, and what the engine says of it."""

import asyncio
import json
import re
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from tests.served import KEY, Answer, Penstock, close, http_post, until
from tests.vllm.real import (
    CHAT,
    ENCODER,
    PATIENCE,
    QUESTION,
    access,
    alive,
    chat,
    chunks_of,
    config,
    engine_metrics,
    family,
    named_events_of,
    running,
    serving,
    until_gone,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]

COUNTED = 1_000_000  # tokens a minute of the keys below
COUNTING_KEYS = [
    f"  - {{name: count-{n}, key: sk-count-{n:010}, models: ['*'], limits: {{tokens_per_minute: {COUNTED}}}}}\n"
    for n in range(64)
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def penstock() -> AsyncIterator[Penstock]:
    async with serving(config(CHAT, ENCODER, keys=COUNTING_KEYS)) as gateway:
        yield gateway


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(penstock: Penstock) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{penstock.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE) as openai:
        yield openai


# ---- the openai SDK


async def test_sdk_chat(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=16
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_sdk_stream(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "Paris" in "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert sum(chunk.usage is not None for chunk in chunks) == 1
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens > 0


async def test_sdk_completions(client: AsyncOpenAI) -> None:
    prompt = "The capital of France is"
    answer = await client.completions.create(model="smollm2", prompt=prompt, temperature=0, max_tokens=4)
    stream = await client.completions.create(model="smollm2", prompt=prompt, temperature=0, max_tokens=4, stream=True)
    assert answer.choices[0].text.startswith(" Paris")
    assert "".join([chunk.choices[0].text async for chunk in stream]) == answer.choices[0].text


async def test_sdk_responses(client: AsyncOpenAI) -> None:
    answer = await client.responses.create(model="smollm2", input=QUESTION, temperature=0, max_output_tokens=16)
    assert "Paris" in answer.output_text


async def test_sdk_models(client: AsyncOpenAI) -> None:
    models = {model.id: model async for model in client.models.list()}
    assert set(models) == {"smollm2", "minilm"}
    assert models["smollm2"].to_dict()["max_model_len"] == 2048
    assert models["smollm2"].owned_by == "vllm"
    assert (await client.models.retrieve("minilm")).id == "minilm"


async def test_sdk_embeddings(client: AsyncOpenAI) -> None:
    texts = ["a cat sits on the mat", "a kitten rests on a rug", "the stock market fell"]
    answer = await client.embeddings.create(model="minilm", input=texts, encoding_format="float")
    cat, kitten, market = (item.embedding for item in answer.data)
    assert len(cat) == 384
    assert dot(cat, kitten) > dot(cat, market) + 0.2
    # What the SDK asks for by itself is base64, which it decodes.
    packed = await client.embeddings.create(model="minilm", input=texts)
    assert [item.embedding for item in packed.data] == [pytest.approx(v, abs=1e-6) for v in (cat, kitten, market)]
    raw = await client.embeddings.with_raw_response.create(model="minilm", input=texts[0], encoding_format="base64")
    assert isinstance(json.loads(raw.text)["data"][0]["embedding"], str)


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


# ---- every endpoint


def content(answer: Any) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


MESSAGES = {"model": "smollm2", "messages": [{"role": "user", "content": QUESTION}]}
WHOLE: dict[str, tuple[dict[str, Any], Callable[[Any], object]]] = {
    "/v1/chat/completions": (chat(), lambda a: "Paris" in content(a)),
    "/v1/completions": (
        {"model": "smollm2", "prompt": "The capital of France is", "temperature": 0, "max_tokens": 2},
        lambda a: a["choices"][0]["text"].startswith(" Paris"),
    ),
    "/v1/responses": (
        {"model": "smollm2", "input": QUESTION, "temperature": 0, "max_output_tokens": 16},
        lambda a: "Paris" in a["output"][0]["content"][0]["text"],
    ),
    "/v1/messages": (
        {**MESSAGES, "temperature": 0, "max_tokens": 16},
        lambda a: "Paris" in a["content"][0]["text"] and a["usage"]["input_tokens"] == 37,
    ),
    "/v1/messages/count_tokens": (MESSAGES, lambda a: a["input_tokens"] == 37),
    "/tokenize": (MESSAGES, lambda a: a["count"] == len(a["tokens"]) == 37),
    "/detokenize": ({"model": "smollm2", "tokens": [28120, 905]}, lambda a: a["prompt"] == "hello world"),
    "/v1/embeddings": ({"model": "minilm", "input": "a cat"}, lambda a: len(a["data"][0]["embedding"]) == 384),
    "/v1/rerank": (
        {"model": "minilm", "query": "cat", "documents": ["stocks", "a kitten"]},
        lambda a: [result["index"] for result in a["results"]] == [1, 0],
    ),
    "/v1/score": (
        {"model": "minilm", "text_1": "cat", "text_2": ["a kitten", "stocks"]},
        lambda a: a["data"][0]["score"] > a["data"][1]["score"] + 0.2,
    ),
}


@pytest.mark.parametrize("path", WHOLE)
async def test_endpoint(penstock: Penstock, path: str) -> None:
    body, is_right = WHOLE[path]
    answer = await penstock.post(path, body)
    assert answer.status == 200, answer.body
    assert is_right(answer.json), answer.body
    assert answer.json.get("model", body["model"]) == body["model"]


async def test_stream_of_responses(penstock: Penstock) -> None:
    body, _ = WHOLE["/v1/responses"]
    events = named_events_of(await penstock.post("/v1/responses", {**body, "stream": True}))
    assert "Paris" in "".join(event["delta"] for name, event in events if name == "response.output_text.delta")
    assert events[-1][0] == "response.completed"


async def test_stream_of_messages(penstock: Penstock) -> None:
    body, _ = WHOLE["/v1/messages"]
    answer = await penstock.request(
        "POST",
        "/v1/messages",
        {"x-api-key": KEY, "content-type": "application/json"},
        json.dumps({**body, "stream": True}).encode(),
    )
    events = named_events_of(answer)
    assert "Paris" in "".join(event["delta"]["text"] for name, event in events if name == "content_block_delta")
    assert events[-1][0] == "message_stop"


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/v1/classify", "minilm"),  # it has no classes
        ("/v1/embeddings", "smollm2"),
        ("/v1/rerank", "smollm2"),
    ],
)
async def test_what_a_model_cannot_do_is_said(penstock: Penstock, path: str, model: str) -> None:
    question = {"query": "cat", "documents": ["a kitten"]} if path == "/v1/rerank" else {"input": "cat"}
    answer = await penstock.post(path, {"model": model, **question})
    assert answer.status == 404
    assert answer.error == {
        "message": f"The model '{model}' does not support the endpoint {path}.",
        "type": "invalid_request_error",
        "param": "model",
        "code": None,
    }


async def test_vllms_own_fields_pass_through(penstock: Penstock) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    shaped, guided, probable = await asyncio.gather(
        penstock.post(
            "/v1/chat/completions",
            chat(
                "Name a colour as JSON.",
                max_tokens=32,
                response_format={"type": "json_schema", "json_schema": {"name": "colour", "schema": schema}},
            ),
        ),
        penstock.post("/v1/chat/completions", chat(structured_outputs={"choice": ["Lyon", "Nice"]})),
        penstock.post("/v1/chat/completions", chat(max_tokens=2, logprobs=True, top_logprobs=2, return_token_ids=True)),
    )
    assert json.loads(content(shaped.json))["colour"] in ("red", "blue")
    assert content(guided.json) in ("Lyon", "Nice")
    choice = probable.json["choices"][0]
    assert [len(token["top_logprobs"]) for token in choice["logprobs"]["content"]] == [2, 2]
    assert len(choice["token_ids"]) == 2


# ---- errors of the engine's own

LONG = "The quick brown fox jumps over the lazy dog. " * 260


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", chat(LONG), "messages"),
        ("/v1/chat/completions", chat(LONG, stream=True), "messages"),
        ("/v1/completions", {"model": "smollm2", "prompt": LONG}, "prompt"),
        ("/v1/responses", {"model": "smollm2", "input": LONG}, "input"),
        ("/v1/embeddings", {"model": "minilm", "input": LONG}, "input"),
        ("/v1/rerank", {"model": "minilm", "query": "a", "documents": [LONG]}, "documents"),
    ],
    ids=["chat", "stream", "completions", "responses", "embeddings", "rerank"],
)
async def test_prompt_too_long(penstock: Penstock, path: str, body: dict[str, Any], param: str) -> None:
    error = refused(await penstock.post(path, body))
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == param
    assert "maximum context length" in error["message"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES["messages"], "max_tokens": 5000}, "max_tokens"),
        ("/v1/chat/completions", {"messages": MESSAGES["messages"], "max_tokens": 5000, "stream": True}, "max_tokens"),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES["messages"], "max_completion_tokens": 5000},
            "max_completion_tokens",
        ),
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 5000}, "max_tokens"),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 5000}, "max_output_tokens"),
    ],
    ids=["chat", "stream", "max_completion_tokens", "completions", "responses"],
)
async def test_answer_longer_than_the_model_can(
    penstock: Penstock, path: str, fields: dict[str, Any], param: str
) -> None:
    error = refused(await penstock.post(path, {"model": "smollm2", **fields}))
    assert error["param"] == param
    assert error["code"] == "invalid_value"
    assert "2048" in error["message"]


PICTURE = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAACAkQBADs="


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "look"}}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PICTURE}}]}]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no-such"}}}},
        {"structured_outputs": {"regex": "("}},
        {"tools": [{"type": "function", "function": {"name": "look"}}], "stream": True},
    ],
    ids=["tools", "image", "schema", "regex", "tools-stream"],
)
async def test_what_the_engine_refuses(penstock: Penstock, fields: dict[str, Any]) -> None:
    assert refused(await penstock.post("/v1/chat/completions", chat(**fields)))["code"] == "invalid_value"


async def test_what_the_engine_refuses_in_anthropics_shape(penstock: Penstock) -> None:
    answer = await penstock.post("/v1/messages", {**MESSAGES, "max_tokens": 5000})
    assert answer.status == 400
    assert answer.json["type"] == "error"
    assert answer.json["error"]["type"] == "invalid_request_error"


def refused(answer: Answer) -> dict[str, Any]:
    """The error of a client's fault: in OpenAI's shape, with nothing of the engine's own."""
    assert answer.status == 400, answer.body
    assert list(answer.json) == ["error"]
    error = answer.error
    assert list(error) == ["message", "type", "param", "code"]
    assert error["type"] == "invalid_request_error"
    assert not re.search(r"BadRequest|127\.0\.0\.1|Traceback|/v1/|quick brown", error["message"])
    return error


# ---- streams

GREEDY = [
    ("/v1/chat/completions", chat(max_tokens=24)),
    ("/v1/chat/completions", chat("Write a greeting with many emojis 🎉🎂👩‍👩‍👧", max_tokens=24)),
    ("/v1/chat/completions", chat("Count from one to twenty in words.", max_tokens=24, stop=["five", "six"])),
    ("/v1/completions", {"model": "smollm2", "prompt": "日本の首都は東京です。フランスの首都は", "max_tokens": 24, "temperature": 0}),
    ("/v1/completions", {"model": "smollm2", "prompt": "def fibonacci(n):\n", "max_tokens": 24, "temperature": 0}),
]  # fmt: skip


async def test_streamed_text_is_the_whole_text(penstock: Penstock) -> None:
    async def both(path: str, body: dict[str, Any]) -> str:
        whole, streamed = await asyncio.gather(
            penstock.post(path, body),
            penstock.post(path, {**body, "stream": True, "stream_options": {"include_usage": True}}),
        )
        *chunks, last = chunks_of(streamed)
        assert last["choices"] == []
        [expected] = whole.json["choices"]
        for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert last["usage"][count] == whole.json["usage"][count]
        choices = [chunk["choices"][0] for chunk in chunks]
        assert all(chunk.get("usage") is None for chunk in chunks)
        text = "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices)
        assert text == (expected["text"] if "text" in expected else expected["message"]["content"])
        assert choices[-1]["finish_reason"] == expected["finish_reason"]
        return text

    texts = await asyncio.gather(*(both(path, body) for path, body in GREEDY))
    assert "Paris" in texts[0]
    assert sum(not text.isascii() for text in texts) >= 2  # characters of several tokens have been among them


async def test_usage_chunk_only_for_those_who_ask(penstock: Penstock) -> None:
    chunks = chunks_of(await penstock.post("/v1/chat/completions", chat(max_tokens=2, stream=True)))
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks)


async def test_stream_of_two_choices(penstock: Penstock) -> None:
    body = chat("Two colours?", n=2, temperature=1, max_tokens=3, ignore_eos=True, stream=True)
    chunks = chunks_of(await penstock.post("/v1/chat/completions", body))
    ends = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"]]
    assert sorted(ends) == [0, 1]


async def test_eight_streams_share_the_engines_batches(penstock: Penstock, client: AsyncOpenAI) -> None:
    async def stream(number: int) -> int:
        chunks = await client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": f"Tell me story number {number}."}],
            max_tokens=48,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        usage = [chunk.usage async for chunk in chunks][-1]
        assert usage is not None
        return usage.completion_tokens

    began = time.monotonic()
    alone = await stream(0) / (time.monotonic() - began)

    seen = shown = 0.0
    began = time.monotonic()
    streams = [asyncio.create_task(stream(number)) for number in range(1, 9)]
    while not all(task.done() for task in streams):
        seen = max(seen, await running(penstock))
        shown = max(shown, await penstock.metric("penstock_engine_running_requests", model="smollm2"))
        await asyncio.wait(streams, timeout=0.3, return_when=asyncio.ALL_COMPLETED)
    together = sum(task.result() for task in streams) / (time.monotonic() - began)
    print(f"tokens/s: one stream {alone:.1f}, eight streams {together:.1f}")  # `pytest -s` shows it
    assert seen == 8
    assert shown > 1
    assert together > 1.5 * alone


async def test_prefix_cache_and_paged_kv_cache(penstock: Penstock) -> None:
    story = " ".join(f"On day {n} the keeper of the sluice wrote {n * 7919 % 1000} into the book." for n in range(50))
    before = await engine_metrics(penstock)
    first = await penstock.post("/v1/chat/completions", chat(story, max_tokens=1))
    prompt = first.json["usage"]["prompt_tokens"]
    assert prompt > 1000
    once = await engine_metrics(penstock)
    assert once["vllm:prefix_cache_queries_total"] - before["vllm:prefix_cache_queries_total"] == prompt
    assert once["vllm:prefix_cache_hits_total"] - before["vllm:prefix_cache_hits_total"] < 100

    async def cache_in_use() -> bool:
        usage = await penstock.metric("penstock_engine_kv_cache_usage", model="smollm2", replica="smollm2/0")
        return 0 < usage < 1

    cached = await penstock.metric("penstock_tokens_total", model="smollm2", kind="cached")
    async with asking(penstock, chat(story, max_tokens=500, ignore_eos=True, stream=True)):
        await until(cache_in_use)
        twice = await engine_metrics(penstock)
    assert 0 < twice["vllm:kv_cache_usage_perc"] < 1
    hits = twice["vllm:prefix_cache_hits_total"] - once["vllm:prefix_cache_hits_total"]
    assert hits > 0.8 * prompt  # all whole blocks of 128 tokens
    await until_idle(penstock)

    again = await penstock.post("/v1/chat/completions", chat(story, max_tokens=1))
    assert again.json["usage"]["prompt_tokens_details"]["cached_tokens"] == hits
    assert await penstock.metric("penstock_tokens_total", model="smollm2", kind="cached") == cached + hits


@asynccontextmanager
async def asking(
    penstock: Penstock, body: dict[str, Any], request_id: str = "asking"
) -> AsyncIterator[asyncio.StreamReader]:
    """A request under way, whose client leaves at the end."""
    reader, writer = await penstock.connect()
    try:
        writer.write(http_post("/v1/chat/completions", body, more=f"x-request-id: {request_id}\r\n"))
        yield reader
    finally:
        await close(writer)


async def until_idle(penstock: Penstock) -> None:
    async def idle() -> bool:
        return await running(penstock) == 0

    await until(idle)


@pytest.mark.parametrize("kinds", [[True], [False], [True, True, False, False]], ids=["streaming", "whole", "both"])
async def test_a_client_that_leaves_stops_the_engines_work(penstock: Penstock, kinds: list[bool]) -> None:
    names = [f"leaver-{n}-of-{len(kinds)}-{'stream' if stream else 'whole'}" for n, stream in enumerate(kinds)]

    async def all_run() -> bool:
        return await running(penstock) == len(kinds)

    async with AsyncExitStack() as leaving:
        for name, stream in zip(names, kinds, strict=True):
            body = chat("Tell me a long story.", max_tokens=1500, ignore_eos=True, stream=stream)
            reader = await leaving.enter_async_context(asking(penstock, body, name))
            if stream:
                await reader.readuntil(b'"delta":{"content":')
        await until(all_run, PATIENCE)
        left = time.monotonic()
    await until_idle(penstock)
    assert time.monotonic() - left < 2  # a second, and time to ask
    for name, stream in zip(names, kinds, strict=True):
        line = await access(penstock, name)
        assert (line["status"], line["outcome"]) == (499, "client_cancelled")
        assert line["prompt_tokens"] > 0 or stream
        assert line["completion_tokens"] > 0 or not stream
    assert await penstock.metric("penstock_inflight_requests", model="smollm2") == 0


# ---- tokens

IDS = [28120, 905, 30, 198]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(texts)]


PROMPTS: list[dict[str, Any]] = [
    *(
        {"messages": said(text)}
        for text in (
            QUESTION,
            "",
            " ",
            "  leading and trailing  ",
            "\n\n\tlines\r\nand\ttabs\n",
            "1234567890 3.14159 0x1F 1e-9",
            "I'm sure they've said it's what we'll do; that'd be DON'T.",
            "naïve café Ünïcödé straße",
            "日本の首都は東京です。",
            "한국어 문장과 العربية والעברית",
            "👩‍👩‍👧 🎉🏳️‍🌈 e\u0301",
            "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}\n",
            '{"json": ["with", "quotes\\"", null]}',
            "<|im_start|>system\nspecial tokens<|im_end|><|endoftext|>",
            "https://example.org/a?b=c&d=%20#e",
            "!!!???...,,,---___===+++",
            "a" * 200,
            "word " * 300,
            "\u200b\ufeff\u00a0\u3000",
            "𝕄𝕒𝕥𝕙 ∑∫√ ±∞ ≠",
        )
    ),
    {"messages": said("Hi", "Hello! How can I help?", QUESTION)},
    {"messages": [{"role": "system", "content": "You are terse."}, *said(QUESTION)]},
    {"messages": [{"role": "system", "content": ""}, *said("Hi", "", "So?")]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "in parts"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "text", "text": "parts"}]}]},
    {"messages": [{"role": "user", "content": "named", "name": "ann"}]},
    {"messages": said("Hi"), "add_generation_prompt": False},
    {"messages": said("Hi", "Hello, I"), "add_generation_prompt": False, "continue_final_message": True},
    {"messages": said("Hi"), "tools": [TOOL], "tool_choice": "none"},
    {"messages": [*said("Hi"), {"role": "tool", "content": "42", "tool_call_id": "call-1"}]},
    *(
        {"prompt": prompt}
        for prompt in (
            "The capital of France is",
            "x",
            "日本の首都は東京です。フランスの首都は",
            "🎉" * 20,
            "<|im_start|>user\nHi<|im_end|>\n",
            "one two  three   four    five\n\n\n",
            IDS,
            ["a list", "of prompts"],
            [IDS, IDS[:2]],
        )
    ),
]


async def test_prompts_are_counted_as_the_engine_counts(penstock: Penstock) -> None:
    assert len(PROMPTS) <= len(COUNTING_KEYS)

    async def counts(number: int, fields: dict[str, Any]) -> tuple[int, int]:
        path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
        body = {"model": "smollm2", "max_tokens": 1, **fields}
        # Each with a key of its own, so that what is not left of its limit is this request alone.
        answer = await penstock.post(path, body, f"sk-count-{number:010}")
        assert answer.status == 200, answer.body
        reserved = COUNTED - int(answer.headers["x-ratelimit-remaining-tokens"])
        return reserved - len(answer.json["choices"]), answer.json["usage"]["prompt_tokens"]

    found = await asyncio.gather(*(counts(*numbered) for numbered in enumerate(PROMPTS)))
    wrong = {str(p)[:80]: (ours, engines) for p, (ours, engines) in zip(PROMPTS, found, strict=True) if ours != engines}
    assert wrong == {}


async def test_tokens_in_log_and_metrics_are_the_engines(penstock: Penstock) -> None:
    calls: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", chat()),
        ("/v1/chat/completions", chat(stream=True)),
        ("/v1/chat/completions", chat("Hi", stream=True, stream_options={"include_usage": True})),
        ("/v1/completions", {"model": "smollm2", "prompt": "One, two,", "max_tokens": 5}),
        ("/v1/completions", {"model": "smollm2", "prompt": IDS, "max_tokens": 5, "stream": True}),
        ("/v1/completions", {"model": "smollm2", "prompt": ["One", "Two, three"], "max_tokens": 5}),
        ("/v1/responses", WHOLE["/v1/responses"][0]),
        ("/v1/responses", {**WHOLE["/v1/responses"][0], "stream": True}),
        ("/v1/messages", WHOLE["/v1/messages"][0]),
        ("/v1/messages", {**WHOLE["/v1/messages"][0], "stream": True}),
    ]

    async def counts() -> list[tuple[float, float]]:
        """Prompt and completion tokens so far: as the engine says, by model, by key."""
        engine, metric = await engine_metrics(penstock), penstock.metric
        kinds = ("prompt", "completion")
        model = [await metric("penstock_tokens_total", model="smollm2", kind=kind) for kind in kinds]
        key = [await metric("penstock_key_tokens_total", key="test", kind=kind) for kind in kinds]
        return [
            (engine["vllm:prompt_tokens_total"], engine["vllm:generation_tokens_total"]),
            (model[0], model[1]),
            (key[0], key[1]),
        ]

    await until_idle(penstock)
    before = await counts()
    answers = await asyncio.gather(
        *(penstock.post(path, body, headers={"x-request-id": f"used-{n}"}) for n, (path, body) in enumerate(calls))
    )
    lines = [await access(penstock, f"used-{n}") for n in range(len(calls))]
    for (path, body), answer, line in zip(calls, answers, lines, strict=True):
        assert answer.status == 200, answer.body
        logged = (line["prompt_tokens"], line["completion_tokens"])
        assert 0 not in logged, (path, body)
        if not body.get("stream"):
            usage = answer.json["usage"]
            names = (
                ("input_tokens", "output_tokens") if "input_tokens" in usage else ("prompt_tokens", "completion_tokens")
            )
            assert logged == (usage[names[0]], usage[names[1]])
    used = (sum(line["prompt_tokens"] for line in lines), sum(line["completion_tokens"] for line in lines))
    await until_idle(penstock)
    after = await counts()
    assert [(a[0] - b[0], a[1] - b[1]) for a, b in zip(after, before, strict=True)] == [used] * 3


# ---- the last test of this gateway


async def test_a_killed_gateway_leaves_no_engine(penstock: Penstock) -> None:
    processes = family(penstock.pid)
    assert len(alive(processes)) >= 4  # two engines, each with its keeper
    penstock.signal(signal.SIGKILL)
    await until_gone(processes)
