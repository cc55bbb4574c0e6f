import math

import pytest
from hypothesis import given, strategies as st

from gateway.usage.estimate import AnswerLengths, PromptEstimator

# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "tokens"), [(0, 1), (1, 1), (10, 3), (1000, 300)])
def test_a_first_estimate_takes_three_tokens_for_ten_bytes(size: int, tokens: int) -> None:
    assert PromptEstimator().estimate(size) == tokens


@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.7, 3.0])
def test_the_ratio_becomes_what_the_engine_counts(ratio: float) -> None:
    estimator = PromptEstimator()
    for _ in range(20):
        estimator.observe(10_000, round(10_000 * ratio))
    assert estimator.estimate(100_000) == pytest.approx(100_000 * ratio, rel=0.25)
    for _ in range(1000):
        estimator.observe(10_000, 5_000)
    assert estimator.estimate(100_000) == pytest.approx(50_000, rel=0.01)


@pytest.mark.parametrize(("size", "tokens"), [(0, 10), (10, 0), (-1, 5), (5, -1)])
def test_a_request_without_a_size_or_a_count_teaches_nothing(size: int, tokens: int) -> None:
    estimator = PromptEstimator()
    estimator.observe(size, tokens)
    assert estimator.estimate(1000) == 300


@given(st.lists(st.tuples(st.integers(-5, 10**8), st.integers(-5, 10**8)), max_size=200), st.integers(0, 10**9))
def test_an_estimate_is_never_below_one_token(seen: list[tuple[int, int]], size: int) -> None:
    estimator = PromptEstimator()
    for one in seen:
        estimator.observe(*one)
    assert estimator.estimate(size) >= 1


# --- answers ---------------------------------------------------------------------------------------------------------


def expected_after(lengths: list[int]) -> int:
    answers = AnswerLengths()
    for length in lengths:
        answers.observe(length)
    return answers.expected()


def test_until_enough_answers_are_seen_256_tokens_are_expected() -> None:
    assert expected_after([10] * 15) == 256
    assert expected_after([10] * 16) < 16


@pytest.mark.parametrize(
    ("lengths", "low", "high"),
    [
        ([0] * 16, 1, 1),
        ([1] * 16, 1, 1),
        ([100] * 32, 64, 127),
        ([100] * 31 + [4000], 64, 127),  # 3 % are rare
        ([100] * 28 + [4000] * 4, 2048, 4095),  # 12 % are not
        ([2**40] * 16, 2**31, 2**32),
    ],
)
def test_the_expected_length_lies_in_the_bucket_of_the_95th_percentile(lengths: list[int], low: int, high: int) -> None:
    assert low <= expected_after(lengths) <= high


@given(st.lists(st.integers(0, 100_000), min_size=16, max_size=16))
def test_at_most_one_in_twenty_answers_is_in_a_longer_bucket(lengths: list[int]) -> None:
    expected = expected_after(lengths)
    longer = sum(length.bit_length() > expected.bit_length() for length in lengths)
    assert longer <= math.floor(0.05 * len(lengths))
    assert sum(length.bit_length() >= expected.bit_length() for length in lengths) > longer or expected == 1


def test_old_answers_are_forgotten() -> None:
    assert expected_after([8000] * 1600 + [20] * 1600) < 32
