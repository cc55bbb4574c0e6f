"""CONTRACT.md §6, row by row: what a client hears when something is wrong."""

import asyncio
import json
import signal
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.fake_engine import FakeEngine
from tests.flow.conftest import NARROW, Start
from tests.flow.talk import CHAT, Served, chunked, connect, exchange, logged, parse, post
from tests.served import KEY, Answer, Penstock, chat_body, simple_config, until

SECRETS = (KEY, NARROW, "sk-engine-secret", "127.0.0.1", "Traceback", "swordfish")  # the last stands in prompts
EMBED = {"model": "vec", "input": "hi"}


def judge(
    answer: Answer,
    status: int,
    code: str | None,
    param: str | None = None,
    kind: str = "invalid_request_error",
) -> None:
    """It is this error, in exactly the contract's shape, and gives nothing away."""
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/json"
    assert answer.json.keys() == {"error"}
    error = answer.error
    assert list(error) == ["message", "type", "param", "code"]
    assert isinstance(error["message"], str)
    assert error["message"]
    assert (error["type"], error["code"], error["param"]) == (kind, code, param)
    for secret in SECRETS:
        assert secret.encode() not in answer.body
        assert secret not in "".join(answer.headers.values())


# ---- keys


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer sk-nobody-knows-this-one"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": f"Basic {KEY}"},
        {"authorization": KEY},
        {"authorization": f"Bearer {KEY} {KEY}"},
        {"authorization": "Bearer ' OR 1=1--"},
        {"authorization": "Bearer %"},
        {"authorization": "Bearer \U0001f511".encode().decode("latin-1")},
        {"authorization": f"Bearer {KEY * 20}"},
        {"x-api-key": ""},
        {"x-api-key": KEY[:-1]},
        {"x-api-key": f"Bearer {KEY}"},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [CHAT, "/v1/models"])
async def test_every_bad_key_gets_the_same_answer(served: Served, headers: dict[str, str], path: str) -> None:
    method, body = ("GET", None) if path == "/v1/models" else ("POST", json.dumps(chat_body()).encode())
    answer = await served.gateway.request(method, path, {"content-type": "application/json", **headers}, body)
    judge(answer, 401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.body == (await served.gateway.chat(key=None)).body
    assert (await served.engine.stats())["requests"] == 0


@pytest.mark.parametrize(
    "headers",
    [{"authorization": f"bearer {KEY}"}, {"authorization": f"BEARER  {KEY} "}, {"x-api-key": KEY}, {}],
    ids=["lower", "upper", "x-api-key", "both"],
)
async def test_good_keys(served: Served, headers: dict[str, str]) -> None:
    headers = headers or {"authorization": f"Bearer {KEY}", "x-api-key": KEY}
    answer = await served.gateway.post(CHAT, chat_body(max_tokens=1), None, headers)
    assert answer.status == 200


@pytest.mark.parametrize(
    "lines",
    [
        f"authorization: Bearer {KEY}\r\nauthorization: Bearer {NARROW}\r\n",
        f"authorization: Bearer {KEY}\r\nx-api-key: {NARROW}\r\n",
        f"x-api-key: {KEY}\r\nx-api-key: wrong\r\n",
        f"authorization: Basic abc\r\nx-api-key: {KEY}\r\n",
    ],
)
async def test_credentials_that_differ(served: Served, lines: str) -> None:
    [answer] = await exchange(served.gateway, post(key=None, more=lines))
    judge(answer, 400, "ambiguous_credentials")


async def test_keys_are_not_taken_from_query_or_body(served: Served) -> None:
    judge(await served.gateway.get(f"/v1/models?api_key={KEY}&key={KEY}", None), 401, "invalid_api_key")
    judge(await served.gateway.post(CHAT, chat_body(), None, {"cookie": f"key={KEY}"}), 401, "invalid_api_key")


# ---- models and paths


async def test_unknown_and_forbidden_models_get_the_same_answer(served: Served) -> None:
    unknown = await served.gateway.chat(model="nobody", key=NARROW)
    forbidden = await served.gateway.chat(model="tiny", key=NARROW)
    alias = await served.gateway.chat(model="default", key=NARROW)
    for answer in (unknown, forbidden, alias):
        judge(answer, 404, "model_not_found", "model")
    assert unknown.body.replace(b"nobody", b"tiny") == forbidden.body == alias.body.replace(b"default", b"tiny")
    assert (await served.gateway.chat(model="other", key=NARROW)).status == 200
    for name in ("nobody", "tiny", "default"):
        judge(await served.gateway.get(f"/v1/models/{name}", NARROW), 404, "model_not_found", "model")
    listed = (await served.gateway.get("/v1/models", NARROW)).json["data"]
    assert [model["id"] for model in listed] == ["other"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/v1"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("POST", "/v1/chat/completions/"),
        ("POST", "/v1/audio/transcriptions"),
        ("GET", "/v1/responses/resp_1"),
        ("POST", "/v1/responses/resp_1/cancel"),
        ("GET", "/health/"),
        ("GET", "/metrics/"),
        ("GET", "/admin/"),
        ("GET", "/v1/realtime"),
    ],
)
async def test_unknown_paths(served: Served, method: str, path: str) -> None:
    judge(await served.gateway.request(method, path, {}), 404, "unknown_url")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", CHAT, {"POST"}),
        ("PUT", CHAT, {"POST"}),
        ("OPTIONS", CHAT, {"POST"}),
        ("TRACE", CHAT, {"POST"}),
        ("DELETE", "/v1/models", {"GET", "HEAD"}),
        ("POST", "/v1/models/tiny", {"GET", "HEAD"}),
        ("POST", "/health", {"GET", "HEAD"}),
        ("POST", "/metrics", {"GET", "HEAD"}),
    ],
)
async def test_wrong_method(served: Served, method: str, path: str, allow: set[str]) -> None:
    answer = await served.gateway.request(method, path, {"origin": "https://example.org"})
    judge(answer, 405, "method_not_allowed")
    assert set(answer.headers["allow"].split(", ")) == allow
    assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_head_works_where_get_does(served: Served) -> None:
    for path in ("/v1/models", "/v1/models/tiny", "/health", "/health/live", "/metrics"):
        answer = await served.gateway.request("HEAD", path, {"authorization": f"Bearer {KEY}"})
        assert (answer.status, answer.body) == (200, b"")


