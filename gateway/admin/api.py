"""The admin API as one application: its routes, its guard, its errors."""

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from gateway import __version__
from gateway.admin import engines, keys, live, system, usage
from gateway.admin.context import Admin
from gateway.admin.errors import on_duplicate, on_fault, on_gateway_error, on_http_error, on_invalid, on_store_error
from gateway.admin.guard import Guard
from gateway.admin.pulse import Pulse
from gateway.admin.shapes import Figures
from gateway.errors import GatewayError
from gateway.store.base import DuplicateError, StoreError


def make_admin(admin: Admin, pulse: Pulse[Figures]) -> FastAPI:
    """To be mounted at /admin/api."""
    app = FastAPI(
        title="Penstock admin API",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
        middleware=[Middleware(Guard, key=admin.key, keyring=lambda: admin.gateway.policy.keyring)],
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
