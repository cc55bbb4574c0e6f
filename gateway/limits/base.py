"""The words of limiting, and the port that every limiter (memory, redis) fills."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol


class Limits(NamedTuple):
    """What a key may use. None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompt + completion
    parallel_requests: int | None = None  # open at once, streams till their last byte


Period = Literal["day", "month", "total"]  # of UTC's calendar
Unit = Literal["tokens", "money"]


class Budget(NamedTuple):
    """What may be used up in a period, and then no more until the next one."""

    amount: int  # tokens (prompt + completion), or millionths of money
    unit: Unit
    period: Period


class Price(NamedTuple):
    """What a model's tokens cost: money for a million, which is millionths for one."""

    prompt: float  # those not found in the prefix cache
    completion: float
    cached: float

    def cost(self, prompt: int, completion: int, cached: int = 0) -> int:
        """Millionths, rounded. `prompt` includes `cached`, which is never more."""
        cached = min(cached, prompt)
        return round((prompt - cached) * self.prompt + cached * self.cached + completion * self.completion)


FREE = Price(0.0, 0.0, 0.0)


class Window(NamedTuple):
    """One per-minute limit as it stands right after an admission or a refusal."""

    limit: int
    remaining: int  # never below 0
    reset: float  # seconds until the limit is whole again


class Standing(NamedTuple):
    """What the x-ratelimit-* headers tell; None where there is no such limit."""

    requests: Window | None
    tokens: Window | None


class Refused(Exception):  # noqa: N818 - a verdict, not a fault
    """An admission that was refused. Nothing was consumed.

    `retry_after`: seconds after which the same request would pass if nothing else came in between;
    None when waiting does not help (a prompt longer than the limit itself, a budget that is used up).
    """

    def __init__(
        self,
        limit: Literal["requests", "tokens", "parallel_requests", "budget"],
        retry_after: float | None,
        standing: Standing,
        allowed: int,
        *,
        budget: Budget | None = None,
        resets_at: float | None = None,
        of_team: bool = False,
    ) -> None:
        super().__init__(limit)
        self.limit = limit
        self.retry_after = retry_after
        self.standing = standing
        self.allowed = allowed  # the limit's own value, for the message
        self.budget = budget  # where that is the limit
        self.resets_at = resets_at  # seconds since the epoch: when the budget is whole again; None: never
        self.of_team = of_team  # the limit is the team's, not the key's own


class Lease(Protocol):
    """What an admitted request holds."""

    @property
    def standing(self) -> Standing:
        """Right after this request's own reservation."""
        ...

    @property
    def reserved(self) -> int:
        """Tokens taken from the per-minute limit; 0 without such a limit."""
        ...

    def settle(self, tokens: int | None, cost: int = 0) -> None:
        """Gives back the parallel slot and replaces the reservation by what was really used (`cost` in millionths).

        None gives back the tokens *and* the request itself (it never reached an engine). The second and later calls
        do nothing. Never blocks, never raises.
        """
        ...


class Account(Protocol):
    """The limiter's state for one key or team: outlives a reload, found again by its id."""

    @property
    def limits(self) -> Limits: ...

    @property
    def counts_tokens(self) -> bool:
        """Whether an admission needs to know how many tokens the prompt has."""
        ...


class Limiter(Protocol):
    """Decides all limits of a request together: its key's, its team's and the budgets of both. All are taken, or none."""

    def account(
        self, owner: str, limits: Limits, budgets: Sequence[Budget] = (), team: Account | None = None
    ) -> Account:
        """The account of a key (its team's first) or team; made if new, given the new terms if not. Not for the request
        path."""
        ...

    async def admit(self, account: Account, prompt_tokens: int, answer_tokens: int, price: Price = FREE) -> Lease:
        """Takes one request, one parallel slot and min(prompt + answer, limit) tokens.

        Raises `Refused`. The memory limiter never suspends here.
        """
        ...
