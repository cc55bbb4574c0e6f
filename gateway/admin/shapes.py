"""What the admin API says and takes: one model for each shape. Strict: an unknown field or another type is refused."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


def iso(seconds: float) -> str:
    """Seconds since the epoch as the API writes a moment."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def instant(text: str) -> float:
    """The reverse, of any ISO 8601 text; a day alone begins at midnight UTC. Raises ValueError."""
    try:
        found = datetime.fromisoformat(text.upper())
        seconds = found.replace(tzinfo=found.tzinfo or UTC).timestamp()
        iso(seconds)
    except (ValueError, OverflowError):
        raise ValueError("there is no such time") from None
    return seconds


def iso_milliseconds(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


class Said(BaseModel):
    """What goes out: made by us, so it is not judged again."""

    model_config = ConfigDict(frozen=True)


class Asked(BaseModel):
    """What comes in."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class Problem(Said):
    message: str
    type: str
    param: str | None = Field(description="The field that is wrong.")
    code: str | None


class Failure(Said):
    """Every answer but success."""

    error: Problem


# ---- the gateway itself


class Session(Said):
    ok: Literal[True] = True
    version: str


class ConfigShown(Said):
    path: str
    config: dict[str, Any]


class Reloaded(Said):
    outcome: Literal["applied"] = "applied"
    notes: list[str]


class AuditShown(Said):
    time: str
    who: str
    what: str
    target: str
    before: Any
    after: Any


class Audit(Said):
    data: list[AuditShown]


class AuditAsked(Asked):
    model_config = ConfigDict(strict=False)  # a query holds text alone

    limit: int = Field(default=100, ge=1, le=1000)


# ---- models and engines


class PriceShown(Said):
    """Money per million tokens, in the unit of the config."""

    prompt: float
    completion: float
    cached: float


class ModelShown(Said):
    name: str
    aliases: list[str]
    failover: Literal["exact", "off"]
    ready: bool
    replicas: int
    open_requests: int
    price: PriceShown | None
    requests: int = Field(description="Since the process started.")
    prompt_tokens: int
    completion_tokens: int


class Models(Said):
    data: list[ModelShown]


class EngineShown(Said):
    id: str
    model: str
    state: Literal["starting", "ready", "unhealthy", "draining", "stopped", "failed"]
    reason: str | None = Field(description="Why it is not ready.")
    managed: bool = Field(description="A process of ours, which can be restarted.")
    url: str
    open_requests: int = Field(description="Requests that this gateway has open on it.")
    running: int | None = Field(description="As the engine itself says; null: it has not said anything yet.")
    waiting: int | None
    kv_cache_usage: float | None = Field(description="From 0 to 1.")
    restarts: int
    max_model_len: int | None


class Engines(Said):
    data: list[EngineShown]


class LogTail(Said):
    lines: list[str]


# ---- live figures


class Percentiles(Said):
    p50: float | None
    p95: float | None


class ModelFigures(Said):
    name: str
    requests_per_second: float
    output_tokens_per_second: float
    open_requests: int


class EngineFigures(Said):
    id: str
    state: str
    running: int | None
    waiting: int | None
    kv_cache_usage: float | None
    restarts: int
    open_requests: int


class Figures(Said):
    """What happens now; percentiles are null when nothing came."""

    time: str
    requests_per_second: float
    output_tokens_per_second: float
    prompt_tokens_per_second: float
    errors_per_second: float
    open_requests: int
    ttft_ms: Percentiles
    itl_ms: Percentiles
    loop_lag_ms: float | None
    models: list[ModelFigures]
    engines: list[EngineFigures]


class History(Said):
    interval: float = Field(description="Seconds between two points.")
    points: list[Figures]


# ---- requests


class RequestShown(Said):
    seq: int
    id: str
    time: str
    key: str | None
    team: str | None
    model: str | None
    endpoint: str
    replica: str | None
    status: int
    outcome: str
    error: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    ttft_ms: float | None
    duration_ms: float
    attempts: int
    cost: float | None


class Requests(Said):
    data: list[RequestShown]


class RequestsAsked(Asked):
    model_config = ConfigDict(strict=False)  # a query holds text alone

    limit: int = Field(default=100, ge=1, le=1000)
    key: Annotated[str, Field(max_length=128)] | None = None
    model: Annotated[str, Field(max_length=256)] | None = None
    status: (
        Annotated[str, Field(pattern=r"^[1-5](\d\d|xx)$", description="A status, or 4xx for all of a kind.")] | None
    ) = None
    outcome: Literal["completed", "client_cancelled", "engine_failed", "refused", "error"] | None = None
    before: Annotated[int, Field(ge=1, le=2**53)] | None = None


class LogAsked(Asked):
    model_config = ConfigDict(strict=False)

    lines: int = Field(default=100, ge=1, le=1000)
