"""What a load test measured: the words, and the statistics over them. Pure; times are in seconds.

Definitions are those of `vllm bench serve`, so that figures can be laid side by side: time to first token (TTFT) ends with
the first chunk that has output, inter-token times (ITL) lie between chunks, time per output token (TPOT) is
`(latency - TTFT) / (output tokens - 1)`, and a request's latency ends with its last chunk. Unlike there, a role chunk is
no output, an interrupted stream is no success, and with a given rate times run from when a request was *due*.
"""

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from itertools import pairwise
from typing import Final, NamedTuple

QUANTILES: Final = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}


class Cause(StrEnum):
    """Why a request failed."""

    REFUSED = "connection refused"
    UNREACHABLE = "no connection"
    UNAUTHORIZED = "401 wrong key"
    NOT_FOUND = "404 unknown model or path"
    REJECTED = "4xx request rejected"
    RATE_LIMITED = "429 rate limited"
    UNAVAILABLE = "503 unavailable"
    SERVER_ERROR = "5xx server error"
    TIMEOUT = "timeout"
    CUT = "stream cut off"
    ERROR_EVENT = "error event in stream"
    MALFORMED = "malformed answer"
    ABANDONED = "abandoned"  # by this side, as the test was stopped: neither good nor bad


CHECK: Final[Mapping[Cause, str]] = {
    Cause.REFUSED: "Nothing listens there. Is the server running, and are host and port of --url right?",
    Cause.UNREACHABLE: "Are host, port and scheme of --url right, and is the certificate trusted (--insecure skips that)?",
    Cause.UNAUTHORIZED: "The server does not accept the key. Is --key (or OPENAI_API_KEY) right, and not revoked?",
    Cause.NOT_FOUND: "Is --model one that GET /v1/models lists for this key, and does --url end before /v1?",
    Cause.REJECTED: "The server does not accept the request. Do --extra, --prompt-tokens and --output-tokens suit the model?",
    Cause.RATE_LIMITED: "The key's limits are below this load. Give the key higher limits, or lower --rate or --concurrency.",
    Cause.UNAVAILABLE: "The server has no healthy engine, or its queue is full. See its log and /health/ready.",
    Cause.SERVER_ERROR: "The server or its engine failed. See its log.",
    Cause.TIMEOUT: "Answers took longer than --timeout. Lower the load, or allow more time.",
    Cause.CUT: "The connection ended before a finish reason and [DONE]. Did the server or its engine die? See its log.",
    Cause.ERROR_EVENT: "The server broke off its answers with an error. See its log.",
    Cause.MALFORMED: "The answer is no OpenAI-style event stream. Does --url point at an OpenAI-compatible server?",
}


class Record(NamedTuple):
    """One request. Points in time count from the start of the run."""

    conversation: int  # its number; the same number is the same prompts for every target
    turn: int
    due: float  # when it should have been sent; when it was, in a closed loop
    sent: float
    first: float  # first chunk with output; 0 without one
    last: float  # last chunk with a choice in it; 0 without one
    chunks: int  # from `first` to `last`, both counted
    longest_gap: float  # between two chunks
    prompt_tokens: int  # as the engine counted
    output_tokens: int  # as the engine counted; chunks, if it did not
    counted: bool  # the engine sent its usage
    cause: Cause | None  # None: a whole answer
    detail: str  # what the server said, for people
    times: "array[float] | None" = None  # of every chunk, kept only on demand

    @property
    def start(self) -> float:
        return min(self.due, self.sent)

    @property
    def ttft(self) -> float:
        return self.first - self.start

    @property
    def latency(self) -> float:
        return self.last - self.start

    @property
    def tpot(self) -> float:
        return (self.last - self.first) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    @property
    def mean_gap(self) -> float:
        return (self.last - self.first) / (self.chunks - 1) if self.chunks > 1 else 0.0


class Sample(NamedTuple):
    """The state of one target at one moment."""

    time: float  # since the start of the run
    chunks: int  # received so far
    running: int  # at most, since the sample before
    ok: int
    failed: int


class Spread(NamedTuple):
    """A distribution in six numbers; all zero when `size` is."""

    size: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


def percentile(ordered: Sequence[float], q: float) -> float:
    """Linear between the two nearest ranks, as numpy's default. `ordered` must be sorted and not empty."""
    rank = q * (len(ordered) - 1)
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def spread(values: Iterable[float]) -> Spread:
    ordered = sorted(values)
    if not ordered:
        return Spread(0, 0, 0, 0, 0, 0, 0)
    p50, p90, p95, p99 = (percentile(ordered, q) for q in QUANTILES.values())
    return Spread(len(ordered), math.fsum(ordered) / len(ordered), p50, p90, p95, p99, ordered[-1])


