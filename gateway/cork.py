"""What one turn of the event loop writes, written together at the turn's end.

A write wakes whoever waits to read it, which costs more than the write itself. Written as it comes, each piece wakes its
reader anew, as reading the next socket lies in between; written one right after another, they wake it once. Nothing is
held back by it: the turn ends when all sockets that were ready have been read.

Where little goes on, each turn has one thing to write, and waiting for its end is a detour. So after some turns of that kind
what comes is written as it comes, until two pieces follow each other as closely as within a turn.
"""

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Final

import structlog

MOST: Final = 16 * 1024  # bytes for one transport
QUIET: Final = 4  # turns with one piece each, after which the next one does not wait
LULL: Final = 50e-6  # seconds between two pieces; less than an engine takes to answer, more than the next socket's turn

log = structlog.get_logger("penstock")


class Cork:
    """For the transports of one event loop. What goes to a transport in this way keeps its order; before anything else is
    done with that transport, `flush` it."""

    __slots__ = ("_at_turns_end", "_flush", "_last", "_lull", "_quiet", "_waiting")

    def __init__(self, lull: float = LULL) -> None:
        self._waiting: dict[asyncio.WriteTransport, bytes] = {}
        self._flush: Callable[[], None] = self._flush_all  # bound once, as is the loop's method, and not at each turn
        self._at_turns_end: Callable[[Callable[[], None]], object] | None = None
        self._lull = lull
        self._quiet = 0  # turns with one piece, one after the other
        self._last = 0.0  # monotonic seconds: when a piece was written as it came

    def write(self, transport: asyncio.WriteTransport, data: bytes) -> None:
        """Goes out at the end of this turn, or when there is much of it: what a reader does not take must be noticed while
        more comes. Never blocks."""
        waiting = self._waiting
        if not waiting:
            if self._quiet >= QUIET:
                now = monotonic()
                if now - self._last > self._lull:
                    self._last = now
                    _write(transport, data)
                    return
                self._quiet = 0
            if self._at_turns_end is None:
                self._at_turns_end = asyncio.get_running_loop().call_soon
            self._at_turns_end(self._flush)
        before = waiting.get(transport)
        if before is not None:
            data = before + data
        waiting[transport] = data
        if len(data) > MOST:
            self.flush(transport)

    def flush(self, transport: asyncio.WriteTransport) -> None:
        """What waits for this transport goes out now."""
        data = self._waiting.get(transport)
        if data is not None:
            self._waiting[transport] = b""  # the key stays: as long as there is one, the turn's end is awaited
            _write(transport, data)

    def _flush_all(self) -> None:
        waiting, self._waiting = self._waiting, {}
        self._quiet = self._quiet + 1 if len(waiting) == 1 else 0
        for transport, data in waiting.items():
            _write(transport, data)


def _write(transport: asyncio.WriteTransport, data: bytes) -> None:
    try:
        if data and not transport.is_closing():
            transport.write(data)
    except Exception:  # the others must have theirs
        log.exception("a fault in the gateway: write")
