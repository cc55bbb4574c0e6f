"""Who may call the admin API, and what every call of it has in common. Around the whole of it, so that no route can be
forgotten: what is not let in here is not even known to exist."""

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from gateway.admin.errors import error_response, unknown_url
from gateway.auth import Keyring, credential, refuse
from gateway.errors import GatewayError
from gateway.keys import digest

MAX_BODY: Final = 1 << 20  # bytes

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]


class AdminKey:
    """The one key that opens the admin API. A reload may replace it."""

    def __init__(self, digest: bytes | None) -> None:
        self.digest = digest  # None: the admin API is off

    def judge(self, authorization: tuple[bytes, ...], api_key: tuple[bytes, ...], keyring: Keyring) -> None:
        """Raises `GatewayError`: 401 for who is unknown, 403 for a client's key. Takes the same time for every wrong key."""
        given = credential(authorization, api_key)
        if given is None or self.digest is None:
            refuse()
        if hmac.compare_digest(digest(given), self.digest):
            return
        if keyring.anonymous is None:
            keyring.identify(authorization, api_key)
            raise GatewayError(
                403,
                "permission_denied",
                "This key is a client's; the admin API takes the admin key alone.",
            )
        refuse()


class Guard:
    """The ASGI application around the admin API."""

    def __init__(self, app: Asgi, key: AdminKey, keyring: Callable[[], Keyring]) -> None:
        self._app = app
        self._key = key
        self._keyring = keyring  # the current one

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._let_in(scope)
        except GatewayError as error:
            await error_response(error)(scope, receive, private(send))
            return
        await self._app(as_get(scope), bounded(receive, MAX_BODY), private(send))

    def _let_in(self, scope: Scope) -> None:
        if self._key.digest is None:
            raise unknown_url(scope["method"], scope["path"])
        self._key.judge(_all(scope, b"authorization"), _all(scope, b"x-api-key"), self._keyring())
        if scope["method"] in ("POST", "PATCH", "PUT") and not _is_json(scope):
            raise GatewayError(
                415,
                "unsupported_media_type",
                "The body must be JSON: send 'Content-Type: application/json', without a Content-Encoding.",
            )


def _all(scope: Scope, name: bytes) -> tuple[bytes, ...]:
    return tuple(value for key, value in scope["headers"] if key == name)


def _is_json(scope: Scope) -> bool:
    """A request without a body need not say of what type it is."""
    length, chunked = _all(scope, b"content-length"), _all(scope, b"transfer-encoding")
    if not chunked and (not length or length == (b"0",)):
        return True
    kinds = [value.partition(b";")[0].strip().lower() for value in _all(scope, b"content-type")]
    encodings = [value.strip().lower() for value in _all(scope, b"content-encoding")]
    return kinds == [b"application/json"] and all(value in (b"", b"identity") for value in encodings)


def as_get(scope: Scope) -> Scope:
    """HEAD works wherever GET does; the server leaves the body out."""
    return {**scope, "method": "GET", "penstock.head": True} if scope["method"] == "HEAD" else scope


def bounded(receive: Receive, most: int) -> Receive:
    """The same body, of which no more than `most` bytes are read."""
    size = 0

    async def limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > most:
            raise GatewayError(413, "request_too_large", f"The body is too large: at most {most} bytes are accepted.")
        return message

    return limited


def private(send: Send) -> Send:
    """No cache keeps an answer, no browser guesses at it."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [field for field in message.get("headers", ()) if field[0] != b"cache-control"]
            headers += [
                (b"cache-control", b"no-store"),
                (b"x-content-type-options", b"nosniff"),
                (b"referrer-policy", b"no-referrer"),
                (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
            ]
            message = {**message, "headers": headers}
        await send(message)

    return sent
