"""The fake engine answers as vLLM 0.32 does, byte for byte, and fails as it is told."""

import asyncio
import base64
import contextlib
import json
import re
import struct
import time
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from tests.fake_engine import DEAD, FakeEngine

# Recorded from vLLM 0.32.0 (see `plain` for what differs from run to run). The answer was "Hello", " there", ",".
RECORDED = {
    "CHAT_USAGE": r"""
data: {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":0,"model":"tiny","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null,"prompt_text":null}
data: {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":0,"model":"tiny","choices":[{"index":0,"delta":{"content":"Hello"},"logprobs":null,"finish_reason":null,"token_ids":null}]}
data: {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":0,"model":"tiny","choices":[{"index":0,"delta":{"content":" there"},"logprobs":null,"finish_reason":null,"token_ids":null}]}
data: {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":0,"model":"tiny","choices":[{"index":0,"delta":{"content":","},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}]}
data: {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":0,"model":"tiny","choices":[],"usage":{"prompt_tokens":32,"total_tokens":35,"completion_tokens":3},"system_fingerprint":"vllm-0.32.0-8a9e6f05"}
data: [DONE]
""",
    "CHAT": r"""
data: {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":0,"model":"tiny","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null,"prompt_text":null}
data: {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":0,"model":"tiny","choices":[{"index":0,"delta":{"content":"Hello"},"logprobs":null,"finish_reason":null,"token_ids":null}]}
data: {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":0,"model":"tiny","choices":[{"index":0,"delta":{"content":" there"},"logprobs":null,"finish_reason":null,"token_ids":null}]}
data: {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":0,"model":"tiny","choices":[{"index":0,"delta":{"content":","},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}],"system_fingerprint":"vllm-0.32.0-8a9e6f05"}
data: [DONE]
""",
    "CHAT_CONTINUOUS": r"""
data: {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":0,"model":"tiny","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":{"prompt_tokens":32,"total_tokens":32,"completion_tokens":0,"completion_tokens_details":null},"prompt_token_ids":null,"prompt_text":null}
data: {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":0,"model":"tiny","choices":[{"index":0,"delta":{"content":"Hello"},"logprobs":null,"finish_reason":null,"token_ids":null}],"usage":{"prompt_tokens":32,"total_tokens":33,"completion_tokens":1,"completion_tokens_details":null}}
data: {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":0,"model":"tiny","choices":[{"index":0,"delta":{"content":" there"},"logprobs":null,"finish_reason":null,"token_ids":null}],"usage":{"prompt_tokens":32,"total_tokens":34,"completion_tokens":2,"completion_tokens_details":null}}
data: {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":0,"model":"tiny","choices":[{"index":0,"delta":{"content":","},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}],"usage":{"prompt_tokens":32,"total_tokens":35,"completion_tokens":3,"completion_tokens_details":null}}
data: {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":0,"model":"tiny","choices":[],"usage":{"prompt_tokens":32,"total_tokens":35,"completion_tokens":3},"system_fingerprint":"vllm-0.32.0-8a9e6f05"}
data: [DONE]
""",
    "TEXT": r"""
data: {"id":"cmpl-ID","object":"text_completion","created":0,"model":"tiny","choices":[{"index":0,"text":"-","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}
data: {"id":"cmpl-ID","object":"text_completion","created":0,"model":"tiny","choices":[{"index":0,"text":"by","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}
data: {"id":"cmpl-ID","object":"text_completion","created":0,"model":"tiny","choices":[{"index":0,"text":"-","logprobs":null,"finish_reason":"length","stop_reason":null,"prompt_token_ids":null,"token_ids":null}],"system_fingerprint":"vllm-0.32.0-8a9e6f05"}
data: [DONE]
""",
    "TEXT_IDS": r"""
data: {"id":"cmpl-ID","object":"text_completion","created":0,"model":"tiny","choices":[{"index":0,"text":"-","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":[IDS],"token_ids":[IDS]}]}
data: {"id":"cmpl-ID","object":"text_completion","created":0,"model":"tiny","choices":[{"index":0,"text":"by","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":[IDS]}]}
data: {"id":"cmpl-ID","object":"text_completion","created":0,"model":"tiny","choices":[{"index":0,"text":"-","logprobs":null,"finish_reason":"length","stop_reason":null,"prompt_token_ids":null,"token_ids":[IDS]}]}
data: {"id":"cmpl-ID","object":"text_completion","created":0,"model":"tiny","choices":[],"usage":{"prompt_tokens":1,"total_tokens":4,"completion_tokens":3},"system_fingerprint":"vllm-0.32.0-8a9e6f05"}
data: [DONE]
""",
    "TEXT_CONTINUOUS": r"""
data: {"id":"cmpl-ID","object":"text_completion","created":0,"model":"tiny","choices":[{"index":0,"text":"-","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}],"usage":{"prompt_tokens":1,"total_tokens":2,"completion_tokens":1}}
data: {"id":"cmpl-ID","object":"text_completion","created":0,"model":"tiny","choices":[{"index":0,"text":"by","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}],"usage":{"prompt_tokens":1,"total_tokens":3,"completion_tokens":2}}
data: {"id":"cmpl-ID","object":"text_completion","created":0,"model":"tiny","choices":[{"index":0,"text":"-","logprobs":null,"finish_reason":"length","stop_reason":null,"prompt_token_ids":null,"token_ids":null}],"usage":{"prompt_tokens":1,"total_tokens":4,"completion_tokens":3}}
data: {"id":"cmpl-ID","object":"text_completion","created":0,"model":"tiny","choices":[],"usage":{"prompt_tokens":1,"total_tokens":4,"completion_tokens":3},"system_fingerprint":"vllm-0.32.0-8a9e6f05"}
data: [DONE]
""",
    "RESPONSES": r"""
event: response.created
data: {"response":{"id":"resp_ID","created_at":0,"incomplete_details":null,"instructions":null,"metadata":null,"model":"tiny","object":"response","output":[],"parallel_tool_calls":true,"temperature":0.0,"tool_choice":"none","tools":[],"top_p":1.0,"background":false,"max_output_tokens":3,"max_tool_calls":null,"previous_response_id":null,"prompt":null,"reasoning":null,"service_tier":"auto","status":"in_progress","text":null,"top_logprobs":null,"truncation":"disabled","usage":null,"user":null,"presence_penalty":0.0,"frequency_penalty":0.0,"kv_transfer_params":null,"ec_transfer_params":null,"input_messages":null,"output_messages":null},"sequence_number":0,"type":"response.created"}
event: response.in_progress
data: {"response":{"id":"resp_ID","created_at":0,"incomplete_details":null,"instructions":null,"metadata":null,"model":"tiny","object":"response","output":[],"parallel_tool_calls":true,"temperature":0.0,"tool_choice":"none","tools":[],"top_p":1.0,"background":false,"max_output_tokens":3,"max_tool_calls":null,"previous_response_id":null,"prompt":null,"reasoning":null,"service_tier":"auto","status":"in_progress","text":null,"top_logprobs":null,"truncation":"disabled","usage":null,"user":null,"presence_penalty":0.0,"frequency_penalty":0.0,"kv_transfer_params":null,"ec_transfer_params":null,"input_messages":null,"output_messages":null},"sequence_number":1,"type":"response.in_progress"}
event: response.output_item.added
data: {"item":{"id":"msg_ID","content":[],"role":"assistant","status":"in_progress","type":"message","phase":null},"output_index":0,"sequence_number":2,"type":"response.output_item.added"}
event: response.content_part.added
data: {"content_index":0,"item_id":"msg_ID","output_index":0,"part":{"annotations":[],"text":"","type":"output_text","logprobs":[]},"sequence_number":3,"type":"response.content_part.added"}
event: response.output_text.delta
data: {"content_index":0,"delta":"Hello","item_id":"msg_ID","logprobs":[],"output_index":0,"sequence_number":4,"type":"response.output_text.delta"}
event: response.output_text.delta
data: {"content_index":0,"delta":" there","item_id":"msg_ID","logprobs":[],"output_index":0,"sequence_number":5,"type":"response.output_text.delta"}
event: response.output_text.delta
data: {"content_index":0,"delta":",","item_id":"msg_ID","logprobs":[],"output_index":0,"sequence_number":6,"type":"response.output_text.delta"}
event: response.output_text.done
data: {"content_index":0,"item_id":"msg_ID","logprobs":[],"output_index":0,"sequence_number":7,"text":"Hello there,","type":"response.output_text.done"}
event: response.content_part.done
data: {"content_index":0,"item_id":"msg_ID","output_index":0,"part":{"annotations":[],"text":"Hello there,","type":"output_text","logprobs":null},"sequence_number":8,"type":"response.content_part.done"}
event: response.output_item.done
data: {"item":{"id":"msg_ID","content":[{"annotations":[],"text":"Hello there,","type":"output_text","logprobs":null}],"role":"assistant","status":"completed","type":"message","phase":null},"output_index":0,"sequence_number":9,"type":"response.output_item.done"}
event: response.completed
data: {"response":{"id":"resp_ID","created_at":0,"incomplete_details":{"reason":"max_output_tokens"},"instructions":null,"metadata":null,"model":"tiny","object":"response","output":[{"id":"msg_ID","content":[{"annotations":[],"text":"Hello there,","type":"output_text","logprobs":null}],"role":"assistant","status":"completed","type":"message","phase":null}],"parallel_tool_calls":true,"temperature":0.0,"tool_choice":"none","tools":[],"top_p":1.0,"background":false,"max_output_tokens":3,"max_tool_calls":null,"previous_response_id":null,"prompt":null,"reasoning":null,"service_tier":"auto","status":"incomplete","text":null,"top_logprobs":null,"truncation":"disabled","usage":{"input_tokens":32,"input_tokens_details":{"cached_tokens":0,"cache_write_tokens":0,"input_tokens_per_turn":[],"cached_tokens_per_turn":[]},"output_tokens":3,"output_tokens_details":{"reasoning_tokens":0,"tool_output_tokens":0,"output_tokens_per_turn":[],"tool_output_tokens_per_turn":[]},"total_tokens":35},"user":null,"presence_penalty":0.0,"frequency_penalty":0.0,"kv_transfer_params":null,"ec_transfer_params":null,"input_messages":null,"output_messages":null},"sequence_number":10,"type":"response.completed"}
""",
    "MESSAGES": r"""
event: message_start
data: {"type":"message_start","message":{"id":"chatcmpl-ID","type":"message","role":"assistant","content":[],"model":"tiny","stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":32,"output_tokens":0}}}
event: content_block_start
data: {"type":"content_block_start","content_block":{"type":"text","text":""},"index":0}
event: content_block_delta
data: {"type":"content_block_delta","delta":{"type":"text_delta","text":"Hello"},"index":0}
event: content_block_delta
data: {"type":"content_block_delta","delta":{"type":"text_delta","text":" there"},"index":0}
event: content_block_delta
data: {"type":"content_block_delta","delta":{"type":"text_delta","text":","},"index":0}
event: content_block_stop
data: {"type":"content_block_stop","index":0}
event: message_delta
data: {"type":"message_delta","delta":{"stop_reason":"max_tokens","stop_sequence":null},"usage":{"input_tokens":32,"output_tokens":3}}
event: message_stop
data: {"type":"message_stop"}
""",
    "CHAT_WHOLE": r"""
{"id":"chatcmpl-ID","object":"chat.completion","created":0,"model":"tiny","choices":[{"index":0,"message":{"role":"assistant","content":"Hello there,","refusal":null,"annotations":null,"audio":null,"function_call":null,"reasoning":null},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,"routed_experts":null}],"service_tier":null,"system_fingerprint":"vllm-0.32.0-8a9e6f05","usage":{"prompt_tokens":32,"total_tokens":35,"completion_tokens":3,"prompt_tokens_details":null,"completion_tokens_details":null},"prompt_logprobs":null,"prompt_token_ids":null,"prompt_text":null,"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}
""",
    "CHAT_IDS_WHOLE": r"""
{"id":"chatcmpl-ID","object":"chat.completion","created":0,"model":"tiny","choices":[{"index":0,"message":{"role":"assistant","content":"Hello there,","refusal":null,"annotations":null,"audio":null,"function_call":null,"reasoning":null},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":[IDS],"routed_experts":null}],"service_tier":null,"system_fingerprint":"vllm-0.32.0-8a9e6f05","usage":{"prompt_tokens":32,"total_tokens":35,"completion_tokens":3,"prompt_tokens_details":null,"completion_tokens_details":null},"prompt_logprobs":null,"prompt_token_ids":[IDS],"prompt_text":null,"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}
""",
    "TEXT_WHOLE": r"""
{"id":"cmpl-ID","object":"text_completion","created":0,"model":"tiny","choices":[{"index":0,"text":"-by-","logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,"prompt_logprobs":null,"prompt_token_ids":null,"routed_experts":null}],"service_tier":null,"system_fingerprint":"vllm-0.32.0-8a9e6f05","usage":{"prompt_tokens":1,"total_tokens":4,"completion_tokens":3,"prompt_tokens_details":null,"completion_tokens_details":null},"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}
""",
    "RESPONSES_WHOLE": r"""
{"id":"resp_ID","created_at":0,"incomplete_details":{"reason":"max_output_tokens"},"instructions":null,"metadata":null,"model":"tiny","object":"response","output":[{"id":"msg_ID","content":[{"annotations":[],"text":"Hello there,","type":"output_text","logprobs":null}],"role":"assistant","status":"completed","type":"message","phase":null}],"parallel_tool_calls":true,"temperature":0.0,"tool_choice":"none","tools":[],"top_p":1.0,"background":false,"max_output_tokens":3,"max_tool_calls":null,"previous_response_id":null,"prompt":null,"reasoning":null,"service_tier":"auto","status":"incomplete","text":null,"top_logprobs":null,"truncation":"disabled","usage":{"input_tokens":32,"input_tokens_details":{"cached_tokens":0,"cache_write_tokens":0,"input_tokens_per_turn":[],"cached_tokens_per_turn":[]},"output_tokens":3,"output_tokens_details":{"reasoning_tokens":0,"tool_output_tokens":0,"output_tokens_per_turn":[],"tool_output_tokens_per_turn":[]},"total_tokens":35},"user":null,"presence_penalty":0.0,"frequency_penalty":0.0,"kv_transfer_params":null,"ec_transfer_params":null,"input_messages":null,"output_messages":null}
""",
    "MESSAGES_WHOLE": r"""
{"id":"chatcmpl-ID","type":"message","role":"assistant","content":[{"type":"text","text":"Hello there,"}],"model":"tiny","stop_reason":"max_tokens","usage":{"input_tokens":32,"output_tokens":3}}
""",
}

