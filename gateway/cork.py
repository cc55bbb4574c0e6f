"""What one turn of the event loop writes, written together at the turn's end.

A write wakes whoever waits to read it, which costs more than the write itself. Written as it comes, each piece wakes its
reader anew, as reading the next socket lies in between; written one right after another, they wake it once. Nothing is
held back by it: the turn ends when all sockets that were ready have been read.
"""

import asyncio
from typing import Final

import structlog

MOST: Final = 16 * 1024  # bytes for one transport

log = structlog.get_logger("penstock")


class Cork:
    """For the transports of one event loop. What goes to a transport in this way keeps its order; before anything else is
    done with that transport, `flush` it."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: dict[asyncio.WriteTransport, bytes] = {}

    def write(self, transport: asyncio.WriteTransport, data: bytes) -> None:
        """Goes out at the end of this turn, or when there is much of it: what a reader does not take must be noticed while
        more comes. Never blocks."""
        waiting = self._waiting
        if not waiting:
            asyncio.get_running_loop().call_soon(self._flush_all)
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
            if data and not transport.is_closing():
                transport.write(data)

    def _flush_all(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for transport, data in waiting.items():
            try:
                if data and not transport.is_closing():
                    transport.write(data)
            except Exception:  # the others must have theirs
                log.exception("a fault in the gateway: write")
