"""Which failures another replica may make good, when, and how often. Pure.

Only what has shown the client nothing is tried again, and only where the engine itself failed. Without a budget, retries
multiply with the clients' own just when the engines can bear it least.
"""

from enum import Enum
from typing import Final

from gateway.errors import Fault, GatewayError

MAX_ATTEMPTS: Final = 3  # of one request before its first byte
SHARE: Final = 0.2  # of a model's open requests may be retries that draw on the budget
FLOOR: Final = 3  # so many may always be
BACKOFF: Final = 0.025  # seconds at most before the first retry, twice as long before the next
LONGEST_BACKOFF: Final = 0.5


class Cause(Enum):
    """Why an attempt failed."""

    LOST = "lost"  # the engine is gone: no connection, or it broke, or it hangs
    FAILED = "failed"  # the engine is there and can't (500, 502, 503, nonsense): the next one may be no better off
    FINAL = "final"  # no other replica would change it: the client's own mistake, or time is up


def cause_of(error: GatewayError) -> Cause:
    """What an attempt's error means for a retry."""
    if error.fault is not Fault.ENGINE or error.status == 504:
        return Cause.FINAL
    return Cause.LOST if error.code == "engine_failed" else Cause.FAILED


def free(cause: Cause, *, doubtful: bool) -> bool:
    """Whether a retry is a mere move to an engine that is well, as when one of them dies: that costs the engines nothing
    beyond what the requests are due anyway, and no request is lost for want of budget. All else draws on it."""
    return cause is Cause.LOST and not doubtful


def backoff(retry: int, chance: float) -> float:
    """Seconds before the `retry`th retry (from 1): all of it jitter, so that what failed together does not return together.

    `chance` is in [0, 1)."""
    return min(BACKOFF * 2.0 ** (retry - 1), LONGEST_BACKOFF) * chance


class RetryBudget:
    """How many retries of one model may be under way at once."""

    __slots__ = ("under_way",)

    def __init__(self) -> None:
        self.under_way = 0

    def draw(self, open_requests: int) -> bool:
        """Takes a retry from the budget, if one is left; the caller gives it back when its request has ended."""
        if self.under_way >= max(FLOOR, SHARE * open_requests):
            return False
        self.under_way += 1
        return True

    def give_back(self) -> None:
        self.under_way -= 1
