"""What limits tell a client: x-ratelimit-* on every reply."""

import math
from functools import lru_cache
from typing import Final

from gateway.limits.base import Standing


def limit_headers(standing: Standing) -> bytes:
    """Limit, remaining and reset of each per-minute limit there is, as whole lines."""
    requests, tokens = standing
    found = b""
    if requests is not None:
        limit, remaining, reset = requests
        found = _REQUESTS % (limit, remaining, _duration(math.ceil(reset * 1000)))
    if tokens is not None:
        limit, remaining, reset = tokens
        found += _TOKENS % (limit, remaining, _duration(math.ceil(reset * 1000)))
    return found


_LINES: Final = b"x-ratelimit-limit-KIND: %d\r\nx-ratelimit-remaining-KIND: %d\r\nx-ratelimit-reset-KIND: %b\r\n"
_REQUESTS: Final = _LINES.replace(b"KIND", b"requests")
_TOKENS: Final = _LINES.replace(b"KIND", b"tokens")


# After an admission a reset lies between 60 and 60.5 s: a few hundred values come again and again.
@lru_cache(maxsize=1024)
def _duration(ms: int) -> bytes:
    """As Go prints a duration and OpenAI sends it: 12ms, 6s, 6.5s, 1m0s."""
    if ms < 1000:
        return b"%dms" % ms if ms else b"0s"
    minutes, ms = divmod(ms, 60_000)
    seconds, ms = divmod(ms, 1000)
    fraction = f".{ms:03}".rstrip("0").rstrip(".")
    return (f"{minutes}m" if minutes else "").encode() + f"{seconds}{fraction}s".encode()
