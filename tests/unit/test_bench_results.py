"""The figures of a load test, by hand and against plain definitions."""

import math

import pytest
from hypothesis import given, strategies as st

from gateway.bench.results import (
    Cause,
    Failure,
    Health,
    Histogram,
    Record,
    Sample,
    Slo,
    Spread,
    failures,
    parse_slo,
    percentile,
    spread,
    summarise,
    token_rates,
)


def record(**changed: object) -> Record:
    """Due and sent at 1 s, five tokens in four chunks from 1.5 to 2.5 s."""
    whole = Record(0, 0, 1.0, 1.0, 1.5, 2.5, 4, 0.6, 10, 5, True, None, "")
    return whole._replace(**changed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [
        ([7.0], 0.99, 7.0),
        ([1.0, 2.0], 0.5, 1.5),
        ([1.0, 2.0, 3.0, 4.0], 0.5, 2.5),  # as numpy.percentile
        ([1.0, 2.0, 3.0, 4.0], 0.9, 3.7),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 0.25, 2.0),
        ([1.0, 2.0], 1.0, 2.0),
    ],
)
def test_percentiles_are_linear_between_ranks(values: list[float], q: float, expected: float) -> None:
    assert percentile(values, q) == pytest.approx(expected)


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_a_spread_is_ordered_and_within_its_values(values: list[float]) -> None:
    found = spread(values)
    assert found.size == len(values)
    assert min(values) <= found.p50 <= found.p90 <= found.p95 <= found.p99 <= found.max == max(values)
    assert found.mean == pytest.approx(math.fsum(values) / len(values))


def test_nothing_spreads_to_nothing() -> None:
    assert spread([]) == Histogram().spread() == Spread(0, 0, 0, 0, 0, 0, 0)


@given(st.lists(st.floats(2e-6, 3000), min_size=1, max_size=200))
def test_a_histogram_knows_gaps_to_a_thousandth(gaps: list[float]) -> None:
    histogram = Histogram()
    for gap in gaps:
        assert histogram.add((0.0, gap)) == gap
    found = histogram.spread()
    ordered = sorted(gaps)
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert getattr(found, name) == pytest.approx(ordered[int(q * (len(ordered) - 1))], rel=0.0011)
    assert (found.size, found.max) == (len(gaps), max(gaps))
    assert found.mean == pytest.approx(math.fsum(gaps) / len(gaps))
    assert sum(n for _, n in histogram.buckets()) == len(gaps)


@pytest.mark.parametrize(
    ("times", "size", "longest"),
    [((), 0, 0.0), ((5.0,), 0, 0.0), ((1.0, 1.0, 3.0), 2, 2.0), ((0.0, 1e9), 1, 1e9)],
)
def test_gaps_lie_between_points(times: tuple[float, ...], size: int, longest: float) -> None:
    histogram = Histogram()
    assert histogram.add(times) == longest
    assert (histogram.count, histogram.max) == (size, longest)


def test_chunks_of_one_read_have_no_gap() -> None:
    histogram = Histogram()
    histogram.add((1.0, 1.0, 1.0))
    assert histogram.buckets() == [(0.0, 2)]
    assert histogram.spread() == Spread(2, 0, 0, 0, 0, 0, 0)


def test_times_of_a_request() -> None:
    r = record()
    assert (r.ttft, r.latency, r.tpot) == (0.5, 1.5, 0.25)
    assert r.mean_gap == pytest.approx(1 / 3)
    assert record(output_tokens=1).tpot == record(chunks=1).mean_gap == 0