SAID: dict[str, Any] = {"tokens": ["Hello", " there", ","]}
WORDS = " ".join(["word"] * 32)  # as long as the recorded prompts
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": WORDS}],
    "max_tokens": 3,
    "temperature": 0,
    "fake": SAID,
}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "max_tokens": 3, "fake": SAID}
RESPONSE: dict[str, Any] = {"model": "tiny", "input": WORDS, "max_output_tokens": 3, "temperature": 0, "fake": SAID}
USAGE = {"include_usage": True}
CONTINUOUS = {"include_usage": True, "continuous_usage_stats": True}

STREAMS: list[tuple[str, str, dict[str, Any]]] = [
    ("CHAT", "/v1/chat/completions", CHAT),
    ("CHAT_USAGE", "/v1/chat/completions", {**CHAT, "stream_options": USAGE}),
    ("CHAT_CONTINUOUS", "/v1/chat/completions", {**CHAT, "stream_options": CONTINUOUS}),
    ("TEXT", "/v1/completions", TEXT),
    ("TEXT_IDS", "/v1/completions", {**TEXT, "return_token_ids": True, "stream_options": USAGE}),
    ("TEXT_CONTINUOUS", "/v1/completions", {**TEXT, "stream_options": CONTINUOUS}),
    ("RESPONSES", "/v1/responses", RESPONSE),
    ("MESSAGES", "/v1/messages", CHAT),
]
WHOLE: list[tuple[str, str, dict[str, Any]]] = [
    ("CHAT_WHOLE", "/v1/chat/completions", CHAT),
    ("CHAT_IDS_WHOLE", "/v1/chat/completions", {**CHAT, "return_token_ids": True}),
    ("TEXT_WHOLE", "/v1/completions", TEXT),
    ("RESPONSES_WHOLE", "/v1/responses", RESPONSE),
    ("MESSAGES_WHOLE", "/v1/messages", CHAT),
]


