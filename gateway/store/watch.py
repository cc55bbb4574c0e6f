"""Keys and teams of the store, as this process holds them: read again whenever anybody changes them."""

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

import structlog

from gateway.beat import until_beat
from gateway.keys import next_change
from gateway.store.base import KeyRecord, StoreError, TeamRecord

if TYPE_CHECKING:
    from gateway.store.db import Store

log = structlog.get_logger("penstock")

INTERVAL: Final = 2.0  # seconds between two looks
_PATIENCE: Final = 2.0  # seconds for one look; a store that takes longer counts as down, until it answers again
_SOON: Final = 0.001  # seconds after a moment at which time changes something: timers may be early


class Watch:
    """For one event loop. Whoever holds it must `run` it."""

    def __init__(
        self,
        store: "Store",
        on_change: Callable[[], None],
        *,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`on_change` is called whenever anything of what stands here is another, or means something else by now."""
        self._store = store
        self._on_change = on_change
        self._interval = interval
        self._clock = clock
        self._reading = asyncio.Lock()
        self._version: int | None = None
        self._complained = False
        self._next: float | None = None  # when time alone changes something
        self.keys: Mapping[str, KeyRecord] = {}  # by id; replaced whole
        self.teams: Mapping[str, TeamRecord] = {}
        self.fresh = False  # the last look succeeded: what is not here was not there then

    async def refresh(self) -> None:
        """Looks now, and has told of what changed when it returns. Raises `StoreError`, and what was known stays."""
        async with self._reading:
            was_fresh = self.fresh
            try:
                async with asyncio.timeout(_PATIENCE):
                    changed = await self._look()
            except (StoreError, TimeoutError) as error:
                why = str(error) or "it does not answer"
                self._complain(why)
                self.fresh = False
                if was_fresh:
                    self._tell()
                raise StoreError(why) from None
            self.fresh = True
            if self._complained:
                self._complained = False
                log.info("the store is back", keys=len(self.keys))
            if changed or not was_fresh:
                self._tell()

    async def _look(self) -> bool:
        if self._version is not None and await self._store.version() == self._version:
            return False
        found = await self._store.snapshot(self._version or 0)
        self.keys = {**self.keys, **{record.id: record for record in found.keys}}
        self.teams = {record.id: record for record in found.teams}
        self._version = found.version
        return True

    def _complain(self, why: str) -> None:
        if not self._complained:
            self._complained = True
            log.error("the store is down; known keys go on working, unknown ones get 503", why=why)

    def _tell(self) -> None:
        self._next = next_change(self.keys.values(), self._clock())
        self._on_change()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.refresh()
            except StoreError:
                pass
            except Exception:
                log.exception("a fault in the gateway: keys")  # and the next look may go well
            now = self._clock()
            if self._next is not None and self._next <= now:
                self._tell()
            due = math.inf if self._next is None else self._next - now + _SOON
            await asyncio.sleep(min(until_beat(self._interval), due))
