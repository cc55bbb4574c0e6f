"""What a process does about the store: it holds keys and teams, and puts use into it. Nothing of it where no store is wanted."""

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gateway.config.schema import Config
from gateway.limits.memory import MemoryLimiter
from gateway.store.base import KeyRecord, StoreError, TeamRecord
from gateway.store.watch import Watch
from gateway.usage.ledger import Ledger

if TYPE_CHECKING:
    from gateway.store.db import Store

PATIENCE = 1.0  # seconds
SPOOL = Path(".penstock")  # beside the logs of engines


def wanted(config: Config) -> bool:
    """An ordinary config file leaves no database behind."""
    return config.admin_key is not None or "store" in config.model_fields_set


def spool_folder(url: str) -> Path:
    """Where rows of usage wait: beside a database file, as one disk holds both; else in the working directory."""
    from gateway.store.db import sqlite_file  # noqa: PLC0415 - as below

    file = sqlite_file(url)
    if file is not None:
        return file.with_name(file.name + ".spool")
    return SPOOL / f"usage-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


class _Later:
    """A store that is made when it is first asked for something: what it is built on takes 25 MB, and a gateway whose keys are
    all in its file has no use for it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._made: Store | None = None

    async def close(self) -> None:
        if self._made is not None:
            await self._made.close()

    def __getattr__(self, name: str) -> Any:
        if self._made is None:
            from gateway.store.db import Store  # noqa: PLC0415 - this is the point

            self._made = Store(self._url)
        return getattr(self._made, name)


class Books:
    """`store` does nothing before it is first used. `known` is what keyrings are made of."""

    def __init__(self, url: str, limiter: MemoryLimiter, on_change: Callable[[], None]) -> None:
        self.store = cast("Store", _Later(url))
        self._url = url
        self._limiter = limiter
        self._watch = Watch(self.store, on_change)
        self._ledger: Ledger | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def keys(self) -> Mapping[str, KeyRecord]:
        return self._watch.keys

    @property
    def teams(self) -> Mapping[str, TeamRecord]:
        return self._watch.teams

    @property
    def fresh(self) -> bool:
        return self._watch.fresh

    def open(self, retention_days: int | None) -> Callable[[tuple[object, ...]], None]:
        """Returns what takes the rows of usage. Blocks on the disk for a moment."""
        folder = spool_folder(self._url)
        if folder.parent == SPOOL:
            with suppress(OSError):  # which the journal tells
                SPOOL.mkdir(exist_ok=True)
        self._ledger = Ledger(self.store, folder, self._limiter, retention_days)
        return self._ledger.append

    async def start(self) -> None:
        """Keys are known and budgets are what they were, unless the store is down: then that takes some seconds, and comes
        later by itself. Never raises."""
        with suppress(StoreError):
            await self._watch.refresh()
        self._tasks.append(asyncio.create_task(self._watch.run()))
        if self._ledger is not None:
            await self._ledger.start()
            self._tasks.append(asyncio.create_task(self._ledger.run()))

    async def refresh(self) -> None:
        """What the store holds of keys and teams is in force here when it returns. Raises `StoreError`."""
        await self._watch.refresh()

    async def settle(self) -> None:
        """What was used so far is in the store when it returns, unless the store is slow or down. Never raises."""
        if self._ledger is not None:
            with suppress(StoreError, TimeoutError):
                async with asyncio.timeout(PATIENCE):
                    await self._ledger.flush()

    async def stop(self) -> None:
        """After the last request."""
        for task in self._tasks:
            task.cancel()
        if self._ledger is not None:
            await self._ledger.close()
        await self.store.close()