# ---- bodies


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model":"tiny",}',
        b"{'model':'tiny'}",
        b'{"model":"tiny","temperature":NaN}',
        b'{"model":"tiny","temperature":Infinity}',
        b'{"model":"tiny"} {"model":"tiny"}',
        b"[]",
        b"null",
        b'"tiny"',
        b'{"model":"ti\xffny"}',
        b'{"model":"\\ud800"}',
        b'\xef\xbb\xbf{"model":"tiny"}',
        '{"model":"tiny"}'.encode("utf-16"),
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b"[" * 100_000,
    ],
    ids=lambda body: repr(body[:24]),
)
async def test_what_is_no_json_object(served: Served, body: bytes) -> None:
    judge(await served.gateway.post(CHAT, body), 400, "invalid_json")
    assert (await served.engine.stats())["requests"] == 0


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"model": None}, "missing_required_parameter", "model"),
        ({"messages": None}, "invalid_type", "messages"),
        ({"messages": [{"content": "hi"}]}, "missing_required_parameter", "messages[0].role"),
        ({"model": 5}, "invalid_type", "model"),
        ({"messages": "hi"}, "invalid_type", "messages"),
        ({"messages": {}}, "invalid_type", "messages"),
        ({"stream": "yes"}, "invalid_type", "stream"),
        ({"max_tokens": "5"}, "invalid_type", "max_tokens"),
        ({"max_tokens": True}, "invalid_type", "max_tokens"),
        ({"temperature": "hot"}, "invalid_type", "temperature"),
        ({"tools": {}}, "invalid_type", "tools"),
        ({"max_tokens": 0}, "integer_below_min_value", "max_tokens"),
        ({"n": 129}, "integer_above_max_value", "n"),
        ({"temperature": -0.1}, "decimal_below_min_value", "temperature"),
        ({"temperature": 2.1}, "decimal_above_max_value", "temperature"),
        ({"messages": []}, "empty_array", "messages"),
        ({"stop": list("abcde")}, "array_above_max_length", "stop"),
        ({"user": "u" * 2000}, "string_above_max_length", "user"),
        ({"service_tier": "x"}, "invalid_value", "service_tier"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "invalid_value", "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    ],
    ids=str,
)
async def test_fields_are_judged(served: Served, fields: dict[str, Any], code: str, param: str) -> None:
    judge(await served.gateway.chat("swordfish", **fields), 400, code, param)
    assert (await served.engine.stats())["requests"] == 0


