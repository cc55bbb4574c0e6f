"""The store: SQLite in one file, or PostgreSQL. Keys, teams, their audit trail, and use.

Nothing here is on the request path: a store that is down, slow or full costs a `StoreError`, and the next call tries again.
"""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import aiosqlite
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from gateway.limits.budgets import month_start
from gateway.store import records
from gateway.store.base import (
    AuditEntry,
    DuplicateError,
    Group,
    KeyRecord,
    Owner,
    Period,
    Snapshot,
    Spent,
    StoreError,
    TeamRecord,
    UsageRow,
    UsageSum,
)
from gateway.store.sums import DAY, HOUR, split, sum_up, text_of
from gateway.store.tables import AUDIT, DAYS, HEAD, HOURS, KEYS, METADATA, STATE, SUMMED, TEAMS, USAGE

PATIENCE: Final = 5.0  # seconds that any one call may take
_BUSY: Final = 3.0  # seconds that SQLite waits for another process's lock
_WAL_TRIES: Final = 10
_MIGRATING: Final = 60.0  # seconds
_LOCK: Final = 0x70656E73746F636B  # PostgreSQL's advisory locks are told apart by a number; "penstock" as one
_AT_ONCE: Final = 500  # values in one IN (...)
_ROWS_AT_ONCE: Final = 64  # in one INSERT: a quarter quicker than one by one, and its prepared form takes some 40 KB
_STATEMENTS: Final = 8  # that the driver keeps
_CONFLICT: Final = (IntegrityError, sqlite3.IntegrityError)
_PRUNED_AT_ONCE: Final = 5000  # rows; keeps other writers waiting for milliseconds only

_Sum = tuple[int | str, ...]  # a bucket and its amounts
R = TypeVar("R")


def driver_url(url: str) -> URL:
    """What SQLAlchemy connects to. Raises ValueError for what is neither sqlite:// nor postgresql://."""
    try:
        parsed = make_url(url.replace("postgres://", "postgresql://", 1) if url.startswith("postgres://") else url)
    except (ArgumentError, ValueError):
        raise ValueError("must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE") from None
    if parsed.drivername == "sqlite":
        return parsed.set(drivername="sqlite+aiosqlite")
    if parsed.drivername != "postgresql":
        raise ValueError("must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE")
    query = dict(parsed.query)
    if "sslmode" in query:  # as libpq spells it
        query["ssl"] = query.pop("sslmode")
    if unknown := sorted(query.keys() - {"ssl", "host", "port"}):
        raise ValueError(f"has the option {unknown[0]}; allowed are: sslmode, host, port")
    return parsed.set(drivername="postgresql+asyncpg", query=query)


def sqlite_file(url: str) -> Path | None:
    """The file of a SQLite store on disk; None for any other."""
    parsed = make_url(url)
    on_disk = parsed.drivername == "sqlite" and parsed.database not in {None, "", ":memory:"}
    return Path(str(parsed.database)) if on_disk else None


