"""Use on its way into the store, whatever happens to the store."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from gateway.limits.base import Budget, Limits
from gateway.limits.memory import MemoryLimiter
from gateway.store.base import StoreError, UsageSum
from gateway.store.db import Store
from gateway.usage.ledger import Ledger
from tests.postgres import Postgres
from tests.served import DEADLINE, until
from tests.unit.test_limits_memory import refusal, run

NOW = time.time()


def fields(number: int, key: str = "key_1", at: float = NOW) -> tuple[object, ...]:
    """A `UsageRow` without its id."""
    return (at, f"r{number}", key, None, "tiny", "/v1/x", 200, "completed", None, "tiny/0", 10, 5, 2, 30, 0.1, 0.2, 1)


async def total(store: Store) -> UsageSum | None:
    return next(iter(await store.usage(0, NOW + 7200, ())), None)


def sums(requests: int) -> UsageSum:
    return UsageSum((), requests, 0, 10 * requests, 5 * requests, 2 * requests, 30 * requests)


@asynccontextmanager
async def running(ledger: Ledger) -> AsyncIterator[Ledger]:
    task = asyncio.create_task(ledger.run())
    try:
        yield ledger
    finally:
        task.cancel()
        await ledger.close()


async def stored(ledger: Ledger) -> None:
    async def empty() -> bool:
        return not ledger.waiting

    await until(empty)


async def test_what_is_appended_is_in_the_store_soon(store: Store, tmp_path: Path) -> None:
    async with running(Ledger(store, tmp_path / "spool", MemoryLimiter())) as ledger:
        for number in range(700):
            ledger.append(fields(number))
        await stored(ledger)
        assert await total(store) == sums(700)


async def test_an_end_stores_what_is_left(store: Store, tmp_path: Path) -> None:
    ledger = Ledger(store, tmp_path / "spool", MemoryLimiter())
    ledger.append(fields(1))
    await ledger.close()
    assert await total(store) == sums(1)
    assert list((tmp_path / "spool").iterdir()) == []


async def test_a_death_between_the_store_s_commit_and_our_note_of_it_counts_once(url: str, tmp_path: Path) -> None:
    class Dying(Store):
        async def add_usage(self, rows: object) -> None:
            await super().add_usage(rows)  # type: ignore[arg-type]
            raise StoreError("the answer did not arrive")

    dying = Dying(url)
    ledger = Ledger(dying, tmp_path / "spool", MemoryLimiter())
    for number in range(1000):
        ledger.append(fields(number))
    with pytest.raises(StoreError):
        await ledger.flush()
    await ledger.close()
    await dying.close()
    store = Store(url)
    later = Ledger(store, tmp_path / "spool", MemoryLimiter())
    await later.start()
    assert await total(store) == sums(1000)
    await later.close()
    await store.close()


async def test_postgresql_stopped_and_paused_loses_no_row_and_blocks_nobody(postgres: Postgres, tmp_path: Path) -> None:
    store = Store(postgres.new_database())
    appended = 0
    async with running(Ledger(store, tmp_path / "spool", MemoryLimiter())) as ledger:
        for down, up in ((postgres.stop, postgres.start), (postgres.pause, postgres.resume)):
            ledger.append(fields(appended))
            appended += 1
            await stored(ledger)
            down()
            try:
                for _ in range(40):
                    ledger.append(fields(appended))
                    appended += 1
                    await asyncio.sleep(0.05)
                assert ledger.waiting
            finally:
                await asyncio.to_thread(up)
            await stored(ledger)
            assert await total(store) == sums(appended)
    await store.close()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another program holds the file."""
    held = sqlite3.connect(path, isolation_level=None)
    held.execute("BEGIN IMMEDIATE")
    yield
    held.close()


