"""What may be tried again, how often, and when."""

import pytest

from gateway import errors
from gateway.errors import GatewayError
from gateway.resilience.attempts import (
    BACKOFF,
    FLOOR,
    LONGEST_BACKOFF,
    Cause,
    RetryBudget,
    backoff,
    cause_of,
    free,
)
from gateway.wire.errors import from_engine
from gateway.wire.openai import ENDPOINTS


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (errors.engine_failed(), Cause.LOST),
        (errors.EngineStalledError(), Cause.LOST),
        (errors.upstream_error(), Cause.FAILED),
        *((from_engine(status, b"", ENDPOINTS[0], "tiny"), Cause.FAILED) for status in (500, 502, 503, 401)),
        *((from_engine(status, b"", ENDPOINTS[0], "tiny"), Cause.FINAL) for status in (400, 413, 422, 429)),
        (errors.timeout(), Cause.FINAL),
        (errors.draining(), Cause.FINAL),
        (errors.internal(), Cause.FINAL),
    ],
    ids=str,
)
def test_cause(error: GatewayError, cause: Cause) -> None:
    assert cause_of(error) is cause


@pytest.mark.parametrize(
    ("cause", "doubtful", "expected"),
    [(Cause.LOST, False, True), (Cause.LOST, True, False), (Cause.FAILED, False, False), (Cause.FAILED, True, False)],
)
def test_only_a_move_to_an_engine_that_is_well_is_free(cause: Cause, doubtful: bool, expected: bool) -> None:
    assert free(cause, doubtful=doubtful) is expected


@pytest.mark.parametrize(
    ("open_requests", "expected"), [(0, FLOOR), (1, FLOOR), (15, FLOOR), (16, 4), (100, 20), (101, 21)]
)
def test_the_budget(open_requests: int, expected: int) -> None:
    budget = RetryBudget()
    assert [budget.draw(open_requests) for _ in range(expected + 1)] == [True] * expected + [False]
    budget.give_back()
    assert budget.draw(open_requests)
    assert not budget.draw(open_requests)


def test_backoff_is_all_jitter_and_grows() -> None:
    assert [backoff(retry, 0.0) for retry in (1, 2, 3)] == [0, 0, 0]
    assert [backoff(retry, 0.5) for retry in (1, 2, 3)] == [BACKOFF / 2, BACKOFF, BACKOFF * 2]
    assert backoff(50, 1.0) == LONGEST_BACKOFF
