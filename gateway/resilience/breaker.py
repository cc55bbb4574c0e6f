"""Which replicas are kept out of the choice because they fail, and when one may be tried again.

A replica that fails `FAILURES` times in a row is ejected, for twice as long each time. Then one request at a time is let
through as a trial: it closes the circuit, or the replica is ejected again. What the health checks know is not judged
here: a replica that is down is not ready, and never in question.

Pure: the clock is passed in (monotonic seconds). While nothing fails, `troubled` is empty and costs one look.
"""

from collections.abc import Collection, Iterable
from typing import Final, Protocol

FAILURES: Final = 5  # in a row
FIRST_EJECTION: Final = 1.0  # seconds
LONGEST_EJECTION: Final = 30.0
TRIAL: Final = 10.0  # seconds: a trial that says nothing for so long does not keep others from trying
DOUBTFUL: Final = 3  # failures in a row after which a retry had better not count on a replica


class Trial(Protocol):
    """The request that tries an ejected replica."""

    @property
    def first_byte(self) -> float | None:
        """Monotonic seconds: when its answer began to go out."""
        ...


class Circuit:
    """One replica that has failed since it last did well."""

    __slots__ = ("ejections", "failures", "trial", "tried_at", "until")

    def __init__(self) -> None:
        self.failures = 0  # in a row
        self.ejections = 0  # in a row
        self.until = 0.0  # ejected until then
        self.trial: Trial | None = None  # the last one since it was ejected
        self.tried_at = 0.0

    def blocks(self, now: float) -> bool:
        """Whether it shall not be picked."""
        if not self.ejections:
            return False
        if now < self.until:
            return True
        return self.trial is not None and not self.flows and now < self.tried_at + TRIAL

    @property
    def flows(self) -> bool:
        """The trial's answer has begun: no need to wait for the end of a long stream."""
        first = self.trial.first_byte if self.trial is not None else None
        return first is not None and first >= self.tried_at  # a stream that was taken up had begun elsewhere


class Breakers:
    """The circuits of all replicas, by their ids."""

    __slots__ = ("troubled",)

    def __init__(self) -> None:
        self.troubled: dict[str, Circuit] = {}  # those that have failed since they last did well; as a rule none

    def blocked(self, replicas: Collection[str], now: float) -> frozenset[str]:
        """Of these replicas of one model, the ones that shall not be picked: never all of them."""
        troubled = self.troubled
        found = frozenset(one for one in replicas if one in troubled and troubled[one].blocks(now))
        return found if len(found) < len(replicas) else frozenset()

    def doubtful(self, replica: str) -> bool:
        """Whether it has failed so often lately that it may not be better than the one that has just failed."""
        circuit = self.troubled.get(replica)
        return circuit is not None and circuit.failures >= DOUBTFUL

    def picked(self, replica: str, request: Trial, now: float) -> None:
        """A request goes there: its trial, if it has been ejected and may be tried again."""
        circuit = self.troubled.get(replica)
        if circuit is None or not circuit.ejections or now < circuit.until or circuit.flows:
            return
        if not circuit.blocks(now):
            circuit.trial, circuit.tried_at = request, now

    def succeeded(self, replica: str, now: float) -> None:
        """It has answered, if only with what is wrong with the request. While it is ejected, what was sent there before
        proves nothing."""
        circuit = self.troubled.get(replica)
        if circuit is not None and now >= circuit.until:
            del self.troubled[replica]

    def failed(self, replica: str, ready: Collection[str], now: float) -> float:
        """It could not be reached, or answered as no engine should. `ready`: the replicas of its model that take requests,
        of which at most half are ejected. Returns for how many seconds it is ejected, if it is now, else 0."""
        circuit = self.troubled.setdefault(replica, Circuit())
        circuit.failures += 1
        if circuit.failures < FAILURES or now < circuit.until:
            return 0.0
        if not circuit.ejections:
            ejected = sum(self._ejected(one) for one in ready)
            if replica not in ready or ejected + 1 > len(ready) // 2:
                return 0.0
        seconds = min(FIRST_EJECTION * 2.0**circuit.ejections, LONGEST_EJECTION)
        circuit.ejections = min(circuit.ejections + 1, 30)
        circuit.until = now + seconds
        circuit.trial = None
        return seconds

    def keep(self, replicas: Iterable[str]) -> None:
        """Forgets all others: they are gone, or are new under an old name."""
        if self.troubled:
            kept = frozenset(replicas)
            for replica in self.troubled.keys() - kept:
                del self.troubled[replica]

    def _ejected(self, replica: str) -> bool:
        circuit = self.troubled.get(replica)
        return circuit is not None and circuit.ejections > 0
