"""Which replica: ready, not tried yet, with the least to do."""

from collections.abc import Mapping

import pytest

from engines.types import Load, Replica, ReplicaState
from gateway.resilience.breaker import FAILURES, FIRST_EJECTION, Breakers
from gateway.routing.balance import load, pick


def replica(name: str, state: ReplicaState = ReplicaState.READY, said: Load | None = None) -> Replica:
    return Replica(name, "tiny", f"http://{name}", None, "tiny", state, said)


def picked(
    replicas: list[Replica],
    open_on: Mapping[str, int] | None = None,
    tried: tuple[str, ...] = (),
    breakers: Breakers | None = None,
    now: float = 0.0,
) -> set[str]:
    """All that chance could lead to."""
    found = set()
    for turn in range(50):
        chances = iter([((turn + 1) * (i + 3) * 0.61803) % 1 for i in range(len(replicas))])
        one = pick(
            replicas,
            tried,
            lambda r: (open_on or {}).get(r.id, 0),
            breakers or Breakers(),
            chance=chances.__next__,
            clock=lambda: now,
        )
        found.add(one.id if one is not None else "none")
    return found


def test_only_ready_ones() -> None:
    others = [replica(state.value, state) for state in ReplicaState if state is not ReplicaState.READY]
    assert picked(others) == {"none"}
    assert picked([*others, replica("a")]) == {"a"}
    assert picked([]) == {"none"}


def test_not_the_same_twice() -> None:
    both = [replica("a"), replica("b")]
    assert picked(both) == {"a", "b"}
    assert picked(both, tried=("a",)) == {"b"}
    assert picked(both, tried=("a", "b")) == {"none"}


def test_the_least_to_do() -> None:
    three = [replica("a"), replica("b"), replica("c")]
    assert picked(three, {"a": 2, "b": 1, "c": 3}) == {"b"}
    assert picked(three, {"a": 1, "b": 1, "c": 3}) == {"a", "b"}
    said = [replica("a", said=Load(5, 3, 0.1)), replica("b", said=Load(5, 0, 0.1))]
    assert picked(said) == {"b"}


def ejecting(*names: str, among: str) -> Breakers:
    """Breakers after these replicas have failed long enough, at 0 seconds."""
    breakers = Breakers()
    for name in names:
        for _ in range(FAILURES):
            breakers.failed(name, among, 0.0)
    return breakers


def test_one_that_fails_all_the_time_is_left_out() -> None:
    three = [replica("a"), replica("b"), replica("c")]
    breakers = ejecting("a", among="abc")
    assert picked(three, breakers=breakers) == {"b", "c"}
    assert picked(three, tried=("b",), breakers=breakers) == {"c"}
    assert picked(three, breakers=breakers, now=FIRST_EJECTION) == {"a", "b", "c"}


def test_one_that_fails_is_better_than_none() -> None:
    breakers = ejecting("a", among="abc")
    assert picked([replica("a"), replica("b", ReplicaState.UNHEALTHY)], breakers=breakers) == {"a"}
    assert picked([replica("a"), replica("b")], tried=("b",), breakers=breakers) == {"a"}
    assert picked([replica("a")], tried=("a",), breakers=breakers) == {"none"}


@pytest.mark.parametrize(
    ("said", "open_here", "expected"),
    [
        (None, 0, 0),
        (None, 4, 4),
        (Load(7, 2, 0.5), 0, 2),  # nothing of ours is open: what runs there was ours a moment ago, or is about to end
        (Load(7, 2, 0.5), 1, 9),
        (Load(1, 0, 0.5), 4, 4),
        (Load(0, 0, 0.0), 4, 4),
    ],
)
def test_load(said: Load | None, open_here: int, expected: int) -> None:
    assert load(replica("a", said=said), open_here) == expected
