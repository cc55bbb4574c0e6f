"""The published state of one replica."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from engines.lifecycle import NEXT, Happening
from engines.types import EngineEvent, EventKind, Replica


class Record:
    """Holds the frozen `Replica` that everybody sees; who looks after the replica changes it here and nowhere else."""

    def __init__(
        self, replica: Replica, *, on_change: Callable[[], None], on_event: Callable[[EngineEvent], None]
    ) -> None:
        self.replica = replica
        self._on_change = on_change
        self._on_event = on_event

    def happened(self, what: Happening, **changes: Any) -> None:
        """Move to the state that follows, together with other changes of the replica's fields, as one change.
        Raises KeyError when `what` cannot happen in this state."""
        self.change(state=NEXT[self.replica.state, what], **changes)

    def change(self, **changes: Any) -> None:
        """Set fields of the replica."""
        changed = replace(self.replica, **changes)
        if changed != self.replica:
            self.replica = changed
            self._on_change()

    def tell(self, kind: EventKind, message: str) -> None:
        """Tell operators."""
        self._on_event(EngineEvent(kind, self.replica.id, self.replica.model, message))
