"""From a request's raw headers to a `Head`: what both doors do first."""

import re
import secrets
import time
from collections.abc import Iterable
from typing import Final

from gateway.types import Endpoint, Head

REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9_.-]{1,128}")


def request_id(given: bytes | None) -> str:
    """The client's own where it is harmless, else a fresh one."""
    if given is not None and REQUEST_ID.fullmatch(given):
        return given.decode()
    return f"req_{secrets.token_hex(16)}"


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