@pytest.mark.parametrize(
    "name",
    [
        "kv_transfer_params",
        "ec_transfer_params",
        "prompt_embeds",
        "chat_template",
        "request_id",
        "priority",
        "cache_salt",
        "vllm_xargs",
        "mm_processor_kwargs",
        "media_io_kwargs",
        "use_beam_search",
        "best_of",
        "prompt_logprobs",
        "api_base",
        "base_url",
        "api_key",
        "extra_headers",
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses", "/tokenize"])
async def test_refused_fields(served: Served, path: str, name: str) -> None:
    body = {**chat_body(), "prompt": "hi", "input": "hi", name: "x"}
    judge(await served.gateway.post(path, body), 400, "unsupported_parameter", name)


async def test_template_kwargs_beyond_the_list(served: Served) -> None:
    bad = await served.gateway.chat(chat_template_kwargs={"tokenize": True, "chat_template": "x"})
    judge(bad, 400, "unsupported_parameter", "chat_template_kwargs")
    good = await served.gateway.chat(chat_template_kwargs={"enable_thinking": False}, max_tokens=1)
    assert good.status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_prompt_too_long(start: Start, stream: bool) -> None:
    async with FakeEngine("--max-model-len", "10") as engine:
        gateway = await start(engine.url)
        judge(await gateway.chat("word " * 20, stream=stream), 400, "context_length_exceeded", "messages")
        body = {"model": "tiny", "prompt": "word " * 20, "stream": stream}
        judge(await gateway.post("/v1/completions", body), 400, "context_length_exceeded", "prompt")
        long_answer = await gateway.chat("hi", max_tokens=100, stream=stream)
        judge(long_answer, 400, "invalid_value", "max_tokens")
        assert "max_model_len=10" in long_answer.error["message"]


async def test_body_over_the_cap(served: Served) -> None:
    cap = 4 * 1024 * 1024
    judge(await served.gateway.post(CHAT, b" " * (cap + 1)), 413, "request_too_large")
    head = post(body=b"").replace(b"content-length: 0", b"transfer-encoding: chunked")
    [answer] = await exchange(served.gateway, head + chunked(*[b" " * 65536] * 65))
    judge(answer, 413, "request_too_large")
    # An announced body need not come at all.
    head = post(body=b"").replace(b"content-length: 0", b"content-length: %d" % (1 << 40))
    async with connect(served.gateway) as client:
        await client.send(head)
        judge(await client.answer(), 413, "request_too_large")
    assert (await served.gateway.chat(max_tokens=1)).status == 200
    assert (await served.engine.stats())["requests"] == 1


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": ""},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/jsonx"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": "application/json", "content-encoding": "br"},
    ],
    ids=str,
)
async def test_wrong_media(served: Served, headers: dict[str, str]) -> None:
    answer = await served.gateway.post(CHAT, chat_body(), headers=headers)
    judge(answer, 415, "unsupported_media_type")


@pytest.mark.parametrize("media", ["application/json; charset=utf-8", "Application/JSON", "application/json ;x=y"])
async def test_good_media(served: Served, media: str) -> None:
    answer = await served.gateway.post(CHAT, chat_body(max_tokens=1), headers={"content-type": media})
    assert answer.status == 200


# ---- heads: the guard, which only the edge has


@pytest.fixture
def edge_only(door: str) -> None:
    if door != "edge":
        pytest.skip("the socket's guard is the edge's")


