"""When requests are due, what they hold, and when to give up."""

import itertools
import random
import statistics

import orjson
import pytest
from hypothesis import given, strategies as st

from gateway.bench.load import Body, Patience, Plan, Probe, arrivals, interleave, parse_sweep
from gateway.bench.prompts import Calibration
from gateway.bench.results import Cause, Record

USER = {"role": "user", "content": "u"}


@pytest.mark.parametrize(
    ("plan", "turns", "expected"),
    [
        (Plan(rate=2, poisson=False, requests=3), 1, [0.0, 0.5, 1.0]),
        (Plan(rate=2, poisson=False, duration=1.5), 1, [0.0, 0.5, 1.0]),
        (Plan(rate=4, poisson=False, requests=5), 2, [0.0, 0.25, 0.5]),
        (Plan(rate=1, poisson=False, duration=0.5), 1, [0.0]),
    ],
)
def test_constant_arrivals(plan: Plan, turns: int, expected: list[float]) -> None:
    assert arrivals(plan, random.Random(0), turns) == expected


def test_poisson_arrivals_have_their_rate_and_spread_and_the_seed_decides() -> None:
    plan = Plan(rate=50, requests=20_000)
    times = arrivals(plan, random.Random(1))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.03)  # of an exponential: its mean
    assert times == arrivals(plan, random.Random(1)) != arrivals(plan, random.Random(2))
    counted = arrivals(Plan(rate=50, duration=200), random.Random(3))
    assert len(counted) == pytest.approx(10_000, rel=0.04)
    assert counted[-1] < 200


@given(st.floats(0.1, 100), st.integers(0, 60), st.integers(0, 1000))
def test_two_targets_get_the_same_requests_at_the_same_rate_taking_turns(rate: float, number: int, seed: int) -> None:
    times = arrivals(Plan(rate=rate, requests=number), random.Random(seed)) if number else []
    assert interleave(times, 0, 1, rate) == list(zip(times, range(len(times)), strict=True))
    first, second = ({i: at for at, i in interleave(times, lane, 2, rate)} for lane in (0, 1))
    assert sorted(first) == sorted(second) == list(range(len(times)))
    for i in range(len(times)):
        assert abs(first[i] - second[i]) == pytest.approx(0.5 / rate)
        assert (first[i] < second[i]) == (i % 2 == 0)


@pytest.mark.parametrize(
    ("text", "loads"),
    [
        ("rate=1,2.5", [{"rate": 1.0}, {"rate": 2.5}]),
        ("concurrency=1,8", [{"concurrency": 1}, {"concurrency": 8}]),
    ],
)
def test_sweeps(text: str, loads: object) -> None:
    assert parse_sweep(text) == loads


@pytest.mark.parametrize(
    "text", ["", "1,2", "rate=", "rate=0", "concurrency=1.5", "speed=1", "rate=inf", "rate=nan", "rate=1,-2"]
)
def test_bad_sweeps(text: str) -> None:
    with pytest.raises(ValueError, match="expected rate=1,2,4"):
        parse_sweep(text)


def give_up_at(*causes: Cause | None, seconds_apart: float = 0.0) -> int | None:
    """The number of the request after which patience ends."""
    patience = Patience()
    for i, cause in enumerate(causes, 1):
        if patience.observe(cause, i * seconds_apart):
            return i
    return None


@pytest.mark.parametrize(
    ("causes", "seconds_apart", "expected"),
    [
        ([Cause.REFUSED], 0, 1),
        ([Cause.UNAUTHORIZED], 0, 1),
        ([Cause.NOT_FOUND], 0, 1),
        ([Cause.UNREACHABLE], 0, 1),
        ([Cause.SERVER_ERROR] * 20, 0, 10),
        ([Cause.TIMEOUT] * 9, 9, None),
        ([Cause.SERVER_ERROR] * 9 + [Cause.TIMEOUT] * 9, 0, None),
        ([Cause.ABANDONED, Cause.SERVER_ERROR] * 9, 0, None),
        ([None] + [Cause.SERVER_ERROR] * 99, 9, None),
        ([None] + [Cause.REFUSED] * 99, 0, None),
        ([None] + [Cause.REFUSED] * 9, 9, None),
        ([None] + [Cause.REFUSED] * 99, 0.1, 52),
        ([None] + [Cause.REFUSED] * 99, 1, 11),
        ([None, *[Cause.REFUSED] * 8, None, *[Cause.REFUSED] * 8], 9, None),
    ],
)
def test_patience(causes: list[Cause | None], seconds_apart: float, expected: int | None) -> None:
    assert give_up_at(*causes, seconds_apart=seconds_apart) == expected


def test_bodies() -> None:
    assert orjson.loads(Body("m").encode([USER], 5)) == {
        "model": "m",
        "messages": [USER],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 5,
    }
    extra = {"max_tokens": None, "max_completion_tokens": 9, "user": "x"}
    body = orjson.loads(Body("m", chat=False, ignore_eos=True, temperature=0.0, extra=extra).encode([USER, USER], 5))
    assert body.keys() - {"model", "stream", "stream_options"} == {
        "prompt",
        "ignore_eos",
        "temperature",
        "max_completion_tokens",
        "user",
    }
    assert body["prompt"] == "u\n\nu"
    assert "max_tokens" not in orjson.loads(Body("m").encode([USER], None))


def test_probes_calibrate_only_when_both_were_counted() -> None:
    def probed(conversation: int, tokens: int, *, counted: bool = True, cause: Cause | None = None) -> Record:
        return Record(conversation, 0, 0, 0, 1, 1, 1, 0, tokens, 1, counted, cause, "")

    assert Probe.calibration([probed(1, 20 + 2 * 272), probed(0, 20 + 2 * 16)]) == Calibration(20, 2)
    assert Probe.calibration([probed(0, 52), probed(1, 564, counted=False)]) == Calibration()
    assert Probe.calibration([probed(0, 52), probed(1, 0, cause=Cause.CUT)]) == Calibration()
    assert [len(Probe().conversation(i)[0].messages[0]["content"].split()) for i in (0, 1)] == list(Probe.WORDS)
