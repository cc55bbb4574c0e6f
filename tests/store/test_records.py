"""Keys, teams and their audit trail, the same over every database."""

import asyncio
import json
from dataclasses import replace

import pytest

from gateway import keys
from gateway.limits.base import Limits
from gateway.store.base import Budget, DuplicateError, KeyRecord, Secret, StoreError, TeamRecord
from gateway.store.db import Store
from tests.stores import open_store

SECRET = keys.make_secret("sk-ps-whatever")
KEY = KeyRecord(
    id="key_1",
    name="batch",
    secrets=(SECRET, Secret(b"\x00" * 32, "abcd", 2e9)),
    team_id="team_1",
    owner="Ada Lovelace",
    note="nächtlich\n'; DROP TABLE keys; --",
    models=("llama-*", "tiny"),
    limits=Limits(60, None, 4),
    budgets=(Budget(10**12, "money", "month"), Budget(5, "tokens", "total")),
    created_at=1_700_000_000.25,
    expires_at=1_800_000_000.5,
    revoked_at=None,
)
TEAM = TeamRecord("team_1", "research", "", ("*",), Limits(tokens_per_minute=9), (Budget(7, "tokens", "day"),), 1.5)


async def test_a_key_comes_back_as_it_was_given(store: Store) -> None:
    await store.add_key(KEY, "admin")
    assert await store.keys() == [KEY]


async def test_a_team_comes_back_as_it_was_given(store: Store) -> None:
    await store.add_team(TEAM, "admin")
    assert await store.teams() == [TEAM]


async def test_a_change_replaces_the_whole_record(store: Store) -> None:
    changed = replace(KEY, name="nightly", models=("*",), limits=Limits(), budgets=(), revoked_at=1.0, team_id=None)
    await store.add_key(KEY, "admin")
    await store.change_key(changed, "admin")
    assert await store.keys() == [changed]


async def test_the_oldest_comes_first(store: Store) -> None:
    old = replace(KEY, id="key_2", name="old", created_at=1.0)
    await store.add_key(KEY, "admin")
    await store.add_key(old, "admin")
    assert await store.keys() == [old, KEY]


async def test_a_name_is_taken_by_one_living_key(store: Store) -> None:
    await store.add_key(KEY, "admin")
    again = replace(KEY, id="key_2")
    with pytest.raises(DuplicateError):
        await store.add_key(again, "admin")
    await store.change_key(replace(KEY, revoked_at=3.0), "admin")
    await store.add_key(again, "admin")
    with pytest.raises(DuplicateError):
        await store.change_key(KEY, "admin")
    assert {key.id for key in await store.keys()} == {"key_1", "key_2"}


async def test_a_team_s_name_is_taken_until_it_is_deleted(store: Store) -> None:
    await store.add_team(TEAM, "admin")
    again = replace(TEAM, id="team_2")
    with pytest.raises(DuplicateError):
        await store.add_team(again, "admin")
    await store.delete_team(TEAM.id, "admin")
    await store.add_team(again, "admin")
    assert await store.teams() == [again]


async def test_what_is_not_there_cannot_be_changed(store: Store) -> None:
    with pytest.raises(KeyError):
        await store.change_key(KEY, "admin")
    with pytest.raises(KeyError):
        await store.change_team(TEAM, "admin")
    with pytest.raises(KeyError):
        await store.delete_team(TEAM.id, "admin")
    assert await store.version() == 0
    assert await store.audit(10) == []


async def test_a_refused_change_changes_nothing(store: Store) -> None:
    await store.add_key(KEY, "admin")
    before = await store.version(), await store.audit(10)
    with pytest.raises(DuplicateError):
        await store.add_key(replace(KEY, id="key_2"), "admin")
    assert (await store.version(), await store.audit(10)) == before


async def test_the_version_grows_and_tells_what_changed_since(store: Store) -> None:
    await store.add_key(KEY, "admin")
    first = await store.snapshot()
    assert (first.version, first.keys, first.teams) == (1, (KEY,), ())
    other = replace(KEY, id="key_2", name="other")
    await store.add_key(other, "admin")
    await store.add_team(TEAM, "admin")
    second = await store.snapshot(first.version)
    assert (second.version, second.keys, second.teams) == (3, (other,), (TEAM,))
    assert await store.version() == 3
    assert (await store.snapshot(3)).keys == ()


