"""What every client sees of a request that goes well."""

import json

from openai import AsyncOpenAI

from tests.fake_engine import FakeEngine
from tests.flow.conftest import Start
from tests.served import KEY


async def test_whole_answer_is_the_engines(engine: FakeEngine, start: Start) -> None:
    gateway = await start(engine.url)
    answer = await gateway.chat(max_tokens=3)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json["choices"][0]["message"]["content"] == " t0 t1 t2"
    [seen] = (await engine.stats())["last"]
    assert seen["json"] == {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


async def test_stream_is_the_engines_but_for_the_usage_chunk(engine: FakeEngine, start: Start) -> None:
    gateway = await start(engine.url)
    answer = await gateway.chat(max_tokens=3, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    events = answer.body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == " t0 t1 t2"
    assert all("usage" not in c for c in chunks)
    [seen] = (await engine.stats())["last"]
    assert seen["json"]["stream_options"] == {"include_usage": True}


async def test_openai_sdk(engine: FakeEngine, start: Start) -> None:
    gateway = await start(engine.url)
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=KEY) as client:
        stream = await client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=3,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 3
        assert [m.id async for m in client.models.list()] == ["tiny"]
