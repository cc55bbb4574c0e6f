"""The FastAPI application: every route and the order of the middleware, as lists. Runs under any ASGI server."""

import time
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route

from gateway.admin.api import AdminApi
from gateway.admin.context import Admin
from gateway.admin.pulse import Pulse
from gateway.admin.shapes import Figures
from gateway.admin.static import Dashboard, to_dashboard
from gateway.api.inference import InferenceEndpoint
from gateway.api.info import error_response, routes
from gateway.errors import GatewayError, internal
from gateway.policy import Gateway
from gateway.wire.openai import ENDPOINTS

Scope = MutableMapping[str, Any]
Asgi = Callable[[Scope, Any, Any], Awaitable[None]]

NAMES = (b"/v1/models/", b"/admin/api/engines/", b"/admin/api/keys/", b"/admin/api/teams/")
PRIVATE = ("/metrics",)  # these and the admin API are what server.admin_listen moves away


class Console(NamedTuple):
    """The admin API with what its event streams live on."""

    admin: Admin
    pulse: Pulse[Figures]


def unknown_url(method: str, path: str) -> GatewayError:
    shown = path if len(path) <= 100 else path[:100] + "…"
    return GatewayError(404, "unknown_url", f"Unknown request URL: {method} {shown}. See the README for what there is.")


async def on_http_error(request: Request, exc: Exception) -> Response:
    """What the router itself refuses."""
    assert isinstance(exc, HTTPException)
    headers = exc.headers
    if exc.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allow = (headers or {}).get("Allow", "")
        error = GatewayError(
            405, "method_not_allowed", f"Not allowed: {request.method}. This URL takes {allow or 'other methods'}."
        )
    else:
        error = unknown_url(request.method, request.url.path)
    return error_response(error, headers)


async def on_fault(request: Request, exc: Exception) -> Response:
    """A fault of our own; it is logged with its trace by the server."""
    return error_response(internal())


class ExactPaths:
    """Refuses paths that only decoding would turn into one of ours; a name in a path may need it, nothing else does."""

    def __init__(self, app: Asgi) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            raw = scope.get("raw_path")
            path = scope["path"]
            if raw is not None and raw != path.encode() and not (raw.startswith(NAMES) and path.isprintable()):
                await error_response(unknown_url(scope["method"], raw.decode("ascii", "replace")))(scope, receive, send)
                return
        await self.app(scope, receive, send)


class PublicCORS:
    """CORS for clients' endpoints, as the policy has it: no other origin has any business with the admin API."""

    def __init__(self, app: Asgi, gateway: Gateway) -> None:
        self.app = app
        self._gateway = gateway
        self._origins: frozenset[str] = frozenset()
        self._public = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        origins = self._gateway.policy.cors_origins
        if origins != self._origins:
            self._origins = origins
            self._public = self.app
            if origins:
                cors = CORSMiddleware(self.app, allow_origins=sorted(origins), allow_methods=["*"], allow_headers=["*"])
                self._public = cors
        app = self.app if scope["type"] == "http" and scope["path"].startswith("/admin") else self._public
        await app(scope, receive, send)


def admin_routes(console: Console) -> list[BaseRoute]:
    key = console.admin.key
    return [
        Mount("/admin/api", AdminApi(console.admin, console.pulse)),
        Route("/admin", to_dashboard(key), methods=["GET"]),
        Mount("/admin", Dashboard(key)),
    ]


def make_app(gateway: Gateway, console: Console | None = None) -> FastAPI:
    """The application around what `runtime` has built: the whole of it, or without `console` what is for the public
    where admin API and metrics have a port of their own."""
    plain = [(path, h) for path, h in routes(gateway, int(time.time())) if console is not None or path not in PRIVATE]
    app = FastAPI(
        title="Penstock",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        routes=[
            *(Route(e.path, InferenceEndpoint(gateway, e), methods=["POST"]) for e in ENDPOINTS),
            *(Route(path, handler, methods=["GET"]) for path, handler in plain),
            *(admin_routes(console) if console is not None else ()),
        ],
        middleware=[
            Middleware(ExactPaths),
            Middleware(PublicCORS, gateway=gateway),
        ],
        exception_handlers={HTTPException: on_http_error, Exception: on_fault},
    )
    app.state.gateway = gateway
    return app
