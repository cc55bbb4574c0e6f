"""From a request's raw headers to a `Head`, which is what both doors do first; and what a head alone rules out."""

import re
import time
from collections.abc import Iterable
from random import getrandbits
from typing import Final

from gateway.errors import GatewayError
from gateway.types import Endpoint, Head

REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9_.-]{1,128}")


def request_id(given: bytes | None) -> str:
    """The client's own where it is harmless, else a fresh one."""
    if given is not None and REQUEST_ID.fullmatch(given):
        return given.decode()
    return f"req_{getrandbits(128):032x}"  # unique; nothing hangs on its being unguessable


def _whole_number(value: bytes) -> int | None:
    return int(value) if value.isdigit() and len(value) < 16 else None


def make_head(endpoint: Endpoint, headers: Iterable[tuple[bytes, bytes]], client: str) -> Head:
    """`headers` have names in lower case. Pure but for the clock and a fresh request id."""
    given_id = length = retries = None
    media = encoding = b""
    authorization: tuple[bytes, ...] = ()
    api_key: tuple[bytes, ...] = ()
    for name, value in headers:
        if name == b"authorization":
            authorization = (*authorization, value)
        elif name == b"content-type":
            media = value
        elif name == b"content-length":
            length = _whole_number(value)
        elif name == b"x-api-key":
            api_key = (*api_key, value)
        elif name == b"x-request-id":
            given_id = value
        elif name == b"content-encoding":
            encoding = value
        elif name == b"x-stainless-retry-count":
            retries = _whole_number(value)
    return Head(
        endpoint,
        request_id(given_id),
        authorization,
        api_key,
        media,
        encoding.strip().lower(),
        length,
        retries,
        client,
        time.monotonic(),
    )


def judge_head(head: Head, max_body_bytes: int) -> None:
    """What the headers alone rule out. Raises `GatewayError`."""
    media = head.content_type.partition(b";")[0].strip().lower()
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
