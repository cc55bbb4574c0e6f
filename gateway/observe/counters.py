"""What the request path counts: plain attributes and lists, which cost it next to nothing. `observe.metrics` shows them."""

from collections import defaultdict
from typing import Final

OTHER: Final = "other"  # the label of everything beyond the cap, and of models nobody configured

# Upper bounds, in seconds.
TTFT: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120)
INTER_TOKEN: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5, 5)
REQUEST: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
OVERHEAD: Final = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
LOOP_LAG: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Histogram:
    """Counts per bucket and a sum. Not thread-safe for writers; readers may be anywhere."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = tuple(map(float, bounds))
        self.counts = [0] * (len(bounds) + 1)  # not cumulated; the last one is beyond every bound
        self.total = 0.0

    def observe(self, v: float) -> None:
        at = 0
        for bound in self.bounds:  # compiled, quicker than a call of `bisect`
            if v <= bound:
                break
            at += 1
        self.counts[at] += 1
        self.total += v


class Family(dict[str, Histogram]):
    """Histograms by a label that the code sets (never a client); made at first use."""

    __slots__ = ("bounds",)

    def __init__(self, bounds: tuple[float, ...]) -> None:
        super().__init__()
        self.bounds = bounds

    def __missing__(self, label: str) -> Histogram:
        made = self[label] = Histogram(self.bounds)
        return made


class ModelMetrics:
    """Of one model: fetch it once (with the policy), not at every request."""

    __slots__ = (
        "attempts",
        "cached_tokens",
        "completion_tokens",
        "failovers",
        "inflight",
        "inter_token",
        "name",
        "prompt_tokens",
        "queued",
        "request_seconds",
        "requests",
        "ttft",
    )

    def __init__(self, name: str) -> None:
        self.name = name  # the label, not always what was asked for
        self.ttft = Histogram(TTFT)
        self.inter_token = Histogram(INTER_TOKEN)
        self.inflight = 0
        self.queued = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.requests: defaultdict[tuple[str, int], int] = defaultdict(int)  # by endpoint and status
        self.request_seconds: dict[str, Histogram] = Family(REQUEST)  # by endpoint
        self.attempts: dict[str, int] = defaultdict(int)  # by outcome
        self.failovers: dict[str, int] = defaultdict(int, resumed=0, refused=0, failed=0)  # by outcome

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """One answered request. `endpoint` is a route of the table, never a path that a client sent."""
        self.requests[endpoint, status] += 1
        self.request_seconds[endpoint].observe(seconds)


class KeyMetrics:
    """Of one key: fetch it with the key, not at every request."""

    __slots__ = ("cached", "completion", "name", "prompt", "rejections")

    def __init__(self, name: str) -> None:
        self.name = name
        self.prompt = 0
        self.completion = 0
        self.cached = 0
        self.rejections: dict[str, int] = defaultdict(int)  # by limit