async def test_every_change_leaves_who_what_before_and_after(store: Store) -> None:
    await store.add_team(TEAM, "alice")
    await store.change_team(replace(TEAM, note="new"), "bob")
    await store.add_key(KEY, "carol")
    await store.change_key(replace(KEY, owner="Grace"), "dave")
    await store.delete_team(TEAM.id, "erin")
    entries = await store.audit(10)
    assert [(entry.who, entry.what, entry.target) for entry in reversed(entries)] == [
        ("alice", "create_team", "team_1"),
        ("bob", "change_team", "team_1"),
        ("carol", "create_key", "key_1"),
        ("dave", "change_key", "key_1"),
        ("erin", "delete_team", "team_1"),
    ]
    changed = entries[1]
    assert changed.before is not None
    assert changed.after is not None
    assert json.loads(changed.before)["owner"] == "Ada Lovelace"
    assert json.loads(changed.after)["owner"] == "Grace"
    assert entries[0].after is None
    assert await store.audit(2) == entries[:2]


async def test_the_audit_trail_holds_no_digest(store: Store) -> None:
    await store.add_key(KEY, "admin")
    assert SECRET.digest.hex() not in str(await store.audit(1))
    assert SECRET.last4 in str(await store.audit(1))


async def test_two_processes_that_start_together_make_the_tables_once(url: str) -> None:
    stores = await asyncio.gather(*(open_store(url) for _ in range(4)))
    await stores[0].add_key(KEY, "admin")
    assert [await store.keys() for store in stores] == [[KEY]] * 4
    await asyncio.gather(*(store.close() for store in stores))


async def test_changes_of_two_processes_at_once_all_count(url: str) -> None:
    first, second = await open_store(url), await open_store(url)
    more = [replace(KEY, id=f"key_{n}", name=f"name{n}") for n in range(20)]
    await asyncio.gather(*((first, second)[n % 2].add_key(key, "admin") for n, key in enumerate(more)))
    assert await first.version() == 20
    assert {key.id for key in await second.keys()} == {key.id for key in more}
    await first.close()
    await second.close()


async def test_tables_of_a_newer_version_are_left_alone(url: str) -> None:
    import sqlalchemy as sa

    store = await open_store(url)
    async with store._engine.begin() as connection:  # what a newer version would have left
        await connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    await store.close()
    with pytest.raises(StoreError, match="newer version"):
        await open_store(url)


async def test_the_migrations_make_what_a_new_store_is_made_as(url: str) -> None:
    """Down to the types, keys and indexes, and to what alembic itself keeps: so a new store can be upgraded later."""
    import sqlalchemy as sa

    from gateway.store.db import _upgrade

    def told(connection: sa.Connection) -> object:
        found = sa.MetaData()
        found.reflect(connection)
        tables = {
            table.name: (
                [(column.name, str(column.type), column.nullable, column.primary_key) for column in table.columns],
                sorted((index.name, index.unique, [c.name for c in index.columns]) for index in table.indexes),
                table.primary_key.name if table.name == "alembic_version" else None,
            )
            for table in found.sorted_tables
        }
        rows = [connection.execute(sa.select(found.tables[name])).all() for name in ("state", "alembic_version")]
        return tables, rows

    def drop(connection: sa.Connection) -> None:
        found = sa.MetaData()
        found.reflect(connection)
        found.drop_all(connection)

    store = await open_store(url)
    async with store._engine.begin() as connection:
        created = await connection.run_sync(told)
        await connection.run_sync(drop)
        await connection.run_sync(_upgrade)
        assert await connection.run_sync(told) == created
    await store.close()


def test_the_newest_migration_is_the_one_that_the_code_knows() -> None:
    from alembic.script import ScriptDirectory

    from gateway.store import migrations
    from gateway.store.tables import HEAD

    assert ScriptDirectory(migrations.__path__[0]).get_current_head() == HEAD


@pytest.mark.parametrize("url", ["mysql://x/y", "sqlite", "postgresql://h/d?sslmode=require&shoe=1", ""])
def test_a_url_that_cannot_be_a_store_s(url: str) -> None:
    with pytest.raises(ValueError, match=r"must be|allowed are"):
        Store(url)
