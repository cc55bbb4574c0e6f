"""What the gateway asks an engine for on its own account is taken out again, byte for byte."""

from typing import Any

import orjson
import pytest
from hypothesis import given, strategies as st

from gateway.types import Call
from gateway.usage.meter import OpenAIMeter, Verdict
from gateway.usage.trail import FOLD, Trail
from gateway.wire.openai import ENDPOINTS

PATHS = {e.path: e for e in ENDPOINTS if e.path in ("/v1/chat/completions", "/v1/completions")}
HEAD = {"id": "x-1", "object": "o", "created": 7, "model": "tiny"}
Piece = tuple[str, list[int]]


def call(path: str, include_usage: bool = False) -> Call:
    return Call(PATHS[path], "tiny", {"model": "tiny", "stream": True}, 100, True, include_usage, None)


def stream(path: str, pieces: list[Piece], prompt: list[int], *, asked: bool, usage: bool) -> list[bytes]:
    """A stream in vLLM's words, with ids and usage asked for or not."""
    chat = path == "/v1/chat/completions"
    chunks: list[dict[str, Any]] = []
    ids_of_prompt = prompt if asked else None
    if chat:
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        chunks.append({**HEAD, "choices": [choice], "prompt_token_ids": ids_of_prompt, "prompt_text": None})
    for i, (text, ids) in enumerate(pieces):
        last = i == len(pieces) - 1
        chunks.append(
            {
                **HEAD,
                "choices": [
                    {
                        "index": 0,
                        **({"delta": {"content": text}} if chat else {"text": text}),
                        "logprobs": None,
                        "finish_reason": "stop" if last else None,
                        **({} if chat and not last else {"stop_reason": None}),
                        **({} if chat else {"prompt_token_ids": ids_of_prompt if i == 0 else None}),
                        "token_ids": ids if asked else None,
                    }
                ],
                **({"system_fingerprint": "f"} if last and not usage else {}),
            }
        )
    if usage:
        counted = {"prompt_tokens": len(prompt), "total_tokens": 9, "completion_tokens": 3}
        chunks.append({**HEAD, "choices": [], "usage": counted, "system_fingerprint": "f"})
    return [b"data: " + orjson.dumps(chunk) for chunk in chunks] + [b"data: [DONE]"]


def relayed(meter: OpenAIMeter, events: list[bytes]) -> list[bytes]:
    out = []
    for event in events:
        verdict = meter.read(event)
        assert verdict in (Verdict.TOKEN, Verdict.OTHER, Verdict.DROP, Verdict.DONE)
        if verdict is not Verdict.DROP:
            out.append(meter.forward)
    return out


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ['"},"logprobs":null', '"token_ids":[1]', "\\", '","logprobs"', '"usage":{', "\u2028", '"finish_reason":"']
)
ids = st.lists(st.integers(0, 200_000), min_size=1, max_size=3)
streams = st.lists(st.tuples(texts, ids), min_size=1, max_size=12)


@given(path=st.sampled_from(list(PATHS)), pieces=streams, prompt=st.lists(st.integers(0, 9), min_size=1))
def test_nothing_asked_is_seen(path: str, pieces: list[Piece], prompt: list[int]) -> None:
    meter = OpenAIMeter(call(path), Trail(path))
    out = relayed(meter, stream(path, pieces, prompt, asked=True, usage=True))
    assert out == stream(path, pieces, prompt, asked=False, usage=False)
    assert meter.complete
    assert meter.usage is not None


@given(path=st.sampled_from(list(PATHS)), pieces=streams, prompt=st.lists(st.integers(0, 9), min_size=1))
def test_usage_stays_where_the_client_asked_for_it(path: str, pieces: list[Piece], prompt: list[int]) -> None:
    meter = OpenAIMeter(call(path, include_usage=True), Trail(path))
    out = relayed(meter, stream(path, pieces, prompt, asked=True, usage=True))
    assert out == stream(path, pieces, prompt, asked=False, usage=True)


@given(
    path=st.sampled_from(list(PATHS)),
    pieces=st.builds(lambda some, times: some * times, streams, st.sampled_from([1, FOLD, FOLD + 1])),
    prompt=st.lists(st.integers(0, 9), min_size=1),
)
def test_the_trail_knows_all(path: str, pieces: list[Piece], prompt: list[int]) -> None:
    trail = Trail(path)
    relayed(OpenAIMeter(call(path), trail), stream(path, pieces, prompt, asked=True, usage=True))
    assert trail.whole
    assert trail.prompt_ids == prompt
    assert trail.text() == "".join(text for text, _ in pieces)
    assert trail.token_ids() == [i for _, piece in pieces for i in piece]
    assert trail.tokens == len(trail.token_ids())
    assert trail.head() == HEAD
    trail.cut(trail.token_ids()[:-1], "")
    assert trail.token_ids() == [i for _, piece in pieces for i in piece][:-1]
    assert trail.tokens == len(trail.token_ids())
    assert trail.text() == "".join(text for text, _ in pieces)


@pytest.mark.parametrize("path", PATHS)
def test_an_engine_that_gives_no_ids_leaves_no_trail(path: str) -> None:
    events = stream(path, [("a", [1]), ("b", [2])], [5], asked=False, usage=True)
    trail = Trail(path)
    meter = OpenAIMeter(call(path), trail)
    assert relayed(meter, events) == stream(path, [("a", [1]), ("b", [2])], [5], asked=False, usage=False)
    assert not trail.whole
    assert meter.tokens == 2


def test_a_tool_call_breaks_the_trail() -> None:
    trail = Trail("/v1/chat/completions")
    meter = OpenAIMeter(call("/v1/chat/completions"), trail)
    first, token, *_ = stream("/v1/chat/completions", [("a", [1]), ("b", [2])], [5], asked=True, usage=True)
    meter.read(first)
    meter.read(token)
    assert trail.whole
    tool = token.replace(b'{"content":"a"}', b'{"tool_calls":[{"index":0}]}')
    assert meter.read(tool) is Verdict.TOKEN
    assert not trail.whole


def test_a_chunk_that_is_there_for_its_ids_alone_is_dropped() -> None:
    trail = Trail("/v1/chat/completions")
    meter = OpenAIMeter(call("/v1/chat/completions"), trail)
    first, token, *_ = stream("/v1/chat/completions", [("a", [1]), ("b", [2])], [5], asked=True, usage=True)
    meter.read(first)
    assert meter.read(token.replace(b'{"content":"a"}', b"{}")) is Verdict.DROP
    assert trail.token_ids() == [1]
    assert trail.whole