def plain(text: str) -> str:
    """Without what differs from run to run: ids, times, token ids, which completion the text of a "-by-" is."""
    text = re.sub(r"(?<=[-_])[0-9a-f]{16}", "ID", text)
    text = re.sub(r'"created(_at)?":\d+', r'"created\1":0', text)
    return re.sub(r"\[\d+(?:,\d+)*\]", "[IDS]", text)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(models=("tiny", "other"), replicas=2) as engine:
        yield engine


@pytest_asyncio.fixture
async def engine(shared: FakeEngine) -> FakeEngine:
    await shared.reset()
    return shared


class Client:
    """A raw connection: sees every byte, and how the engine ends it."""

    def __init__(self, url: str) -> None:
        self._port = int(url.rpartition(":")[2])

    async def __aenter__(self) -> "Client":
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    def send(self, path: str, body: Any = None, method: str = "POST", *headers: str) -> None:
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "host: engine", f"content-length: {len(data)}", *headers, "", ""]
        self.writer.write("\r\n".join(lines).encode() + data)

    async def head(self) -> str:
        return (await self.reader.readuntil(b"\r\n\r\n")).decode()

    async def chunk(self) -> bytes:
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def chunks(self, found: list[bytes] | None = None) -> list[bytes]:
        """All chunks to the end of the body; `found` has those before it broke off."""
        found = [] if found is None else found
        while piece := await self.chunk():
            found.append(piece)
        return found

    async def reply(self) -> tuple[str, bytes]:
        """A whole reply: head and body."""
        head = await self.head()
        if "transfer-encoding: chunked" in head:
            return head, b"".join(await self.chunks())
        length = re.search(r"content-length: (\d+)", head)
        assert length
        return head, await self.reader.readexactly(int(length[1]))


