"""How late the event loop wakes: the one number that tells a blocked gateway from a slow engine."""

import asyncio

from gateway.beat import until_beat
from gateway.observe.counters import Histogram


class LoopLag:
    """Observes, every `interval` seconds, by how much a timer was late. A timer alone: a coroutine costs several times as much.

    Belongs to one event loop, on which `start` and `stop` are called.
    """

    def __init__(self, lag: Histogram, interval: float = 0.25) -> None:
        self._lag = lag
        self._interval = interval
        self._due = 0.0
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._due = loop.time() + until_beat(self._interval)
        self._handle = loop.call_at(self._due, self._wake)

    def _wake(self) -> None:
        self._lag.observe(max(0.0, asyncio.get_running_loop().time() - self._due))
        self.start()

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
