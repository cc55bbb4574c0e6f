"""The dashboard's files. What it may load and run is said here, in headers that no model output can talk its way around."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from gateway.admin.errors import error_response, unknown_url
from gateway.admin.guard import AdminKey

Handler = Callable[[Request], Awaitable[Response]]

FOLDER: Final = Path(__file__).parent / "dashboard"

HEADERS: Final = {
    "content-security-policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' data:",
            "connect-src 'self'",
            "font-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # an update must not meet an old page: each use asks whether it changed
}


class Dashboard(StaticFiles):
    """Serves `FOLDER` under /admin/, while there is an admin key."""

    def __init__(self, key: AdminKey) -> None:
        super().__init__(directory=FOLDER, html=True, check_dir=False)
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._key.digest is None:
            await error_response(unknown_url(scope["method"], scope["path"]))(scope, receive, send)
            return
        await super().__call__(scope, receive, send)

    async def get_response(self, path: str, scope: Scope) -> Response:
        if not scope["path"].endswith("/admin/" + path.removeprefix(".")):
            raise HTTPException(404)  # a file has one path, as everything else
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def to_dashboard(key: AdminKey) -> Handler:
    """For /admin without its slash."""

    async def redirect(request: Request) -> Response:
        if key.digest is None:
            return error_response(unknown_url(request.method, request.url.path))
        return RedirectResponse("admin/", 308)  # relative, so that it is right behind a prefix too

    return redirect