async def ask(url: str, path: str, body: Any = None, method: str = "POST", *headers: str) -> tuple[int, Any]:
    """Status and body, parsed if it is JSON."""
    async with Client(url) as client:
        client.send(path, body, method, *headers)
        head, data = await client.reply()
    return int(head.split()[1]), json.loads(data) if "application/json" in head else data.decode()


def stream(**fake: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "max_tokens": 8,
        "fake": fake,
    }


def said(chunks: list[bytes]) -> str:
    """The text of a chat stream's chunks."""
    events = [line[6:] for line in b"".join(chunks).decode().splitlines() if line.startswith("data: {")]
    return "".join(c["delta"]["content"] for e in events for c in json.loads(e)["choices"])


# ---- shapes


def same_but_for_the_words(recorded: str) -> str:
    """The recorded completion said "-", "by", "-"."""
    for theirs, ours in (('"text":"-by-"', '"text":"Hello there,"'), ('"text":"by"', '"text":" there"')):
        recorded = recorded.replace(theirs, ours)
    first, found, rest = recorded.partition('"text":"-"')
    return first + '"text":"Hello"' + rest.replace('"text":"-"', '"text":","') if found else recorded


@pytest.mark.parametrize(("name", "path", "body"), STREAMS, ids=[s[0] for s in STREAMS])
async def test_streams_are_those_recorded(engine: FakeEngine, name: str, path: str, body: dict[str, Any]) -> None:
    async with Client(engine.url) as client:
        client.send(path, {**body, "stream": True})
        head = await client.head()
        chunks = [chunk.decode() for chunk in await client.chunks()]
    assert re.sub("date: [^\r]*", "date: D", head).split("\r\n") == [
        "HTTP/1.1 200 OK",
        "date: D",
        "server: uvicorn",
        "content-type: text/event-stream; charset=utf-8",
        "vary: Origin",
        "transfer-encoding: chunked",
        "",
        "",
    ]
    assert all(chunk.endswith("\n\n") and chunk.count("\n\n") == 1 for chunk in chunks)
    got = "".join(chunk[:-1] for chunk in chunks)
    assert plain(got).splitlines() == same_but_for_the_words(RECORDED[name]).split("\n")[1:-1]


