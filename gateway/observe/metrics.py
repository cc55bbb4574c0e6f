"""Every metric, declared once (in `_Exposition`); CONTRACT.md §7 lists them.

The request path counts in plain attributes and lists; prometheus_client sees them only at a scrape.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Final, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engines.types import FleetView, ReplicaState
from gateway.observe.counters import LOOP_LAG, OTHER, OVERHEAD, Family, Histogram, KeyMetrics, ModelMetrics

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4  # of what `Metrics.render` gives

_K = TypeVar("_K")
_V = TypeVar("_V")


class Metrics:
    """All that is counted in this process.

    Everything but `render` belongs to the event loop's thread and never blocks; `render` may run in any thread.
    """

    def __init__(self, max_labels: int = 1000) -> None:
        self._max_labels = max_labels
        self.other_model = ModelMetrics(OTHER)  # for models nobody configured
        self.other_key = KeyMetrics(OTHER)
        self.models = {OTHER: self.other_model}
        self.keys = {OTHER: self.other_key}
        self.overhead: dict[str, Histogram] = Family(OVERHEAD)  # by stage
        self.loop_lag = Histogram(LOOP_LAG)
        self.reloads: dict[str, int] = defaultdict(int, applied=0, failed=0)  # by outcome
        self.view = FleetView()
        self._registry = CollectorRegistry()
        self._registry.register(_Exposition(self))
        ProcessCollector(registry=self._registry)

    def model(self, name: str) -> ModelMetrics:
        """The metrics of a configured model; those of `other` once there are too many."""
        return self._bounded(self.models, name, ModelMetrics, self.other_model)

    def key(self, name: str) -> KeyMetrics:
        """The metrics of a key by its name (never the key itself); those of `other` once there are too many."""
        return self._bounded(self.keys, name, KeyMetrics, self.other_key)

    def fleet(self, view: FleetView) -> None:
        """Remembers the latest view, for the engines' gauges; their models' series exist from now on."""
        self.view = view
        for name in view.replicas:
            self.model(name)

    def render(self) -> bytes:
        """The text exposition, of type `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def replicas(self) -> dict[tuple[str, str], list[float | None]]:
        """By (model, replica) label: up, restarts, running, waiting, KV cache usage.

        Replicas beyond the cap share `other`: sums, and the fullest cache.
        """
        rows: dict[tuple[str, str], list[float | None]] = {}
        merge: tuple[Callable[[float, float], float], ...] = (_plus, _plus, _plus, _plus, max)
        for model, replicas in self.view.replicas.items():
            known = self.models.get(model, self.other_model).name
            for replica in replicas:
                label = (known, replica.id) if len(rows) < self._max_labels else (OTHER, OTHER)
                load = replica.load or (None, None, None)
                new = [float(replica.state is ReplicaState.READY), float(replica.restarts), *load]
                old = rows.get(label, [None] * len(new))
                rows[label] = [
                    b if a is None else a if b is None else m(a, b) for m, a, b in zip(merge, old, new, strict=True)
                ]
        return rows

    def _bounded(self, table: dict[str, _V], name: str, make: Callable[[str], _V], other: _V) -> _V:
        found = table.get(name)
        if found is None:
            if len(table) > self._max_labels:  # `other` itself does not count
                return other
            found = table[name] = make(name)
        return found


class _Exposition(Collector):
    """The declaration of every metric, read from `Metrics` at each scrape."""

    def __init__(self, metrics: Metrics) -> None:
        self._of = metrics

    def collect(self) -> Iterator[Metric]:
        of = self._of
        models, keys = _values(of.models), _values(of.keys)
        yield _counter(
            "requests",
            "Requests answered.",
            ("model", "endpoint", "status"),
            (((m.name, endpoint, str(status)), n) for m in models for (endpoint, status), n in _items(m.requests)),
        )
        yield _counter(
            "tokens",
            "Tokens used, as the engines count them; cached ones are part of the prompt.",
            ("model", "kind"),
            (
                ((m.name, kind), n)
                for m in models
                for kind, n in _kinds(m.prompt_tokens, m.completion_tokens, m.cached_tokens)
            ),
        )
        yield _counter(
            "key_tokens",
            "Tokens used by each key.",
            ("key", "kind"),
            (((k.name, kind), n) for k in keys for kind, n in _kinds(k.prompt, k.completion, k.cached)),
        )
        yield _histogram(
            "time_to_first_token_seconds",
            "From a streaming request's arrival to the first token written to the client.",
            ("model",),
            (((m.name,), m.ttft) for m in models),
        )
        yield _histogram(
            "inter_token_seconds",
            "Between two events of a stream.",
            ("model",),
            (((m.name,), m.inter_token) for m in models),
        )
        yield _histogram(
            "request_seconds",
            "From a request's arrival to its last byte.",
            ("model", "endpoint"),
            (((m.name, endpoint), h) for m in models for endpoint, h in _items(m.request_seconds)),
        )
        yield _histogram(
            "overhead_seconds",
            "Time spent in the gateway itself.",
            ("stage",),
            (((stage,), h) for stage, h in _items(of.overhead)),
        )
        yield _gauge("inflight_requests", "Requests open now.", ("model",), (((m.name,), m.inflight) for m in models))
        yield _gauge(
            "queued_requests", "Requests that wait for a place.", ("model",), (((m.name,), m.queued) for m in models)
        )
        yield _counter(
            "limit_rejections",
            "Requests refused by a limit.",
            ("key", "limit"),
            (((k.name, limit), n) for k in keys for limit, n in _items(k.rejections)),
        )
        yield _counter(
            "attempts",
            "Requests sent to engines, retries included; over_budget: retries that were not made.",
            ("model", "outcome"),
            (((m.name, outcome), n) for m in models for outcome, n in _items(m.attempts)),
        )
        yield _counter(
            "failovers",
            "Streams whose engine died in mid-answer.",
            ("model", "outcome"),
            (((m.name, outcome), n) for m in models for outcome, n in _items(m.failovers)),
        )
        replicas = of.replicas()
        each = ("model", "replica")
        up, restarts, running, waiting, kv = ([(label, row[i]) for label, row in replicas.items()] for i in range(5))
        yield _gauge("engine_up", "1 if the replica takes requests.", each, up)
        yield _counter("engine_restarts", "Starts of the replica after its first.", each, restarts)
        yield _gauge("engine_running_requests", "Requests in the engine's batch, as it says.", each, running)
        yield _gauge("engine_waiting_requests", "Requests queued in the engine, as it says.", each, waiting)
        yield _gauge("engine_kv_cache_usage", "Share of the engine's KV cache in use (0 to 1).", each, kv)
        yield _histogram("event_loop_lag_seconds", "How late the event loop wakes.", (), [((), of.loop_lag)])
        yield _counter(
            "config_reloads",
            "Reloads of the configuration.",
            ("outcome",),
            (((outcome,), n) for outcome, n in _items(of.reloads)),
        )


_Values = Iterable[tuple[tuple[str, ...], float | None]]  # None: not known, no sample


def _counter(name: str, text: str, labels: tuple[str, ...], values: _Values) -> Metric:
    family = CounterMetricFamily(f"penstock_{name}", text, labels=labels)
    for label, value in values:
        if value is not None:
            family.add_metric(label, value)
    return family


def _gauge(name: str, text: str, labels: tuple[str, ...], values: _Values) -> Metric:
    family = GaugeMetricFamily(f"penstock_{name}", text, labels=labels)
    for label, value in values:
        if value is not None:
            family.add_metric(label, value)
    return family


def _histogram(
    name: str, text: str, labels: tuple[str, ...], values: Iterable[tuple[tuple[str, ...], Histogram]]
) -> Metric:
    family = HistogramMetricFamily(f"penstock_{name}", text, labels=labels)
    for label, histogram in values:
        family.add_metric(label, _cumulated(histogram), histogram.total)
    return family


def _cumulated(histogram: Histogram) -> list[tuple[str, float]]:
    names = (*(str(float(bound)) for bound in histogram.bounds), "+Inf")
    return list(zip(names, accumulate(histogram.counts), strict=True))


# Copied in one step, so that the loop's thread may add to them during a scrape in another.


def _items(table: Mapping[_K, _V]) -> list[tuple[_K, _V]]:
    return list(table.items())


def _values(table: Mapping[str, _V]) -> list[_V]:
    return list(table.values())


def _kinds(prompt: int, completion: int, cached: int) -> tuple[tuple[str, int], ...]:
    return ("prompt", prompt), ("completion", completion), ("cached", cached)


def _plus(a: float, b: float) -> float:
    return a + b
