"""The store: SQLite in one file, or PostgreSQL."""

from collections.abc import Collection, Mapping, Sequence

from gateway.store.base import (
    AuditEntry,
    Group,
    KeyRecord,
    Owner,
    Period,
    Snapshot,
    Spent,
    TeamRecord,
    UsageRow,
    UsageSum,
)


async def open_store(url: str) -> "Store":
    """Connects and brings the tables up to date, alone among all processes that try. Raises `StoreError`."""
    raise NotImplementedError


class Store:
    """Every method may raise `StoreError`, some seconds after the call at the latest, and then has changed nothing."""

    async def version(self) -> int:
        """Grows with every change of a key or team."""
        raise NotImplementedError

    async def snapshot(self, since: int = 0) -> Snapshot:
        """All teams, and the keys that changed after version `since`."""
        raise NotImplementedError

    async def keys(self) -> list[KeyRecord]:
        """All of them, revoked and expired ones too; the oldest first."""
        raise NotImplementedError

    async def teams(self) -> list[TeamRecord]:
        """The oldest first."""
        raise NotImplementedError

    async def add_key(self, record: KeyRecord, who: str) -> None:
        """Raises `DuplicateError` if a key that is not revoked has the name."""
        raise NotImplementedError

    async def change_key(self, record: KeyRecord, who: str) -> None:
        """Replaces the key with that id. Raises `DuplicateError`, and `KeyError` if there is none."""
        raise NotImplementedError

    async def add_team(self, record: TeamRecord, who: str) -> None:
        """Raises `DuplicateError`."""
        raise NotImplementedError

    async def change_team(self, record: TeamRecord, who: str) -> None:
        """Replaces the team with that id. Raises `DuplicateError`, and `KeyError` if there is none."""
        raise NotImplementedError

    async def delete_team(self, team_id: str, who: str) -> None:
        """Raises `KeyError` if there is none. Its keys are the caller's to look at first."""
        raise NotImplementedError

    async def audit(self, limit: int) -> list[AuditEntry]:
        """The newest first."""
        raise NotImplementedError

    async def add_usage(self, rows: Sequence[UsageRow]) -> None:
        """Adds the rows and, in the same transaction, their sums; a row whose id is there already counts once."""
        raise NotImplementedError

    async def usage(self, start: float, end: float, group_by: Sequence[Group]) -> list[UsageSum]:
        """Sums of the hours that begin in [start, end), by group in order; none for groups without requests."""
        raise NotImplementedError

    async def spent(self, owners: Collection[Owner], now: float) -> Mapping[Owner, Mapping[Period, Spent]]:
        """What each of `owners` has used in the day and month of `now`, and in total."""
        raise NotImplementedError

    async def prune(self, before: float) -> int:
        """Drops the rows of requests that came before; their sums stay. Returns how many."""
        raise NotImplementedError

    async def close(self) -> None:
        """Never raises."""
        raise NotImplementedError