@pytest.mark.parametrize(("name", "path", "body"), WHOLE, ids=[s[0] for s in WHOLE])
async def test_whole_answers_are_those_recorded(engine: FakeEngine, name: str, path: str, body: dict[str, Any]) -> None:
    async with Client(engine.url) as client:
        client.send(path, body)
        head, data = await client.reply()
    assert re.findall("(?m)^(.*?):", head) == ["date", "server", "content-length", "content-type", "vary"]
    assert plain(data.decode()) == same_but_for_the_words(RECORDED[name]).strip()


async def test_the_default_answer_counts(engine: FakeEngine) -> None:
    asked = {"model": "tiny", "prompt": "one two"}
    _, whole = await ask(engine.url, "/v1/completions", asked)
    assert whole["choices"][0]["text"] == "".join(f" t{i}" for i in range(16))
    assert whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"] == {
        "prompt_tokens": 2,
        "total_tokens": 18,
        "completion_tokens": 16,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }
    _, short = await ask(engine.url, "/v1/completions", {**asked, "max_tokens": 2, "return_token_ids": True})
    assert short["choices"][0]["token_ids"] == [10000, 10001]


async def test_a_model_that_stops_sends_its_last_token_without_text(engine: FakeEngine) -> None:
    async with Client(engine.url) as client:
        client.send("/v1/chat/completions", stream(tokens=["a", "b"]) | {"return_token_ids": True})
        await client.head()
        *_, last, done = await client.chunks()
    assert json.loads(last[6:])["choices"] == [
        {
            "index": 0,
            "delta": {"content": ""},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
            "token_ids": [2],
        }
    ]
    assert done == b"data: [DONE]\n\n"


async def test_several_choices_take_turns(engine: FakeEngine) -> None:
    async with Client(engine.url) as client:
        client.send("/v1/chat/completions", stream() | {"n": 2, "max_tokens": 2, "stream_options": USAGE})
        await client.head()
        chunks = await client.chunks()
    events = [json.loads(chunk[6:]) for chunk in chunks[:-1]]
    assert [e["choices"][0]["index"] for e in events[:-1]] == [0, 1] * 3
    assert events[-1]["usage"]["completion_tokens"] == 4


async def test_errors_are_those_recorded(engine: FakeEngine) -> None:
    async def error(path: str, body: Any) -> Any:
        status, answer = await ask(engine.url, path, body)
        assert answer["error"].get("code", status) == status
        return answer["error"]

    chat = "/v1/chat/completions"
    assert await error(chat, {**CHAT, "model": "nope"}) == {
        "message": "The model `nope` does not exist. Valid aliases: tiny, other.",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }
    assert await ask(engine.url, "/v1/messages", {**CHAT, "model": "nope"}) == (
        404,
        {
            "type": "error",
            "error": {
                "type": "NotFoundError",
                "message": "The model `nope` does not exist. Valid aliases: tiny, other.",
            },
        },
    )
    assert await error(chat, {"model": "tiny"}) == {
        "message": "1 validation error:\n  {'type': 'missing', 'loc': 'body.messages', 'msg': 'Field required', 'input': '<dict of 1 items>'}",
        "type": "Bad Request",
        "param": "body.messages",
        "code": 400,
    }
    assert (await error(chat, {**CHAT, "max_tokens": "x"}))["message"] == (
        "1 validation error:\n  {'type': 'int_parsing', 'loc': 'body.max_tokens', "
        "'msg': 'Input should be a valid integer, unable to parse string as an integer', 'input': 'x'}"
    )
    assert (await error(chat, {**CHAT, "max_tokens": 0})) == {
        "message": "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)",
        "type": "BadRequestError",
        "param": "max_tokens",
        "code": 400,
    }
    assert (await error(chat, {**CHAT, "max_tokens": 200_000}))["param"] == "max_tokens"
    assert (await error("/v1/completions", {"model": "tiny"}))["param"] == "prompt"
    assert (await error("/v1/completions", {**TEXT, "prompt": "w " * 140_000}))["param"] == "input_tokens"
    assert (await error(chat, b"{bad"))["type"] == "Bad Request"
    assert (await error(chat, b"[1]"))["param"] == "body"
    assert await ask(engine.url, "/nope", {}) == (404, {"detail": "Not Found"})
    assert await ask(engine.url, chat, method="GET") == (405, {"detail": "Method Not Allowed"})
    assert (await ask(engine.url, "/v1/embeddings", {"input": "x"}))[0] == 404  # a chat model has none
    assert (await engine.stats())["running"] == 0


