"""Keys, teams, audit, usage."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    state = op.create_table("state", sa.Column("version", sa.BigInteger, nullable=False))
    op.bulk_insert(state, [{"version": 0}])
    op.create_table(
        "teams",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("record", sa.LargeBinary, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
    )
    op.create_index("teams_name", "teams", ["name"], unique=True)
    op.create_table(
        "keys",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("team_id", sa.Text),
        sa.Column("record", sa.LargeBinary, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("revoked_at", sa.Double),
        sa.Column("changed", sa.BigInteger, nullable=False),
    )
    op.create_index("keys_changed", "keys", ["changed"])
    living = sa.text("revoked_at IS NULL")
    op.create_index("keys_name", "keys", ["name"], unique=True, sqlite_where=living, postgresql_where=living)
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("who", sa.Text, nullable=False),
        sa.Column("what", sa.Text, nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("before", sa.Text),
        sa.Column("after", sa.Text),
    )
    op.create_table(
        "usage",
        sa.Column("row_id", sa.Text, primary_key=True),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("team_id", sa.Text),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("error", sa.Text),
        sa.Column("replica", sa.Text),
        sa.Column("prompt", sa.BigInteger, nullable=False),
        sa.Column("completion", sa.BigInteger, nullable=False),
        sa.Column("cached", sa.BigInteger, nullable=False),
        sa.Column("cost", sa.BigInteger, nullable=False),
        sa.Column("ttft", sa.Double),
        sa.Column("duration", sa.Double, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sqlite_with_rowid=False,
    )
    for name, key in (
        ("usage_hours", ("start", "key_id", "team_id", "model")),
        ("usage_days", ("key_id", "team_id", "model", "start")),
    ):
        op.create_table(
            name,
            sa.Column("start", sa.BigInteger, nullable=False),
            sa.Column("key_id", sa.Text, nullable=False),
            sa.Column("team_id", sa.Text, nullable=False),
            sa.Column("model", sa.Text, nullable=False),
            sa.Column("requests", sa.BigInteger, nullable=False),
            sa.Column("errors", sa.BigInteger, nullable=False),
            sa.Column("prompt", sa.BigInteger, nullable=False),
            sa.Column("completion", sa.BigInteger, nullable=False),
            sa.Column("cached", sa.BigInteger, nullable=False),
            sa.Column("cost", sa.BigInteger, nullable=False),
            sa.PrimaryKeyConstraint(*key),
            sqlite_with_rowid=False,
        )
    op.create_index("usage_days_start", "usage_days", ["start"])
    op.create_index("usage_days_team", "usage_days", ["team_id"])


def downgrade() -> None:
    for table in ("usage_days", "usage_hours", "usage", "audit", "keys", "teams", "state"):
        op.drop_table(table)
