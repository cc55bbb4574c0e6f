"""What a turn of the loop writes: at its end, in order, each transport's own; and nothing lost by what is done in between."""

import asyncio
import math
from typing import Any, cast

from gateway.cork import MOST, QUIET, Cork


class Wire:
    def __init__(self, *, fails: bool = False) -> None:
        self.said: list[bytes] = []
        self.closing = False
        self.fails = fails

    def write(self, data: bytes) -> None:
        if self.fails:
            raise RuntimeError
        self.said.append(data)

    def is_closing(self) -> bool:
        return self.closing


def wires(number: int) -> list[Any]:
    return [cast(Any, Wire()) for _ in range(number)]


async def test_what_a_turn_writes_goes_out_at_its_end_in_one_piece() -> None:
    cork, (one, two) = Cork(), wires(2)
    cork.write(one, b"a")
    cork.write(two, b"b")
    cork.write(one, b"c")
    assert (one.said, two.said) == ([], [])
    await asyncio.sleep(0)
    assert (one.said, two.said) == ([b"ac"], [b"b"])
    cork.write(one, b"d")
    await asyncio.sleep(0)
    assert one.said == [b"ac", b"d"]


async def test_what_is_flushed_goes_out_at_once_and_once() -> None:
    cork, (one, two) = Cork(), wires(2)
    cork.flush(one)
    cork.write(one, b"a")
    cork.flush(one)
    assert one.said == [b"a"]
    cork.write(one, b"b")
    cork.write(two, b"c")
    await asyncio.sleep(0)
    assert (one.said, two.said) == ([b"a", b"b"], [b"c"])


async def test_a_transport_that_closes_or_fails_takes_nothing_from_the_others() -> None:
    cork, (closed, other) = Cork(), wires(2)
    faulty: Any = Wire(fails=True)
    for wire in (closed, faulty, other):
        cork.write(wire, b"a")
    closed.closing = True
    await asyncio.sleep(0)
    assert (closed.said, other.said) == ([], [b"a"])


async def test_much_goes_out_at_once() -> None:
    cork, (one,) = Cork(), wires(1)
    cork.write(one, b"a")
    cork.write(one, b"b" * MOST)
    assert one.said == [b"a" + b"b" * MOST]
    cork.write(one, b"c")
    await asyncio.sleep(0)
    assert one.said[1:] == [b"c"]


async def quiet(cork: Cork, wire: Any) -> None:
    for _ in range(QUIET):
        cork.write(wire, b"-")
        await asyncio.sleep(0)
    wire.said.clear()


async def test_where_little_goes_on_a_piece_does_not_wait() -> None:
    cork, (one, two) = Cork(lull=-1.0), wires(2)
    await quiet(cork, one)
    cork.write(one, b"a")
    cork.write(two, b"b")
    assert (one.said, two.said) == ([b"a"], [b"b"])


async def test_pieces_that_follow_each_other_closely_wait_again_in_their_order() -> None:
    cork, (one, two) = Cork(lull=math.inf), wires(2)
    await quiet(cork, one)
    for wire in (two, one):
        cork.write(wire, b"b")
    cork.write(one, b"c")
    assert (one.said, two.said) == ([], [])
    await asyncio.sleep(0)
    assert (one.said, two.said) == ([b"bc"], [b"b"])


async def test_turns_with_much_to_write_are_not_quiet() -> None:
    cork, (one, two) = Cork(), wires(2)
    for _ in range(2 * QUIET):
        cork.write(one, b"a")
        cork.write(two, b"b")
        await asyncio.sleep(0)
    cork.write(one, b"c")
    assert one.said == [b"a"] * 2 * QUIET
