"""From a request's raw headers to a `Head`, which is what both doors do first; and what a head alone rules out."""

import re
from collections.abc import Sequence
from secrets import token_hex
from typing import Final

from gateway.errors import GatewayError
from gateway.types import Endpoint, Head

_PROCESS: Final = f"req_{token_hex(10)}"
_LAST: Final = [f"{n:02x}" for n in range(256)]  # digits of an id
REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9_.-]{1,128}")

_prefix = ""  # what 256 ids have in common
_made = 0


def fresh_id() -> str:
    """Unique; nothing hangs on its being unguessable. For one thread."""
    global _prefix, _made  # noqa: PLW0603 - a counter
    last = _made & 255
    if not last:
        _prefix = f"{_PROCESS}{_made >> 8:010x}"
    _made += 1
    return _prefix + _LAST[last]


def request_id(given: bytes | None) -> str | None:
    """The client's own where it is harmless."""
    return given.decode() if given is not None and REQUEST_ID.fullmatch(given) else None


def _whole_number(value: bytes) -> int | None:
    return int(value) if value.isdigit() and len(value) < 16 else None


def all_of(name: bytes, headers: Sequence[tuple[bytes, bytes]]) -> tuple[bytes, ...]:
    return tuple(value for key, value in headers if key == name)


def make_head(endpoint: Endpoint, headers: Sequence[tuple[bytes, bytes]], client: str) -> Head:
    """`headers` have names in lower case. Pure."""
    fields = dict(headers)
    get = fields.get
    authorization, api_key = get(b"authorization"), get(b"x-api-key")
    once = len(fields) == len(headers)
    length, retries = get(b"content-length"), get(b"x-stainless-retry-count")
    return Head(
        endpoint,
        request_id(get(b"x-request-id")),
        () if authorization is None else (authorization,) if once else all_of(b"authorization", headers),
        () if api_key is None else (api_key,) if once else all_of(b"x-api-key", headers),
        get(b"content-type", b""),
        get(b"content-encoding", b"").strip().lower(),
        None if length is None else _whole_number(length),
        None if retries is None else _whole_number(retries),
        client,
    )


def judge_head(head: Head, max_body_bytes: int) -> None:
    """What the headers alone rule out. Raises `GatewayError`."""
    media = head.content_type
    if media != b"application/json":
        media = media.partition(b";")[0].strip().lower()
    if media != b"application/json" or head.content_encoding not in (b"", b"identity"):
        raise GatewayError(
            415,
            "unsupported_media_type",
            "The body must be JSON: send 'Content-Type: application/json', without a Content-Encoding.",
        )
    if head.content_length is not None and head.content_length > max_body_bytes:
        raise too_large(max_body_bytes)


def too_large(most: int) -> GatewayError:
    return GatewayError(413, "request_too_large", f"The body is too large: at most {most} bytes are accepted.")
