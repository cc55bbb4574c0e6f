"""Bodies made from good ones by chance and malice: each is either refused in words that we chose, or reaches an engine
as exactly what was judged."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from gateway.errors import GatewayError
from gateway.limits.base import Limits
from gateway.limits.memory import MemoryLimiter
from gateway.resilience.resume import Cut, continuation, finished, obstacle
from gateway.routing.models import plan
from gateway.types import Call, Caller, Endpoint
from gateway.usage import bpe, prompt
from gateway.usage.estimate import PromptEstimator
from gateway.usage.template import ChatTemplate
from gateway.usage.tokens import TokenCounter
from gateway.wire import errors as wire_errors
from gateway.wire.openai import ENDPOINTS, decode, encode


class Model(NamedTuple):
    name: str = "tiny"
    request_timeout: float = 60.0
    template_kwargs: frozenset[str] = frozenset()


CALLER = Caller("k", MemoryLimiter().account("k", Limits()), None)
BYTES = [chr(b) if 0x20 < b < 0x7F else chr(0x100 + b) for b in range(256)]
TOKENIZER: dict[str, Any] = {
    "normalizer": None,
    "post_processor": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "added_tokens": [],
    "model": {"type": "BPE", "vocab": {token: n for n, token in enumerate(BYTES)}, "merges": []},
}
TEMPLATE = "{% for m in messages %}{{ m.role }}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}{{ tools | tojson }}"
COUNTER = TokenCounter(
    bpe.load(TOKENIZER, {"tokenizer_class": "PreTrainedTokenizerFast"}), ChatTemplate({"default": TEMPLATE}, {})
)

CHAT = [{"role": "user", "content": "hi"}]
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "max_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
        "logit_bias": {"1": 5},
        "stop": ["a"],
        "metadata": {"a": "b"},
    },
    "/v1/completions": {"prompt": "hi", "max_tokens": 5, "stream": True},
    "/v1/embeddings": {"input": ["hi"], "dimensions": 8},
    "/v1/rerank": {"query": "hi", "documents": ["a", {"content": [{"type": "text", "text": "b"}]}]},
    "/v1/score": {"text_1": "hi", "text_2": ["ho"]},
    "/v1/classify": {"input": "hi"},
    "/v1/responses": {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]},
    "/v1/messages": {"messages": CHAT, "max_tokens": 5, "system": [{"type": "text", "text": "s"}]},
    "/v1/messages/count_tokens": {"messages": CHAT},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1, 2]},
}

JUDGED = {name for endpoint in ENDPOINTS for name in endpoint.rules}  # by some endpoint

# What stands in a body is text here, because half of it is what no Python value would be written as.
ATOMS = st.sampled_from(
    [
        *(
            [
                "null",
                "true",
                "false",
                "0",
                "-0",
                "1",
                "-1",
                "1.0",
                "0.5",
                "-0.0",
                "1e400",
                "-1e400",
                "1e-400",
                "9223372036854775807",
                "9223372036854775808",
            ]
        ),
        *(
            [
                "18446744073709551616",
                "NaN",
                "Infinity",
                "nul",
                "01",
                "+1",
                ".5",
                "1.",
                "0x5",
                "[",
                "]",
                "{",
                "}",
                "[1,]",
                "{}x",
            ]
        ),
        "9" * 400,
        "-" + "9" * 5000,
        *(
            [
                '""',
                '"hi"',
                '"tiny"',
                '"\\ud800"',
                '"\\udc00\\ud800"',
                '"\\ud83d\\ude00"',
                '"\\u0000"',
                '"\\u2028"',
                '"a\\nb"',
                '"\x01"',
                "'a'",
            ]
        ),
        '"http://127.0.0.1/"',
        '"data:image/png;base64,AAAA"',
        '"' + "x" * 70_000 + '"',
        '"\U0001f600"',
        '"\ufeff"',
    ]
)
NAMES = st.sampled_from(
    [
        "role",
        "content",
        "type",
        "text",
        "url",
        "image_url",
        "name",
        "function",
        "schema",
        "model",
        "",
        "__proto__",
        "stream",
        "n",
        "max_tokens",
        "max_output_tokens",
        "max_completion_tokens",
        "messages",
        "prompt",
        "input",
        "k" * 300,
        "\\ud800",
        "a\\u0000b",
        "message",
        "source",
    ]
)
DEEP = st.builds(
    lambda depth, opening: opening * depth + "1" + "".join({"[": "]", '{"a":': "}"}[opening] for _ in range(depth)),
    st.sampled_from([10, 100, 200, 250, 253, 254, 255, 256, 500, 1000, 1023, 1024, 1025, 5000]),
    st.sampled_from(["[", '{"a":']),
)


def array(items: list[str]) -> str:
    return f"[{','.join(items)}]"


def record(fields: list[tuple[str, str]]) -> str:
    return "{" + ",".join(f'"{name}":{value}' for name, value in fields) + "}"


VALUES = st.recursive(
    ATOMS | DEEP,
    lambda inner: st.lists(inner, max_size=4).map(array) | st.lists(st.tuples(NAMES, inner), max_size=4).map(record),
    max_leaves=6,
)


def spots(value: Any) -> list[tuple[Any, ...]]:
    """Every place in a body, as a path; the whole is ()."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(), *((key, *rest) for key, child in inner for rest in spots(child))]