async def test_sqlite_locked_by_another_program_loses_no_row(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/store.db")
    await store.version()
    async with running(Ledger(store, tmp_path / "spool", MemoryLimiter())) as ledger:
        with locked(tmp_path / "store.db"):
            ledger.append(fields(1))
            with pytest.raises(StoreError):
                await ledger.flush()
            ledger.append(fields(2))
        await stored(ledger)
        assert await total(store) == sums(2)
    await store.close()


async def test_budgets_know_what_was_used_before(url: str, tmp_path: Path) -> None:
    budget = Budget(100, "tokens", "month")
    store = Store(url)
    first = Ledger(store, tmp_path / "a", MemoryLimiter())
    for number in range(4):
        first.append(fields(number))
        first.append(fields(number, key="key_2"))
    await first.close()
    left = tmp_path / "b"
    crashed = Ledger(store, left, MemoryLimiter())
    crashed.append(fields(9))
    crashed._journal.close()  # as a kill -9 leaves it
    limiter = MemoryLimiter()
    account = limiter.account("key_1", Limits(), [budget])
    limiter.account("key_2", Limits())
    ledger = Ledger(store, left, limiter)
    await ledger.start()
    use = limiter.use("key_1")
    assert use is not None
    assert use.budgets[0].spent == 75
    run(limiter.admit(account, 10, 15)).settle(25)
    assert refusal(limiter, account).limit == "budget"
    await ledger.close()
    await store.close()


async def test_two_processes_share_a_budget(url: str, tmp_path: Path) -> None:
    stores = [Store(url), Store(url)]
    limiters = [MemoryLimiter(), MemoryLimiter()]
    accounts = [limiter.account("key_1", Limits(), [Budget(100, "tokens", "day")]) for limiter in limiters]
    ledgers = [Ledger(store, tmp_path / "spool", limiter) for store, limiter in zip(stores, limiters, strict=True)]
    for number in range(7):  # all of it by the first
        run(limiters[0].admit(accounts[0], 10, 5)).settle(15)
        ledgers[0].append(fields(number, at=time.time()))
    assert refusal(limiters[0], accounts[0]).limit == "budget"
    await ledgers[0].flush()
    await ledgers[1].flush()
    assert refusal(limiters[1], accounts[1]).limit == "budget"
    for ledger, store in zip(ledgers, stores, strict=True):
        await ledger.close()
        await store.close()


async def test_use_that_is_not_stored_yet_is_not_counted_twice(store: Store, tmp_path: Path) -> None:
    limiter = MemoryLimiter()
    account = limiter.account("key_1", Limits(), [Budget(10**6, "tokens", "day"), Budget(10**6, "money", "total")])
    async with running(Ledger(store, tmp_path / "spool", limiter)) as ledger:
        for number in range(60):
            run(limiter.admit(account, 10, 5)).settle(15, 30)
            ledger.append(fields(number, at=time.time()))
            if number % 20 == 7:
                ledger._budgets_at = 0.0  # as if it had been long ago
                await ledger.flush()
        ledger._budgets_at = 0.0
        await ledger.flush()
        use = limiter.use("key_1")
        assert use is not None
        assert [one.spent for one in use.budgets] == [60 * 15, 60 * 30]


async def test_a_store_that_is_down_at_the_start_keeps_nobody_waiting(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    store = Store(f"sqlite:///{folder}/store.db")
    ledger = Ledger(store, tmp_path / "spool", MemoryLimiter())
    await ledger.start()
    ledger.append(fields(1))
    folder.mkdir()
    async with running(ledger):
        await stored(ledger)
    assert await total(store) == sums(1)
    await store.close()


async def test_rows_older_than_the_retention_go(url: str, tmp_path: Path) -> None:
    pruned: asyncio.Queue[int] = asyncio.Queue()

    class Told(Store):
        async def prune(self, before: float) -> int:
            await pruned.put(await super().prune(before))
            return 0

    store = Told(url)
    ledger = Ledger(store, tmp_path / "spool", MemoryLimiter(), retention_days=30)
    ledger.append(fields(1, at=NOW - 31 * 86_400))
    ledger.append(fields(2))
    await ledger.flush()
    async with running(ledger), asyncio.timeout(DEADLINE):
        ledger.append(fields(3))
        assert await pruned.get() == 1
    assert await Store.prune(store, NOW + 1) == 2
    assert (await total(store)) == sums(3)
    await store.close()
