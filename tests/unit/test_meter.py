"""What a meter makes of an answer: usage, verdicts, and whether it is whole. (Ids taken out again: test_trail.)"""

from typing import Any

import orjson
import pytest
from hypothesis import given, strategies as st

from gateway.types import Call, Usage
from gateway.usage.meter import NamedEventMeter, OpenAIMeter, Verdict, choices_of, meter, usage_in, usage_of
from gateway.usage.trail import Trail
from gateway.wire.openai import ENDPOINTS

BY_PATH = {endpoint.path: endpoint for endpoint in ENDPOINTS}
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


def call(path: str = CHAT, *, include_usage: bool = False, **body: Any) -> Call:
    return Call(BY_PATH[path], "tiny", {"model": "tiny", "stream": True, **body}, 100, True, include_usage, None)


def event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(chunk)


def token(text: str, finish: str | None = None, index: int = 0, **more: Any) -> bytes:
    choice = {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": finish}
    return event({"id": "x", "choices": [choice], **more})


ROLE = event(
    {"id": "x", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
)
USED = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
USAGE = event({"id": "x", "choices": [], "usage": USED})
DONE = b"data: [DONE]"


# ---- whole answers


@pytest.mark.parametrize(
    ("answer", "usage"),
    [
        ({"usage": {"prompt_tokens": 5, "completion_tokens": 7}}, Usage(5, 7)),
        ({"usage": {"prompt_tokens": 5, "completion_tokens": 0}}, Usage(5, 0)),
        ({"usage": {"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 3}}}, Usage(5, 0, 3)),
        ({"usage": {"prompt_tokens": 5, "prompt_tokens_details": None}}, Usage(5)),
        ({"usage": {"input_tokens": 5, "output_tokens": 7}}, Usage(5, 7)),
        (
            {"usage": {"input_tokens": 5, "input_tokens_details": {"cached_tokens": 3}, "output_tokens": 7}},
            Usage(5, 7, 3),
        ),
        ({"usage": {"input_tokens": 5, "output_tokens": 7, "cache_read_input_tokens": 4}}, Usage(5, 7, 4)),
        ({"usage": {"prompt_tokens": 5, "total_tokens": 5}}, Usage(5)),
        ({"usage": {"prompt_tokens": "5", "completion_tokens": -1}}, Usage()),
        ({"usage": {"prompt_tokens": None, "prompt_tokens_details": [1]}}, Usage()),
        ({"usage": {}}, Usage()),
        ({"usage": None}, None),
        ({"usage": [5]}, None),
        ({}, None),
        ("usage", None),
        (None, None),
    ],
)
def test_usage_of(answer: Any, usage: Usage | None) -> None:
    assert usage_of(answer) == usage


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)
COUNT = st.integers(0, 10**6)


@given(st.text(), JSON, COUNT, COUNT, st.none() | COUNT, st.booleans())
def test_usage_found_in_a_text_is_the_usage_in_the_answer(
    text: str, extra: Any, prompt: int, completion: int, cached: int | None, last: bool
) -> None:
    """Whatever the answer says about usage."""
    usage = {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": None if cached is None else {"audio_tokens": None, "cached_tokens": cached},
    }
    said = orjson.dumps({"usage": {**usage, "prompt_tokens": 999}}).decode() + text
    fields = [("choices", [{"message": {"content": said}}]), ("usage", usage), ("extra", [extra, said])]
    answer = dict(fields if not last else sorted(fields))
    found = usage_in(orjson.dumps(answer))
    assert found in (usage_of(answer), None)
    if "usage" not in repr(extra):
        assert found == usage_of(answer)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"{}",
        b"not json",
        b'{"usage":null}',
        b'{"usage": {"prompt_tokens": 1, "total_tokens": 1}}',
        b'{"usage":{"prompt_tokens":3,"total_tokens":5,"completion_tokens":2,"prompt_tokens_details":null}',
    ],
)
def test_usage_that_is_written_otherwise_is_not_guessed(answer: bytes) -> None:
    assert usage_in(answer) in (None, Usage(3, 2))


@pytest.mark.parametrize(
    ("body", "choices"),
    [
        ({}, 1),
        ({"n": None}, 1),
        ({"n": 3}, 3),
        ({"prompt": "a"}, 1),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": ["a", "b"], "n": 3}, 6),
        ({"prompt": [[1, 2], [3]]}, 2),
        ({"prompt": []}, 1),
    ],
)
def test_choices_of(body: dict[str, Any], choices: int) -> None:
    assert choices_of(call(TEXT, **body)) == choices


# ---- chats and completions


def whole(made: OpenAIMeter | NamedEventMeter) -> bool:
    return made.complete


def read(made: OpenAIMeter | NamedEventMeter, *events: bytes) -> list[Verdict]:
    return [made.read(one) for one in events]


def test_a_stream_without_usage_asked_for() -> None:
    made = OpenAIMeter(call(), None)
    assert not whole(made)
    assert read(made, ROLE, token("a")) == [Verdict.OTHER, Verdict.TOKEN]
    assert made.forward == token("a")
    # The last one waits for what the usage chunk says of the engine.
    assert made.read(token("b", "stop")) is Verdict.DROP
    assert whole(made)
    assert made.read(event({"id": "x", "choices": [], "usage": USED, "system_fingerprint": "f"})) is Verdict.TOKEN
    assert made.forward == token("b", "stop", system_fingerprint="f")
    assert made.usage == Usage(5, 2)
    assert made.read(DONE) is Verdict.DONE
    assert made.release() == b""


def test_a_stream_without_any_usage() -> None:
    made = OpenAIMeter(call(), None)
    assert read(made, ROLE, token("a"), token("b", "stop"), DONE)[-2:] == [Verdict.DROP, Verdict.DONE]
    assert made.release() == token("b", "stop")
    assert made.usage is None


def test_a_stream_with_usage_asked_for() -> None:
    made = OpenAIMeter(call(include_usage=True), None)
    verdicts = read(made, ROLE, token("a"), token("b", "length"), USAGE, DONE)
    assert verdicts == [Verdict.OTHER, Verdict.TOKEN, Verdict.TOKEN, Verdict.OTHER, Verdict.DONE]
    assert (made.usage, made.tokens, made.complete) == (Usage(5, 2), 2, True)


def test_usage_in_every_chunk() -> None:
    made = OpenAIMeter(call(include_usage=True), None)
    counted = [{"prompt_tokens": 5, "completion_tokens": n} for n in (1, 2)]
    assert made.read(token("a", usage=counted[0])) is Verdict.TOKEN
    assert made.usage == Usage(5, 1)
    assert made.read(token("b", "stop", usage=counted[1])) is Verdict.TOKEN
    assert (made.usage, made.tokens, made.complete) == (Usage(5, 2), 2, True)
    assert made.read(token("c", usage=None)) is Verdict.TOKEN


def test_every_choice_has_to_finish() -> None:
    made = OpenAIMeter(call(n=2, include_usage=True), None)
    read(made, token("a", "stop", 0), token("b", None, 1))
    assert not whole(made)
    read(made, token("c", "length", 1))
    assert whole(made)
    both = event({"choices": [{"index": i, "delta": {}, "finish_reason": "stop"} for i in (0, 1)]})
    made = OpenAIMeter(call(n=2, include_usage=True), None)
    assert made.read(both) is Verdict.TOKEN
    assert whole(made)


@pytest.mark.parametrize(
    ("one", "verdict"),
    [
        (b": keep-alive", Verdict.DROP),
        (b"event: ping", Verdict.DROP),
        (b"data: {", Verdict.NONSENSE),
        (b"data: ", Verdict.NONSENSE),
        (b"data: 5", Verdict.NONSENSE),
        (b"data: []", Verdict.NONSENSE),
        (b"data: <html>", Verdict.NONSENSE),
        (b'data: {"choices":[{"index":0,"delta":{"content":', Verdict.NONSENSE),
        (b'data: {"choices":[],"usage":{"prompt_tokens":', Verdict.NONSENSE),
        (b'data: {"choices":[],"usage":{"prompt_tokens":1}}', Verdict.DROP),
        (b'data: [{"usage":{}}]', Verdict.NONSENSE),
        (b'data: {"error":{"message":"x","code":500}}', Verdict.ERROR),
        (b'data: {"error": {"message": "x", "code": 500}}', Verdict.ERROR),
        (b'data: {"error":"x"}', Verdict.ERROR),
        (b'data: {"something":"new"}', Verdict.OTHER),
        (b"data:[DONE]", Verdict.DONE),
        (b"id: 1\ndata: [DONE]", Verdict.DONE),
        (b"data: [DONE]\nid: 1", Verdict.DONE),
    ],
)
@pytest.mark.parametrize("trail", [False, True])
def test_odd_events(one: bytes, verdict: Verdict, trail: bool) -> None:
    made = OpenAIMeter(call(), Trail(CHAT) if trail else None)
    assert made.read(one) is verdict


def test_a_first_event_that_is_no_json() -> None:
    made = OpenAIMeter(call(), Trail(CHAT))
    assert made.read(b'data: {"choices":[{"index":}]}') is Verdict.NONSENSE


def test_what_a_model_says_is_not_what_the_engine_means() -> None:
    made = OpenAIMeter(call(), None)
    for text in ('"usage":{"prompt_tokens":1}', '"finish_reason":"stop"', '{"error":1}', "[DONE]", '"role":"', "\n\n"):
        assert made.read(token(text)) is Verdict.TOKEN
        assert made.forward == token(text)
    assert not whole(made)
    assert made.usage is None


@pytest.mark.parametrize("trail", [False, True])
def test_another_engines_json(trail: bool) -> None:
    """With blanks between its words, or over several lines: read as the same, and written on one line."""
    made = OpenAIMeter(call(), Trail(CHAT) if trail else None)
    spaced = b'data: {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": null}]}'
    assert made.read(spaced) is Verdict.TOKEN
    assert made.forward == b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}'
    lines = b'data: {"choices":[{"index":0,"delta":{"content":"b"},\ndata: "finish_reason":"stop"}]}'
    assert made.read(lines) is Verdict.DROP
    assert whole(made)
    assert made.read(b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}') is Verdict.TOKEN
    assert made.forward == b'data: {"choices":[{"index":0,"delta":{"content":"b"},"finish_reason":"stop"}]}'
    assert made.usage == Usage(5, 2)


def test_tool_calls_break_the_trail_and_nothing_else() -> None:
    trail = Trail(CHAT)
    made = OpenAIMeter(call(), trail)
    made.read(
        event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "prompt_token_ids": [1]})
    )
    asked = {"tool_calls": [{"index": 0, "function": {"arguments": '{"usage":{'}}]}
    for delta in (asked, {"content": "a", "reasoning": "b"}):
        one = event({"choices": [{"index": 0, "delta": delta, "finish_reason": None, "token_ids": [7]}]})
        assert made.read(one) is Verdict.TOKEN
        assert made.forward == one.replace(b"[7]", b"null")
    assert [trail.broken, made.tokens] == [True, 2]


