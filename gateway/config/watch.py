"""When a file has changed: looked at once a second, since that works on every file system, for symbolic links too."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

INTERVAL: Final = 1.0  # seconds

Look = tuple[int, int, int, int] | None  # what identifies a file's state; None: it is not there


class Settling:
    """Tells a change when it is over: when two looks in a row see the same, so that a file is not read half-written."""

    def __init__(self, now: Look) -> None:
        self._known = self._last = now

    def changed(self, now: Look) -> bool:
        """Whether there is a new state of the file, and it has come to rest."""
        settled, self._last = now == self._last, now
        if not settled or now is None or now == self._known:
            return False
        self._known = now
        return True


def look(path: Path) -> Look:
    """Follows symbolic links. Blocks as long as the file system does."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


async def watch(path: Path, on_change: Callable[[], Awaitable[None]], interval: float = INTERVAL) -> None:
    """Awaits `on_change` after each change of a file, until cancelled. A file that is gone is waited for."""
    settling = Settling(look(path))
    while True:
        await asyncio.sleep(interval)
        if settling.changed(look(path)):
            await on_change()
