"""The tables as they are now. Whoever changes one adds a migration, and names it in `HEAD`."""

from typing import Final

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    text,
)

HEAD: Final = "0001"  # the newest migration; known here so that an up-to-date store needs no alembic

METADATA: Final = MetaData()

# One row: the version that the last change of a key or team gave.
STATE: Final = Table("state", METADATA, Column("version", BigInteger, nullable=False))

TEAMS: Final = Table(
    "teams",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("record", LargeBinary, nullable=False),  # JSON
    Column("created_at", Double, nullable=False),
    Index("teams_name", "name", unique=True),
)

# A record is read and written whole, and judged in memory: so it is one value, and what SQL must know stands beside it.
KEYS: Final = Table(
    "keys",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("team_id", Text),
    Column("record", LargeBinary, nullable=False),  # JSON
    Column("created_at", Double, nullable=False),
    Column("revoked_at", Double),
    Column("changed", BigInteger, nullable=False),  # the version of its last change
    Index("keys_changed", "changed"),
    Index(
        "keys_name",
        "name",
        unique=True,
        sqlite_where=text("revoked_at IS NULL"),
        postgresql_where=text("revoked_at IS NULL"),
    ),
)

AUDIT: Final = Table(
    "audit",
    METADATA,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("time", Double, nullable=False),
    Column("who", Text, nullable=False),
    Column("what", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("before", Text),
    Column("after", Text),
)

# Ids grow with time: so the one index that there is grows at its end, and the oldest rows are found by it.
USAGE: Final = Table(
    "usage",
    METADATA,
    Column("row_id", Text, primary_key=True),
    Column("time", Double, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("team_id", Text),
    Column("model", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("status", Integer, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("error", Text),
    Column("replica", Text),
    Column("prompt", BigInteger, nullable=False),
    Column("completion", BigInteger, nullable=False),
    Column("cached", BigInteger, nullable=False),
    Column("cost", BigInteger, nullable=False),
    Column("ttft", Double),
    Column("duration", Double, nullable=False),
    Column("attempts", Integer, nullable=False),
    sqlite_with_rowid=False,
)

SUMMED: Final = ("requests", "errors", "prompt", "completion", "cached", "cost")


def _sums(name: str, *key: str) -> Table:
    return Table(
        name,
        METADATA,
        Column("start", BigInteger, nullable=False),  # seconds since the epoch
        Column("key_id", Text, nullable=False),
        Column("team_id", Text, nullable=False),  # "": none
        Column("model", Text, nullable=False),
        *(Column(column, BigInteger, nullable=False) for column in SUMMED),
        PrimaryKeyConstraint(*key),
        sqlite_with_rowid=False,
    )


HOURS: Final = _sums("usage_hours", "start", "key_id", "team_id", "model")
# Kept too, so that a year, and all that a key has ever used, are few rows.
DAYS: Final = _sums("usage_days", "key_id", "team_id", "model", "start")
Index("usage_days_start", DAYS.c.start)
Index("usage_days_team", DAYS.c.team_id)