def write(value: Any, path: tuple[Any, ...], change: Callable[[str], str]) -> str:
    """JSON, changed at one place."""
    if not path:
        return change(json.dumps(value))
    key, *rest = path
    if isinstance(value, list):
        return array([write(v, tuple(rest), change) if i == key else json.dumps(v) for i, v in enumerate(value)])
    return record([(k, write(v, tuple(rest), change) if k == key else json.dumps(v)) for k, v in value.items()])


@st.composite
def bodies(draw: st.DrawFn, endpoint: Endpoint) -> bytes:
    body = {"model": "tiny", **GOOD[endpoint.path]}
    known, foreign = st.sampled_from(sorted(endpoint.rules)), st.sampled_from(sorted(JUDGED - endpoint.rules.keys()))
    kind = draw(st.sampled_from(["replace", "replace", "field", "field", "foreign", "twice", "bytes"]))
    value = draw(VALUES)
    if kind == "replace":
        return write(body, draw(st.sampled_from(spots(body))), lambda _: value).encode("utf-8", "surrogatepass")
    fields = [(name, json.dumps(one)) for name, one in body.items()]
    if kind in ("field", "foreign"):
        name = draw(known | NAMES if kind == "field" else foreign)
        fields = [(k, v) for k, v in fields if k != name] + [(name, value)]
    elif kind == "twice":
        name = draw(st.sampled_from(list(body)))
        fields.insert(draw(st.integers(0, len(fields))), (name, value))
    raw = record(fields).encode("utf-8", "surrogatepass")
    if kind == "bytes":
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.binary(max_size=4)) + raw[at + draw(st.integers(0, 3)) :]
    return raw


def as_read(raw: bytes) -> Any:
    """What the standard library makes of it. Integers of more than 64 bits are doubles to our parser."""
    return json.loads(raw, parse_int=lambda text: n if -(2**63) <= (n := int(text)) < 2**64 else float(text))


def judge_refusal(error: GatewayError, endpoint: Endpoint) -> None:
    assert error.status in (400, 404), error
    assert error.type == "invalid_request_error"
    assert len(error.message) < 1000
    assert error.param is None or len(error.param) < 1000
    told = json.loads(wire_errors.body(error, endpoint))
    assert told["error"]["message"] == error.message


def use_elsewhere(call: Call) -> None:
    """What else reads a body on its way must cope with all that has passed."""
    plan(call, CALLER, {call.model: Model(template_kwargs=frozenset(call.body.get("chat_template_kwargs") or ()))}, 0.0)
    assert prompt.count(COUNTER, PromptEstimator(), call) >= 0
    if obstacle(call) is None:
        cut = Cut([1, 2], [3], "")
        continuation(call, cut)
        finished(call, cut)


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda e: e.path)
def test_refused_or_passed_on_as_judged(endpoint: Endpoint) -> None:
    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(bodies(endpoint))
    def check(raw: bytes) -> None:
        try:
            call = decode(endpoint, raw)
            sent = encode(call, "served", with_ids=True)
            use_elsewhere(call)
        except GatewayError as error:
            judge_refusal(error, endpoint)
            return
        wanted = as_read(raw) | {"model": "served"}
        got = as_read(sent)
        if call.stream and endpoint.dialect == "openai":
            got.pop("return_token_ids")
            wanted.pop("return_token_ids", None)
            assert got.pop("stream_options")["include_usage"] is True
            wanted.pop("stream_options", None)
        assert got == wanted
        assert call.model == as_read(raw)["model"]

    check()


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda e: e.path)
def test_what_the_mutations_start_from_is_good(endpoint: Endpoint) -> None:
    call = decode(endpoint, json.dumps({"model": "tiny", **GOOD[endpoint.path]}).encode())
    assert call.model == "tiny"
