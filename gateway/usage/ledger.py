"""Every request's use, on its way into the store: noted at once where a `kill -9` cannot reach it, stored in batches."""

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from gateway.beat import until_beat
from gateway.limits.memory import MemoryLimiter, has_news
from gateway.store.base import Owner, StoreError
from gateway.store.journal import Journal

if TYPE_CHECKING:
    from gateway.store.db import Store

log = structlog.get_logger("penstock")

INTERVAL: Final = 1.0  # seconds between two batches
LONGEST_WAIT: Final = 8.0  # seconds between two tries while the store is down
BUDGETS_EVERY: Final = 5.0  # seconds between two looks at what other processes have used
ADOPT_EVERY: Final = 60.0  # seconds
PRUNE_EVERY: Final = 3600.0  # seconds
FIRST: Final = 3.0  # seconds that a start waits for what was used before
LAST: Final = 3.0  # seconds that an end waits for the store


class Ledger:
    """For one event loop. Whoever holds it must `run` it."""

    def __init__(
        self, store: "Store", folder: Path | None, limiter: MemoryLimiter, retention_days: int | None = None
    ) -> None:
        """`folder`: where rows wait for the store; None: in memory. Blocks on the disk for a moment."""
        self._store = store
        self._journal = Journal(folder)
        self._limiter = limiter
        self._keep = None if retention_days is None else retention_days * 86_400.0
        self._passing = asyncio.Lock()
        self._complained = False
        self._budgets_at = -BUDGETS_EVERY
        self.append = self._journal.append

    @property
    def waiting(self) -> int:
        """Bytes of rows that are not in the store yet."""
        return self._journal.waiting

    async def start(self) -> None:
        """What was used before counts against budgets when it returns, unless the store is down. Never raises."""
        await asyncio.to_thread(self._journal.adopt)
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(FIRST):
                await self.flush()

    async def run(self) -> None:
        """Until cancelled."""
        wait, adopted, pruned = INTERVAL, time.monotonic(), time.monotonic() - PRUNE_EVERY
        while True:
            await asyncio.sleep(until_beat(wait))
            now = time.monotonic()
            try:
                await self.flush()
                if now - adopted > ADOPT_EVERY:
                    adopted = now
                    self._journal.adopt()
                    self._journal.tidy()
                if self._keep is not None and now - pruned > PRUNE_EVERY:
                    pruned = now
                    await self._store.prune(time.time() - self._keep)
                wait = INTERVAL
            except StoreError as error:
                self._complain(str(error))
                wait = min(2 * wait, LONGEST_WAIT)
            except Exception:
                # Rows wait meanwhile, and are not lost: better than to stop for good.
                log.exception("a fault in the gateway: usage")
                wait = LONGEST_WAIT

    async def flush(self) -> None:
        """Puts all that was appended before into the store. Raises `StoreError`; then the rest waits."""
        async with self._passing:
            cut, mark = self._journal.cut(), self._limiter.mark()
            for batch in self._journal.batches(cut):
                if batch.rows:
                    await self._store.add_usage(batch.rows)
                batch.segment.finish(batch)
            if self._complained:
                self._complained = False
                log.info("usage is in the store again")
            now = time.monotonic()
            if mark and (now - self._budgets_at >= BUDGETS_EVERY or has_news(mark)):
                # Between the cut and the mark nothing could be used, and what came since is not in the store yet.
                spent = await self._store.spent(list(map(_owner, mark)), time.time())
                self._limiter.restore(mark, {owner: found for (_, owner), found in spent.items()})
                self._budgets_at = now

    def _complain(self, why: str) -> None:
        if not self._complained:
            self._complained = True
            log.error("usage waits for the store", why=why)

    async def close(self) -> None:
        """After the last request. What the store does not take now waits for the next start. Never raises."""
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(LAST):
                await self.flush()
        if self.waiting:
            log.warning("usage waits for the next start", bytes=self.waiting)
        self._journal.close()


def _owner(id: str) -> Owner:  # noqa: A002
    return ("team" if id.startswith("team_") else "key", id)
