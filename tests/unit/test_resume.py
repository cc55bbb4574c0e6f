"""Continuing on another engine: the decisions."""

from typing import Any

import orjson
import pytest

from gateway.resilience.resume import Cut, ResumedMeter, continuation, ending, finished, fits, obstacle, straddle
from gateway.types import Call, Usage
from gateway.usage.meter import Verdict
from gateway.usage.trail import Trail
from gateway.wire import sse
from gateway.wire.openai import ENDPOINTS, decode

CHAT, TEXT = (next(e for e in ENDPOINTS if e.path == p) for p in ("/v1/chat/completions", "/v1/completions"))
HEAD = {"id": "first", "object": "o", "created": 1, "model": "m"}


def chat(**fields: Any) -> Call:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True, **fields}
    return decode(CHAT, orjson.dumps(body))


def text(**fields: Any) -> Call:
    return decode(TEXT, orjson.dumps({"model": "m", "prompt": "hi", "stream": True, **fields}))


TOOL = {"type": "function", "function": {"name": "f"}}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}


@pytest.mark.parametrize(
    "call",
    [
        chat(),
        chat(temperature=0.7, seed=1, top_p=0.5, top_k=5, min_p=0.1),
        chat(stop=["x"], stop_token_ids=[1], ignore_eos=True, min_tokens=2),
        chat(logit_bias={"1": 2}, repetition_penalty=1.1),
        chat(tools=[TOOL], tool_choice="auto"),
        chat(response_format={"type": "text"}, frequency_penalty=0, presence_penalty=0, n=1),
        chat(messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]),
        chat(stop=["x"], include_stop_str_in_output=True),
        chat(prompt=["a stray field", "of another endpoint"]),
        text(),
        text(prompt=["one"]),
        text(prompt=[1, 2, 3]),
        text(prompt=[[1, 2, 3]]),
    ],
)
def test_nothing_in_the_way(call: Call) -> None:
    assert obstacle(call) is None


@pytest.mark.parametrize(
    "call",
    [
        chat(stream=False),
        chat(n=2),
        chat(response_format={"type": "json_object"}),
        chat(structured_outputs={"regex": "a"}),
        chat(tools=[TOOL], tool_choice="required"),
        chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "f"}}),
        chat(frequency_penalty=0.1),
        chat(presence_penalty=-0.1),
        chat(bad_words=["x"]),
        chat(logprobs=True),
        chat(include_reasoning=False),
        chat(return_token_ids=True),
        chat(truncate_prompt_tokens=5),
        chat(messages=[{"role": "user", "content": [PICTURE]}]),
        text(echo=True),
        text(logprobs=1),
        text(logprobs=0),
        chat(logprob_token_ids=[1]),
        chat(thinking_token_budget=0),
        chat(repetition_detection={"max_pattern_size": 3}),
        chat(watermarking=True),
        chat(response_format={"type": "structural_tag"}),
        chat(messages=[{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]),
        text(prompt=[[1], [2]]),
        text(n=2),
        text(prompt=["a", "b"]),
    ],
)
def test_something_in_the_way(call: Call) -> None:
    assert obstacle(call) is not None


@pytest.mark.parametrize(
    ("decoded", "sent", "overlap"),
    [
        ("P", "", ""),
        ("Pab", "ab", ""),
        ("Pab", "abc", "c"),  # one more id covers what was sent; it was rolled back
        ("Pabc", "ab", None),  # the ids run ahead of what was sent: a stop string is looked for
        ("Pa\ufffd", "a", None),  # torn inside a character
        ("Pax", "ab", None),
        ("ab", "ab", None),
    ],
)
def test_ids_kept_say_no_more_than_was_sent(decoded: str, sent: str, overlap: str | None) -> None:
    assert fits("P", decoded, sent) == overlap


@pytest.mark.parametrize(
    ("fields", "characters"),
    [
        ({}, 0),
        ({"stop": ["abcd", "x"]}, 0),  # the engine holds the beginning back itself
        ({"stop": ["abcd", "x"], "include_stop_str_in_output": True}, 3),
        ({"stop": "ab", "include_stop_str_in_output": True}, 1),
        ({"stop": None, "include_stop_str_in_output": True}, 0),
    ],
)
def test_the_beginning_of_a_stop_string_that_is_shown_is_said_again(fields: dict[str, Any], characters: int) -> None:
    assert straddle(chat(**fields)) == characters


def test_ids_whose_text_may_begin_a_stop_string_are_not_kept() -> None:
    assert fits("P", "Pabc", "abcd", 2) is None
    assert fits("P", "Pab", "abcd", 2) == "cd"
    assert fits("P", "P", "a", 2) == "a"  # there is nothing before


