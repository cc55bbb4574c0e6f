"""What goes wrong when: a schedule of faults, the same for the same seed. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

GATEWAY: Final = "gateway"
DOWN: Final = frozenset({"kill", "stop", "mute"})  # the engine answers nobody for a while
RECOVERY: Final = 6.0  # seconds after such a fault until the gateway has surely taken the engine back


@dataclass(frozen=True, slots=True)
class Fault:
    at: float  # seconds from the start
    kind: str
    target: str  # the replica's id, or `GATEWAY`
    seconds: float = 0.0  # how long it lasts


@dataclass(frozen=True, slots=True)
class Target:
    """A replica that faults may befall."""

    id: str
    kinds: Mapping[str, int]  # weights
    rest: float  # seconds at least between two faults that take it down: an engine that dies too often is given up


def schedule(seed: int, seconds: float, targets: Sequence[Target], pause: float, longest: float) -> list[Fault]:
    """Faults about every `pause` seconds, none of which lasts longer than `longest`; the last of them is over well before
    the end. Never are more than half of the replicas down at once."""
    chance, at = Random(seed), 0.0
    faults: list[Fault] = []
    down: dict[str, float] = {}  # until when
    rests: dict[str, float] = {}
    while (at := at + chance.uniform(0.3, 1.7) * pause) < seconds - min(longest, seconds / 4):
        if chance.random() < 0.1:
            faults.append(Fault(round(at, 2), "reload", GATEWAY))
            continue
        target = chance.choice(targets)
        [kind] = chance.choices(list(target.kinds), list(target.kinds.values()))
        length = round(min(chance.uniform(0.1, 1.0) * longest, seconds - at), 2)
        if kind in DOWN:
            others = sum(until > at for name, until in down.items() if name != target.id)
            if others >= len(targets) // 2 or rests.get(target.id, 0.0) > at:
                continue
            down[target.id] = at + length + RECOVERY
            rests[target.id] = at + length + target.rest
        faults.append(Fault(round(at, 2), kind, target.id, length))
    return faults
