"""Records as JSON: for their columns, and for the audit trail. Pure."""

from collections.abc import Iterable
from typing import Any

import orjson

from gateway.limits.base import Limits
from gateway.store.base import Budget, KeyRecord, Secret, TeamRecord


def dump_key(record: KeyRecord) -> bytes:
    return orjson.dumps(
        {
            "secrets": [(one.digest.hex(), one.last4, one.expires_at) for one in record.secrets],
            "owner": record.owner,
            "note": record.note,
            "models": record.models,
            "limits": tuple(record.limits),
            "budgets": [tuple(budget) for budget in record.budgets],
            "expires_at": record.expires_at,
        }
    )


def load_key(row: Iterable[Any]) -> KeyRecord:
    """From the columns id, name, team_id, record, created_at, revoked_at."""
    key_id, name, team_id, record, created_at, revoked_at = row
    rest = orjson.loads(record)
    return KeyRecord(
        id=key_id,
        name=name,
        secrets=tuple(Secret(bytes.fromhex(digest), last4, until) for digest, last4, until in rest["secrets"]),
        team_id=team_id,
        owner=rest["owner"],
        note=rest["note"],
        models=tuple(rest["models"]),
        limits=Limits(*rest["limits"]),
        budgets=tuple(Budget(*budget) for budget in rest["budgets"]),
        created_at=created_at,
        expires_at=rest["expires_at"],
        revoked_at=revoked_at,
    )


def dump_team(record: TeamRecord) -> bytes:
    return orjson.dumps(
        {
            "note": record.note,
            "models": record.models,
            "limits": tuple(record.limits),
            "budgets": [tuple(budget) for budget in record.budgets],
        }
    )


def load_team(row: Iterable[Any]) -> TeamRecord:
    """From the columns id, name, record, created_at."""
    team_id, name, record, created_at = row
    rest = orjson.loads(record)
    return TeamRecord(
        id=team_id,
        name=name,
        note=rest["note"],
        models=tuple(rest["models"]),
        limits=Limits(*rest["limits"]),
        budgets=tuple(Budget(*budget) for budget in rest["budgets"]),
        created_at=created_at,
    )


def describe_key(record: KeyRecord) -> str:
    """For the audit trail: without digests, for which nobody there has a use."""
    return orjson.dumps(
        {
            "name": record.name,
            "keys": [{"last4": one.last4, "expires_at": one.expires_at} for one in record.secrets],
            "team_id": record.team_id,
            "owner": record.owner,
            "note": record.note,
            "models": record.models,
            "limits": record.limits._asdict(),
            "budgets": [budget._asdict() for budget in record.budgets],
            "expires_at": record.expires_at,
            "revoked_at": record.revoked_at,
        }
    ).decode()


def describe_team(record: TeamRecord) -> str:
    return orjson.dumps(
        {
            "name": record.name,
            "note": record.note,
            "models": record.models,
            "limits": record.limits._asdict(),
            "budgets": [budget._asdict() for budget in record.budgets],
        }
    ).decode()
