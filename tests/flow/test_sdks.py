"""What people write against OpenAI works as they know it: the openai SDK and langchain-openai."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest
import pytest_asyncio
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from pydantic import SecretStr

from tests.fake_engine import vector
from tests.flow.talk import Served, logged
from tests.served import KEY

HI: list[Any] = [{"role": "user", "content": "hi"}]
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ARGUMENTS = '{"city":"Paris","usage":{"a":1},"finish_reason":"x"}'


@pytest_asyncio.fixture(loop_scope="session")
async def client(served: Served) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{served.gateway.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


LangChain = Callable[..., ChatOpenAI]


@pytest_asyncio.fixture(loop_scope="session")
async def connections() -> AsyncIterator[DefaultAsyncHttpxClient]:
    """langchain's own would stay open for as long as the process lives."""
    async with DefaultAsyncHttpxClient() as made:
        yield made


@pytest.fixture
def langchain(served: Served, connections: DefaultAsyncHttpxClient) -> LangChain:
    def made(**fields: Any) -> ChatOpenAI:
        url, key = f"{served.gateway.url}/v1", SecretStr(KEY)
        return ChatOpenAI(
            model="tiny", base_url=url, api_key=key, max_retries=0, http_async_client=connections, **fields
        )

    return made


# ---- openai


async def test_models(client: AsyncOpenAI) -> None:
    listed = [model async for model in client.models.list()]
    assert [model.id for model in listed] == ["tiny", "other", "vec", "lost"]
    tiny = await client.models.retrieve("tiny")
    assert tiny == listed[0]
    assert tiny.owned_by == "vllm"
    assert tiny.model_dump()["max_model_len"] == 131072
    assert tiny.model_dump()["root"] == "models/tiny"
    alias = await client.models.retrieve("default")
    assert alias.id == "default"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("nobody")


async def test_chat(client: AsyncOpenAI, served: Served) -> None:
    answer = await client.chat.completions.create(
        model="default", messages=HI, max_completion_tokens=3, extra_headers={"x-request-id": "sdk-chat"}
    )
    assert answer.choices[0].message.content == " t0 t1 t2"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1, 3)
    assert answer._request_id == "sdk-chat"
    assert (await logged(served.gateway, "sdk-chat"))["retry_count"] == 0
    raw = await client.chat.completions.with_raw_response.create(model="tiny", messages=HI)
    assert int(raw.headers["openai-processing-ms"]) >= 0


async def test_chat_stream(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="tiny", messages=HI, max_tokens=3, stream=True, n=2)
    chunks = [chunk async for chunk in stream]
    for index in (0, 1):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.delta.content or "" for choice in choices) == " t0 t1 t2"
        assert choices[-1].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)
    with_usage = await client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=3, stream=True, stream_options={"include_usage": True}
    )
    *_, last = [chunk async for chunk in with_usage]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 3


async def test_stream_helper(client: AsyncOpenAI) -> None:
    fake = {"tokens": [" a", " b"]}
    async with client.chat.completions.stream(model="tiny", messages=HI, extra_body={"fake": fake}) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == " a b"
    assert final.choices[0].finish_reason == "stop"