async def test_pages(engine: FakeEngine) -> None:
    assert await ask(engine.url, "/health", method="GET") == (200, "")
    assert await ask(engine.url, "/version", method="GET") == (200, {"version": "0.32.0"})
    _, models = await ask(engine.url, "/v1/models", method="GET")
    assert [card["id"] for card in models["data"]] == ["tiny", "other"]
    assert models["data"][0]["max_model_len"] == 131072
    await engine.health(503)
    assert (await ask(engine.url, "/health", method="GET"))[0] == 503
    assert (await ask(engine.urls[1], "/health", method="GET"))[0] == 200  # each port is a replica of its own
    await engine.load(running=3, waiting=1, kv_cache_usage=0.5)
    _, metrics = await ask(engine.url, "/metrics", method="GET")
    assert 'vllm:num_requests_running{engine="0",model_name="tiny"} 3.0\n' in metrics
    assert 'vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.5\n' in metrics


async def test_text_and_tokens_go_both_ways(engine: FakeEngine) -> None:
    text = "Say hi, t7 and  bye"
    _, tokens = await ask(engine.url, "/tokenize", {"model": "tiny", "prompt": text})
    assert tokens["count"] == len(tokens["tokens"]) == 5
    assert await ask(engine.url, "/detokenize", {"tokens": tokens["tokens"]}) == (200, {"prompt": text})
    _, counted = await ask(engine.url, "/v1/messages/count_tokens", CHAT)
    assert counted == {"input_tokens": 32, "context_management": {"original_input_tokens": 32}}


async def test_a_pooling_model() -> None:
    async with FakeEngine("--pooling", models=("mini",)) as engine:
        asked = {"model": "mini", "input": ["a", "b c"], "dimensions": 3}
        _, floats = await ask(engine.url, "/v1/embeddings", asked)
        _, packed = await ask(engine.url, "/v1/embeddings", {**asked, "encoding_format": "base64"})
        assert list(floats) == ["id", "object", "created", "model", "data", "usage"]
        assert floats["usage"]["prompt_tokens"] == 3
        for plainly, tightly in zip(floats["data"], packed["data"], strict=True):
            assert plainly["embedding"] == list(struct.unpack("<3f", base64.b64decode(tightly["embedding"])))

        documents = [f"d{i}" for i in range(9)]
        asked = {"model": "mini", "query": "q", "documents": documents, "top_n": 4}
        _, ranked = await ask(engine.url, "/v1/rerank", asked)
        scores = [result["relevance_score"] for result in ranked["results"]]
        assert len(scores) == 4
        assert scores == sorted(scores, reverse=True)
        assert ranked["results"][0]["document"]["multi_modal"] is None

        _, scored = await ask(engine.url, "/v1/score", {"model": "mini", "text_1": "q", "text_2": documents})
        assert scored["data"][ranked["results"][0]["index"]]["score"] == scores[0]
        _, classes = await ask(engine.url, "/classify", {"model": "mini", "input": "x"})
        assert classes["data"][0]["num_classes"] == len(classes["data"][0]["probs"]) == 2
        assert (await ask(engine.url, "/v1/chat/completions", CHAT))[0] == 404


async def test_the_key_guards_v1_only() -> None:
    async with FakeEngine(api_key="secret") as engine:
        assert await ask(engine.url, "/v1/models", method="GET") == (401, {"error": "Unauthorized"})
        good = await ask(engine.url, "/v1/models", None, "GET", "authorization: Bearer secret")
        assert good[0] == 200
        assert (await ask(engine.url, "/health", method="GET"))[0] == 200


async def test_the_openai_sdk_is_content(engine: FakeEngine) -> None:
    async with openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="any", max_retries=0) as client:
        messages: list[Any] = [{"role": "user", "content": "hi"}]
        whole = await client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
        assert whole.choices[0].message.content == " t0 t1"
        parts = await client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, stream=True)
        assert "".join([part.choices[0].delta.content or "" async for part in parts]) == " t0 t1"
        response = await client.responses.create(model="tiny", input="hi", max_output_tokens=2)
        assert response.output_text == " t0 t1"
        events = await client.responses.create(model="tiny", input="hi", max_output_tokens=2, stream=True)
        assert [event.type async for event in events][-1] == "response.completed"
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="nope", messages=messages)
    async with (
        FakeEngine("--pooling") as pooling,
        openai.AsyncOpenAI(base_url=f"{pooling.url}/v1", api_key="any", max_retries=0) as client,
    ):
        embedded = await client.embeddings.create(model="tiny", input="hi")
        assert len(embedded.data[0].embedding) == 8


# ---- faults


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("after", [-1, 0, 3, 8])
async def test_a_cut_is_in_the_middle_of_the_next_event(engine: FakeEngine, after: int, how: str) -> None:
    async with Client(engine.url) as client:
        client.send("/v1/chat/completions", stream(cut_after=after, close=how))
        await client.head()
        chunks: list[bytes] = []
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)) as ending:
            await client.chunks(chunks)
    assert said(chunks) == "".join(f" t{i}" for i in range(after))
    assert len(chunks) == after + 1  # the role's, and the tokens'
    if how == "fin":
        assert isinstance(ending.value, asyncio.IncompleteReadError)
        assert ending.value.partial
    assert (await engine.until(cut=1))["disconnects"] == 0


