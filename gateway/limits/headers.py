"""What limits tell a client: x-ratelimit-* on every reply."""

import math
from functools import lru_cache
from typing import TypeAlias

from gateway.limits.base import Standing

Headers: TypeAlias = list[tuple[bytes, bytes]]


def limit_headers(standing: Standing) -> Headers:
    """Limit, remaining and reset of each per-minute limit there is."""
    requests, tokens = standing
    found: Headers = []
    if requests is not None:
        limit, remaining, reset = requests
        found += (
            (b"x-ratelimit-limit-requests", b"%d" % limit),
            (b"x-ratelimit-remaining-requests", b"%d" % remaining),
            (b"x-ratelimit-reset-requests", _duration(math.ceil(reset * 1000))),
        )
    if tokens is not None:
        limit, remaining, reset = tokens
        found += (
            (b"x-ratelimit-limit-tokens", b"%d" % limit),
            (b"x-ratelimit-remaining-tokens", b"%d" % remaining),
            (b"x-ratelimit-reset-tokens", _duration(math.ceil(reset * 1000))),
        )
    return found


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
