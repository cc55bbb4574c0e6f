"""Places and the queue for them: first come, first served, never more than there are."""

import math

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.resilience.overload import Places


def taken(most: float, waiting: int = 3) -> Places[str]:
    places: Places[str] = Places(most, waiting)
    while places.open < most:
        places.open += 1
    return places


def test_first_come_first_served() -> None:
    places = taken(2)
    for name in "abc":
        assert not places.full
        places.queue(name)
    assert places.full
    assert [places.release() for _ in range(5)] == ["a", "b", "c", None, None]
    assert places.open == 0


def test_who_leaves_the_queue_frees_a_place_in_it() -> None:
    places = taken(1)
    for name in "abc":
        places.queue(name)
    assert places.leave("b")
    assert not places.full
    assert [places.release(), places.release()] == ["a", "c"]
    assert not places.leave("a"), "it has a place already"


def test_without_a_queue() -> None:
    places = taken(1, 0)
    assert places.full
    assert places.release() is None
    assert not places.full


def test_without_a_cap() -> None:
    places: Places[str] = Places(math.inf, 0)
    places.open += 100_000
    assert not places.full
    assert places.open < places.most


@pytest.mark.parametrize(
    ("most", "served", "after"), [(1, [], 2), (2, [], 2), (3, ["a"], 3), (9, ["a", "b"], 4), (math.inf, ["a", "b"], 4)]
)
def test_other_bounds(most: float, served: list[str], after: int) -> None:
    places = taken(2)
    places.queue("a")
    places.queue("b")
    assert places.resize(most, 5) == served
    assert places.open == after


def test_fewer_places_are_taken_back_as_they_come_free() -> None:
    places = taken(3)
    places.queue("a")
    places.resize(1, 5)
    assert [places.release(), places.release(), places.release()] == [None, None, "a"]
    assert places.open == 1


class Anything(RuleBasedStateMachine):
    """Whatever happens in whatever order, nobody is served twice or forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Places[int] = Places(2, 3)
        self.line: list[int] = []
        self.next = 0
        self.holders = 0

    @rule()
    def come(self) -> None:
        if self.places.open < self.places.most:
            self.places.open += 1
            self.holders += 1
        elif not self.places.full:
            self.places.queue(self.next)
            self.line.append(self.next)
            self.next += 1

    @precondition(lambda self: self.holders)
    @rule()
    def end(self) -> None:
        served = self.places.release()
        if served is None:
            self.holders -= 1
        else:
            assert served == self.line.pop(0)

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.line))
        assert self.places.leave(one)
        self.line.remove(one)

    @rule(most=st.integers(1, 5), waiting=st.integers(0, 4))
    def resize(self, most: int, waiting: int) -> None:
        served = self.places.resize(most, waiting)
        assert served == self.line[: len(served)]
        del self.line[: len(served)]
        self.holders += len(served)

    @invariant()
    def nobody_waits_beside_a_free_place(self) -> None:
        assert self.places.open == self.holders
        assert list(self.places.waiting) == self.line
        assert not self.line or self.places.open >= self.places.most


TestAnything = Anything.TestCase
