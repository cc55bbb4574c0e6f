"""How changes of keys reach a process, and what it goes by while the store is down."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from gateway import keys
from gateway.limits.base import Limits
from gateway.store.base import KeyRecord, StoreError, TeamRecord
from gateway.store.db import Store
from gateway.store.watch import Watch
from tests.postgres import Postgres

KEY = KeyRecord("key_1", "a", (keys.make_secret("sk-ps-a"),), None, "", "", ("*",), Limits(), (), 0.0, None, None)
TEAM = TeamRecord("team_1", "research", "", ("*",), Limits(), (), 0.0)


class Heard:
    """What a watch told, and when something is so."""

    def __init__(self) -> None:
        self.times = 0
        self._event = asyncio.Event()

    def __call__(self) -> None:
        self.times += 1
        self._event.set()

    async def until(self, wanted: Callable[[], bool], timeout: float = 10) -> None:
        async with asyncio.timeout(timeout):
            while not wanted():
                self._event.clear()
                await self._event.wait()


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest_asyncio.fixture
async def other(url: str) -> AsyncIterator[Store]:
    """Another process's."""
    store = Store(url)
    yield store
    await store.close()


async def test_a_local_change_counts_at_once(store: Store, heard: Heard) -> None:
    watch = Watch(store, heard)
    await watch.refresh()
    assert (heard.times, watch.fresh, watch.keys) == (1, True, {})
    await store.add_key(KEY, "admin")
    await store.add_team(TEAM, "admin")
    await watch.refresh()
    assert (heard.times, watch.keys, watch.teams) == (2, {"key_1": KEY}, {"team_1": TEAM})
    await watch.refresh()
    assert heard.times == 2


async def test_changes_of_another_process_come_by_themselves(store: Store, other: Store, heard: Heard) -> None:
    watch = Watch(store, heard, interval=0.05)
    running = asyncio.create_task(watch.run())
    await other.add_key(KEY, "admin")
    await heard.until(lambda: watch.keys == {"key_1": KEY})
    gone = replace(KEY, revoked_at=1.0)
    await other.change_key(gone, "admin")
    await heard.until(lambda: watch.keys == {"key_1": gone})
    await other.add_team(TEAM, "admin")
    await other.delete_team("team_1", "admin")
    await other.add_team(replace(TEAM, id="team_2"), "admin")
    await heard.until(lambda: list(watch.teams) == ["team_2"])
    running.cancel()


async def test_the_passing_of_time_is_told(store: Store, heard: Heard) -> None:
    now = 1000.0
    watch = Watch(store, heard, interval=60, clock=lambda: now)
    await store.add_key(replace(KEY, expires_at=1000.05), "admin")
    running = asyncio.create_task(watch.run())
    await heard.until(lambda: heard.times == 1)
    now = 1000.1
    await heard.until(lambda: heard.times == 2)
    running.cancel()


async def test_what_is_known_stays_known_while_postgresql_is_stopped_and_paused(
    postgres: Postgres, heard: Heard
) -> None:
    store = Store(postgres.new_database())
    await store.add_key(KEY, "admin")
    watch = Watch(store, heard, interval=0.05)
    running = asyncio.create_task(watch.run())
    await heard.until(lambda: watch.fresh)
    for down, up in ((postgres.stop, postgres.start), (postgres.pause, postgres.resume)):
        down()
        try:
            await heard.until(lambda: not watch.fresh)
            assert watch.keys == {"key_1": KEY}
            with pytest.raises(StoreError):
                await watch.refresh()
        finally:
            await asyncio.to_thread(up)
        await heard.until(lambda: watch.fresh)
        assert watch.keys == {"key_1": KEY}
    running.cancel()
    await store.close()


async def test_a_store_that_is_down_from_the_start_heals(tmp_path: Path, heard: Heard) -> None:
    folder = tmp_path / "later"
    store = Store(f"sqlite:///{folder}/store.db")
    watch = Watch(store, heard, interval=0.05)
    running = asyncio.create_task(watch.run())
    with pytest.raises(StoreError):
        await watch.refresh()
    assert (watch.fresh, heard.times) == (False, 0)
    folder.mkdir()
    await heard.until(lambda: watch.fresh)
    running.cancel()
    await store.close()


async def test_a_lock_that_another_program_holds_does_not_hide_keys(tmp_path: Path, heard: Heard) -> None:
    store = Store(f"sqlite:///{tmp_path}/store.db")
    await store.add_key(KEY, "admin")
    with sqlite3.connect(tmp_path / "store.db", isolation_level=None) as held:
        held.execute("BEGIN IMMEDIATE")
        watch = Watch(store, heard)
        await watch.refresh()
        assert watch.keys == {"key_1": KEY}
        with pytest.raises(StoreError, match="locked"):
            await store.add_team(TEAM, "admin")
    held.close()
    await store.add_team(TEAM, "admin")
    await store.close()
