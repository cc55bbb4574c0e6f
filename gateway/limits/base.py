"""The words of limiting, and the port that every limiter (memory, redis) fills."""

from typing import Literal, NamedTuple, Protocol


class Limits(NamedTuple):
    """What a key may use. None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompt + completion
    parallel_requests: int | None = None  # open at once, streams till their last byte


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
    None when it can never pass (a prompt longer than the limit itself).
    """

    def __init__(
        self,
        limit: Literal["requests", "tokens", "parallel_requests"],
        retry_after: float | None,
        standing: Standing,
        allowed: int,
    ) -> None:
        super().__init__(limit)
        self.limit = limit
        self.retry_after = retry_after
        self.standing = standing
        self.allowed = allowed  # the limit's own value, for the message


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

    def settle(self, tokens: int | None) -> None:
        """Gives back the parallel slot and replaces the reservation by what was really used.

        None gives back the tokens *and* the request itself (it never reached an engine). The second and later calls
        do nothing. Never blocks, never raises.
        """
        ...


class Account(Protocol):
    """The limiter's state for one key: outlives a reload, found again by the key's id."""

    @property
    def limits(self) -> Limits: ...


class Limiter(Protocol):
    """Decides all limits of a request together: either all are taken, or none."""

    def account(self, key_id: str, limits: Limits) -> Account:
        """The account of a key; made if new, given the new limits if not. Not for the request path."""
        ...

    async def admit(self, account: Account, prompt_tokens: int, answer_tokens: int) -> Lease:
        """Takes one request, one parallel slot and min(prompt + answer, limit) tokens.

        Raises `Refused`. The memory limiter never suspends here.
        """
        ...
