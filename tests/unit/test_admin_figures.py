"""Two looks at the counters, and what happened between them."""

import pytest
from hypothesis import given, strategies as st

from gateway.admin.figures import look, quantile, rates
from gateway.observe.metrics import Metrics

BOUNDS = (1.0, 2.0, 4.0)


@pytest.mark.parametrize(
    ("counts", "q", "expected"),
    [
        ((0, 0, 0, 0), 0.5, None),  # nothing came
        ((4, 0, 0, 0), 0.5, 0.5),  # half-way into the first bucket
        ((0, 10, 0, 0), 0.5, 1.5),
        ((0, 10, 0, 0), 1.0, 2.0),
        ((5, 0, 5, 0), 0.5, 1.0),
        ((5, 0, 5, 0), 0.75, 3.0),
        ((0, 0, 0, 7), 0.5, 4.0),  # beyond every bound: at least the highest
    ],
)
def test_quantile(counts: tuple[int, ...], q: float, expected: float | None) -> None:
    assert quantile(BOUNDS, counts, q) == expected


@given(st.lists(st.floats(0, 3.999), min_size=1, max_size=50), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_quantile_is_in_the_right_bucket(values: list[float], q: float) -> None:
    edges = (0.0, *BOUNDS)
    counts = [
        sum(low < v <= high or (low == 0 and v == 0) for v in values) for low, high in zip(edges, BOUNDS, strict=False)
    ]
    true = sorted(values)[max(0, -(-int(q * len(values) * 1000) // 1000) - 1)]
    bucket = next(i for i, bound in enumerate(BOUNDS) if true <= bound)
    found = quantile(BOUNDS, [*counts, 0], q)
    assert found is not None
    assert edges[max(0, bucket - 1)] <= found <= BOUNDS[min(bucket + 1, 2)]


def test_what_happened_between_two_looks() -> None:
    metrics = Metrics()
    tiny = metrics.model("tiny")
    tiny.request("/v1/chat/completions", 200, 0.1)
    tiny.prompt_tokens = 1000
    before = look(metrics, 100.0)
    for status in (200, 200, 499, 429, 502):
        tiny.request("/v1/chat/completions", status, 0.1)
    tiny.prompt_tokens += 30
    tiny.completion_tokens += 50
    tiny.ttft.observe(0.05)
    tiny.inter_token.observe(0.012)
    metrics.loop_lag.observe(0.002)
    metrics.loop_lag.observe(0.004)
    metrics.model("new").request("/v1/completions", 200, 0.1)  # a model that a reload brought
    metrics.other_model.request("/v1/completions", 404, 0.1)
    found = rates(before, look(metrics, 102.0))
    assert found.requests == 3.5
    assert found.errors == 1.5  # a client that left is no error
    assert (found.prompt_tokens, found.output_tokens) == (15, 25)
    assert found.ttft_p50 == pytest.approx(50)
    assert found.itl_p95 == pytest.approx(14.75)
    assert found.loop_lag == pytest.approx(3)
    assert list(found.models["tiny"]) == [2.5, 25]
    assert list(found.models["new"]) == [0.5, 0]


def test_nothing_happened() -> None:
    metrics = Metrics()
    seen = look(metrics, 1.0)
    found = rates(seen, seen._replace(at=2.0))
    assert (found.requests, found.errors, found.output_tokens) == (0, 0, 0)
    assert (found.ttft_p50, found.ttft_p95, found.itl_p50, found.loop_lag) == (None, None, None, None)