def test_events_that_bear_only_ids_are_ours() -> None:
    trail = Trail(CHAT)
    made = OpenAIMeter(call(), trail)
    made.read(
        event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "prompt_token_ids": [1]})
    )
    assert (
        made.read(event({"choices": [{"index": 0, "delta": {}, "finish_reason": None, "token_ids": [7]}]}))
        is Verdict.DROP
    )
    assert trail.token_ids() == [7]
    made.read(token("x", token_ids=None))
    assert trail.broken


def test_ids_and_usage_in_every_chunk() -> None:
    trail = Trail(CHAT)
    made = OpenAIMeter(call(include_usage=True), trail)
    usage = {"prompt_tokens": 1, "completion_tokens": 0}
    choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
    made.read(event({"choices": [choice], "usage": usage, "prompt_token_ids": [1]}))
    assert made.forward == event({"choices": [choice], "usage": usage, "prompt_token_ids": None})
    choice = {"index": 0, "delta": {"content": "a"}, "logprobs": None, "token_ids": [7]}
    made.read(event({"choices": [choice], "usage": usage}))
    assert made.forward == event({"choices": [{**choice, "token_ids": None}], "usage": usage})
    assert (trail.prompt_ids, trail.token_ids()) == ([1], [7])


@pytest.mark.parametrize("trail", [False, True])
def test_only_a_lone_token_goes_the_short_way(trail: bool) -> None:
    """As `read` would have it, or not at all."""
    ids = [7] if trail else None
    choice = {"index": 0, "delta": {"content": "a"}, "logprobs": None, "finish_reason": None, "token_ids": ids}
    first = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "prompt_token_ids": [1]})
    one = event({"choices": [choice]})
    without = event({"choices": [{**choice, "token_ids": None}]})
    last = event({"choices": [{**choice, "finish_reason": "stop"}]})
    counted = event({"choices": [choice], "usage": None})
    made = OpenAIMeter(call(), Trail(CHAT) if trail else None)
    assert NamedEventMeter().lane is None
    assert made.lane is not None
    lone = made.lane.lone
    assert lone(one + b"\n\n") == b""  # before the first one nothing is known
    read(made, first, one)
    for other in (one, one + b"\n", one + b"\n\n" + one + b"\n\n", first + b"\n\n", DONE + b"\n\n", b""):
        assert lone(other) == b""
    for other in (last, counted, one.replace(b'"index":0', b'"index":1')):
        assert lone(other + b"\n\n") == b""
    before = made.tokens
    assert lone(one + b"\n\n") == without + b"\n\n"
    assert made.tokens == before + 1


