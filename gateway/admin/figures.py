"""From two looks at the counters to what happened between them. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from gateway.observe.counters import INTER_TOKEN, TTFT, Histogram, ModelMetrics
from gateway.observe.metrics import Metrics

CLIENT_LEFT: Final = 499  # no error: somebody closed a window


class ModelCounts(NamedTuple):
    """Of one model, since the process started."""

    requests: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Look(NamedTuple):
    """The counters at one moment."""

    at: float  # monotonic seconds
    models: Mapping[str, ModelCounts]  # by name; requests for models that nobody configured are in "other"
    ttft: tuple[int, ...]  # counts per bucket, over all models
    inter_token: tuple[int, ...]
    lag_count: int
    lag_total: float  # seconds


class Rates(NamedTuple):
    """What happened between two looks. Per second, but for the times, which are in milliseconds (None: nothing came)."""

    requests: float
    errors: float
    prompt_tokens: float
    output_tokens: float
    ttft_p50: float | None
    ttft_p95: float | None
    itl_p50: float | None
    itl_p95: float | None
    loop_lag: float | None  # mean
    models: Mapping[str, tuple[float, float]]  # requests and output tokens of each


def look(metrics: Metrics, at: float) -> Look:
    """`at`: the moment, in monotonic seconds. Costs some microseconds a model."""
    models = list(metrics.models.values())
    return Look(
        at,
        {model.name: counts(model) for model in models},
        summed((model.ttft for model in models), TTFT),
        summed((model.inter_token for model in models), INTER_TOKEN),
        sum(metrics.loop_lag.counts),
        metrics.loop_lag.total,
    )


def counts(model: ModelMetrics) -> ModelCounts:
    return ModelCounts(
        sum(model.requests.values()),
        sum(n for (_, status), n in model.requests.items() if status >= 400 and status != CLIENT_LEFT),
        model.prompt_tokens,
        model.completion_tokens,
    )


def summed(histograms: Iterable[Histogram], bounds: Sequence[float]) -> tuple[int, ...]:
    rows = [histogram.counts for histogram in histograms]
    return tuple(map(sum, zip(*rows, strict=True))) if rows else (0,) * (len(bounds) + 1)


def quantile(bounds: Sequence[float], counts: Sequence[int], q: float) -> float | None:
    """The value below which a share `q` of the observations lies, by linear interpolation within its bucket; the highest
    bound for what is beyond all of them, None if there are no observations."""
    rank = q * sum(counts)
    if not rank:
        return None
    below, lower = 0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if below + count >= rank:
            return lower + (bound - lower) * (rank - below) / count
        below, lower = below + count, bound
    return lower


def rates(before: Look, after: Look) -> Rates:
    seconds = max(after.at - before.at, 1e-9)
    models = {
        name: ModelCounts(*(b - a for a, b in zip(before.models.get(name, ModelCounts()), now, strict=True)))
        for name, now in after.models.items()
    }
    requests, errors, prompt, output = (sum(column) / seconds for column in zip(*models.values(), strict=True))
    ttft, itl = grown(before.ttft, after.ttft), grown(before.inter_token, after.inter_token)
    lags = after.lag_count - before.lag_count
    return Rates(
        requests,
        errors,
        prompt,
        output,
        milliseconds(quantile(TTFT, ttft, 0.5)),
        milliseconds(quantile(TTFT, ttft, 0.95)),
        milliseconds(quantile(INTER_TOKEN, itl, 0.5)),
        milliseconds(quantile(INTER_TOKEN, itl, 0.95)),
        milliseconds((after.lag_total - before.lag_total) / lags if lags else None),
        {name: (model.requests / seconds, model.completion_tokens / seconds) for name, model in models.items()},
    )


def grown(before: Sequence[int], after: Sequence[int]) -> list[int]:
    return [b - a for a, b in zip(before, after, strict=True)]


def milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