async def test_completions(client: AsyncOpenAI) -> None:
    whole = await client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=2)
    assert [choice.text for choice in whole.choices] == [" t0 t1"] * 2
    stream = await client.completions.create(model="tiny", prompt="a", max_tokens=2, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == " t0 t1"


async def test_embeddings(client: AsyncOpenAI, served: Served) -> None:
    """The SDK asks for base64 by itself and unpacks it."""
    answer = await client.embeddings.create(model="vec", input=["one", "two"])
    assert [one.embedding for one in answer.data] == [vector("one", 8), vector("two", 8)]
    [seen] = (await served.pooling.stats())["last"]
    assert seen["json"]["encoding_format"] == "base64"
    floats = await client.embeddings.create(model="vec", input="one", encoding_format="float", dimensions=4)
    assert floats.data[0].embedding == vector("one", 4)


async def test_responses(client: AsyncOpenAI) -> None:
    answer = await client.responses.create(model="tiny", input="hi", max_output_tokens=3)
    assert answer.output_text == " t0 t1 t2"
    stream = await client.responses.create(model="tiny", input="hi", max_output_tokens=3, stream=True)
    deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
    assert "".join(deltas) == " t0 t1 t2"


def tool_answer(*, stream: bool) -> dict[str, Any]:
    """A behaviour: the answer of a model that calls a tool."""
    head = {"id": "chatcmpl-1", "created": 0, "model": "tiny"}
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
    function = {"name": "weather", "arguments": ARGUMENTS}
    if not stream:
        message = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        }
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
        whole = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
        return {"status": 200, "body": json.dumps(whole)}

    def chunk(delta: Any, finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return json.dumps({**head, "object": "chat.completion.chunk", "choices": [choice]}, separators=(",", ":"))

    def call(**function: str) -> dict[str, Any]:
        return {"tool_calls": [{"index": 0, "function": function}]}

    begin = call(name="weather", arguments="")
    begin["tool_calls"][0] |= {"id": "c1", "type": "function"}
    pieces = [ARGUMENTS[at : at + 7] for at in range(0, len(ARGUMENTS), 7)]
    said = [chunk({"role": "assistant", "content": ""}), chunk(begin), *(chunk(call(arguments=p)) for p in pieces)]
    last = json.dumps({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage}, separators=(",", ":"))
    events = [*said, chunk({"content": ""}, "tool_calls"), last, "[DONE]"]
    return {
        "status": 200,
        "body": "".join(f"data: {event}\n\n" for event in events),
        "content_type": "text/event-stream; charset=utf-8",
    }


async def test_tool_calls(client: AsyncOpenAI, served: Served) -> None:
    await served.engine.script([tool_answer(stream=False), tool_answer(stream=True)])
    whole = await client.chat.completions.create(model="tiny", messages=HI, tools=[TOOL], tool_choice="auto")
    [call] = whole.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert (call.id, call.function.name, call.function.arguments) == ("c1", "weather", ARGUMENTS)
    stream = await client.chat.completions.create(
        model="tiny", messages=HI, tools=[TOOL], stream=True, extra_headers={"x-request-id": "tool-stream"}
    )
    chunks = [chunk async for chunk in stream]
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert "".join(call.function.arguments or "" for call in calls if call.function) == ARGUMENTS
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    seen = (await served.engine.stats())["last"]
    assert [request["json"]["tools"] for request in seen] == [[TOOL]] * 2
    entry = await logged(served.gateway, "tool-stream")
    assert (entry["prompt_tokens"], entry["completion_tokens"]) == (9, 4)


async def test_what_vllm_adds_passes_through(client: AsyncOpenAI, served: Served) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "ignore_eos": True, "structured_outputs": {"choice": ["a", "b"]}, "new_one": [1]}
    await client.chat.completions.create(model="tiny", messages=HI, max_tokens=1, extra_body=extra)
    [seen] = (await served.engine.stats())["last"]
    assert seen["json"] == {"model": "tiny", "messages": HI, "max_tokens": 1, **extra}


# ---- langchain


async def test_langchain(langchain: LangChain) -> None:
    model = langchain(max_tokens=3)
    assert (await model.ainvoke("hi")).content == " t0 t1 t2"
    chunks = [chunk async for chunk in model.astream("hi")]
    assert "".join(str(chunk.content) for chunk in chunks) == " t0 t1 t2"
    with_usage = langchain(max_tokens=3, stream_usage=True)
    whole = None
    async for chunk in with_usage.astream("hi"):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 3


async def test_langchain_tools(served: Served, langchain: LangChain) -> None:
    await served.engine.script([tool_answer(stream=True)])
    model = langchain().bind_tools([TOOL])
    whole: Any = None
    async for chunk in model.astream("hi"):
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls[0]["name"] == "weather"
    assert whole.tool_calls[0]["args"] == json.loads(ARGUMENTS)


async def test_langchain_hears_of_a_broken_stream(langchain: LangChain) -> None:
    model = langchain(extra_body={"fake": {"cut_after": 2}})
    said: list[str] = []

    async def listen() -> None:
        async for chunk in model.astream("hi"):
            said.append(str(chunk.content))  # noqa: PERF401 - it ends with an error

    with pytest.raises(openai.APIError, match="engine failed"):
        await listen()
    assert "".join(said) == " t0 t1"


async def test_langchain_embeddings(served: Served, connections: DefaultAsyncHttpxClient) -> None:
    model = OpenAIEmbeddings(
        model="vec",
        base_url=f"{served.gateway.url}/v1",
        api_key=SecretStr(KEY),
        check_embedding_ctx_length=False,
        http_async_client=connections,
    )
    assert await model.aembed_documents(["one", "two"]) == [vector("one", 8), vector("two", 8)]