def test_the_next_engine_is_asked_for_the_rest() -> None:
    cut = Cut([1, 2], [3, 4, 5], "")
    body = continuation(chat(max_tokens=10, max_completion_tokens=10, min_tokens=4), cut)
    assert body["kv_transfer_params"] == {"prompt_token_ids": [1, 2, 3, 4, 5]}
    assert (body["max_tokens"], body["max_completion_tokens"], body["min_tokens"]) == (7, 7, 1)
    assert continuation(text(min_tokens=1), cut)["prompt"] == [1, 2, 3, 4, 5]
    assert continuation(text(min_tokens=1), cut)["min_tokens"] == 0
    assert "max_tokens" not in continuation(text(), cut)


def test_nothing_is_left() -> None:
    assert finished(chat(max_tokens=3), Cut([1], [2, 3, 4], ""))
    assert not finished(chat(max_tokens=4), Cut([1], [2, 3, 4], ""))
    assert not finished(chat(), Cut([1], [2, 3, 4], ""))


@pytest.mark.parametrize("value", ["x", [5], {"a": 1}])
def test_fields_that_an_endpoint_does_not_know_may_hold_anything(value: object) -> None:
    call = text(max_tokens=3, max_completion_tokens=value, messages=value)
    assert obstacle(call) is None
    assert continuation(call, Cut([1], [2], ""))["max_completion_tokens"] == value
    assert finished(call, Cut([1], [2, 3, 4], ""))


def trail_of(*pieces: tuple[str, list[int]]) -> Trail:
    trail = Trail(CHAT.path)
    trail.prompt, trail.opened = b"1,2", True
    for piece, ids in pieces:
        trail.add(ids, piece)
    return trail


def event(content: str | None, ids: list[int], finish: str | None = None, **more: Any) -> bytes:
    delta = {} if content is None else {"content": content}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, "token_ids": ids}
    chunk = {"id": "second", "object": "o", "created": 2, "model": "m", "choices": [choice], **more}
    return b"data: " + orjson.dumps(chunk)


def test_the_second_stream_becomes_the_first_ones() -> None:
    trail = trail_of(("ab", [3]), ("c", [4]))
    meter = ResumedMeter(chat(stream_options={"include_usage": True}), trail, Cut([1, 2], [3], "c"), HEAD)
    role = event("", [], prompt_token_ids=[1, 2, 3])
    assert meter.read(role) is Verdict.DROP
    assert meter.read(event("cd", [5])) is Verdict.TOKEN
    first = orjson.loads(meter.forward[6:])
    assert (first["id"], first["created"]) == ("first", 1)
    assert first["choices"][0]["delta"] == {"content": "d"}
    assert first["choices"][0]["token_ids"] is None
    assert meter.read(event("e", [6], "stop")) is Verdict.TOKEN
    assert meter.complete
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert meter.read(b"data: " + orjson.dumps({**HEAD, "choices": [], "usage": usage})) is Verdict.OTHER
    assert orjson.loads(meter.forward[6:])["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert meter.usage == Usage(2, 3, 0)
    assert trail.text() == "abcde"
    assert trail.token_ids() == [3, 5, 6]


@pytest.mark.parametrize(
    "strange",
    [
        event("", [], prompt_token_ids=[9]),  # it has begun anew
        event("x", [5]),  # not what was sent already
        event("c", [5]).replace(b'"content":"c"', b'"tool_calls":[]'),
        b"data: nonsense",
    ],
)
def test_what_does_not_go_on_is_refused(strange: bytes) -> None:
    meter = ResumedMeter(chat(), trail_of(("ab", [3]), ("c", [4])), Cut([1, 2], [3], "c"), HEAD)
    assert meter.read(strange) is Verdict.NONSENSE


def test_an_engine_that_fails_again_says_so() -> None:
    meter = ResumedMeter(chat(), trail_of(("ab", [3])), Cut([1, 2], [3], ""), HEAD)
    assert meter.read(b'data: {"error": {"message": "x"}}') is Verdict.ERROR
    assert meter.read(b": comment") is Verdict.DROP
    assert meter.read(b"data: [DONE]") is Verdict.DONE
    assert not meter.complete


@pytest.mark.parametrize("call", [chat(max_tokens=2), text(max_tokens=2)])
def test_an_ending_without_an_engine(call: Call) -> None:
    trail = Trail(call.endpoint.path)
    trail.prompt, trail.opened = b"1,2", True
    trail.add([3], "a")
    trail.add([4], "b")
    cut = Cut([1, 2], [3, 4], "")
    meter = ResumedMeter(call, trail, cut, HEAD)
    events = sse.Splitter().feed(ending(call, cut, HEAD))
    assert [meter.read(e) for e in events] == [Verdict.DROP, Verdict.TOKEN, Verdict.DONE]
    assert meter.usage == Usage(2, 2, 0)
    assert meter.complete


def test_ids_without_text_have_their_events_once() -> None:
    """Of a character of three ids, one was sent when the engine died; it is made again, and the other two are new."""
    meter = ResumedMeter(chat(), trail_of(("ab", [3])), Cut([1, 2], [3], "", again=1), HEAD)
    verdicts = [meter.read(event(text, [i])) for i, text in enumerate(["", "", "🌍"], start=4)]
    assert verdicts == [Verdict.DROP, Verdict.TOKEN, Verdict.TOKEN]
