"""The admin API as one application: its routes, its guard, its errors."""

from fastapi import FastAPI, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from gateway import __version__
from gateway.admin import engines, keys, live, system, usage
from gateway.admin.context import Admin
from gateway.admin.errors import on_duplicate, on_fault, on_gateway_error, on_http_error, on_invalid, on_store_error
from gateway.admin.guard import Guard, Receive, Scope, Send
from gateway.admin.pulse import Pulse
from gateway.admin.shapes import Failure, Figures
from gateway.errors import GatewayError
from gateway.store.base import DuplicateError, StoreError


class AdminApi:
    """To be mounted at /admin/api. Without an admin key nothing is made: it would cost memory for nothing, until a reload
    brings a key."""

    def __init__(self, admin: Admin, pulse: Pulse[Figures]) -> None:
        self._admin = admin
        self._pulse = pulse
        self._made = _make(admin, pulse) if admin.key.digest is not None else None
        self._guard = Guard(self._inside, admin.key, lambda: admin.gateway.policy.keyring)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._guard(scope, receive, send)

    async def _inside(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._made is None:
            self._made = _make(self._admin, self._pulse)
        await self._made(scope, receive, send)


def _make(admin: Admin, pulse: Pulse[Figures]) -> FastAPI:
    app = FastAPI(
        title="Penstock admin API",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
        # Both for the description alone: the guard has judged before, and errors are made in one place.
        dependencies=[Security(HTTPBearer(auto_error=False, description="The admin_key of the config."))],
        responses={"default": {"model": Failure, "description": "Anything else"}},
        exception_handlers={
            GatewayError: on_gateway_error,
            RequestValidationError: on_invalid,
            StoreError: on_store_error,
            DuplicateError: on_duplicate,
            HTTPException: on_http_error,
            Exception: on_fault,
        },
    )
    app.include_router(system.router(admin))
    app.include_router(keys.router(admin))
    app.include_router(usage.router(admin))
    app.include_router(engines.router(admin))
    app.include_router(live.router(admin, pulse))
    return app