@pytest.mark.parametrize("trail", [False, True])
def test_a_run_of_tokens_goes_a_short_way(trail: bool) -> None:
    """As `read` would have each of them, up to the first that is something else."""
    choice = {"index": 0, "delta": {"content": "a"}, "logprobs": None, "finish_reason": None, "token_ids": [7]}
    first = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "prompt_token_ids": [1]})
    one = event({"choices": [choice]})
    without = event({"choices": [{**choice, "token_ids": None}]})
    last = event({"choices": [{**choice, "finish_reason": "stop"}]})
    made = OpenAIMeter(call(), Trail(CHAT) if trail else None)
    out: list[bytes] = []
    assert made.plain([first, one], 0, out) == 0
    read(made, first, one)
    before = made.tokens
    assert made.plain([last, one, one, one, last], 1, out) == (4 if trail else 1)
    assert out == ([without] * 3 if trail else [])
    assert made.tokens == before + len(out)
    assert made.plain([one, one], 0, out) == (2 if trail else 0)


# ---- named events


def named(name: str, **data: Any) -> bytes:
    return b"event: %b\ndata: %b" % (name.encode(), orjson.dumps({"type": name, **data}))


def test_messages() -> None:
    made = meter(call("/v1/messages"), None)
    assert isinstance(made, NamedEventMeter)
    verdicts = read(
        made,
        named("message_start", message={"usage": {"input_tokens": 5, "output_tokens": 0}}),
        named("content_block_start"),
        named("content_block_delta", delta={"text": "a"}),
        named("ping"),
        named("content_block_stop"),
        named("message_delta", usage={"input_tokens": 5, "output_tokens": 2}),
    )
    assert verdicts == [Verdict.OTHER, Verdict.OTHER, Verdict.TOKEN] + [Verdict.OTHER] * 2 + [Verdict.TOKEN]
    assert not whole(made)
    assert made.read(named("message_stop")) is Verdict.OTHER
    assert whole(made)
    assert made.usage == Usage(5, 2)
    assert made.forward == named("message_stop")
    assert made.release() == b""


