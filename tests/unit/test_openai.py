"""Bodies: judged on the way in, encoded afresh on the way out."""

import json
from typing import Any

import pytest

from gateway.errors import GatewayError
from gateway.types import Call, Endpoint
from gateway.wire.openai import ENDPOINTS, decode, encode
from tests.flow.rows import ROWS, encode as as_json, expand

BY_PATH = {endpoint.path: endpoint for endpoint in ENDPOINTS}
CHAT = BY_PATH["/v1/chat/completions"]
HI = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def judged(endpoint: Endpoint, body: dict[str, Any]) -> Call:
    return decode(endpoint, json.dumps(body).encode())


def refusal(endpoint: Endpoint, raw: bytes) -> tuple[str | None, str | None]:
    with pytest.raises(GatewayError) as refused:
        decode(endpoint, raw)
    error = refused.value
    assert error.type == "invalid_request_error"
    assert len(error.message) < 700
    return error.code, error.param


# ---- what is refused

# Those that `decode` itself judges: models and their template's arguments are the plan's matter.
REFUSED = [
    row for row in ROWS if "fields" in row and row["status"] in (400, 404) and row["row"] not in (35, 36, 53)
]  # fmt: skip


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: f"{row['row']} {json.dumps(row['fields'])[:60]}")
def test_bad_inputs(row: dict[str, Any]) -> None:
    body = expand(row["fields"])
    if "post" not in row:
        body = {**HI, **body}
    expected = "invalid_image_url" if row["code"] == "anthropic" else row["code"]
    code, param = refusal(BY_PATH[row.get("post", CHAT.path)], as_json(body))
    assert code == expected
    assert row["code"] == "anthropic" or param == row["param"]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"5",
        b"true",
        b'"x"',
        b"{'a':1}",
        b'{"a":1}x',
        b'{"a":NaN}',
        b'{"a":"\xff"}',
        b'{"a":"\\ud800"}',
        b"\xef\xbb\xbf{}",
        '{"a":1}'.encode("utf-16"),
        b"[" * 200_000,
        b'{"a":' * 2000 + b"1" + b"}" * 2000,
        b'{"model":"m","messages":[{"role":"user","content":"hi"}],"x":1e400}',
        b'{"model":"m","messages":[{"role":"user","content":"hi"}],"x":' + b"9" * 5000 + b"}",
        b'{"x":1e400,' + b'"a":' * 2,
        b'{"x":1e999,"y":' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
    ids=lambda raw: repr(raw[:30]),
)
def test_no_json(raw: bytes) -> None:
    assert refusal(CHAT, raw) == ("invalid_json", None)


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        (CHAT.path, {}, "missing_required_parameter", "model"),
        (CHAT.path, {"model": 5}, "invalid_type", "model"),
        (CHAT.path, {"model": "m"}, "missing_required_parameter", "messages"),
        (CHAT.path, {**HI, "messages": [{"role": 5, "content": "x"}]}, "invalid_type", "messages[0].role"),
        (CHAT.path, {**HI, "messages": [{"role": "r" * 65, "content": "x"}]}, "string_above_max_length", "messages[0].role"),
        (CHAT.path, {**HI, "messages": [{"role": "user", "content": [5]}]}, "invalid_type", "messages[0].content[0]"),
        (CHAT.path, {**HI, "messages": [{"role": "user", "content": [{"type": 5}]}]}, "invalid_type", "messages[0].content[0].type"),
        (CHAT.path, {**HI, "messages": [{"role": "user", "content": [{"type": "text"}]}]}, "missing_required_parameter", "messages[0].content[0].text"),
        (CHAT.path, {**HI, "messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "invalid_type", "messages[0].content[0].text"),
        (CHAT.path, {**HI, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "missing_required_parameter", "messages[0].content[0].image_url"),
        (CHAT.path, {**HI, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]}]}, "invalid_type", "messages[0].content[0].image_url.url"),
        (CHAT.path, {**HI, "messages": [{"role": "user", "content": [{"type": "input_audio"}] * 65}]}, "array_above_max_length", "messages[0].content"),
        (CHAT.path, {**HI, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * (20 << 20)}}]}]}, "string_above_max_length", "messages"),
        (CHAT.path, {**HI, "stop": 5}, "invalid_type", "stop"),
        (CHAT.path, {**HI, "logit_bias": []}, "invalid_type", "logit_bias"),
        (CHAT.path, {**HI, "logit_bias": {"5": True}}, "invalid_value", "logit_bias"),
        (CHAT.path, {**HI, "metadata": []}, "invalid_type", "metadata"),
        (CHAT.path, {**HI, "modalities": "text"}, "invalid_type", "modalities"),
        (CHAT.path, {**HI, "tools": [5]}, "invalid_type", "tools[0]"),
        (CHAT.path, {**HI, "tools": [{"function": {}}]}, "missing_required_parameter", "tools[0].function.name"),
        (CHAT.path, {**HI, "tools": [{"type": "function", "function": {"name": ""}}]}, "invalid_value", "tools[0].function.name"),
        (CHAT.path, {**HI, "tools": [{"type": "custom"}], "tool_choice": {"type": "function"}}, "invalid_value", "tool_choice"),
        (CHAT.path, {**HI, "structured_outputs": {"json": 5}}, "invalid_type", "structured_outputs.json"),
        ("/v1/completions", {"model": "m", "prompt": [[1], [2, "x"]]}, "invalid_type", "prompt[1]"),
        ("/v1/completions", {"model": "m", "prompt": [[1], 2]}, "invalid_type", "prompt"),
        ("/v1/completions", {"model": "m", "prompt": [[1], []]}, "empty_array", "prompt[1]"),
        ("/v1/completions", {"model": "m", "prompt": [{}]}, "invalid_type", "prompt"),
        ("/v1/completions", {"model": "m", "prompt": [0] * 9 + [-1]}, "integer_below_min_value", "prompt"),
        ("/v1/completions", {"model": "m", "prompt": "hi", "logprobs": 6}, "integer_above_max_value", "logprobs"),
        ("/v1/embeddings", {"model": "m", "input": "hi", "stream": True}, "invalid_value", "stream"),
        ("/v1/rerank", {"model": "m", "query": "q"}, "missing_required_parameter", "documents"),
        ("/v1/rerank", {"model": "m", "query": "q", "documents": [5]}, "invalid_type", "documents[0]"),
        ("/v1/rerank", {"model": "m", "query": "q", "documents": []}, "empty_array", "documents"),
        ("/v1/responses", {"model": "m"}, "missing_required_parameter", "input"),
        ("/v1/responses", {"model": "m", "input": None}, "missing_required_parameter", "input"),
        ("/v1/responses", {"model": "m", "input": [5]}, "invalid_type", "input[0]"),
        ("/v1/responses", {"model": "m", "input": 5}, "invalid_type", "input"),
        ("/v1/messages", HI, "missing_required_parameter", "max_tokens"),
        ("/v1/messages", {**HI, "max_tokens": 1, "messages": [{"role": "user", "content": [5]}]}, "invalid_type", "messages[0].content[0]"),
        ("/v1/messages", {**HI, "max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "image"}]}]}, "invalid_type", "messages[0].content[0].source"),
        ("/v1/messages", {**HI, "max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "video"}]}]}, "invalid_value", "messages[0].content[0].type"),
        ("/v1/messages", {**HI, "max_tokens": 1, "messages": [{"role": "user", "content": [{}]}]}, "missing_required_parameter", "messages[0].content[0].type"),
        ("/v1/messages", {**HI, "max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}]}, "invalid_value", "messages[0].content[0].type"),
        (CHAT.path, {**HI, "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": 5}]}]}, "invalid_type", "messages[0].content[1].text"),
        ("/v1/responses", {"model": "m", "input": [{"content": [{"type": "input_text", "text": "x"}, {"type": "input_text"}]}]}, "missing_required_parameter", "input[0].content[1].text"),
        (CHAT.path, {**HI, "stop_token_ids": [1] * 129}, "array_above_max_length", "stop_token_ids"),
        ("/detokenize", {"model": "m", "tokens": ["x"]}, "invalid_type", "tokens[0]"),
        ("/detokenize", {"model": "m"}, "missing_required_parameter", "tokens"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else str(value),
)  # fmt: skip
def test_refused(path: str, body: dict[str, Any], code: str, param: str) -> None:
    assert refusal(BY_PATH[path], json.dumps(body).encode()) == (code, param)


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.path)
def test_dangerous_fields_are_refused_everywhere(endpoint: Endpoint) -> None:
    for name in ("kv_transfer_params", "request_id", "api_base", "extra_headers", "prompt_logprobs"):
        assert refusal(endpoint, json.dumps({"model": "m", name: 1}).encode()) == ("unsupported_parameter", name)


# ---- what is accepted


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT.path, {**HI, "messages": [{"role": "assistant", "tool_calls": []}, {"role": "tool", "content": None}]}),
        (CHAT.path, {**HI, "messages": [{"role": "user", "content": ["text", {"type": "refusal", "refusal": "no"}]}]}),
        (CHAT.path, {**HI, "messages": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AA"}, {"type": "file", "file": {}}]}]}),
        (CHAT.path, {**HI, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}]}]}),
        (CHAT.path, {**HI, "messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,AA,BB"}}]}]}),
        (CHAT.path, {**HI, "max_tokens": 5, "max_completion_tokens": 5}),
        (CHAT.path, {**HI, "logprobs": True, "top_logprobs": 20, "n": 128, "seed": -(2**63), "stop": "x", "top_k": -1}),
        (CHAT.path, {**HI, "logit_bias": {"5": -100, "6": 0.5}, "metadata": {"a": "b"}, "modalities": ["text"]}),
        (CHAT.path, {**HI, "stop": ["a", "b"], "temperature": 2, "top_p": 1, "top_logprobs": 0}),
        (CHAT.path, {**HI, "tools": [{"type": "function", "function": {"name": "a.b-c_d"}}, {"type": "custom"}], "tool_choice": {"type": "function", "function": {"name": "a.b-c_d"}}}),
        (CHAT.path, {**HI, "tool_choice": "none"}),
        (CHAT.path, {**HI, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}}),
        (CHAT.path, {**HI, "response_format": {"type": "text"}}),
        (CHAT.path, {**HI, "structured_outputs": {"regex": None}}),
        ("/v1/messages", {**HI, "max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "text", "data": "x"}}]}]}),
        (CHAT.path, {**HI, "structured_outputs": {"regex": r"[(+)*]+\(a+\)(ab|c)d*", "choice": ["a"], "json": {}}}),
        (CHAT.path, {**HI, "structured_outputs": {"json": "{}"}, "new_field": {"of": ["vLLM"]}}),
        (CHAT.path, {**HI, **dict.fromkeys(("max_tokens", "temperature", "stop", "tools", "logit_bias", "metadata", "stream", "n"))}),
        ("/v1/completions", {"model": "m", "prompt": [1, 2, 3], "logprobs": 5, "suffix": None}),
        ("/v1/completions", {"model": "m", "prompt": [[1], [2, 3]]}),
        ("/v1/completions", {"model": "m", "prompt": ["a", "b"], "echo": True}),
        ("/v1/embeddings", {"model": "m", "input": [1, 2]}),
        ("/v1/embeddings", {"model": "m", "messages": HI["messages"]}),
        ("/v1/rerank", {"model": "m", "query": {"content": [{"type": "text", "text": "q"}]}, "documents": ["a", {"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}]}),
        ("/v1/rerank", {"model": "m", "query": "q", "documents": {"content": ["a"]}}),
        ("/v1/score", {"model": "m", "text_1": "a", "text_2": ["b", [1, 2]]}),
        ("/v1/classify", {"model": "m", "input": "a"}),
        ("/v1/responses", {"model": "m", "input": "hi", "background": False, "previous_response_id": None}),
        ("/v1/responses", {"model": "m", "input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}, {"type": "input_file", "file_data": "x"}, {"type": "input_image", "image_url": "data:image/png;base64,AA"}]}]}),
        ("/v1/responses", {"model": "m", "input": [{"type": "function_call_output", "call_id": "c", "output": "x"}, {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x"}]}]}),
        ("/v1/messages", {**HI, "max_tokens": 1, "system": [{"type": "text", "text": "x"}]}),
        ("/v1/messages", {**HI, "max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "tool_result", "content": "x"}, {"type": "tool_result", "content": [{"type": "text", "text": "x"}]}, {"type": "thinking", "thinking": "x"}]}]}),
        ("/v1/messages/count_tokens", HI),
        ("/tokenize", {"model": "m", "prompt": "x"}),
        ("/detokenize", {"model": "m", "tokens": [1, 2]}),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else str(value),
)  # fmt: skip
def test_accepted_and_kept_as_it_is(path: str, body: dict[str, Any]) -> None:
    call = judged(BY_PATH[path], body)
    assert call.body == body
    assert call.model == "m"
    assert json.loads(encode(call, "served")) == {**body, "model": "served"}


@pytest.mark.parametrize(
    ("path", "fields", "stream", "include_usage", "max_tokens"),
    [
        (CHAT.path, {}, False, False, None),
        (CHAT.path, {"stream": True}, True, False, None),
        (CHAT.path, {"stream": True, "stream_options": {"include_usage": True}}, True, True, None),
        (CHAT.path, {"stream": True, "stream_options": {"include_usage": False}}, True, False, None),
        (CHAT.path, {"max_tokens": 7}, False, False, 7),
        (CHAT.path, {"max_completion_tokens": 7, "n": 3}, False, False, 21),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 9}, False, False, 9),
        ("/v1/messages", {"max_tokens": 4, "stream": True}, True, False, 4),
        ("/v1/embeddings", {"input": "hi"}, False, False, 0),
        ("/tokenize", {"prompt": "hi"}, False, False, 0),
    ],
)
def test_what_routes_and_bounds(
    path: str, fields: dict[str, Any], stream: bool, include_usage: bool, max_tokens: int | None
) -> None:
    call = judged(BY_PATH[path], {**HI, **fields})
    assert (call.stream, call.include_usage, call.max_tokens) == (stream, include_usage, max_tokens)
    assert call.size == len(json.dumps({**HI, **fields}))


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        (None, {"include_usage": True}),
        ({"include_usage": False}, {"include_usage": True}),
        ({"continuous_usage_stats": True}, {"include_usage": True}),
        ({"include_usage": True}, {"include_usage": True}),
        (
            {"include_usage": True, "continuous_usage_stats": True},
            {"include_usage": True, "continuous_usage_stats": True},
        ),
    ],
)
def test_usage_is_always_asked_for(options: dict[str, Any] | None, sent: dict[str, Any]) -> None:
    call = judged(CHAT, {**HI, "stream": True, **({} if options is None else {"stream_options": options})})
    assert json.loads(encode(call, "m"))["stream_options"] == sent
    assert "return_token_ids" not in json.loads(encode(call, "m"))
    assert json.loads(encode(call, "m", with_ids=True))["return_token_ids"] is True


def test_other_dialects_have_no_stream_options() -> None:
    call = judged(BY_PATH["/v1/messages"], {**HI, "max_tokens": 1, "stream": True})
    assert "stream_options" not in json.loads(encode(call, "m", with_ids=True))


def test_two_parsers_cannot_read_it_in_two_ways() -> None:
    """The last of two fields with one name is what is judged, and the only one that goes on."""
    call = decode(CHAT, b'{"n":999,"model":"a","model":"m","n":1,"messages":[{"role":"user","content":"h\\u0069"}]}')
    assert encode(call, "m") == b'{"n":1,"model":"m","messages":[{"role":"user","content":"hi"}]}'


def test_a_body_may_be_a_bytearray() -> None:
    assert decode(CHAT, bytearray(json.dumps(HI).encode())).body == HI


@pytest.mark.parametrize("depth", [254, 1000])
def test_what_cannot_be_written_again_is_too_deep(depth: int) -> None:
    """The parser reads 1023 levels, the writer 253: in between, a request would fail with a fault of ours."""
    deep = b"[" * depth + b"]" * depth
    call = decode(CHAT, b'{"model":"m","messages":[{"role":"user","content":"hi"}],"extra":%b}' % deep)
    with pytest.raises(GatewayError) as refused:
        encode(call, "m")
    assert (refused.value.status, refused.value.code) == (400, "invalid_json")
    schema = b'{"type":"json_schema","json_schema":{"name":"x","schema":{"a":%b}}}' % deep
    raw = b'{"model":"m","messages":[{"role":"user","content":"hi"}],"response_format":%b}' % schema
    assert refusal(CHAT, raw)[0] == "invalid_json"


@pytest.mark.parametrize("value", ["x", [], {}, 1e300])
def test_fields_that_an_endpoint_does_not_know_bound_nothing(value: object) -> None:
    """They pass through unjudged, so they may hold anything."""
    responses = BY_PATH["/v1/responses"]
    for name in ("max_tokens", "max_completion_tokens", "n", "prompt"):
        call = judged(responses, {"model": "m", "input": "hi", "max_output_tokens": 5, name: value})
        assert (call.max_tokens, call.body[name]) == (5, value)
    assert judged(CHAT, {**HI, "max_output_tokens": value}).max_tokens is None