class Store:
    """Connects with its first call, which brings the tables up to date too, alone among all processes that try.

    Every method may raise `StoreError`, some seconds after the call at the latest, and then has changed nothing; but what a slow
    disk was still writing by then may be there (rows of use count once all the same).
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        """Raises ValueError for a URL that cannot be a store's."""
        self._url = driver_url(url)
        self._clock = clock
        self._sqlite = self._url.drivername.startswith("sqlite")
        self._engine = _sqlite_engine(self._url) if self._sqlite else _postgres_engine(self._url)
        self._writing = self._engine.execution_options(penstock_writes=True)
        insert = sqlite.insert if self._sqlite else postgresql.insert
        dialect = self._engine.dialect
        self._add_hours, self._add_days = (
            str(_upsert(insert, table).compile(dialect=dialect)) for table in (HOURS, DAYS)
        )
        self._add_row = str(sa.insert(USAGE).compile(dialect=dialect))
        head, _, group = self._add_row.partition(" VALUES ")
        self._add_block = f"{head} VALUES {', '.join([group] * _ROWS_AT_ONCE)}"
        self._prepared = False
        self._preparing = asyncio.Lock()

    # ---- keys and teams

    async def version(self) -> int:
        """Grows with every change of a key or team. Is asked for all the time."""
        if self._sqlite:
            return int(await self._run(_version))
        async with self._begin() as connection:
            return int(await connection.scalar(sa.select(STATE.c.version)) or 0)

    async def snapshot(self, since: int = 0) -> Snapshot:
        """All teams, and the keys that changed after version `since`."""
        async with self._begin() as connection:
            # Read first: what changes in between is then told again, not missed.
            version = int(await connection.scalar(sa.select(STATE.c.version)) or 0)
            keys = await connection.execute(_SELECT_KEYS.where(KEYS.c.changed > since))
            teams = await connection.execute(_SELECT_TEAMS)
            return Snapshot(
                version,
                tuple(records.load_key(row) for row in keys),
                tuple(records.load_team(row) for row in teams),
            )

    async def keys(self) -> list[KeyRecord]:
        """All of them, revoked and expired ones too; the oldest first."""
        async with self._begin() as connection:
            return [records.load_key(row) for row in await connection.execute(_SELECT_KEYS)]

    async def teams(self) -> list[TeamRecord]:
        """The oldest first."""
        async with self._begin() as connection:
            return [records.load_team(row) for row in await connection.execute(_SELECT_TEAMS)]

    async def add_key(self, record: KeyRecord, who: str) -> None:
        """Raises `DuplicateError` if a key that is not revoked has the name."""
        async with self._changing() as (connection, version):
            await connection.execute(sa.insert(KEYS).values(_key_columns(record, version)))
            await self._note(
                connection, AuditEntry(self._clock(), who, "create_key", record.id, None, records.describe_key(record))
            )

    async def change_key(self, record: KeyRecord, who: str) -> None:
        """Replaces the key with that id. Raises `DuplicateError`, and `KeyError` if there is none."""
        async with self._changing() as (connection, version):
            found = (await connection.execute(_SELECT_KEYS.where(KEYS.c.id == record.id))).one_or_none()
            if found is None:
                raise KeyError(record.id)
            before = records.describe_key(records.load_key(found))
            await connection.execute(
                sa.update(KEYS).where(KEYS.c.id == record.id).values(_key_columns(record, version))
            )
            await self._note(
                connection,
                AuditEntry(self._clock(), who, "change_key", record.id, before, records.describe_key(record)),
            )

    async def add_team(self, record: TeamRecord, who: str) -> None:
        """Raises `DuplicateError`."""
        async with self._changing() as (connection, _):
            await connection.execute(sa.insert(TEAMS).values(_team_columns(record)))
            await self._note(
                connection,
                AuditEntry(self._clock(), who, "create_team", record.id, None, records.describe_team(record)),
            )

    async def change_team(self, record: TeamRecord, who: str) -> None:
        """Replaces the team with that id. Raises `DuplicateError`, and `KeyError` if there is none."""
        async with self._changing() as (connection, _):
            before = records.describe_team(await _team(connection, record.id))
            await connection.execute(sa.update(TEAMS).where(TEAMS.c.id == record.id).values(_team_columns(record)))
            await self._note(
                connection,
                AuditEntry(self._clock(), who, "change_team", record.id, before, records.describe_team(record)),
            )

    async def delete_team(self, team_id: str, who: str) -> None:
        """Raises `KeyError` if there is none. Its keys are the caller's to look at first."""
        async with self._changing() as (connection, _):
            before = records.describe_team(await _team(connection, team_id))
            await connection.execute(sa.delete(TEAMS).where(TEAMS.c.id == team_id))
            await self._note(connection, AuditEntry(self._clock(), who, "delete_team", team_id, before, None))

    async def audit(self, limit: int) -> list[AuditEntry]:
        """The newest first."""
        columns = (AUDIT.c[field] for field in AuditEntry._fields)
        async with self._begin() as connection:
            found = await connection.execute(sa.select(*columns).order_by(AUDIT.c.id.desc()).limit(limit))
            return [AuditEntry(*row) for row in found]

    async def add_audit(self, entry: AuditEntry) -> None:
        """Of what is no change of a key or team: those have their entries from the calls that make them."""
        async with self._begin(writes=True) as connection:
            await self._note(connection, entry)

    async def _note(self, connection: AsyncConnection, entry: AuditEntry) -> None:
        await connection.execute(sa.insert(AUDIT).values(entry._asdict()))

    # ---- use

    async def add_usage(self, rows: Sequence[UsageRow]) -> None:
        """Adds the rows and, in the same transaction, their sums; a row whose id is there already counts once."""
        try:
            await self._add_usage(list(rows))
        except _CONFLICT:
            # Some are there already, which is rare: a process died between the store's commit and its own note of it.
            try:
                await self._add_usage(await self._new(list({row.row_id: row for row in rows}.values())))
            except _CONFLICT as error:  # another process adds the same ones now, or somebody put up a rule of their own
                raise StoreError(_reason(getattr(error, "orig", None) or error)) from None

    async def _add_usage(self, rows: list[UsageRow]) -> None:
        if not rows:
            return
        totals = sum_up(rows)
        hours, days = ([(*bucket, *amounts) for bucket, amounts in sums.items()] for sums in totals)
        if self._sqlite:
            await self._run(self._insert_usage, rows, hours, days)
            return
        async with self._begin(writes=True) as connection:
            # The statements are Core's, their values go to the driver as they are: a row's dict costs more than its insert.
            await connection.exec_driver_sql(self._add_row, rows)
            await connection.exec_driver_sql(self._add_hours, hours)
            await connection.exec_driver_sql(self._add_days, days)

    def _insert_usage(
        self, connection: sqlite3.Connection, rows: list[UsageRow], hours: list[_Sum], days: list[_Sum]
    ) -> None:
        """In the driver's thread, to which each call costs as much as ten rows: so all of them at once."""
        connection.execute("BEGIN IMMEDIATE")
        try:
            in_blocks = len(rows) - len(rows) % _ROWS_AT_ONCE
            for first in range(0, in_blocks, _ROWS_AT_ONCE):
                block = rows[first : first + _ROWS_AT_ONCE]
                connection.execute(self._add_block, tuple(chain.from_iterable(block)))
            connection.executemany(self._add_row, rows[in_blocks:])
            connection.executemany(self._add_hours, hours)
            connection.executemany(self._add_days, days)
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    async def _new(self, rows: list[UsageRow]) -> list[UsageRow]:
        known: set[str] = set()
        async with self._begin() as connection:
            for start in range(0, len(rows), _AT_ONCE):
                ids = [row.row_id for row in rows[start : start + _AT_ONCE]]
                known.update(await connection.scalars(sa.select(USAGE.c.row_id).where(USAGE.c.row_id.in_(ids))))
        return [row for row in rows if row.row_id not in known]

    async def usage(self, start: float, end: float, group_by: Sequence[Group]) -> list[UsageSum]:
        """Sums of the hours that begin in [start, end), by group in order; none for groups without requests."""
        parts = []
        for span in split(start, end, whole_days="hour" not in group_by):
            table = DAYS if span.days else HOURS
            labelled = [_GROUPS[group](table).label(group) for group in group_by]
            within = sa.and_(table.c.start >= span.start, table.c.start < span.end)
            parts.append(sa.select(*labelled, *(table.c[column] for column in SUMMED)).where(within))
        if not parts:
            return []
        every = sa.union_all(*parts).subquery()
        groups = [every.c[group] for group in group_by]
        sums = [sa.cast(sa.func.sum(every.c[column]), sa.BigInteger) for column in SUMMED]
        async with self._begin() as connection:
            found = await connection.execute(sa.select(*groups, *sums).group_by(*groups).order_by(*groups))
            width = len(group_by)
            return [
                UsageSum(
                    tuple(text_of(group, value) for group, value in zip(group_by, row, strict=False)), *row[width:]
                )
                for row in found
                if row[width]  # without groups there is one row, of NULLs if there is nothing
            ]

    async def spent(self, owners: Collection[Owner], now: float) -> Mapping[Owner, Mapping[Period, Spent]]:
        """What each of `owners` has used in the day and month of `now`, and in total."""
        starts: dict[Period, int] = {"day": int(now) // DAY * DAY, "month": month_start(now), "total": 0}
        found: dict[Owner, Mapping[Period, Spent]] = {owner: dict.fromkeys(starts, Spent()) for owner in owners}
        kinds: tuple[tuple[Literal["key", "team"], sa.Column[Any]], ...] = (
            ("key", DAYS.c.key_id),
            ("team", DAYS.c.team_id),
        )
        since = [amount for start in starts.values() for amount in _since(start)]
        async with self._begin() as connection:
            for kind, column in kinds:
                ids = [owner for one, owner in owners if one == kind]
                for first in range(0, len(ids), _AT_ONCE):
                    some = column.in_(ids[first : first + _AT_ONCE])
                    for id_, *sums in await connection.execute(sa.select(column, *since).where(some).group_by(column)):
                        pairs = zip(sums[::2], sums[1::2], strict=True)
                        found[kind, id_] = dict(zip(starts, (Spent(*pair) for pair in pairs), strict=True))
        return found

    async def prune(self, before: float) -> int:
        """Drops the rows of requests that came before; their sums stay. Returns how many."""
        oldest = sa.select(USAGE.c.row_id, USAGE.c.time).order_by(USAGE.c.row_id).limit(_PRUNED_AT_ONCE)
        dropped = 0
        while True:
            async with self._begin(writes=True) as connection:
                found = (await connection.execute(oldest)).all()
                gone = [row_id for row_id, time_ in found if time_ < before]
                for first in range(0, len(gone), _AT_ONCE):
                    await connection.execute(sa.delete(USAGE).where(USAGE.c.row_id.in_(gone[first : first + _AT_ONCE])))
            dropped += len(gone)
            if len(gone) < _PRUNED_AT_ONCE:
                return dropped

    async def close(self) -> None:
        """Never raises."""
        with suppress(Exception):
            await self._engine.dispose()

    # ---- transactions

    @asynccontextmanager
    async def _begin(self, *, writes: bool = False) -> AsyncIterator[AsyncConnection]:
        """A transaction, committed if nothing is raised. Raises `StoreError`; IntegrityError is the caller's."""
        await self._ready()
        async with _mapped(PATIENCE), (self._writing if writes else self._engine).begin() as connection:
            yield connection

    @asynccontextmanager
    async def _changing(self) -> AsyncIterator[tuple[AsyncConnection, int]]:
        """A transaction that changes keys or teams, and the version that it gives."""
        try:
            async with self._begin(writes=True) as connection:
                grown = sa.update(STATE).values(version=STATE.c.version + 1).returning(STATE.c.version)
                yield connection, int((await connection.execute(grown)).scalar_one())
        except IntegrityError:
            raise DuplicateError from None

    async def _run(self, work: Callable[..., R], *args: object) -> R:
        """Calls `work` with SQLite's own connection in that connection's thread. Raises as `_begin` does."""
        await self._ready()
        async with _mapped(PATIENCE), self._engine.connect() as connection:
            # aiosqlite has no public way to have several statements done in one go.
            driver: Any = (await connection.get_raw_connection()).driver_connection
            result: R = await driver._execute(work, driver._conn, *args)
            return result

    async def _ready(self) -> None:
        if not self._prepared:
            async with self._preparing:
                if not self._prepared:
                    await self._prepare()

    async def _prepare(self) -> None:
        """Brings the tables up to date. SQLite's write lock or an advisory one keeps other processes waiting."""
        async with _mapped(PATIENCE), self._engine.begin() as connection:
            at = await connection.run_sync(_revision)
        if at != HEAD:
            async with _mapped(_MIGRATING), self._writing.begin() as connection:
                if not self._sqlite:
                    await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
                await connection.run_sync(_bring_up_to_date)
        self._prepared = True


@asynccontextmanager
async def _mapped(patience: float) -> AsyncIterator[None]:
    """Every way in which a database fails, as one."""
    try:
        async with asyncio.timeout(patience):
            yield
    except _CONFLICT:
        raise
    except TimeoutError:
        raise StoreError("it does not answer") from None
    except SQLAlchemyError as error:
        raise StoreError(_reason(getattr(error, "orig", None) or error)) from None
    except OSError as error:
        raise StoreError(error.strerror or "it cannot be reached") from None
    except Exception as error:
        # What a driver raises while it connects is not wrapped.
        if type(error).__module__.partition(".")[0] in {"asyncpg", "sqlite3", "aiosqlite"}:
            raise StoreError(_reason(error)) from None
        raise


def _reason(error: BaseException) -> str:
    """Without SQL, values and addresses."""
    lines = str(error).splitlines()
    return lines[0].rpartition(">: ")[2] if lines else type(error).__name__


def _version(connection: sqlite3.Connection) -> int:
    found: tuple[int] | None = connection.execute(_SELECT_VERSION).fetchone()
    return found[0] if found else 0


def _sqlite_engine(url: URL) -> AsyncEngine:
    async def connect() -> aiosqlite.Connection:
        # Without the driver's own idea of transactions, so that DDL is part of them, and they lock when they begin.
        connection = aiosqlite.connect(
            url.database or ":memory:", isolation_level=None, timeout=_BUSY, cached_statements=_STATEMENTS
        )
        thread = connection._thread
        thread.daemon = True
        try:
            return await connection
        except sqlite3.Error:
            # Its thread has a last word for this loop, which may be closed soon.
            await asyncio.to_thread(thread.join)
            raise

    engine = create_async_engine(url, hide_parameters=True, async_creator=connect)

    @sa.event.listens_for(engine.sync_engine, "connect")
    def _set_up(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        for tries_left in reversed(range(_WAL_TRIES)):
            try:
                cursor.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError as error:
                # The one statement that does not wait when another process makes the file at the same time: this does.
                if not tries_left or "locked" not in str(error):
                    raise
                cursor.execute("BEGIN IMMEDIATE")
                cursor.execute("COMMIT")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.close()

    @sa.event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("penstock_writes")
        # A transaction that reads first and writes then would fail if another process wrote in between.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgres_engine(url: URL) -> AsyncEngine:
    return create_async_engine(
        url,
        hide_parameters=True,
        pool_size=2,
        max_overflow=2,
        pool_pre_ping=True,  # a server that was restarted costs no call
        connect_args={"timeout": PATIENCE, "server_settings": {"application_name": "penstock"}},
    )


def _revision(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    return found


def _bring_up_to_date(connection: sa.Connection) -> None:
    at = _revision(connection)  # again: another process may have been first
    if at is None:
        _create(connection)
    elif at != HEAD:
        _upgrade(connection)


def _create(connection: sa.Connection) -> None:
    """What all migrations make of an empty database, without the time and the 9 MB that alembic takes to load."""
    METADATA.create_all(connection, checkfirst=False)
    connection.execute(sa.insert(STATE).values(version=0))
    done = sa.Table(
        "alembic_version",
        sa.MetaData(),
        sa.Column("version_num", sa.String(32)),
        sa.PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
    )
    done.create(connection)
    connection.execute(sa.insert(done).values(version_num=HEAD))


def _upgrade(connection: sa.Connection) -> None:
    import alembic.command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415
    from alembic.util import CommandError  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        alembic.command.upgrade(config, "head")
    except CommandError:
        raise StoreError("its tables were made by a newer version of Penstock") from None


# ---- statements

_SELECT_VERSION: Final = str(sa.select(STATE.c.version))
_SELECT_KEYS: Final = sa.select(
    KEYS.c.id, KEYS.c.name, KEYS.c.team_id, KEYS.c.record, KEYS.c.created_at, KEYS.c.revoked_at
).order_by(KEYS.c.created_at, KEYS.c.id)
_SELECT_TEAMS: Final = sa.select(TEAMS.c.id, TEAMS.c.name, TEAMS.c.record, TEAMS.c.created_at).order_by(
    TEAMS.c.created_at, TEAMS.c.id
)

_GROUPS: Final[Mapping[Group, Callable[[sa.Table], sa.ColumnElement[Any]]]] = {
    "key": lambda table: table.c.key_id,
    "team": lambda table: table.c.team_id,
    "model": lambda table: table.c.model,
    "day": lambda table: table.c.start - table.c.start % DAY,
    "hour": lambda table: table.c.start - table.c.start % HOUR,
}


def _key_columns(record: KeyRecord, version: int) -> dict[str, object]:
    return {
        "id": record.id,
        "name": record.name,
        "team_id": record.team_id,
        "record": records.dump_key(record),
        "created_at": record.created_at,
        "revoked_at": record.revoked_at,
        "changed": version,
    }


def _team_columns(record: TeamRecord) -> dict[str, object]:
    return {
        "id": record.id,
        "name": record.name,
        "record": records.dump_team(record),
        "created_at": record.created_at,
    }


async def _team(connection: AsyncConnection, team_id: str) -> TeamRecord:
    found = (await connection.execute(_SELECT_TEAMS.where(TEAMS.c.id == team_id))).one_or_none()
    if found is None:
        raise KeyError(team_id)
    return records.load_team(found)


def _since(start: int) -> tuple[sa.ColumnElement[int], sa.ColumnElement[int]]:
    """Tokens and cost of the days from `start` on."""

    def of(amount: sa.ColumnElement[int]) -> sa.ColumnElement[int]:
        return sa.cast(sa.func.sum(sa.case((DAYS.c.start >= start, amount), else_=0)), sa.BigInteger)

    return of(DAYS.c.prompt + DAYS.c.completion), of(DAYS.c.cost)


def _upsert(insert: Any, table: sa.Table) -> Any:
    added = insert(table)
    grown = {column: table.c[column] + added.excluded[column] for column in SUMMED}
    return added.on_conflict_do_update(index_elements=list(table.primary_key.columns), set_=grown)
