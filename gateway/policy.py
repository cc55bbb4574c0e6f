"""What a request is judged by and works with.

`Policy` is read once per request and replaced whole by a reload. `Resources` outlive reloads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from engines.types import FleetView
from gateway.auth import Keyring
from gateway.cork import Cork
from gateway.drive import Event
from gateway.limits.base import Limiter, Price
from gateway.observe.access import AccessLog
from gateway.observe.counters import ModelMetrics
from gateway.observe.metrics import Metrics
from gateway.relay import Ticker
from gateway.resilience.attempts import RetryBudget
from gateway.resilience.breaker import Breakers
from gateway.resilience.overload import Places
from gateway.upstream.client import EngineClient
from gateway.usage.estimate import AnswerLengths, PromptEstimator
from gateway.usage.prompt import Counter


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A model of the policy, with what outlives a reload: what its prompts and answers have been like, its metrics,
    who is served and who waits."""

    name: str
    failover: Literal["exact", "off"]
    stall_timeout: float  # seconds without a byte in mid-stream
    request_timeout: float  # seconds for a whole request
    failover_wait: float  # seconds that a cut stream waits for a replica to come back
    max_open_requests: float  # more wait, infinite: the engines queue them
    max_queue: int  # so many may wait; more are refused at once
    queue_timeout: float  # seconds that one may wait
    template_kwargs: frozenset[str]  # keys of chat_template_kwargs that clients may set
    counter: Counter | None  # counts prompts with the model's own tokenizer; None: they are estimated
    estimator: PromptEstimator
    answers: AnswerLengths
    metrics: ModelMetrics
    places: Places[Event]
    retries: RetryBudget
    price: Price | None = None  # None: for free


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    keyring: Keyring
    models: Mapping[str, Model]  # by name and by alias
    max_body_bytes: int
    body_timeout: float  # seconds, plus one for each 100 KB
    drain_timeout: float  # seconds
    cors_origins: frozenset[str] = frozenset()


class Fleet(Protocol):
    """What serving needs of the engines."""

    view: FleetView

    def report_failure(self, replica_id: str) -> None:
        """A request could not reach this replica: look at it soon. Never blocks."""
        ...

    def report_stall(self, replica_id: str) -> None:
        """A request waited for tokens in vain: find out whether the engine hangs. Never blocks."""
        ...


class Open(Protocol):
    """A request that has not ended."""

    def give_up(self) -> None:
        """End it with an error, if an engine is at work on it. Never blocks."""
        ...


@dataclass(slots=True, eq=False)
class Gateway:
    """What all requests share. `policy` is the only part that is ever swapped."""

    policy: Policy
    fleet: Fleet
    client: EngineClient
    limiter: Limiter
    metrics: Metrics
    access_log: AccessLog
    note_usage: Callable[[tuple[object, ...]], None] | None = None  # takes a `UsageRow` without its id; never blocks
    ticker: Ticker = field(default_factory=Ticker)
    cork: Cork = field(default_factory=Cork)
    breakers: Breakers = field(default_factory=Breakers)
    draining: bool = False  # on its way out: not ready, and connections are told to close
    refusing: bool = False  # new requests too are told to go elsewhere
    requests: set[Open] = field(default_factory=set)

    @property
    def ready(self) -> bool:
        """At least one model has a healthy engine, and the process is not on its way out."""
        return not self.draining and any(self.fleet.view.ready(m.name) for m in self.policy.models.values())
