"""Stage 5: filter, score, pick, over one snapshot."""

from collections.abc import Callable, Sequence
from random import random

from engines.types import Replica, ReplicaState


def load(replica: Replica, open_here: int) -> int:
    """Requests that stand before a new one: those that this gateway has open on it now, or, if that is more (other
    clients use it too), what it said itself last."""
    said = replica.load
    return open_here if said is None else max(open_here, said.waiting + said.running if open_here else said.waiting)


def pick(
    replicas: Sequence[Replica],
    tried: Sequence[str],
    open_on: Callable[[Replica], int],
    chance: Callable[[], float] = random,
) -> Replica | None:
    """The ready replica with the least load that has not been tried yet, by chance among equals; None if there is none."""
    best: Replica | None = None
    best_score = 0.0
    for replica in replicas:
        if replica.state is not ReplicaState.READY or replica.id in tried:
            continue
        score = load(replica, open_on(replica)) + chance()  # chance is in [0, 1): it decides between equals alone
        if best is None or score < best_score:
            best, best_score = replica, score
    return best
