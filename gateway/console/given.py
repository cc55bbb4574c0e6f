"""Amounts and times as people type them. Pure, but for the clock, which is passed in."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any, Final

_SPAN: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d|w)", re.ASCII)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_BUDGET: Final = re.compile(r"([\d_]+(?:\.\d+)?)\s*([kMG]?)\s*(tokens|money)\s*/\s*(day|month|total)", re.ASCII)
_SCALE: Final = {"": 1, "k": 1_000, "M": 1_000_000, "G": 1_000_000_000}


def seconds(text: str) -> float:
    """`90`, `90s`, `15m`, `36h`, `7d`, `2w`. Raises ValueError."""
    if re.fullmatch(r"\d+(\.\d+)?", text, re.ASCII):
        return float(text)
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no span of time; expected one like 90s, 15m, 36h, 7d or 2w")
    return float(match[1]) * _SECONDS[match[2]]


def moment(text: str, now: datetime, *, past: bool) -> str:
    """A span as seen from now, a date or a time; as ISO 8601 in UTC. What bears no zone is UTC. Raises ValueError."""
    try:
        at = now + timedelta(seconds=-seconds(text) if past else seconds(text))
    except ValueError:
        try:
            at = datetime.fromisoformat(text)
        except ValueError:
            raise ValueError(
                f"{text!r} is no time; expected a date (2026-11-24), a time (2026-11-24T10:00:00Z) or a span (7d, 36h)"
            ) from None
    except OverflowError:
        raise ValueError(f"{text!r} is too far away") from None
    at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def budget(text: str) -> dict[str, Any]:
    """`5M tokens/month`, `25 money/day`, `1000000 tokens/total`. Raises ValueError."""
    match = _BUDGET.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{text!r} is no budget; expected one like '5M tokens/month', '25 money/day' or '100k tokens/total'"
        )
    amount = float(match[1]) * _SCALE[match[2]]
    return {"amount": int(amount) if amount.is_integer() else amount, "unit": match[3], "period": match[4]}
