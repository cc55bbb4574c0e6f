"""The rules of a replica's life: states, restarts, hanging. Pure: time is an argument."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from engines.types import Replica, ReplicaState


class Happening(StrEnum):
    """What can happen to a replica."""

    LAUNCHED = "launched"
    ANSWERED = "answered"  # a probe that counts went well
    SILENT = "silent"  # two probes in a row went wrong
    DIED = "died"
    GAVE_UP = "gave up"
    STOPPING = "stopping"  # somebody wants it down
    ENDED = "ended"


_S, _H = ReplicaState, Happening

NEXT: Final[Mapping[tuple[ReplicaState, Happening], ReplicaState]] = {
    (_S.STOPPED, _H.LAUNCHED): _S.STARTING,
    (_S.FAILED, _H.LAUNCHED): _S.STARTING,
    (_S.STARTING, _H.LAUNCHED): _S.STARTING,
    (_S.STARTING, _H.ANSWERED): _S.READY,
    (_S.UNHEALTHY, _H.ANSWERED): _S.READY,
    (_S.STARTING, _H.SILENT): _S.STARTING,
    (_S.READY, _H.SILENT): _S.UNHEALTHY,
    (_S.STARTING, _H.DIED): _S.STARTING,
    (_S.READY, _H.DIED): _S.STARTING,
    (_S.UNHEALTHY, _H.DIED): _S.STARTING,
    (_S.STARTING, _H.GAVE_UP): _S.FAILED,
    (_S.STARTING, _H.STOPPING): _S.DRAINING,
    (_S.READY, _H.STOPPING): _S.DRAINING,
    (_S.UNHEALTHY, _H.STOPPING): _S.DRAINING,
    **{(state, _H.ENDED): _S.STOPPED for state in _S},
}


def shown(own: Replica, held: str | None) -> Replica:
    """What everybody sees of a replica: one that is held takes nothing new, whatever it could do itself."""
    if held is None or own.state not in {_S.STARTING, _S.READY, _S.UNHEALTHY}:
        return own
    return replace(own, state=_S.DRAINING, reason=held if own.reason is None else f"{held}; {own.reason}")


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a dead engine is started again."""

    first_delay: float = 0.5  # seconds after the first death; doubles with each further one
    longest_delay: float = 30.0
    starts: int = 5  # at most so many starts …
    window: float = 60.0  # … in so many seconds; an engine that was ready for so long has shown that it works

    def delay(self, starts: Sequence[float], deaths: int, now: float) -> float | None:
        """Seconds to wait before the next start, or None to give up. `starts` are the times of earlier starts,
        `deaths` how many of them in a row ended too soon."""
        delay = min(self.longest_delay, self.first_delay * 2 ** min(deaths - 1, 32)) if deaths else 0.0
        recent = sum(1 for start in starts if start > now + delay - self.window)
        return None if recent >= self.starts else delay

    def died_too_soon(self, ready_at: float | None, now: float) -> bool:
        return ready_at is None or now - ready_at < self.window


@dataclass(frozen=True, slots=True)
class Progress:
    """What an engine's counters said when they last moved."""

    tokens: float
    since: float

    def seen(self, tokens: float, running: int, now: float) -> "Progress":
        """After another look at the counters. An engine with nothing to do makes progress by definition."""
        return self if running and tokens == self.tokens else Progress(tokens, now)