class Histogram:
    """Counts durations in buckets 0.1 % wide, so that hours of tokens cost the same memory as a second of them."""

    _FLOOR: Final = 1e-6  # seconds: all below is one bucket
    _PER_E: Final = 1000  # buckets per factor e
    _SIZE: Final = 22_000  # up to an hour

    __slots__ = ("_counts", "count", "max", "total")

    def __init__(self) -> None:
        self._counts = array("Q", bytes(8 * self._SIZE))
        self.count = 0
        self.total = 0.0
        self.max = 0.0

    def add(self, times: Sequence[float]) -> float:
        """Counts the gaps between points in time, in order. Returns the longest."""
        counts, floor, per_e, log, top = self._counts, self._FLOOR, self._PER_E, math.log, self._SIZE - 1
        longest = 0.0
        for earlier, later in pairwise(times):
            gap = later - earlier
            if gap > floor:
                counts[min(int(log(gap / floor) * per_e) + 1, top)] += 1
                longest = max(longest, gap)
            else:
                counts[0] += 1
        if len(times) > 1:
            self.count += len(times) - 1
            self.total += times[-1] - times[0]
            self.max = max(self.max, longest)
        return longest

    def buckets(self) -> list[tuple[float, int]]:
        """(a bucket's middle, how many), rising, without empty ones."""
        return [(self._middle(i), n) for i, n in enumerate(self._counts) if n]

    def spread(self) -> Spread:
        if not self.count:
            return Spread(0, 0, 0, 0, 0, 0, 0)
        p50, p90, p95, p99 = self._quantiles()
        return Spread(self.count, self.total / self.count, p50, p90, p95, p99, self.max)

    def _middle(self, i: int) -> float:
        return min(self._FLOOR * math.exp((i - 0.5) / self._PER_E), self.max) if i else 0.0

    def _quantiles(self) -> list[float]:
        ranks = [int(q * (self.count - 1)) for q in QUANTILES.values()]
        found: list[float] = []
        seen = 0
        for middle, n in self.buckets():
            seen += n
            while len(found) < len(ranks) and ranks[len(found)] < seen:
                found.append(middle)
        return found


class Slo(NamedTuple):
    """Bounds for a good request; None is no bound."""

    ttft: float | None = None
    itl: float | None = None  # the request's mean time between chunks
    tpot: float | None = None
    e2e: float | None = None
    stall: float | None = None  # the request's longest time between chunks

    def met_by(self, record: Record) -> bool:
        values = (record.ttft, record.mean_gap, record.tpot, record.latency, record.longest_gap)
        return all(bound is None or value <= bound for bound, value in zip(self, values, strict=True))


_UNITS: Final = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_slo(text: str) -> Slo:
    """`ttft=200ms,itl=50ms,e2e=2s` → Slo. Raises `ValueError` with what is allowed."""
    bounds: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        name = {"e2el": "e2e"}.get(name, name)
        if name not in Slo._fields:
            raise ValueError(f"'{name}' is no measure: use {', '.join(Slo._fields)}")
        unit = next((unit for unit in _UNITS if value.endswith(unit)), "")
        try:
            number = float(value.removesuffix(unit)) if unit else math.nan
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise ValueError(f"'{part.strip()}': expected a duration with its unit, such as {name}=200ms")
        bounds[name] = number * _UNITS[unit]
    return Slo(**bounds)


class Failure(NamedTuple):
    cause: Cause
    requests: int
    detail: str  # what the first of them was told


class Summary(NamedTuple):
    """One target in one run. Rates are per second of `duration`, and count whole answers only."""

    duration: float  # from the first request to the end of the last
    ok: int
    failed: int
    abandoned: int
    failures: tuple[Failure, ...]  # most frequent first
    uncounted: int  # answers without the engine's usage: their tokens are chunks
    prompt_tokens: int
    output_tokens: int
    request_rate: float
    prompt_rate: float
    output_rate: float
    total_rate: float
    peak_output_rate: float  # the busiest second
    peak_running: int
    ttft: Spread
    itl: Spread
    tpot: Spread
    e2e: Spread
    lateness: Spread  # of this side: sent minus due
    good: int | None  # requests within the SLO; None without one
    goodput: float | None  # of them, per second


class TargetResult(NamedTuple):
    name: str
    summary: Summary
    records: tuple[Record, ...]
    gaps: Histogram
    samples: tuple[Sample, ...]