@pytest.mark.usefixtures("edge_only")
class TestGuard:
    @pytest.mark.parametrize(
        "more",
        ["x: y\r\n" * 200, f"x: {'y' * 70_000}\r\n", f"x: {'y' * (1 << 20)}\r\n"],
        ids=["200 fields", "70 kB", "1 MB"],
    )
    async def test_headers_too_large(self, served: Served, more: str) -> None:
        [answer] = await exchange(served.gateway, post(more=more))
        judge(answer, 431, "headers_too_large")
        assert answer.headers["connection"] == "close"

    @pytest.mark.parametrize("size", [9_000, 70_000])
    async def test_url_too_long(self, served: Served, size: int) -> None:
        [answer] = await exchange(served.gateway, post(f"/v1/{'x' * size}", {}))
        judge(answer, 414, "uri_too_long")

    async def test_expectation_failed(self, served: Served) -> None:
        [answer] = await exchange(served.gateway, post(more="expect: miracles\r\n"))
        judge(answer, 417, "expectation_failed")

    async def test_too_slow(self, start: Start, engine: FakeEngine) -> None:
        gateway = await start(engine.url, more="server: {header_timeout: 0.2, body_timeout: 0.2}")
        async with connect(gateway) as slow_head, connect(gateway) as slow_body, connect(gateway) as slow_chunks:
            await slow_head.send(post()[:30])
            await slow_body.send(post()[:-3])
            await slow_chunks.send(
                post(body=b"").replace(b"content-length: 0", b"transfer-encoding: chunked") + b"5\r\n"
            )
            for client in (slow_head, slow_body, slow_chunks):
                [answer], rest = parse(await client.to_end())
                judge(answer, 408, "request_timeout")
                assert rest == b""
        assert (await engine.stats())["requests"] == 0

    async def test_connections_that_say_nothing_are_closed(self, start: Start, engine: FakeEngine) -> None:
        gateway = await start(engine.url, more="server: {idle_timeout: 0.2}")
        async with connect(gateway) as fresh, connect(gateway) as used:
            await used.send(post(max_tokens=1).replace(b"connection: close\r\n", b""))
            assert (await used.answer()).status == 200
            assert await used.to_end() == b""
            assert await fresh.to_end() == b""


# ---- limits


@pytest.mark.parametrize(
    ("limits", "kind"),
    [
        ("{requests_per_minute: 1}", "requests"),
        ("{tokens_per_minute: 40}", "tokens"),
        ("{parallel_requests: 1}", "requests"),
    ],
)
async def test_over_a_limit(engine: FakeEngine, start: Start, limits: str, kind: str) -> None:
    gateway = await start(engine.url, limits=limits)
    async with connect(gateway) as first:
        await first.send(post(max_tokens=5, fake={"hold": True}))
        await engine.until(holding=1)
        answer = await gateway.chat(max_tokens=5)
        judge(answer, 429, "rate_limit_exceeded", kind=kind)
        seconds, ms = int(answer.headers["retry-after"]), int(answer.headers["retry-after-ms"])
        assert (seconds - 1) * 1000 < ms <= seconds * 1000
        assert "x-should-retry" not in answer.headers
        await engine.release()
        assert (await first.answer()).status == 200
    assert (await engine.stats())["requests"] == 1


async def test_larger_than_the_limit_itself(engine: FakeEngine, start: Start) -> None:
    gateway = await start(engine.url, limits="{tokens_per_minute: 40}")
    answer = await gateway.chat("word " * 1000)
    judge(answer, 429, "rate_limit_exceeded", kind="tokens")
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after" not in answer.headers
    assert (await engine.stats())["requests"] == 0


# ---- engines that fail


