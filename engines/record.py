"""The published state of one replica."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from engines.lifecycle import NEXT, Happening, shown
from engines.types import EngineEvent, EventKind, Replica, ReplicaState


class Record:
    """Holds the frozen `Replica` that everybody sees; who looks after the replica changes it here and nowhere else.

    Whether a replica is held is not its own matter: it lives on as it would, but shows as DRAINING where it would take
    requests, until it is released.
    """

    def __init__(
        self, replica: Replica, *, on_change: Callable[[], None], on_event: Callable[[EngineEvent], None]
    ) -> None:
        self.replica = replica
        self.own = replica  # as it is, held or not
        self.held: str | None = None  # why it takes nothing new
        self.proven = False  # it has been ready at some time
        self._on_change = on_change
        self._on_event = on_event

    @property
    def state(self) -> ReplicaState:
        """Where the replica itself stands, held or not."""
        return self.own.state

    def happened(self, what: Happening, **changes: Any) -> None:
        """Move to the state that follows, together with other changes of the replica's fields, as one change.
        Raises KeyError when `what` cannot happen in this state."""
        self.change(state=NEXT[self.own.state, what], **changes)

    def change(self, **changes: Any) -> None:
        """Set fields of the replica."""
        self.own = replace(self.own, **changes)
        self.proven |= self.own.state is ReplicaState.READY
        self._show()

    def hold(self, why: str | None) -> None:
        """Let it take nothing new; with None, release it."""
        self.held = why
        self._show()

    def _show(self) -> None:
        changed = shown(self.own, self.held)
        if changed != self.replica:
            self.replica = changed
            self._on_change()

    def tell(self, kind: EventKind, message: str) -> None:
        """Tell operators."""
        self._on_event(EngineEvent(kind, self.replica.id, self.replica.model, message))
