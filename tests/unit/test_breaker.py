"""Circuit breakers: who is left out, for how long, and how it comes back."""

from collections.abc import Sequence

import pytest
from hypothesis import given, strategies as st

from gateway.resilience.breaker import (
    DOUBTFUL,
    FAILURES,
    FIRST_EJECTION,
    LONGEST_EJECTION,
    TRIAL,
    Breakers,
)


class Request:
    def __init__(self, first_byte: float | None = None) -> None:
        self.first_byte = first_byte


def fail(
    breakers: Breakers, replica: str, ready: Sequence[str] = "ab", now: float = 0.0, times: int = FAILURES
) -> float:
    """For how long it is ejected after so many failures."""
    return [breakers.failed(replica, ready, now) for _ in range(times)][-1]


def test_failures_in_a_row_eject() -> None:
    breakers = Breakers()
    assert fail(breakers, "a", times=FAILURES - 1) == 0
    assert breakers.blocked("ab", 0.0) == frozenset()
    assert fail(breakers, "a", times=1) == FIRST_EJECTION
    assert breakers.blocked("ab", 0.0) == {"a"}


def test_a_success_in_between_starts_the_count_anew() -> None:
    breakers = Breakers()
    fail(breakers, "a", times=FAILURES - 1)
    breakers.succeeded("a", 0.0)
    assert not breakers.troubled
    assert fail(breakers, "a", times=FAILURES - 1) == 0


@pytest.mark.parametrize(("count", "most"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (8, 4)])
def test_at_most_half_and_never_the_last(count: int, most: int) -> None:
    breakers, ready = Breakers(), [str(i) for i in range(count)]
    for replica in ready:
        fail(breakers, replica, ready)
    assert len(breakers.blocked(ready, 0.0)) == most


def test_replicas_that_are_down_do_not_count_as_a_rest() -> None:
    breakers = Breakers()
    fail(breakers, "a", ready="a")  # b, c and d are down: a is the last one
    assert breakers.blocked("a", 0.0) == frozenset()


def test_the_last_one_left_is_never_blocked() -> None:
    breakers = Breakers()
    fail(breakers, "a")
    assert breakers.blocked("a", 0.0) == frozenset()  # b went down after a had been ejected


def test_one_trial_at_a_time() -> None:
    breakers = Breakers()
    fail(breakers, "a")
    now = FIRST_EJECTION
    assert breakers.blocked("ab", now - 0.001) == {"a"}
    assert breakers.blocked("ab", now) == frozenset()
    breakers.picked("a", Request(), now)
    assert breakers.blocked("ab", now) == {"a"}
    assert breakers.blocked("ab", now + TRIAL - 0.001) == {"a"}
    assert breakers.blocked("ab", now + TRIAL) == frozenset(), "a trial that says nothing lets another one through"


def test_a_trial_that_succeeds_closes_the_circuit() -> None:
    breakers = Breakers()
    fail(breakers, "a")
    breakers.picked("a", Request(), FIRST_EJECTION)
    breakers.succeeded("a", FIRST_EJECTION + 0.1)
    assert not breakers.troubled


def test_a_trial_whose_answer_flows_lets_others_follow() -> None:
    breakers, trial = Breakers(), Request()
    fail(breakers, "a")
    now = FIRST_EJECTION
    breakers.picked("a", trial, now)
    trial.first_byte = now + 0.2
    assert breakers.blocked("ab", now + 0.3) == frozenset()
    breakers.picked("a", Request(), now + 0.3)
    assert breakers.blocked("ab", now + 0.3) == frozenset(), "not one at a time any more"


def test_a_stream_that_began_elsewhere_proves_nothing_yet() -> None:
    breakers = Breakers()
    fail(breakers, "a")
    breakers.picked("a", Request(first_byte=0.5), FIRST_EJECTION)
    assert breakers.blocked("ab", FIRST_EJECTION + 0.1) == {"a"}


def test_a_trial_that_fails_ejects_for_twice_as_long() -> None:
    breakers, now, seconds = Breakers(), 0.0, fail(Breakers(), "a")
    fail(breakers, "a")
    seen = []
    while seconds < LONGEST_EJECTION:
        now += seconds
        breakers.picked("a", Request(), now)
        again = breakers.failed("a", "ab", now)
        assert again == min(2 * seconds, LONGEST_EJECTION)
        assert breakers.blocked("ab", now) == {"a"}
        seen.append(seconds := again)
    assert breakers.failed("a", "ab", now + seconds) == LONGEST_EJECTION
    assert seen == sorted(seen)


def test_what_was_sent_before_the_ejection_changes_nothing_while_it_lasts() -> None:
    breakers = Breakers()
    fail(breakers, "a")
    breakers.succeeded("a", FIRST_EJECTION - 0.1)
    assert fail(breakers, "a", now=FIRST_EJECTION - 0.1) == 0
    assert breakers.blocked("ab", FIRST_EJECTION - 0.1) == {"a"}
    assert breakers.blocked("ab", FIRST_EJECTION) == frozenset()


def test_it_is_in_doubt_before_it_is_ejected() -> None:
    breakers = Breakers()
    assert not breakers.doubtful("a")
    fail(breakers, "a", times=DOUBTFUL - 1)
    assert not breakers.doubtful("a")
    fail(breakers, "a", times=1)
    assert breakers.doubtful("a")
    assert not breakers.doubtful("b")


class TestProperties:
    steps = st.lists(
        st.tuples(st.sampled_from("abcde"), st.sampled_from(["fail", "succeed", "pick"]), st.floats(0, 3)), max_size=200
    )

    @given(steps)
    def test_somebody_is_always_left_and_everybody_comes_back(self, steps: list[tuple[str, str, float]]) -> None:
        breakers, now = Breakers(), 0.0
        for replica, what, seconds in steps:
            now += seconds
            if what == "fail":
                breakers.failed(replica, "abcde", now)
            elif what == "succeed":
                breakers.succeeded(replica, now)
            elif replica not in breakers.blocked("abcde", now):
                breakers.picked(replica, Request(), now)
            assert len(breakers.blocked("abcde", now)) <= 2
        assert breakers.blocked("abcde", now + LONGEST_EJECTION + TRIAL) == frozenset()
        for replica in "abcde":
            breakers.succeeded(replica, now + LONGEST_EJECTION)
        assert not breakers.troubled


def test_a_replica_that_is_gone_or_begins_anew_is_forgotten() -> None:
    breakers = Breakers()
    fail(breakers, "a", "abcd")
    fail(breakers, "b", "abcd")
    breakers.keep(iter("bcd"))
    assert set(breakers.troubled) == {"b"}
