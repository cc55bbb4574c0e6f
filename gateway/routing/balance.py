"""Stage 5: filter, score, pick, over one snapshot."""

from collections.abc import Callable, Sequence
from random import random
from time import monotonic
from typing import Final

from engines.types import Replica, ReplicaState
from gateway.resilience.breaker import Breakers

READY: Final = ReplicaState.READY  # to look up an enum's member takes as long as the rest of the question


def load(replica: Replica, open_here: int) -> int:
    """Requests that stand before a new one: those that this gateway has open on it now, or, if that is more (other
    clients use it too), what it said itself last."""
    said = replica.load
    return open_here if said is None else max(open_here, said.waiting + said.running if open_here else said.waiting)


def pick(
    replicas: Sequence[Replica],
    tried: Sequence[str],
    open_on: Callable[[Replica], int],
    breakers: Breakers,
    *,
    chance: Callable[[], float] = random,
    clock: Callable[[], float] = monotonic,
) -> Replica | None:
    """The ready replica with the least load that has not been tried yet, by chance among equals; None if there is none.
    One that fails all the time is left out while there is another."""
    if breakers.troubled:
        replicas = [r for r in replicas if r.state is READY and r.id not in tried]
        blocked = breakers.blocked([r.id for r in replicas], clock())
        replicas = [r for r in replicas if r.id not in blocked]
    best: Replica | None = None
    best_score = 0.0
    for replica in replicas:
        if replica.state is not READY or replica.id in tried:
            continue
        score = load(replica, open_on(replica)) + chance()  # chance is in [0, 1): it decides between equals alone
        if best is None or score < best_score:
            best, best_score = replica, score
    return best