async def test_a_cut_between_events_looks_like_a_killed_process(engine: FakeEngine) -> None:
    async with Client(engine.url) as client:
        client.send("/v1/chat/completions", stream(cut_after=2, cut_between=True))
        await client.head()
        rest = await client.reader.read()
    assert rest.endswith(b"\n\n\r\n")
    assert b" t1" in rest
    assert b" t2" not in rest


async def test_a_whole_answer_is_cut_in_its_body(engine: FakeEngine) -> None:
    async with Client(engine.url) as client:
        client.send("/v1/chat/completions", {**CHAT, "fake": {"cut_after": 0}})
        with pytest.raises(asyncio.IncompleteReadError) as ending:
            await client.reply()
    assert ending.value.partial.startswith(b'{"id":"chatcmpl-')


async def test_an_engine_that_fails_inside_says_so_and_ends_well(engine: FakeEngine) -> None:
    event = (
        b'data: {"error": {"message": "%b", "type": "InternalServerError", "param": null, "code": 500}}\n\n'
        % DEAD.encode()
    )
    async with Client(engine.url) as client:
        client.send("/v1/chat/completions", stream(error_event_after=2))
        await client.head()
        chunks = await client.chunks()
        assert said(chunks[:-2]) == " t0 t1"
        assert chunks[-2:] == [event, b"data: [DONE]\n\n"]
        client.send("/v1/chat/completions", stream(error_first=True))
        await client.head()
        assert await client.chunks() == [event, b"data: [DONE]\n\n"]
        client.send("/v1/messages", stream(error_first=True))
        await client.head()
        assert (await client.chunks())[-1].startswith(b"event: error\ndata: ")
    status, answer = await ask(engine.url, "/v1/chat/completions", {**CHAT, "fake": {"error_first": True}})
    assert (status, answer["error"]["type"]) == (500, "InternalServerError")


async def test_any_status_and_body(engine: FakeEngine) -> None:
    fake = {"status": 503, "body": "<h1>no</h1>", "content_type": "text/html", "headers": {"retry-after": "7"}}
    async with Client(engine.url) as client:
        client.send("/v1/chat/completions", stream(**fake))
        head, body = await client.reply()
    assert head.startswith("HTTP/1.1 503 Service Unavailable\r\n")
    assert "content-type: text/html\r\n" in head
    assert "retry-after: 7\r\n" in head
    assert body == b"<h1>no</h1>"
    assert (await ask(engine.url, "/tokenize", {"prompt": "x", "fake": {"status": 429}}))[1]["error"]["code"] == 429


@pytest.mark.parametrize("fake", [{"accept_then_close": True}, {"raw": "HTTP/9 what?\r\n\r\n"}])
async def test_no_http_reply_at_all(engine: FakeEngine, fake: dict[str, Any]) -> None:
    async with Client(engine.url) as client:
        client.send("/v1/chat/completions", stream(**fake))
        assert (await client.reader.read()).decode() == fake.get("raw", "")


async def test_nonsense_in_place_of_json(engine: FakeEngine) -> None:
    async with Client(engine.url) as client:
        client.send("/v1/chat/completions", stream(garbage=True))
        await client.head()
        first, *_ = await client.chunks()
        with pytest.raises(ValueError, match="Expecting value"):
            json.loads(first[6:])
        client.send("/v1/chat/completions", {**CHAT, "fake": {"garbage": True}})
        _, body = await client.reply()
    with pytest.raises(ValueError, match="Unterminated string"):
        json.loads(body)


async def test_endings_left_out(engine: FakeEngine) -> None:
    async def chunks(**fake: Any) -> bytes:
        async with Client(engine.url) as client:
            client.send("/v1/chat/completions", stream(**fake) | {"stream_options": USAGE})
            await client.head()
            return b"".join(await client.chunks())

    assert b"[DONE]" not in await chunks(no_done=True)
    assert b'"length"' not in await chunks(no_finish=True)
    assert b'"usage"' not in await chunks(usage=None)
    assert b'"usage":{"prompt_tokens":1}' in await chunks(usage={"prompt_tokens": 1})


async def test_other_ways_to_write_the_same(engine: FakeEngine) -> None:
    async def raw(**fake: Any) -> list[bytes]:
        async with Client(engine.url) as client:
            client.send("/v1/chat/completions", stream(**fake))
            await client.head()
            return await client.chunks()

    usual = plain(b"".join(await raw()).decode())
    assert plain(b"".join(await raw(split=1)).decode()) == usual
    assert plain(b"".join(await raw(crlf=True)).decode()) == usual.replace("\n", "\r\n")
    assert plain(b"".join(await raw(comments=True)).decode()).replace(": keep-alive\n\n", "") == usual
    together = await raw(many_per_chunk=4)
    assert len(together) == 3  # ten events
    assert plain(b"".join(together).decode()) == usual
    fewer = await raw(ids_per_event=3)
    assert len(fewer) == 5
    assert said(fewer[:-1]) == "".join(f" t{i}" for i in range(8))


