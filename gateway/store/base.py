"""The words of the store. Times are seconds since the epoch, money is in millionths of the unit that prices are in."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from gateway.limits.base import Budget as Budget, Limits, Period as Period, Unit as Unit  # noqa: PLC0414 - words here too

Group = Literal["key", "team", "model", "day", "hour"]


class StoreError(Exception):
    """The store is unreachable, slow, read-only or full. Nothing was changed; the same call may pass later."""


class DuplicateError(Exception):
    """The name is taken."""


class Secret(NamedTuple):
    """One of the full keys that a key record stands for; there are several while a rotation overlaps."""

    digest: bytes  # SHA-256
    last4: str
    expires_at: float | None  # None: as long as the record


@dataclass(frozen=True, slots=True)
class TeamRecord:
    id: str  # "team_" and 16 hexadecimal digits
    name: str
    note: str
    models: tuple[str, ...]  # patterns; a key may use what its own and its team's allow
    limits: Limits
    budgets: tuple[Budget, ...]
    created_at: float


@dataclass(frozen=True, slots=True)
class KeyRecord:
    id: str  # "key_" and 16 hexadecimal digits
    name: str  # taken by one key that is not revoked
    secrets: tuple[Secret, ...]  # the newest first
    team_id: str | None
    owner: str
    note: str
    models: tuple[str, ...]  # patterns
    limits: Limits
    budgets: tuple[Budget, ...]
    created_at: float
    expires_at: float | None
    revoked_at: float | None


class Snapshot(NamedTuple):
    """Keys and teams as they stood together."""

    version: int
    keys: tuple[KeyRecord, ...]  # those that changed after the version asked for; revoked ones too
    teams: tuple[TeamRecord, ...]  # all


class UsageRow(NamedTuple):
    """One request, settled."""

    row_id: str  # unique; grows with time
    time: float  # arrival
    request_id: str
    key_id: str  # "config:NAME" for a key of the config file
    team_id: str | None
    model: str  # by its own name, not an alias; "" if none was found
    endpoint: str
    status: int
    outcome: str
    error: str | None  # code
    replica: str | None
    prompt: int  # tokens
    completion: int  # tokens
    cached: int  # tokens, of the prompt
    cost: int  # millionths
    ttft: float | None  # seconds
    duration: float  # seconds
    attempts: int


class UsageSum(NamedTuple):
    """What the requests of one group come to."""

    group: tuple[str, ...]  # values of the fields asked for; day as 2026-11-24, hour as 2026-11-24T10:00:00Z
    requests: int
    errors: int  # of the requests: neither completed nor given up by the client
    prompt: int
    completion: int
    cached: int
    cost: int


class AuditEntry(NamedTuple):
    """One change, and who made it."""

    time: float
    who: str
    what: str  # create_key, change_key, create_team, change_team, delete_team
    target: str  # id
    before: str | None  # JSON, without digests
    after: str | None


class Spent(NamedTuple):
    """What counts against budgets."""

    tokens: int = 0
    cost: int = 0


Owner = tuple[Literal["key", "team"], str]  # and its id