class Health(NamedTuple):
    """How the load generator itself fared."""

    cpu: float  # share of one core
    lag: Spread  # by how much the event loop woke too late

    @property
    def bottleneck(self) -> str | None:
        """Why the figures are not to be trusted; None if they are, or if there was no time to tell."""
        if self.lag.size < MIN_TICKS:
            return None
        if self.cpu > MAX_CPU:
            return f"it used {self.cpu:.0%} of its core"
        if self.lag.p99 > MAX_LAG:
            other = f", while it used {self.cpu:.0%} of a core: is the machine busy with other work?"
            return f"its event loop woke {self.lag.p99 * 1e3:.0f} ms late (p99)" + (other if self.cpu < 0.5 else "")
        return None


MIN_TICKS: Final = 20  # one second
MAX_CPU: Final = 0.90
MAX_LAG: Final = 0.020  # seconds; later than this, time stamps tell more of this side than of the server


class Run(NamedTuple):
    label: str  # such as `rate 4`
    load: Mapping[str, float | str | None]
    targets: tuple[TargetResult, ...]
    health: Health
    stopped: str | None  # why it ended before its time


class Report(NamedTuple):
    created: str  # ISO 8601
    config: Mapping[str, object]  # without keys
    runs: tuple[Run, ...]
    slo: Slo | None

    @property
    def failed(self) -> bool:
        return not self.runs or any(run.stopped or target.summary.failed for run in self.runs for target in run.targets)


def failures(records: Iterable[Record]) -> tuple[Failure, ...]:
    found: dict[Cause, list[str]] = {}
    for record in records:
        if record.cause not in (None, Cause.ABANDONED):
            found.setdefault(record.cause, []).append(record.detail)
    return tuple(
        Failure(cause, len(details), details[0])
        for cause, details in sorted(found.items(), key=lambda item: -len(item[1]))
    )


def token_rates(samples: Sequence[Sample], tokens_per_chunk: float, width: float = 1.0) -> list[tuple[float, float]]:
    """(middle of a span, tokens per second in it), for spans of at least `width` seconds."""
    rates: list[tuple[float, float]] = []
    if not samples:
        return rates
    since = samples[0]
    for sample in samples[1:]:
        elapsed = sample.time - since.time
        if elapsed >= width * 0.99:
            rates.append(((sample.time + since.time) / 2, (sample.chunks - since.chunks) * tokens_per_chunk / elapsed))
            since = sample
    return rates


def tokens_per_chunk(summary: Summary) -> float:
    chunks = summary.itl.size + summary.ok
    return summary.output_tokens / chunks if chunks else 1.0


def summarise(records: Sequence[Record], gaps: Histogram, samples: Sequence[Sample], slo: Slo | None = None) -> Summary:
    """`gaps` are those of the whole answers among `records`."""
    whole = [record for record in records if record.cause is None]
    abandoned = sum(record.cause is Cause.ABANDONED for record in records)
    prompt, output = sum(r.prompt_tokens for r in whole), sum(r.output_tokens for r in whole)
    begin = min((r.start for r in records), default=0.0)
    duration = max((r.last for r in whole), default=begin) - begin
    good = sum(map(slo.met_by, whole)) if slo else None

    def per_second(n: float) -> float:
        return n / duration if duration > 0 else 0.0

    summary = Summary(
        duration=duration,
        ok=len(whole),
        failed=len(records) - len(whole) - abandoned,
        abandoned=abandoned,
        failures=failures(records),
        uncounted=sum(not r.counted for r in whole),
        prompt_tokens=prompt,
        output_tokens=output,
        request_rate=per_second(len(whole)),
        prompt_rate=per_second(prompt),
        output_rate=per_second(output),
        total_rate=per_second(prompt + output),
        peak_output_rate=0.0,
        peak_running=max((sample.running for sample in samples), default=0),
        ttft=spread(r.ttft for r in whole),
        itl=gaps.spread(),
        tpot=spread(r.tpot for r in whole if r.output_tokens > 1),
        e2e=spread(r.latency for r in whole),
        lateness=spread(max(0.0, r.sent - r.due) for r in records),
        good=good,
        goodput=None if good is None else per_second(good),
    )
    # The last second is cut short, and not among the spans: it can have been the busiest, and no peak is below the mean.
    peaks = [rate for _, rate in token_rates(samples, tokens_per_chunk(summary))]
    return summary._replace(peak_output_rate=max([*peaks, summary.output_rate]))
