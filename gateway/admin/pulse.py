"""The gateway's figures over time: once a second for whoever watches, and every ten seconds of the last hour for whoever comes."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Final, Generic, TypeVar

from gateway.admin.figures import Look
from gateway.beat import until_beat

TICK: Final = 1.0  # seconds between two figures
STRIDE: Final = 10  # ticks between two points of the history
HOUR: Final = 3600

P = TypeVar("P")


class Pulse(Generic[P]):
    """Looks at the counters and makes points (`P`) of the differences. Belongs to one event loop.

    `look`: reads the counters. `live`, `past`: from two looks, one behind the other, to a point.
    While nobody watches it looks every ten seconds alone.
    """

    def __init__(
        self,
        look: Callable[[], Look],
        live: Callable[[Look, Look], P],
        past: Callable[[Look, Look], P],
        tick: float = TICK,
    ) -> None:
        self.history: deque[P] = deque(maxlen=int(HOUR / (TICK * STRIDE)))
        self.watchers = 0
        self.interval = tick * STRIDE  # seconds between two points of the history
        self._look, self._live, self._past = look, live, past
        self._tick = tick
        self._latest: P | None = None
        self._event = asyncio.Event()
        self._closed = False

    async def run(self) -> None:
        """Until cancelled."""
        last = kept = self._look()
        ticks = 0
        while True:
            ticks += 1
            await asyncio.sleep(until_beat(self._tick))
            whole = ticks % STRIDE == 0
            if not whole and not self.watchers:
                continue
            seen = self._look()
            if whole:
                self.history.append(self._past(kept, seen))
                kept = seen
            if self.watchers:
                self._tell(self._live(last, seen))
            last = seen

    def _tell(self, point: P | None) -> None:
        self._latest = point
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def watch(self) -> AsyncIterator[P]:
        """Each point from now on, until `close`. Who is too slow misses some."""
        self.watchers += 1
        try:
            while not self._closed:
                await self._event.wait()
                if self._latest is not None:
                    yield self._latest
        finally:
            self.watchers -= 1

    def close(self) -> None:
        """Ends every `watch`. Never blocks."""
        self._closed = True
        self._tell(None)
