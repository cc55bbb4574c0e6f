"""Errors over the wire: ours as bodies and headers, and an engine's turned into ours."""

import math
import re
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from gateway import errors
from gateway.errors import INVALID, GatewayError
from gateway.limits.base import Budget, Refused
from gateway.types import Endpoint, Headers
from gateway.wire import sse

MAX_MESSAGE: Final = 1000  # characters of an engine's message that are passed on

ANTHROPIC_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def _object(error: GatewayError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def _anthropic(error: GatewayError) -> dict[str, Any]:
    kind = ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def body(error: GatewayError, endpoint: Endpoint | None = None) -> bytes:
    """The answer's body, in the shape that the endpoint's clients read."""
    return orjson.dumps(_anthropic(error) if endpoint and endpoint.dialect == "anthropic" else _object(error))


def event(error: GatewayError, endpoint: Endpoint) -> bytes:
    """The event that ends a stream after a failure: the one ending that every SDK reports (facts: sse.md §1)."""
    if endpoint.dialect == "anthropic":
        return sse.event(orjson.dumps(_anthropic(error)), b"error")
    if endpoint.dialect == "responses":
        return sse.event(
            orjson.dumps({"type": "error", "code": error.code, "message": error.message, "param": error.param}),
            b"error",
        )
    return sse.event(orjson.dumps(_object(error)))


def headers(error: GatewayError) -> Headers:
    """What an error adds to a reply's headers: when to come back, and whether to."""
    found: Headers = [(name.encode(), value.encode()) for name, value in error.headers]
    if error.retry_after is not None:
        found.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after))))
        found.append((b"retry-after-ms", b"%d" % max(1, math.ceil(error.retry_after * 1000))))
    if error.should_retry is not None:
        found.append((b"x-should-retry", b"true" if error.should_retry else b"false"))
    return found


def over_limit(refused: Refused) -> GatewayError:
    """A limiter's verdict as an answer."""
    if refused.budget is not None:
        return _over_budget(refused, refused.budget)
    where = " in your team" if refused.of_team else ""
    if refused.limit == "parallel_requests":
        what = f"at most {refused.allowed} requests{where} may be open at once"
    else:
        what = f"at most {refused.allowed} {refused.limit} per minute{where}"
    for_good = refused.retry_after is None
    hint = "This prompt is larger than the limit itself." if for_good else "Please try again later."
    return GatewayError(
        429,
        "rate_limit_exceeded",
        f"Rate limit reached: {what}. {hint}",
        type="tokens" if refused.limit == "tokens" else "requests",
        retry_after=refused.retry_after,
        should_retry=False if for_good else None,
    )


_PERIODS: Final = {"day": " for this day", "month": " for this month", "total": ""}


def _over_budget(refused: Refused, budget: Budget) -> GatewayError:
    whose = "team's" if refused.of_team else "key's"
    amount = f"{budget.amount} tokens" if budget.unit == "tokens" else f"{budget.amount / 1e6:g}"
    if refused.retry_after is not None:
        state = "is held by requests that are still open. Please try again later."
    elif refused.resets_at is None:
        state = "is used up."
    else:
        at = datetime.fromtimestamp(refused.resets_at, UTC)
        state = f"is used up. It begins anew at {at:%Y-%m-%dT%H:%M:%SZ}."
    return GatewayError(
        429,
        "insufficient_quota",
        f"The {whose} budget of {amount}{_PERIODS[budget.period]} {state}",
        type="insufficient_quota",
        retry_after=refused.retry_after,
        should_retry=False if refused.retry_after is None else None,
    )


# ---- an engine's errors


def _engine_error(raw: bytes) -> tuple[str | None, str | None, str | None]:
    """(message, type, param) of an engine's error body, as far as it has them. vLLM has three shapes of it."""
    try:
        found = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None, None, None
    if not isinstance(found, dict):
        return None, None, None
    error = found.get("error")
    if isinstance(error, dict):
        message, kind, param = error.get("message"), error.get("type"), error.get("param")
        return (
            message if isinstance(message, str) else None,
            kind if isinstance(kind, str) else None,
            param if isinstance(param, str) else None,
        )
    detail = found.get("detail", error)
    return (detail if isinstance(detail, str) else None), None, None


VALIDATION: Final = re.compile(
    r"'loc': (?:\(([^)]*)\)|'([^']*)'), 'msg': (?:'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\")"
)
"""One fault in a dump of pydantic's errors, which vLLM sends as a message: `loc` is a tuple or, since 0.32, a dotted
path. The dump also repeats the input (a prompt)."""

ADDRESS: Final = re.compile(r"(?:https?://\S+|\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b)")


def _readable(message: str) -> tuple[str, str | None]:
    """An engine's message without what must not leave, and the field that it speaks of, if it is a dump of faults."""
    param = None
    dump = VALIDATION.search(message)
    if dump:
        path = [part.strip().strip("'\"") for part in re.split(r"[,.]", dump[1] or dump[2] or "")]
        names = [part for part in path if part != "body" and (part.isdigit() or part.isidentifier())]
        param = "".join(f"[{n}]" if n.isdigit() else f".{n}" for n in names).lstrip(".") or None
        what = (dump[3] or dump[4] or "not accepted").rstrip(".")
        message = f"Invalid value for '{param}': {what}." if param else f"{what}."
    elif "'input':" in message:
        message = "The engine did not accept the request."
    message = ADDRESS.sub("<address>", message)
    return (message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "…"), param


TOO_LONG: Final = re.compile(
    r"maximum context length|longer than the maximum model length|max_model_len|input_tokens", re.IGNORECASE
)
PROMPT_PARAMS: Final = ("input_tokens", "input_text")  # as vLLM calls a prompt of too many tokens, or characters
CODES: Final = {400: "invalid_value", 413: "request_too_large", 422: "invalid_value", 429: "rate_limit_exceeded"}


def from_engine(status: int, raw: bytes, endpoint: Endpoint, model: str) -> GatewayError:
    """An engine's answer other than success, as a client may see it.

    A client's own mistake keeps its status and message. What the client cannot have caused (the engine's key or
    address is wrong, the engine is broken) becomes ours: 502 or 503.
    """
    message, kind, param = _engine_error(raw)
    if status == 503:
        return errors.overloaded(model)
    if status in (404, 405) and kind is None:
        return GatewayError(
            404,
            None,
            f"The model '{model}' does not support the endpoint {endpoint.path}.",
            param="model",
        )
    if status in (401, 403, 404, 407) or not 400 <= status < 500:
        return errors.upstream_error(f"The engine answered with an error (status {status}).")
    text, named = _readable(message or f"The engine did not accept the request (status {status}).")
    param = named or (param.removeprefix("body.") if param else None)
    code = CODES.get(status)
    if param in PROMPT_PARAMS or (param is None and TOO_LONG.search(text)):
        code, param = "context_length_exceeded", endpoint.prompt_field
    return GatewayError(status, code, text, type="requests" if status == 429 else INVALID, param=param)


def from_engine_event(payload: bytes, endpoint: Endpoint, model: str) -> GatewayError:
    """An error event in an engine's stream. Its own integer code says what it would have been as a status."""
    try:
        error = orjson.loads(payload).get("error")
        code = error.get("code") if isinstance(error, dict) else None
    except (orjson.JSONDecodeError, AttributeError):
        code = None
    if isinstance(code, int) and 400 <= code < 500:
        return from_engine(code, payload, endpoint, model)
    return errors.engine_failed()
