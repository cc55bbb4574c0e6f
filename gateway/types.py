"""The words of a request: one frozen type for each hop between two stages (DESIGN.md §1).

Named tuples, because one is made per request and stage and they are the cheapest frozen thing that Python has.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.limits.base import Account

Headers = list[tuple[bytes, bytes]]  # names in lower case, as ASGI has them


def lines(headers: Headers) -> bytes:
    """The same as lines of HTTP/1.1, each with its end."""
    return b"".join([b"%b: %b\r\n" % field for field in headers])


class Endpoint(NamedTuple):
    """A row of the endpoint table (`wire.openai.ENDPOINTS`)."""

    path: str  # what clients call
    engine_path: str  # what the engine calls it
    dialect: Literal["openai", "anthropic", "responses"]  # decides error shape and how a stream is read
    rules: "Mapping[str, Callable[[object, str], None]]"  # by field of the body
    required: tuple[str, ...]
    prompt_field: str  # the field that holds the prompt: `param` of context_length_exceeded
    streams: bool = False  # `stream: true` is possible
    generates: bool = False  # the answer costs tokens beside the prompt


class Head(NamedTuple):
    """What a door knows when a request's headers are complete. The same for all requests with the same headers."""

    endpoint: Endpoint
    request_id: str | None  # the client's own, where it is harmless
    authorization: tuple[bytes, ...]  # raw header values
    api_key: tuple[bytes, ...]  # raw x-api-key values
    content_type: bytes
    content_encoding: bytes
    content_length: int | None  # bytes as announced; None when chunked
    retry_count: int | None  # x-stainless-retry-count: which attempt of the client's own this is
    client: str  # the peer's address, for the log alone


class Caller(NamedTuple):
    """Who asks: a key, judged."""

    name: str  # the key's name: label and log
    account: "Account"
    models: frozenset[str] | None  # names and aliases that the key may use; None: all
    id: str = "anonymous"  # of the key, for limits and usage: "key_…", or "config:NAME"
    team: str | None = None  # the team's id


class Call:
    """What is asked for: the body, judged."""

    __slots__ = ("body", "endpoint", "include_usage", "max_tokens", "media", "model", "size", "stream")

    def __init__(  # noqa: PLR0917
        self,
        endpoint: Endpoint,
        model: str,  # as the client wrote it
        body: dict[str, Any],  # judged; encoded afresh for the engine
        size: int,  # bytes of the body as it came
        stream: bool,
        include_usage: bool,  # the client itself asked for the usage chunk
        max_tokens: int | None,  # bound on the answer's tokens (times n, times prompts), None if the client set none
        media: bool = False,  # it may hold pictures or sound, whose bytes say nothing about their tokens
    ) -> None:
        self.endpoint = endpoint
        self.model = model
        self.body = body
        self.size = size
        self.stream = stream
        self.include_usage = include_usage
        self.max_tokens = max_tokens
        self.media = media

    def with_body(self, body: dict[str, Any]) -> "Call":
        return Call(
            self.endpoint, self.model, body, self.size, self.stream, self.include_usage, self.max_tokens, self.media
        )


class Usage(NamedTuple):
    """Tokens as the engine counted them."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0  # of the prompt, found in the prefix cache


State = Literal["completed", "client_cancelled", "engine_failed", "refused", "error"]


class Outcome:
    """How a request ended: settled, counted and logged exactly once."""

    __slots__ = ("attempts", "error", "replica", "state", "status", "ttft", "usage")

    def __init__(  # noqa: PLR0917
        self,
        status: int,  # HTTP status sent, or that would have been sent (499: the client left first)
        state: State,
        error: str | None,  # error code
        usage: Usage | None,  # None: no engine worked on it
        replica: str | None,
        ttft: float | None,  # seconds from arrival to the first byte of the answer
        attempts: int,
    ) -> None:
        self.status = status
        self.state = state
        self.error = error
        self.usage = usage
        self.replica = replica
        self.ttft = ttft
        self.attempts = attempts


class Sink(Protocol):
    """Where an answer goes: the client's side of a door. Nothing here blocks or raises.

    After the client has gone, writes are dropped.
    """

    gone: bool
    started: bool

    def start(self, status: int, headers: bytes, length: int | None) -> None:
        """Status line and headers (whole lines). `length` is the body's size in bytes, None if it is not known (chunked)."""

    def write(self, data: bytes) -> None:
        """A piece of the body; goes out without delay."""

    def finish(self, last: bytes = b"") -> None:
        """The body is complete with this last piece. Only the first call counts."""

    def close_after(self) -> None:
        """Once the answer is complete, the connection is closed, where the door can do that."""

    def abort(self) -> None:
        """Closes the connection, so that the client sees that the answer is not complete."""

    def watch(self, watcher: "Watcher | None") -> None:
        """Who is told from now on that the client has left, or reads too slowly. Told at once if it is so already."""


class Watcher(Protocol):
    """Hears from a sink. Called from the event loop, never re-entrantly from the sink's own methods but `watch`."""

    def client_gone(self) -> None: ...

    def pause(self) -> None:
        """The client reads slower than the engine writes: stop reading from the engine."""

    def resume(self) -> None: ...