def test_times_run_from_when_a_request_was_due_but_not_from_after_it_was_sent() -> None:
    late = record(due=0.2)
    assert late.ttft == pytest.approx(1.3)
    assert late.tpot == 0.25
    early = record(due=1.0004)
    assert early.ttft == 0.5


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("ttft=200ms", Slo(ttft=0.2)),
        ("ttft=200ms, itl=50ms ,e2e=2s", Slo(ttft=0.2, itl=0.05, e2e=2)),
        ("e2el=1.5s,tpot=300us,stall=300µs", Slo(e2e=1.5, tpot=0.0003, stall=0.0003)),
    ],
)
def test_slo(text: str, slo: Slo) -> None:
    parsed = parse_slo(text)
    assert all(a == b if a is None or b is None else a == pytest.approx(b) for a, b in zip(parsed, slo, strict=True))


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft=200", "ttft=ms", "ttft=-1ms", "ttft=infs", "speed=1s", "ttft=1h", "ttft=0s"]
)
def test_bad_slo(text: str) -> None:
    with pytest.raises(ValueError, match=r"use|expected"):
        parse_slo(text)


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(), True),
        (Slo(ttft=0.5), True),
        (Slo(ttft=0.49), False),
        (Slo(itl=0.34, e2e=1.5), True),
        (Slo(itl=0.33), False),
        (Slo(tpot=0.25), True),
        (Slo(tpot=0.2), False),
        (Slo(stall=0.5), False),
        (Slo(ttft=1, e2e=1.4), False),
    ],
)
def test_goodput_counts_requests_that_keep_all_bounds(slo: Slo, good: bool) -> None:
    found = summarise([record()], Histogram(), [], slo)
    assert (found.good, found.goodput) == (int(good), good / 1.5)


def test_rates_are_of_whole_answers_over_the_whole_run() -> None:
    records = [
        record(),
        record(due=2.0, sent=2.0, first=2.5, last=5.0, prompt_tokens=20, output_tokens=7),
        record(cause=Cause.CUT, detail="cut", prompt_tokens=0, last=9.0),
        record(cause=Cause.ABANDONED),
        record(counted=False),
    ]
    found = summarise(records, Histogram(), [Sample(0.5, 3, 4, 0, 0)])
    assert (found.duration, found.ok, found.failed, found.abandoned, found.uncounted) == (4.0, 3, 1, 1, 1)
    assert (found.prompt_tokens, found.output_tokens) == (40, 17)
    assert (found.request_rate, found.prompt_rate, found.output_rate, found.total_rate) == (0.75, 10, 4.25, 14.25)
    assert found.peak_running == 4
    assert found.peak_output_rate == found.output_rate  # too short to tell
    assert found.good is found.goodput is None
    slow_start = [Sample(0.0, 0, 0, 0, 0), Sample(1.0, 0, 1, 0, 0), Sample(1.9, 17, 1, 3, 0)]
    assert summarise(records, Histogram(), slow_start).peak_output_rate == found.output_rate
    assert found.ttft.size == 3
    assert found.lateness.size == 5


def test_a_run_without_an_answer_has_no_rates() -> None:
    for records in ([], [record(cause=Cause.REFUSED, first=0.0, last=0.0)]):
        found = summarise(records, Histogram(), [], Slo(ttft=1))
        assert (found.request_rate, found.total_rate, found.goodput, found.duration) == (0, 0, 0, 0)


def test_failures_by_cause_most_frequent_first_with_what_the_first_was_told() -> None:
    causes = [(Cause.CUT, "a"), (None, ""), (Cause.TIMEOUT, "b"), (Cause.TIMEOUT, "c"), (Cause.ABANDONED, "")]
    records = [record(cause=cause, detail=detail) for cause, detail in causes]
    assert failures(records) == (Failure(Cause.TIMEOUT, 2, "b"), Failure(Cause.CUT, 1, "a"))


def test_token_rates_are_exact_however_late_the_samples_came() -> None:
    samples = [Sample(t, chunks, 1, 0, 0) for t, chunks in ((0, 0), (0.5, 50), (1.0, 100), (3.0, 200), (3.1, 999))]
    assert token_rates(samples, 2.0) == [(0.5, 200.0), (2.0, 100.0)]
    assert token_rates([], 1.0) == []


@pytest.mark.parametrize(
    ("cpu", "lag", "ticks", "trusted"),
    [(0.5, 0.001, 100, True), (0.95, 0.001, 100, False), (0.5, 0.05, 100, False), (1.0, 0.05, 5, True)],
)
def test_the_generator_says_when_it_was_the_bottleneck(cpu: float, lag: float, ticks: int, trusted: bool) -> None:
    health = Health(cpu, Spread(ticks, lag, lag, lag, lag, lag, lag))
    assert (health.bottleneck is None) == trusted
