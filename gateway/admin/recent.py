"""The last requests, in memory: what the access log says of them, and so never a prompt, an answer or a key."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from gateway.observe.access import AccessRecord

ROOM: Final = 5000  # requests, some 5 MB


class Entry(NamedTuple):
    seq: int  # counts all requests since the process started, from 1
    record: AccessRecord


class Recent:
    """A bounded ring. Belongs to the event loop's thread."""

    def __init__(self, room: int = ROOM) -> None:
        self._records: deque[AccessRecord] = deque(maxlen=room)
        self._seen = 0

    def extend(self, records: Sequence[AccessRecord]) -> None:
        """The next requests that have ended, in their order."""
        self._records.extend(records)
        self._seen += len(records)

    def newest(self) -> Iterator[Entry]:
        """From the newest to the oldest. The ring must not change meanwhile."""
        for back, record in enumerate(reversed(self._records)):
            yield Entry(self._seen - back, record)

    def select(self, wanted: Callable[[AccessRecord], bool], limit: int, before: int | None = None) -> list[Entry]:
        """The newest `limit` that are `wanted`, of those with a `seq` below `before`."""
        found: list[Entry] = []
        for entry in self.newest():
            if (before is None or entry.seq < before) and wanted(entry.record):
                found.append(entry)
                if len(found) == limit:
                    break
        return found

    def minute(self, now: float) -> dict[str, tuple[int, int]]:
        """Requests that have ended in the last 60 seconds, and their tokens, by the key's name. `now`: seconds since
        the epoch. No more than the ring holds."""
        found: dict[str, tuple[int, int]] = {}
        for _, record in self.newest():
            if record.time + record.duration < now - 60:
                break
            if record.key is not None:
                requests, tokens = found.get(record.key, (0, 0))
                more = (record.prompt_tokens or 0) + (record.completion_tokens or 0)
                found[record.key] = requests + 1, tokens + more
        return found
