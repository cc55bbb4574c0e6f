"""The words that describe engines. Every value here is frozen: a change makes a new one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple


class ReplicaState(StrEnum):
    """Where a replica stands. Only `READY` takes requests."""

    STARTING = "starting"  # launched (or, for a remote one, not yet seen healthy)
    READY = "ready"  # /health is 200 and it has generated a token (remote: /health is 200)
    UNHEALTHY = "unhealthy"  # was ready; does not answer now
    DRAINING = "draining"  # finishes what it has, takes nothing new
    STOPPED = "stopped"  # ended on purpose
    FAILED = "failed"  # crash loop: started too often within a minute; stays down until asked


class Load(NamedTuple):
    """What an engine's own /metrics said last."""

    running: int  # requests in the current batch (vllm:num_requests_running)
    waiting: int  # requests queued in the engine (vllm:num_requests_waiting)
    kv_cache_usage: float  # 0–1 (vllm:kv_cache_usage_perc)


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine that answers for one model: a process of ours, or a remote endpoint."""

    id: str  # "smollm2/0": the metric label, stable over restarts
    model: str  # the model's name in the config
    url: str  # "http://127.0.0.1:41234", no trailing slash, no path; never shown to clients
    api_key: str | None  # what this engine wants as its bearer token
    served_name: str  # what the engine calls the model
    state: ReplicaState
    load: Load | None = None  # None: not scraped yet, or the engine has no metrics
    card: Mapping[str, Any] = field(default_factory=dict)  # its entry in the engine's /v1/models
    restarts: int = 0  # starts after the first one
    reason: str | None = None  # why it is not ready, in one line, for operators
    managed: bool = False  # a process of ours, which can be restarted

    @property
    def max_model_len(self) -> int | None:
        """Longest prompt + answer in tokens, as the engine says."""
        value = self.card.get("max_model_len")
        return value if isinstance(value, int) else None


@dataclass(frozen=True, slots=True)
class FleetView:
    """All replicas at one moment. Replaced whole, never changed."""

    replicas: Mapping[str, tuple[Replica, ...]] = field(default_factory=dict)  # by model, in the order of the config

    def of(self, model: str) -> tuple[Replica, ...]:
        return self.replicas.get(model, ())

    def all(self) -> list[Replica]:
        return [replica for replicas in self.replicas.values() for replica in replicas]

    def ready(self, model: str) -> list[Replica]:
        return [r for r in self.of(model) if r.state is ReplicaState.READY]


class EventKind(StrEnum):
    """What happened to a replica."""

    STARTED = "started"  # a process was launched
    READY = "ready"  # takes requests, for the first time or again
    UNHEALTHY = "unhealthy"  # stopped answering
    DIED = "died"  # its process ended though nobody asked, or was killed because it hung
    FAILED = "failed"  # will not be started again until asked
    STOPPED = "stopped"  # ended on purpose
    NOTE = "note"  # nothing changed, but an operator should know


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """One line for the log."""

    kind: EventKind
    replica: str  # the replica's id
    model: str
    message: str  # for operators: may hold addresses and paths
