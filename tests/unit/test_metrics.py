"""What a scrape says is what was observed; names and labels are those of CONTRACT.md §7."""

import asyncio
import math
from typing import Any

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from engines.types import FleetView, Load, Replica, ReplicaState
from gateway.observe.counters import LOOP_LAG, OTHER, REQUEST, TTFT, Histogram
from gateway.observe.loop import LoopLag
from gateway.observe.metrics import Metrics

CONTRACT = {
    "requests_total": {"model", "endpoint", "status"},
    "tokens_total": {"model", "kind"},
    "key_tokens_total": {"key", "kind"},
    "time_to_first_token_seconds": {"model"},
    "inter_token_seconds": {"model"},
    "request_seconds": {"model", "endpoint"},
    "overhead_seconds": {"stage"},
    "inflight_requests": {"model"},
    "queued_requests": {"model"},
    "limit_rejections_total": {"key", "limit"},
    "attempts_total": {"model", "outcome"},
    "failovers_total": {"model", "outcome"},
    "engine_up": {"model", "replica"},
    "engine_restarts_total": {"model", "replica"},
    "engine_running_requests": {"model", "replica"},
    "engine_waiting_requests": {"model", "replica"},
    "engine_kv_cache_usage": {"model", "replica"},
    "event_loop_lag_seconds": set[str](),
    "config_reloads_total": {"outcome"},
}


def replica(index: int, state: ReplicaState = ReplicaState.READY, load: Load | None = None, **more: Any) -> Replica:
    return Replica(f"tiny/{index}", "tiny", "http://127.0.0.1:1", None, "tiny", state, load, **more)


def used(**cap: int) -> Metrics:
    """Metrics with at least one sample of every family."""
    metrics = Metrics(**cap)
    metrics.fleet(
        FleetView(
            {
                "tiny": (
                    replica(0, load=Load(3, 1, 0.25), restarts=2),
                    replica(1, ReplicaState.UNHEALTHY),
                )
            }
        )
    )
    tiny = metrics.model("tiny")
    tiny.request("/v1/completions", 200, 0.3)
    tiny.request("/v1/completions", 200, 0.6)
    tiny.request("/v1/completions", 429, 0.001)
    tiny.ttft.observe(0.02)
    tiny.inter_token.observe(0.011)
    tiny.inflight += 2
    tiny.prompt_tokens += 10
    tiny.completion_tokens += 20
    tiny.cached_tokens += 5
    tiny.attempts["ok"] += 2
    tiny.failovers["resumed"] += 1
    demo = metrics.key("demo")
    demo.prompt += 10
    demo.completion += 20
    demo.cached += 5
    demo.rejections["tokens"] += 1
    metrics.overhead["decode"].observe(0.00002)
    metrics.reloads["failed"] += 1
    return metrics


def scrape(metrics: Metrics) -> dict[str, Metric]:
    """Penstock's families by the name in the contract."""
    text = metrics.render().decode()
    families = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith("penstock_"):
            suffix = "_total" if family.type == "counter" else ""
            families[family.name.removeprefix("penstock_") + suffix] = family
    return families


def value(families: dict[str, Metric], name: str, sample: str | None = None, **labels: str) -> float | None:
    wanted = f"penstock_{sample or name}"
    for found in families[name].samples:
        if found.name == wanted and found.labels == labels:
            return found.value
    return None


def test_families_and_labels_are_those_of_the_contract() -> None:
    families = scrape(used())
    assert set(families) == set(CONTRACT)
    for name, family in families.items():
        assert family.documentation
        assert family.samples, name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == CONTRACT[name], sample


def test_no_family_is_declared_twice() -> None:
    lines = used().render().decode().splitlines()
    types = [line for line in lines if line.startswith("# TYPE")]
    assert len(types) == len(set(types))
    series = [line.rsplit(" ", 1)[0] for line in lines if not line.startswith("#")]
    assert len(series) == len(set(series))


def test_counts_are_what_was_observed() -> None:
    families = scrape(used())
    at = {"model": "tiny", "endpoint": "/v1/completions"}
    assert value(families, "requests_total", status="200", **at) == 2
    assert value(families, "requests_total", status="429", **at) == 1
    assert value(families, "tokens_total", model="tiny", kind="prompt") == 10
    assert value(families, "tokens_total", model="tiny", kind="completion") == 20
    assert value(families, "tokens_total", model="tiny", kind="cached") == 5
    assert value(families, "key_tokens_total", key="demo", kind="completion") == 20
    assert value(families, "inflight_requests", model="tiny") == 2
    assert value(families, "limit_rejections_total", key="demo", limit="tokens") == 1
    assert value(families, "attempts_total", model="tiny", outcome="ok") == 2
    assert value(families, "failovers_total", model="tiny", outcome="resumed") == 1
    assert value(families, "failovers_total", model="tiny", outcome="refused") == 0
    assert value(families, "config_reloads_total", outcome="failed") == 1
    assert value(families, "request_seconds", "request_seconds_count", **at) == 3
    assert value(families, "request_seconds", "request_seconds_sum", **at) == pytest.approx(0.901)
    assert value(families, "request_seconds", "request_seconds_bucket", le="0.5", **at) == 2
    assert value(families, "overhead_seconds", "overhead_seconds_bucket", le="2.5e-05", stage="decode") == 1


