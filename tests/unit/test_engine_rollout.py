"""Changing over to another configuration: what to do next, by table, and played to its end."""

from itertools import product

import pytest

from engines.command import Machine, Placement
from engines.rollout import Seat, Steps, memory_allows, next_steps, room_beside, same_process
from engines.spec import EngineSpec


def seat(text: str) -> Seat:
    """Words after the id: remote, leaving, launched, ready, proven, cramped."""
    id_, *words = text.split()
    assert {*words} <= {"remote", "leaving", "launched", "ready", "proven", "cramped"}
    return Seat(
        id_,
        local="remote" not in words,
        leaving="leaving" in words,
        launched=bool({"launched", "ready", "proven"} & {*words}),
        ready="ready" in words,
        proven=bool({"ready", "proven"} & {*words}),
        fits="cramped" not in words,
    )


@pytest.mark.parametrize(
    ("seats", "launch", "retire"),
    [
        ([], [], []),
        (["a ready"], [], []),
        (["a"], ["a"], []),
        (["a", "b"], ["a", "b"], []),
        # gone without a successor
        (["a leaving ready"], [], ["a"]),
        (["b ready", "a leaving ready"], [], ["a"]),
        (["b proven", "a leaving ready"], [], ["a"]),
        # replaced: the old one serves until the new one does
        (["b", "a leaving ready"], ["b"], []),
        (["b launched", "a leaving ready"], [], []),
        # and one that does not serve has no reason to stay
        (["b launched", "a leaving proven"], [], ["a"]),
        (["b launched", "a leaving launched"], [], ["a"]),
        # two for two: one by one
        (["c ready", "d launched", "a leaving ready", "b leaving ready"], [], ["a"]),
        (["c launched", "d launched", "a leaving ready", "b leaving ready"], [], []),
        # two for one
        (["c launched", "a leaving ready", "b leaving ready"], [], ["a"]),
        # another one that is kept counts
        (["k ready", "c launched", "a leaving ready"], [], []),
        (["k ready", "a leaving ready", "b leaving ready"], [], ["a", "b"]),
        # no room: the old one goes first, one at a time, and only while those before have worked out
        (["b cramped", "a leaving ready"], [], ["a"]),
        (["c cramped", "d cramped", "a leaving ready", "b leaving ready"], [], ["a"]),
        (["c launched", "d cramped", "b leaving ready"], [], []),
        (["c ready", "d cramped", "b leaving ready"], [], ["b"]),
        # nobody who could make room
        (["a cramped"], ["a"], []),
        (["a cramped", "b cramped"], ["a"], []),
        (["b cramped", "a remote leaving ready"], ["b"], []),
        # room is being made by one that is of no use any more
        (["b cramped", "a leaving proven"], [], ["a"]),
    ],
)
def test_what_to_do_next(seats: list[str], launch: list[str], retire: list[str]) -> None:
    assert next_steps([seat(text) for text in seats]) == Steps(launch, retire)


def test_room_that_is_to_come_is_waited_for() -> None:
    assert next_steps([seat("b cramped"), seat("c")], room_to_come=True) == Steps(["c"], [])


@pytest.mark.parametrize(("old", "new", "room"), [*product(range(4), repeat=3)])
def test_a_change_over_ends_and_never_leaves_fewer_than_there_could_be(old: int, new: int, room: int) -> None:
    """`room`: how many engines more than the old ones fit on the machine at a time."""
    leaving = {f"o{i}" for i in range(old)}
    waiting = [f"n{i}" for i in range(new)]
    ready: set[str] = set()
    for _ in range(50):
        fits = old + room - len(leaving) - len(ready)
        seats = [
            *(Seat(n, True, False, n in ready, n in ready, n in ready, i < fits) for i, n in enumerate(waiting)),
            *(Seat(n, True, False, True, True, True) for n in sorted(ready)),
            *(Seat(o, True, True, True, True, True) for o in sorted(leaving)),
        ]
        steps = next_steps(seats)
        if steps == Steps([], []):
            break
        leaving -= {*steps.retire}
        ready |= {*steps.launch}  # starts take no time here
        waiting = [n for n in waiting if n not in ready]
        assert len(leaving) + len(ready) >= min(old, new) - (room == 0)
    assert not leaving
    assert len(ready) == new


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"replicas": 3, "start_timeout": 1.0, "stop_timeout": 1.0}, True),
        ({"model": "n"}, False),
        ({"args": {"dtype": "float32"}}, False),
        ({"env": {"A": "b"}}, False),
        ({"python": "python3"}, False),
    ],
)
def test_what_needs_another_process(change: dict[str, object], same: bool) -> None:
    spec = EngineSpec(model="m")
    assert same_process(spec, spec.model_copy(update=change)) is same


ONE, TWO = EngineSpec(model="m"), EngineSpec(model="m", args={"tensor-parallel-size": 2})
CHOSEN = EngineSpec(model="m", env={"CUDA_VISIBLE_DEVICES": "1, 2"})


def gpus(*names: str) -> Placement:
    return Placement(gpus=names)


@pytest.mark.parametrize(
    ("spec", "planned", "others", "expected"),
    [
        (ONE, gpus("0"), [], gpus("0")),
        (ONE, gpus("0"), [(ONE, gpus("0"))], gpus("1")),
        (ONE, gpus("0"), [(ONE, gpus("0")), (CHOSEN, Placement())], gpus("3")),
        (TWO, gpus("0", "1"), [(ONE, gpus("1"))], gpus("0", "2")),
        (TWO, gpus("0", "1"), [(TWO, gpus("0", "1")), (ONE, gpus("2"))], None),
        (CHOSEN, Placement(), [(ONE, gpus("0"))], Placement()),
        (CHOSEN, Placement(), [(ONE, gpus("1"))], None),
    ],
)
def test_room_on_gpus(
    spec: EngineSpec, planned: Placement, others: list[tuple[EngineSpec, Placement]], expected: Placement | None
) -> None:
    assert room_beside(spec, planned, others, Machine(cores=(0,), gpus=("0", "1", "2", "3"))) == expected


def test_cores_can_be_shared() -> None:
    planned = Placement(cores=(0,))
    assert room_beside(ONE, planned, [(ONE, planned)], Machine(cores=(0,))) is planned


def test_memory_for_another_one_like_it() -> None:
    assert memory_allows(1250, 1000)
    assert not memory_allows(1249, 1000)