@pytest.mark.parametrize(
    ("behaviour", "stream", "status", "code"),
    [
        ({"garbage": True}, False, 502, "upstream_error"),
        ({"garbage": True}, True, 502, "upstream_error"),
        ({"status": 200, "body": '{"id": "x", "choices": []}'}, True, 502, "upstream_error"),
        ({"status": 200, "body": "<html>hi</html>", "content_type": "text/html"}, False, 502, "upstream_error"),
        ({"status": 200, "body": "<html>hi</html>", "content_type": "text/html"}, True, 502, "upstream_error"),
        ({"status": 200, "body": '"text"'}, False, 502, "upstream_error"),
        ({"raw": "SSH-2.0-OpenSSH_9.2\r\n"}, False, 502, "upstream_error"),
        ({"raw": "HTTP/1.1 200 OK\r\ncontent-length: oops\r\n\r\n"}, True, 502, "upstream_error"),
        ({"status": 302, "headers": {"location": "http://127.0.0.1/"}}, False, 502, "upstream_error"),
        ({"status": 401}, False, 502, "upstream_error"),
        ({"status": 500}, False, 502, "upstream_error"),
        ({"status": 500, "body": "Traceback: at 127.0.0.1"}, True, 502, "upstream_error"),
        ({"accept_then_close": True}, False, 502, "engine_failed"),
        ({"accept_then_close": True, "close": "rst"}, True, 502, "engine_failed"),
        ({"cut_after": -1}, False, 502, "engine_failed"),
        ({"cut_after": -1}, True, 502, "engine_failed"),
        ({"error_first": True}, True, 502, "engine_failed"),
        ({"status": 503}, True, 503, "overloaded"),
    ],
    ids=str,
)
async def test_engine_fails_before_the_first_byte(
    served: Served, behaviour: dict[str, Any], stream: bool, status: int, code: str
) -> None:
    await served.engine.script([behaviour] * 3)
    answer = await served.gateway.chat("swordfish", stream=stream)
    judge(answer, status, code, kind="server_error")
    assert ("retry-after" in answer.headers) == (status == 503)
    # A pooled connection that breaks without a byte could have been stale: then it is sent once more.
    assert (await served.engine.stats())["requests"] <= (2 if "accept_then_close" in behaviour else 1)


async def test_no_healthy_engine(served: Served) -> None:
    answer = await served.gateway.chat(model="lost")
    judge(answer, 503, "no_healthy_engine", kind="server_error")
    assert 1 <= int(answer.headers["retry-after"]) <= 60


async def test_engine_dies(start: Start) -> None:
    """Also before anybody has noticed."""
    async with FakeEngine() as engine:
        gateway = await start(engine.url)
        await engine.exit()
        judge(await gateway.chat(), 503, "no_healthy_engine", kind="server_error")


@pytest.mark.parametrize("stream", [False, True])
async def test_engine_too_slow(engine: FakeEngine, start: Start, stream: bool) -> None:
    config = simple_config(engine.url).replace("aliases: [default]", "request_timeout: 0.2")
    gateway = await start(config=config)
    answer = await gateway.chat(stream=stream, fake={"hold": True})
    judge(answer, 504, "timeout", kind="server_error")
    await engine.until(disconnects=1, running=0)


async def test_draining(engine: FakeEngine, start: Start) -> None:
    gateway = await start(engine.url)
    async with connect(gateway) as running, connect(gateway) as waiting:
        await running.send(post(max_tokens=2, stream=True, fake={"hold_after": 1}))
        await engine.until(holding=1)
        await waiting.send(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await waiting.answer()).status == 200
        gateway.signal(signal.SIGTERM)
        await gateway.logged(lambda line: line["message"] == "draining")
        await waiting.send(post())
        answer = await waiting.answer()
        judge(answer, 503, "draining", kind="server_error")
        assert answer.headers["retry-after"] == "1"
        assert answer.headers["connection"] == "close"
        await engine.release()
        assert (await running.to_end()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert await gateway.exit_code() == 0


async def test_drain_has_an_end(engine: FakeEngine, start: Start) -> None:
    gateway = await start(engine.url, more="server: {drain_timeout: 0.1}")
    async with connect(gateway) as stream, connect(gateway) as whole:
        await stream.send(post(stream=True, fake={"hold_after": 1}))
        await whole.send(post(fake={"hold": True}))
        await engine.until(holding=2)
        gateway.signal(signal.SIGTERM)
        [answer], _ = parse(await whole.to_end())
        judge(answer, 503, "draining", kind="server_error")
        [answer], _ = parse(await stream.to_end())
        assert json.loads(answer.body.split(b"\n\n")[-2].removeprefix(b"data: "))["error"]["code"] == "draining"
    assert await gateway.exit_code() == 0


# ---- an engine's own refusals


VLLM_DUMP = (
    "1 validation error:\n  {'type': 'int_parsing', 'loc': 'body.seed', 'msg': 'Input should be a valid integer', "
    "'input': 'swordfish'}"
)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "error", "message", "param"),
    [
        (400, {"message": "No parser for tools.", "type": "BadRequestError", "param": "tools", "code": 400}, "No parser for tools.", "tools"),
        (422, {"message": "Odd.", "type": "BadRequestError", "param": None, "code": 422}, "Odd.", None),
        (400, {"message": VLLM_DUMP, "type": "Bad Request", "param": "body.seed", "code": 400}, "Invalid value for 'seed': Input should be a valid integer.", "seed"),
        (400, {"message": "see http://127.0.0.1:8000/x", "type": "B", "param": None, "code": 400}, "see <address>", None),
    ],
    ids=["plain", "422", "dump", "address"],
)  # fmt: skip
async def test_engine_refuses(
    served: Served, stream: bool, status: int, error: dict[str, Any], message: str, param: str | None
) -> None:
    fake = {"status": status, "body": json.dumps({"error": error})}
    answer = await served.gateway.chat("swordfish", stream=stream, fake=fake)
    judge(answer, status, "invalid_value", param)
    assert answer.error["message"] == message