def test_engine_gauges_come_from_the_latest_view() -> None:
    metrics = used()
    families = scrape(metrics)
    first, second = {"model": "tiny", "replica": "tiny/0"}, {"model": "tiny", "replica": "tiny/1"}
    assert value(families, "engine_up", **first) == 1
    assert value(families, "engine_restarts_total", **first) == 2
    assert value(families, "engine_running_requests", **first) == 3
    assert value(families, "engine_waiting_requests", **first) == 1
    assert value(families, "engine_kv_cache_usage", **first) == 0.25
    assert value(families, "engine_up", **second) == 0
    assert value(families, "engine_running_requests", **second) is None  # its load is not known
    assert value(families, "engine_kv_cache_usage", **second) is None

    metrics.fleet(FleetView({"tiny": (replica(1),)}))
    families = scrape(metrics)
    assert value(families, "engine_up", **first) is None
    assert value(families, "engine_up", **second) == 1


@pytest.mark.parametrize(
    ("observed", "bucket"),
    [(0.0, 0), (0.001, 0), (0.0011, 1), (120, len(TTFT) - 1), (120.1, len(TTFT)), (math.inf, len(TTFT))],
)
def test_a_bound_belongs_to_its_own_bucket(observed: float, bucket: int) -> None:
    histogram = Histogram(TTFT)
    histogram.observe(observed)
    assert histogram.counts.index(1) == bucket


@pytest.mark.parametrize("bounds", [TTFT, REQUEST, LOOP_LAG])
def test_buckets_are_cumulated_and_sorted(bounds: tuple[float, ...]) -> None:
    metrics = Metrics()
    metrics.loop_lag = Histogram(bounds)
    for bound in bounds:
        metrics.loop_lag.observe(bound)
    buckets = [s for s in scrape(metrics)["event_loop_lag_seconds"].samples if s.name.endswith("_bucket")]
    assert [float(s.labels["le"]) for s in buckets] == [*bounds, math.inf]
    assert [s.value for s in buckets] == [*range(1, len(bounds) + 1), len(bounds)]


def test_beyond_the_cap_names_become_other() -> None:
    metrics = Metrics()
    for i in range(1000):
        assert metrics.model(f"m{i}").name == f"m{i}"
        assert metrics.key(f"k{i}").name == f"k{i}"
    assert metrics.model("one too many") is metrics.other_model
    assert metrics.key("one too many") is metrics.other_key
    assert metrics.model("m999").name == "m999"  # a known one stays itself

    metrics.model("one too many").inflight += 1
    metrics.key("one too many").prompt += 7
    families = scrape(metrics)
    assert len(families["inflight_requests"].samples) == 1001
    assert value(families, "inflight_requests", model=OTHER) == 1
    assert value(families, "key_tokens_total", key=OTHER, kind="prompt") == 7


def test_a_configured_name_may_be_other() -> None:
    metrics = Metrics()
    assert metrics.model(OTHER) is metrics.other_model


def test_replicas_beyond_the_cap_are_summed() -> None:
    metrics = Metrics(max_labels=2)
    metrics.fleet(
        FleetView(
            {
                "tiny": (
                    replica(0),
                    replica(1),
                    replica(2, load=Load(1, 0, 0.5), restarts=1),
                    replica(3, ReplicaState.STARTING),
                    replica(4, load=Load(4, 2, 0.75), restarts=2),
                )
            }
        )
    )
    families = scrape(metrics)
    rest = {"model": OTHER, "replica": OTHER}
    assert len(families["engine_up"].samples) == 3
    assert value(families, "engine_up", **rest) == 2
    assert value(families, "engine_restarts_total", **rest) == 3
    assert value(families, "engine_running_requests", **rest) == 5
    assert value(families, "engine_waiting_requests", **rest) == 2
    assert value(families, "engine_kv_cache_usage", **rest) == 0.75


def test_a_client_can_make_no_series() -> None:
    """Unknown models are counted on `other_model`, whose series exist from the start but for endpoint and status."""
    metrics = used()
    metrics.other_model.request("/v1/completions", 404, 0.001)
    before = metrics.render().count(b"\n")
    for _ in range(100):
        metrics.other_model.request("/v1/completions", 404, 0.001)
    assert metrics.render().count(b"\n") == before


def test_label_values_are_escaped() -> None:
    metrics = Metrics()
    odd = 'a"b\\c\nd'
    metrics.model(odd).inflight += 3
    assert value(scrape(metrics), "inflight_requests", model=odd) == 3


def test_process_metrics_are_there_and_registries_are_apart() -> None:
    first, second = Metrics(), Metrics()
    first.model("only here")
    assert b"process_resident_memory_bytes" in first.render()
    assert b"process_cpu_seconds_total" in first.render()
    assert b"only here" not in second.render()


async def test_the_loop_lag_is_observed_again_and_again_until_it_is_stopped() -> None:
    lag = Histogram(LOOP_LAG)
    sampled = LoopLag(lag, interval=0.001)
    sampled.stop()
    sampled.start()
    while sum(lag.counts) < 3:  # noqa: ASYNC110 - it sets nothing that could be waited for
        await asyncio.sleep(0)
    sampled.stop()
    assert lag.total >= 0
    before = sum(lag.counts)
    await asyncio.sleep(0.01)
    assert sum(lag.counts) == before
