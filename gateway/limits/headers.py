"""What limits tell a client: x-ratelimit-* on every reply."""

import math

from gateway.limits.base import Standing


def limit_headers(standing: Standing) -> bytes:
    """Limit, remaining and reset of each per-minute limit there is, as whole lines."""
    requests, tokens = standing
    found = b""
    if requests is not None:
        limit, remaining, reset = requests
        found = (
            b"x-ratelimit-limit-requests: %d\r\nx-ratelimit-remaining-requests: %d\r\nx-ratelimit-reset-requests: %b\r\n"
            % (limit, remaining, _known(math.ceil(reset * 1000)))
        )
    if tokens is not None:
        limit, remaining, reset = tokens
        found += (
            b"x-ratelimit-limit-tokens: %d\r\nx-ratelimit-remaining-tokens: %d\r\nx-ratelimit-reset-tokens: %b\r\n"
            % (limit, remaining, _known(math.ceil(reset * 1000)))
        )
    return found


_durations: dict[int, bytes] = {}


def _known(ms: int) -> bytes:
    """After an admission a reset lies between 60 and 60.5 s: a few hundred values come again and again."""
    found = _durations.get(ms)
    if found is None:
        if len(_durations) >= 1024:
            _durations.clear()
        found = _durations[ms] = _duration(ms)
    return found


def _duration(ms: int) -> bytes:
    """As Go prints a duration and OpenAI sends it: 12ms, 6s, 6.5s, 1m0s."""
    if ms < 1000:
        return b"%dms" % ms if ms else b"0s"
    minutes, ms = divmod(ms, 60_000)
    seconds, ms = divmod(ms, 1000)
    fraction = f".{ms:03}".rstrip("0").rstrip(".")
    return (f"{minutes}m" if minutes else "").encode() + f"{seconds}{fraction}s".encode()