async def test_model_without_that_endpoint(served: Served) -> None:
    """A chat model asked for embeddings, and the other way round."""
    for path, model in (("/v1/embeddings", "tiny"), (CHAT, "vec")):
        answer = await served.gateway.post(path, {**chat_body(), **EMBED, "model": model})
        judge(answer, 404, None, "model")


# ---- Anthropic's shape


@pytest.mark.parametrize(
    ("body", "key", "status", "kind"),
    [
        ({}, None, 401, "authentication_error"),
        ({"model": "nobody"}, KEY, 404, "not_found_error"),
        ({"max_tokens": 0}, KEY, 400, "invalid_request_error"),
        ({"model": "lost"}, KEY, 503, "overloaded_error"),
        ({"fake": {"status": 500}}, KEY, 502, "api_error"),
    ],
    ids=str,
)
async def test_messages_speak_anthropic(
    served: Served, body: dict[str, Any], key: str | None, status: int, kind: str
) -> None:
    body = {**chat_body(), "max_tokens": 5, **body}
    answer = await served.gateway.post("/v1/messages", body, None, {} if key is None else {"x-api-key": key})
    assert answer.status == status
    assert answer.json.keys() == {"type", "error"}
    assert answer.json["type"] == "error"
    assert answer.error.keys() == {"type", "message"}
    assert answer.error["type"] == kind


async def test_messages_too_large_speak_anthropic(served: Served) -> None:
    answer = await served.gateway.post("/v1/messages/count_tokens", b" " * (5 << 20))
    assert answer.status == 413
    assert answer.error["type"] == "request_too_large"


# ---- what clients make of it


async def test_openai_sdk_raises_the_right_class(served: Served) -> None:
    async def ask(key: str = KEY, **fields: Any) -> None:
        async with AsyncOpenAI(base_url=f"{served.gateway.url}/v1", api_key=key, max_retries=0) as client:
            asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}
            await client.chat.completions.create(**asked)

    with pytest.raises(openai.AuthenticationError) as wrong_key:
        await ask("sk-wrong")
    assert wrong_key.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as no_model:
        await ask(model="nobody")
    assert (no_model.value.code, no_model.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        await ask(temperature=9)
    assert bad.value.param == "temperature"
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(openai.InternalServerError) as down:
        await ask(model="lost")
    assert (down.value.status_code, down.value.code) == (503, "no_healthy_engine")
    with pytest.raises(openai.BadRequestError):
        await ask(extra_body={"fake": {"status": 400}})
    with pytest.raises(openai.UnprocessableEntityError):
        await ask(extra_body={"fake": {"status": 422}})


async def test_openai_sdk_waits_as_long_as_it_is_told(engine: FakeEngine, start: Start) -> None:
    gateway = await start(engine.url, limits="{requests_per_minute: 1}")
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0) as client:
        asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        await client.chat.completions.create(**asked)
        with pytest.raises(openai.RateLimitError) as limited:
            await client.chat.completions.create(**asked)
    assert limited.value.code == "rate_limit_exceeded"
    assert limited.value.type == "requests"
    assert 0 < int(limited.value.response.headers["retry-after-ms"]) <= 60_500


