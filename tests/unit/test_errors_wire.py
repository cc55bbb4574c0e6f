"""Errors over the wire: ours in each dialect, and an engine's turned into ours."""

import json
from typing import Any

import pytest

from gateway import errors
from gateway.errors import Fault, GatewayError
from gateway.limits.base import Budget, Refused, Standing
from gateway.wire import errors as wire
from gateway.wire.openai import ENDPOINTS

CHAT = next(e for e in ENDPOINTS if e.path == "/v1/chat/completions")
TEXT = next(e for e in ENDPOINTS if e.path == "/v1/completions")
MESSAGES = next(e for e in ENDPOINTS if e.path == "/v1/messages")
RESPONSES = next(e for e in ENDPOINTS if e.path == "/v1/responses")
EMBEDDINGS = next(e for e in ENDPOINTS if e.path == "/v1/embeddings")

ERROR = GatewayError(400, "invalid_value", "No.", param="n")


def vllm(message: str, kind: str = "BadRequestError", param: str | None = None, code: int = 400) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def dump(loc: str, message: str) -> str:
    fault = f"{{'type': 'x', 'loc': {loc}, 'msg': {message}, 'input': 'SECRET'}}"
    return f"1 validation error:\n  {fault}"


# ---- ours


def test_bodies() -> None:
    ours = {"message": "No.", "type": "invalid_request_error", "param": "n", "code": "invalid_value"}
    for endpoint in (None, CHAT, RESPONSES):
        assert json.loads(wire.body(ERROR, endpoint)) == {"error": ours}
    anthropic = {"type": "error", "error": {"type": "invalid_request_error", "message": "No."}}
    assert json.loads(wire.body(ERROR, MESSAGES)) == anthropic


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (408, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (502, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
    ],
)
def test_anthropic_types(status: int, kind: str) -> None:
    assert json.loads(wire.body(GatewayError(status, None, "x"), MESSAGES))["error"]["type"] == kind


def test_events() -> None:
    assert wire.event(ERROR, CHAT) == b"data: " + wire.body(ERROR) + b"\n\n"
    assert wire.event(ERROR, MESSAGES) == b"event: error\ndata: " + wire.body(ERROR, MESSAGES) + b"\n\n"
    name, data, *_ = wire.event(ERROR, RESPONSES).split(b"\n")
    assert name == b"event: error"
    assert json.loads(data[6:]) == {"type": "error", "code": "invalid_value", "message": "No.", "param": "n"}


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (GatewayError(400, None, "x"), []),
        (GatewayError(429, None, "x", retry_after=0.0001), [(b"retry-after", b"1"), (b"retry-after-ms", b"1")]),
        (GatewayError(429, None, "x", retry_after=1.0001), [(b"retry-after", b"2"), (b"retry-after-ms", b"1001")]),
        (GatewayError(429, None, "x", should_retry=False), [(b"x-should-retry", b"false")]),
        (GatewayError(503, None, "x", should_retry=True), [(b"x-should-retry", b"true")]),
        (GatewayError(405, None, "x", headers=(("allow", "GET"),)), [(b"allow", b"GET")]),
    ],
)
def test_headers(error: GatewayError, headers: list[tuple[bytes, bytes]]) -> None:
    assert wire.headers(error) == headers


@pytest.mark.parametrize(
    ("limit", "retry_after", "kind", "should_retry", "says"),
    [
        ("requests", 3.0, "requests", None, "at most 7 requests per minute"),
        ("tokens", 3.0, "tokens", None, "at most 7 tokens per minute"),
        ("tokens", None, "tokens", False, "larger than the limit itself"),
        ("parallel_requests", 1.0, "requests", None, "at most 7 requests may be open at once"),
    ],
)
def test_over_limit(limit: Any, retry_after: float | None, kind: str, should_retry: bool | None, says: str) -> None:
    error = wire.over_limit(Refused(limit, retry_after, Standing(None, None), 7))
    assert (error.status, error.code, error.type) == (429, "rate_limit_exceeded", kind)
    assert (error.retry_after, error.should_retry) == (retry_after, should_retry)
    assert says in error.message


# ---- an engine's

