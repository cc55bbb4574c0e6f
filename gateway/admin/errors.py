"""What the admin API refuses, in the shape of every other error of the gateway (CONTRACT.md §6)."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from gateway.errors import SERVER, Fault, GatewayError, internal
from gateway.wire import errors as wire_errors

_CODES: Final = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unsupported_parameter",
    "json_invalid": "invalid_json",
    "greater_than": "integer_below_min_value",
    "greater_than_equal": "integer_below_min_value",
    "less_than": "integer_above_max_value",
    "less_than_equal": "integer_above_max_value",
    "too_short": "empty_array",
    "too_long": "array_above_max_length",
    "string_too_long": "string_above_max_length",
}
_SOURCES: Final = ("body", "query", "path", "header")
_SHOWN: Final = 100  # characters of a name that a client chose


def error_response(error: GatewayError) -> Response:
    response = Response(wire_errors.body(error), error.status, media_type="application/json")
    response.raw_headers += wire_errors.headers(error)
    return response


def unknown_url(method: str, path: str) -> GatewayError:
    return GatewayError(
        404,
        "unknown_url",
        f"Unknown request URL: {method} {printable(path)}. GET /admin/api/openapi.json lists what there is.",
    )


def not_found(what: str, name: str) -> GatewayError:
    return GatewayError(404, "not_found", f"There is no {what} '{printable(name)}'.", param="id")


def printable(text: str, longest: int = _SHOWN) -> str:
    """Safe in JSON, in a terminal and in a log, whatever a client sent."""
    cut = text if len(text) <= longest else text[:longest] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in cut)


def place(loc: Sequence[str | int]) -> str | None:
    """Where pydantic found a fault, as `param`: `limits.requests_per_minute`, `budgets[0].amount`."""
    parts = list(loc[1:] if loc and loc[0] in _SOURCES else loc)
    named = "".join(f"[{part}]" if isinstance(part, int) else f".{printable(part)}" for part in parts)
    return named.removeprefix(".") or None


def from_fault(fault: Mapping[str, Any]) -> GatewayError:
    """One fault as pydantic tells it. Its input is never repeated: it may be a secret in the wrong place."""
    kind = str(fault["type"])
    if kind == "json_invalid":
        return GatewayError(400, "invalid_json", "The body is not valid JSON.")
    where = place(fault["loc"])
    if where is None:
        if kind == "missing":
            return GatewayError(400, "invalid_json", "The request must have a body: a JSON object.")
        if kind == "value_error":
            return GatewayError(400, "invalid_value", f"Invalid request: {_words(fault)}.")
        return GatewayError(400, "invalid_json", "The body must be a JSON object.")
    code = _CODES.get(kind) or ("invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value")
    if any(isinstance(bound, float) for bound in (fault.get("ctx") or {}).values()):
        code = code.replace("integer", "decimal")
    if kind == "missing":
        message = f"Missing required parameter: '{where}'."
    elif kind == "extra_forbidden":
        message = f"Unknown parameter: '{where}'."
    else:
        message = f"Invalid value for '{where}': {_words(fault)}."
    return GatewayError(400, code, message, param=where)


def _words(fault: Mapping[str, Any]) -> str:
    text = str(fault["msg"]).removeprefix("Value error, ").rstrip(".")
    return text[:1].lower() + text[1:]


async def on_gateway_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, GatewayError)
    return error_response(exc)


async def on_store_error(request: Request, exc: Exception) -> Response:
    """Requests of clients go on as ever meanwhile."""
    return error_response(
        GatewayError(
            503,
            "store_unavailable",
            "The store cannot be reached or written to at the moment; nothing has changed. Please try again.",
            type=SERVER,
            fault=Fault.GATEWAY,
            retry_after=5,
        )
    )


async def on_duplicate(request: Request, exc: Exception) -> Response:
    what = "team" if "/teams" in request.url.path else "key"
    return error_response(GatewayError(409, "name_taken", f"There is a {what} of that name already.", param="name"))


async def on_invalid(request: Request, exc: Exception) -> Response:
    """The first fault: one `param` is all that the shape has room for."""
    assert isinstance(exc, RequestValidationError)
    return error_response(from_fault(exc.errors()[0]))


async def on_http_error(request: Request, exc: Exception) -> Response:
    """What the router, or the reading of a body, refuses."""
    assert isinstance(exc, HTTPException)
    if isinstance(exc.__cause__, GatewayError):
        return error_response(exc.__cause__)
    if exc.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allow = (exc.headers or {}).get("Allow", "")
        error = GatewayError(
            405,
            "method_not_allowed",
            f"Not allowed: {request.method}. This URL takes {allow or 'other methods'}.",
            headers=(("allow", allow),) if allow else (),
        )
    elif exc.status_code == HTTPStatus.BAD_REQUEST:
        error = GatewayError(400, "invalid_json", "The body is not JSON that can be read.")
    else:
        error = unknown_url(request.method, request.url.path)
    return error_response(error)


async def on_fault(request: Request, exc: Exception) -> Response:
    """A fault of our own; it is logged with its trace by the server."""
    return error_response(internal())