async def test_holding_hanging_and_the_client_that_leaves(engine: FakeEngine) -> None:
    async with Client(engine.url) as client:
        client.send("/v1/chat/completions", stream(hold=True, hold_after=2))
        await client.head()  # out at once, as vLLM's of a stream that queues
        await engine.until(holding=1, running=1)
        await engine.release()
        assert said([await client.chunk() for _ in range(3)]) == " t0 t1"
        await engine.until(holding=1)
        await engine.release()
        assert said((await client.chunks())[:-1]) == "".join(f" t{i}" for i in range(2, 8))
    await engine.until(finished=1, running=0)

    waits: list[dict[str, Any]] = [{"hang_after": 1}, {"hold": True}, {"first_delay": 1000}, {"delay": 1000}]
    for number, fake in enumerate(waits, 1):
        async with Client(engine.url) as client:
            client.send("/v1/chat/completions", stream(**fake))
            await client.head()
            await engine.until(running=1)
            left = time.monotonic()
        stats = await engine.until(disconnects=number, running=0)
        assert stats["departures"][-1]["noticed"] >= left

    async with Client(engine.url) as client:
        client.send("/v1/chat/completions", {**CHAT, "fake": {"hang_after": 0}})
        await engine.until(running=1)
    await engine.until(disconnects=5, running=0)


async def test_a_stream_that_is_read_to_its_end_is_no_departure(engine: FakeEngine) -> None:
    for _ in range(20):
        await ask(engine.url, "/v1/chat/completions", stream(), "POST", "connection: close")
    stats = await engine.until(finished=20, running=0)
    assert stats["disconnects"] == 0


# ---- control


async def test_the_script_is_a_queue_for_each_replica(engine: FakeEngine) -> None:
    await engine.script([{"status": 500}, {"tokens": ["x"]}])
    await engine.script([{"status": 418}], replica=1)
    asked = {key: value for key, value in TEXT.items() if key != "fake"}
    assert (await ask(engine.url, "/v1/completions", asked))[0] == 500
    assert (await ask(engine.urls[1], "/v1/completions", asked))[0] == 418
    assert (await ask(engine.url, "/v1/completions", asked))[1]["choices"][0]["text"] == "x"
    assert (await ask(engine.url, "/v1/completions", asked))[1]["choices"][0]["text"] == " t0 t1 t2"
    with pytest.raises(ValueError, match="tokns"):
        await engine.script([{"tokns": []}])
    assert (await ask(engine.url, "/v1/completions", {**TEXT, "fake": {"tokns": []}}))[0] == 400


async def test_requests_are_kept_as_they_came(engine: FakeEngine) -> None:
    body = b'{ "model":"tiny", "prompt":"h\xc3\xa9", "max_tokens":1 }'
    await ask(engine.url, "/v1/completions", body, "POST", "X-Odd: Value")
    (kept,) = (await engine.stats())["last"]
    assert base64.b64decode(kept["body"]) == body
    assert kept["json"]["prompt"] == "hé"
    assert ["X-Odd", "Value"] in kept["headers"]
    assert kept["path"] == "/v1/completions"


async def test_bodies_in_chunks_and_requests_in_a_row(engine: FakeEngine) -> None:
    data = json.dumps({"model": "tiny", "prompt": "hi", "max_tokens": 1}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: e\r\ntransfer-encoding: chunked\r\n\r\n"
    chunked = head + b"5\r\n" + data[:5] + b"\r\n%x;ext=1\r\n" % (len(data) - 5) + data[5:] + b"\r\n0\r\n\r\n"
    async with Client(engine.url) as client:
        for at in range(0, len(chunked), 7):  # as a socket would, in odd pieces
            client.writer.write(chunked[at : at + 7])
            await client.writer.drain()
        client.writer.write(chunked)
        for _ in range(2):
            assert b'"text":" t0"' in (await client.reply())[1]


async def test_idle_connections_can_be_closed(engine: FakeEngine) -> None:
    async with Client(engine.url) as client:
        client.send("/health", method="GET")
        await client.reply()
        await engine.close_idle()
        assert await client.reader.read() == b""
    async with FakeEngine("--close-idle", "0.01") as impatient, Client(impatient.url) as client:
        client.send("/health", method="GET")
        await client.reply()
        assert await client.reader.read() == b""


async def test_it_stops_goes_on_exits_and_dies() -> None:
    async with FakeEngine() as engine:
        engine.stop()
        async with Client(engine.url) as client:
            client.send("/health", method="GET")
            engine.cont()
            assert "200 OK" in await client.head()
        await engine.exit(3)
        with pytest.raises(ConnectionRefusedError):
            await ask(engine.url, "/health", method="GET")
    async with FakeEngine() as engine, Client(engine.url) as client:
        client.send("/v1/chat/completions", stream(hold_after=1))
        await client.head()
        await engine.until(holding=1)
        engine.kill()
        assert said([await client.chunk(), await client.chunk()]) == " t0"
        assert await client.reader.read() == b""


async def test_a_fake_that_cannot_start_says_so() -> None:
    with pytest.raises(RuntimeError, match="did not start"):
        await FakeEngine("--close-idle", "soon").__aenter__()