LONG = "This model's maximum context length is 10 tokens. However, your prompt contains at least 11 input tokens."
FROM_ENGINE = [
    # its own words and field
    (400, vllm("No parser.", param="tools"), CHAT, 400, "invalid_value", "tools", "No parser."),
    (422, vllm("Odd."), CHAT, 422, "invalid_value", None, "Odd."),
    (400, {"detail": "There was an error parsing the body"}, CHAT, 400, "invalid_value", None, "There was an error parsing the body"),
    (400, {"error": "just words"}, CHAT, 400, "invalid_value", None, "just words"),
    (400, {"type": "error", "error": {"type": "invalid_request_error", "message": "Odd."}}, MESSAGES, 400, "invalid_value", None, "Odd."),
    (413, vllm("Large."), CHAT, 413, "request_too_large", None, "Large."),
    (429, vllm("Slow."), CHAT, 429, "rate_limit_exceeded", None, "Slow."),
    (418, vllm("Tea."), CHAT, 418, None, None, "Tea."),
    # no words
    (400, b"<html>", CHAT, 400, "invalid_value", None, "The engine did not accept the request (status 400)."),
    (400, [1], CHAT, 400, "invalid_value", None, "The engine did not accept the request (status 400)."),
    (400, {"error": {"message": 5, "type": 5, "param": 5}}, CHAT, 400, "invalid_value", None, "The engine did not accept the request (status 400)."),
    # a dump of pydantic's faults, in both its forms
    (400, vllm(dump("('body', 'max_tokens')", "'Input should be an integer'"), "Bad Request"), CHAT, 400, "invalid_value", "max_tokens", "Invalid value for 'max_tokens': Input should be an integer."),
    (400, vllm(dump("'body.max_tokens'", "'Input should be an integer'"), "Bad Request", "body.max_tokens"), CHAT, 400, "invalid_value", "max_tokens", "Invalid value for 'max_tokens': Input should be an integer."),
    (400, vllm(dump("('body', 'messages', 0, 'ChatMessage', 'content')", '"it\'s no text"'), "Bad Request"), CHAT, 400, "invalid_value", "messages[0].ChatMessage.content", "Invalid value for 'messages[0].ChatMessage.content': it's no text."),
    (400, vllm(dump("'body'", "'Value error.'"), "Bad Request"), CHAT, 400, "invalid_value", None, "Value error."),
    (400, vllm("Odd {'input': 'SECRET'}"), CHAT, 400, "invalid_value", None, "The engine did not accept the request."),
    # too long
    (400, vllm(LONG, param="input_tokens"), CHAT, 400, "context_length_exceeded", "messages", LONG),
    (400, vllm(LONG), TEXT, 400, "context_length_exceeded", "prompt", LONG),
    (400, vllm("The prompt is longer than the maximum model length of 5."), EMBEDDINGS, 400, "context_length_exceeded", "input", "The prompt is longer than the maximum model length of 5."),
    (400, vllm("max_tokens=9 cannot be greater than max_model_len=5.", param="max_tokens"), CHAT, 400, "invalid_value", "max_tokens", "max_tokens=9 cannot be greater than max_model_len=5."),
    # what must not leave
    (400, vllm("see http://10.0.0.5:8000/x, or 10.0.0.5:8000 or 10.0.0.5"), CHAT, 400, "invalid_value", None, "see <address> or <address> or <address>"),
    (400, vllm("x" * 5000), CHAT, 400, "invalid_value", None, "x" * 1000 + "…"),
    # what the client cannot have caused
    (401, {"error": "Unauthorized"}, CHAT, 502, "upstream_error", None, "The engine answered with an error (status 401)."),
    (403, {"error": "SECRET"}, CHAT, 502, "upstream_error", None, "The engine answered with an error (status 403)."),
    (404, vllm("The model `SECRET` does not exist.", "NotFoundError", "model", 404), CHAT, 502, "upstream_error", None, "The engine answered with an error (status 404)."),
    (407, b"", CHAT, 502, "upstream_error", None, "The engine answered with an error (status 407)."),
    (500, vllm("SECRET", "InternalServerError", code=500), CHAT, 502, "upstream_error", None, "The engine answered with an error (status 500)."),
    (302, b"", CHAT, 502, "upstream_error", None, "The engine answered with an error (status 302)."),
    (201, b"{}", CHAT, 502, "upstream_error", None, "The engine answered with an error (status 201)."),
    (503, vllm("SECRET", code=503), CHAT, 503, "overloaded", None, "The engines of the model 'tiny' are overloaded. Please try again."),
    # it has no such endpoint
    (404, {"detail": "Not Found"}, EMBEDDINGS, 404, None, "model", "The model 'tiny' does not support the endpoint /v1/embeddings."),
    (405, {"detail": "Method Not Allowed"}, EMBEDDINGS, 404, None, "model", "The model 'tiny' does not support the endpoint /v1/embeddings."),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body", "endpoint", "becomes", "code", "param", "message"), FROM_ENGINE)
def test_from_engine(
    status: int, body: Any, endpoint: Any, becomes: int, code: str | None, param: str | None, message: str
) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    error = wire.from_engine(status, raw, endpoint, "tiny")
    assert (error.status, error.code, error.param, error.message) == (becomes, code, param, message)
    assert error.fault is (Fault.ENGINE if becomes in (502, 503) else Fault.CLIENT)
    assert (error.retry_after is not None) == (becomes == 503)
    expected = "server_error" if becomes in (502, 503) else "requests" if becomes == 429 else "invalid_request_error"
    assert error.type == expected


@pytest.mark.parametrize(
    ("payload", "status", "code"),
    [
        (vllm("EngineCore died", "InternalServerError", code=500), 502, "engine_failed"),
        (vllm("Odd.", param="stop", code=400), 400, "invalid_value"),
        ({"type": "error", "error": {"type": "internal_error", "message": "x"}}, 502, "engine_failed"),
        ({"error": "x"}, 502, "engine_failed"),
        (b"nonsense", 502, "engine_failed"),
        (b"[]", 502, "engine_failed"),
    ],
)
def test_from_engine_event(payload: Any, status: int, code: str) -> None:
    raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    error = wire.from_engine_event(raw, CHAT, "tiny")
    assert (error.status, error.code) == (status, code)


def test_what_stands_ready() -> None:
    """The errors of the contract that are no client's fault."""
    table = {
        errors.no_healthy_engine("tiny"): (503, "no_healthy_engine"),
        errors.engine_failed(): (502, "engine_failed"),
        errors.EngineStalledError(): (502, "engine_failed"),
        errors.upstream_error(): (502, "upstream_error"),
        errors.timeout(): (504, "timeout"),
        errors.draining(): (503, "draining"),
        errors.internal(): (500, "internal_error"),
    }
    for error, (status, code) in table.items():
        assert (error.status, error.code, error.type) == (status, code, "server_error")
        assert error.fault is not Fault.CLIENT
        assert (error.retry_after is not None) == (status == 503)
        assert code in repr(error)


@pytest.mark.parametrize(
    ("budget", "retry_after", "resets_at", "of_team", "message"),
    [
        (
            Budget(1000, "tokens", "day"),
            None,
            1_795_564_800.0,
            False,
            "The key's budget of 1000 tokens for this day is used up. It begins anew at 2026-11-25T00:00:00Z.",
        ),
        (Budget(2_500_000, "money", "total"), None, None, True, "The team's budget of 2.5 is used up."),
        (
            Budget(7, "tokens", "month"),
            1.0,
            1_796_083_200.0,
            False,
            "The key's budget of 7 tokens for this month is held by requests that are still open. Please try again later.",
        ),
    ],
)
def test_over_budget(
    budget: Budget, retry_after: float | None, resets_at: float | None, of_team: bool, message: str
) -> None:
    refused = Refused(
        "budget",
        retry_after,
        Standing(None, None),
        budget.amount,
        budget=budget,
        resets_at=resets_at,
        of_team=of_team,
    )
    error = wire.over_limit(refused)
    assert (error.status, error.type, error.code) == (429, "insufficient_quota", "insufficient_quota")
    assert error.message == message
    assert error.retry_after == retry_after
    assert error.should_retry is (None if retry_after else False)


def test_a_team_s_limit_is_told_as_the_team_s() -> None:
    error = wire.over_limit(Refused("tokens", 5.0, Standing(None, None), 7, of_team=True))
    assert error.message == "Rate limit reached: at most 7 tokens per minute in your team. Please try again later."