CURL = [
    (["-X", "POST", "{url}/v1/chat/completions"], 401, "invalid_api_key"),
    (["{key}", "{url}/v1/chat/completions"], 405, "method_not_allowed"),
    (["{key}", "{url}/v1/nothing"], 404, "unknown_url"),
    (["{key}", "--path-as-is", "{url}/v1/../metrics"], 404, "unknown_url"),
    (["{key}", "-d", "{{}}", "{url}/v1/chat/completions"], 415, "unsupported_media_type"),
    (["{key}", "-H", "content-type: application/json", "-d", "{{", "{url}/v1/chat/completions"], 400, "invalid_json"),
    (["{key}", "--json", '{{"model":"tiny"}}', "{url}/v1/chat/completions"], 400, "missing_required_parameter"),
]


@pytest.mark.parametrize(("arguments", "status", "code"), CURL, ids=[row[2] for row in CURL])
async def test_curl(served: Served, arguments: list[str], status: int, code: str) -> None:
    filled = [word.format(url=served.gateway.url, key=f"-HAuthorization: Bearer {KEY}") for word in arguments]
    process = await asyncio.create_subprocess_exec(
        "curl", "-q", "-sS", "-w", "\n%{http_code}", *filled, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    body, _, shown = out.rpartition(b"\n")
    assert int(shown) == status
    assert json.loads(body)["error"]["code"] == code


# ---- what is written down


async def test_logs_hold_no_secret(engine: FakeEngine, start: Start) -> None:
    gateway = await start(engine.url)
    await gateway.chat("swordfish", max_tokens=1)
    await gateway.chat("swordfish", temperature="swordfish")
    await gateway.chat("swordfish", fake={"status": 400, "body": json.dumps({"error": {"message": "swordfish"}})})
    await gateway.chat("swordfish", fake={"cut_after": -1})
    await gateway.chat("swordfish", fake={"garbage": True})
    await gateway.chat("swordfish", key="sk-wrong-0123456789")
    entries = await gateway.access_log(6)
    for secret in (KEY, "sk-wrong", "swordfish", "Traceback"):
        assert secret not in json.dumps([entries, gateway.log])
    assert engine.url not in json.dumps(entries)  # the program's own log tells operators where their engines are
    assert [(e["status"], e["code"]) for e in entries] == [
        (200, None),
        (400, "invalid_type"),
        (400, "invalid_value"),
        (502, "engine_failed"),
        (502, "upstream_error"),
        (401, "invalid_api_key"),
    ]


async def test_request_ids(served: Served) -> None:
    """The client's own where it is harmless, else a fresh one; on errors too."""
    mine = await served.gateway.post(CHAT, chat_body(), None, {"x-request-id": "my.id_1-2"})
    assert (mine.status, mine.headers["x-request-id"]) == (401, "my.id_1-2")
    assert (await logged(served.gateway, "my.id_1-2"))["status"] == 401
    for bad in ("a b", "x" * 129, "a\tb", "{}"):
        answer = await served.gateway.post(CHAT, chat_body(max_tokens=1), headers={"x-request-id": bad})
        assert answer.status == 200
        assert answer.headers["x-request-id"] != bad
        assert answer.headers["x-request-id"].startswith("req_")
    listed = await served.gateway.request("GET", "/v1/models", {"x-request-id": "other"})
    assert (listed.status, listed.headers["x-request-id"]) == (401, "other")


async def test_metrics_count_errors_without_new_series(served: Served) -> None:
    gateway: Penstock = served.gateway

    async def count(**labels: str) -> float:
        return await gateway.metric("penstock_requests_total", **labels)

    before = await count(model="other", endpoint=CHAT, status="404")
    for name in ("nobody-1", "nobody-2"):
        await gateway.chat(model=name)

    async def counted() -> bool:
        return await count(model="other", endpoint=CHAT, status="404") == before + 2

    await until(counted)
    assert b"nobody" not in (await gateway.get("/metrics")).body