@pytest.mark.parametrize("last", ["response.completed", "response.incomplete", "response.failed"])
def test_responses(last: str) -> None:
    made = meter(call("/v1/responses"), None)
    assert isinstance(made, NamedEventMeter)
    assert read(made, named("response.created"), named("response.output_text.delta")) == [Verdict.OTHER, Verdict.TOKEN]
    assert made.tokens == 1
    usage = {"input_tokens": 5, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 4}}
    assert made.read(named(last, response={"usage": usage})) is Verdict.OTHER
    assert (made.complete, made.usage) == (True, Usage(5, 2, 4))


@pytest.mark.parametrize(
    ("one", "verdict"),
    [
        (b": comment", Verdict.DROP),
        (b"event: ping", Verdict.DROP),
        (DONE, Verdict.DROP),
        (b'event: error\ndata: {"type":"error"}', Verdict.ERROR),
        (b'data: {"error":{"message":"x"}}', Verdict.ERROR),
        (b'data: {"type":"new"}', Verdict.OTHER),
        (b"event: message_delta\ndata: {", Verdict.TOKEN),
        (b"event: message_delta\ndata: [1]", Verdict.TOKEN),
        (b'event: message_delta\ndata: {"message":"x"}', Verdict.TOKEN),
    ],
)
def test_odd_named_events(one: bytes, verdict: Verdict) -> None:
    made = NamedEventMeter()
    assert made.read(one) is verdict
    assert made.usage is None


def test_named_events_are_written_as_we_write_them() -> None:
    made = NamedEventMeter()
    made.read(b"id: 5\nevent:ping\ndata:{}")
    assert made.forward == b"event: ping\ndata: {}"


def test_which_meter() -> None:
    assert isinstance(meter(call(), None), OpenAIMeter)
    assert isinstance(meter(call(TEXT), None), OpenAIMeter)
