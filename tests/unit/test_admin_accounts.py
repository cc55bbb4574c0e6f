"""Keys and teams: what may be asked for, what is kept, what is shown."""

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, strategies as st
from pydantic import ValidationError

from gateway.admin.accounts import (
    KeyAsked,
    NewKey,
    TeamAsked,
    UsedNow,
    blank_key,
    blank_team,
    budget_use,
    budgets_shown,
    changed_key,
    changed_team,
    judge_models,
    key_shown,
    resets_at,
)
from gateway.admin.errors import from_fault
from gateway.errors import GatewayError
from gateway.keys import digest
from gateway.limits.base import Limits
from gateway.store.base import Budget, KeyRecord, Period, Spent

NOW = datetime(2026, 11, 24, 10, 30, tzinfo=UTC).timestamp()
NOT_COUNTED = UsedNow(requests=None, tokens=None, parallel=None)


def made(**fields: Any) -> KeyRecord:
    asked = NewKey.model_validate({"name": "alice", **fields})
    return changed_key(blank_key("sk-ps-old-1234", NOW), asked, None, NOW)


def changed(record: KeyRecord, **fields: Any) -> KeyRecord:
    return changed_key(record, KeyAsked.model_validate(fields), fields.get("team"), NOW)


# ---- what is refused

BAD: list[tuple[dict[str, Any], str, str]] = [
    ({}, "missing_required_parameter", "name"),
    ({"name": None}, "invalid_type", "name"),
    ({"name": 5}, "invalid_type", "name"),
    ({"name": ""}, "invalid_value", "name"),
    ({"name": " a"}, "invalid_value", "name"),
    ({"name": "a\nb"}, "invalid_value", "name"),
    ({"name": "a\u202eb"}, "invalid_value", "name"),
    ({"name": "\ud800"}, "invalid_value", "name"),
    ({"name": "x" * 129}, "string_above_max_length", "name"),
    ({"name": "a", "id": "key_0"}, "unsupported_parameter", "id"),
    ({"name": "a", "digest": "00"}, "unsupported_parameter", "digest"),
    ({"name": "a", "revoked_at": None}, "unsupported_parameter", "revoked_at"),
    ({"name": "a", "source": "config"}, "unsupported_parameter", "source"),
    ({"name": "a", "admin": True}, "unsupported_parameter", "admin"),
    ({"name": "a", "max_rpm": -1}, "unsupported_parameter", "max_rpm"),
    ({"name": "a", "models": []}, "empty_array", "models"),
    ({"name": "a", "models": "*"}, "invalid_type", "models"),
    ({"name": "a", "models": ["a b"]}, "invalid_value", "models[0]"),
    ({"name": "a", "models": ["*", 7]}, "invalid_type", "models[1]"),
    ({"name": "a", "models": ["*"] * 101}, "array_above_max_length", "models"),
    ({"name": "a", "limits": {"requests_per_minute": -1}}, "integer_below_min_value", "limits.requests_per_minute"),
    ({"name": "a", "limits": {"requests_per_minute": 0}}, "integer_below_min_value", "limits.requests_per_minute"),
    ({"name": "a", "limits": {"tokens_per_minute": 10**13}}, "integer_above_max_value", "limits.tokens_per_minute"),
    ({"name": "a", "limits": {"tokens_per_minute": 10**300}}, "integer_above_max_value", "limits.tokens_per_minute"),
    ({"name": "a", "limits": {"tokens_per_minute": 1.5}}, "invalid_type", "limits.tokens_per_minute"),
    ({"name": "a", "limits": {"parallel_requests": "3"}}, "invalid_type", "limits.parallel_requests"),
    ({"name": "a", "limits": {"parallel_requests": True}}, "invalid_type", "limits.parallel_requests"),
    ({"name": "a", "limits": {"max_rpm": 5}}, "unsupported_parameter", "limits.max_rpm"),
    ({"name": "a", "limits": []}, "invalid_type", "limits"),
    ({"name": "a", "budgets": {}}, "invalid_type", "budgets"),
    ({"name": "a", "budgets": [{}]}, "missing_required_parameter", "budgets[0].amount"),
    (
        {"name": "a", "budgets": [{"amount": -1, "unit": "tokens", "period": "day"}]},
        "decimal_below_min_value",
        "budgets[0].amount",
    ),
    (
        {"name": "a", "budgets": [{"amount": 1e13, "unit": "money", "period": "day"}]},
        "decimal_above_max_value",
        "budgets[0].amount",
    ),
    (
        {"name": "a", "budgets": [{"amount": float("inf"), "unit": "money", "period": "day"}]},
        "invalid_value",
        "budgets[0].amount",
    ),
    ({"name": "a", "budgets": [{"amount": 1.5, "unit": "tokens", "period": "day"}]}, "invalid_value", "budgets[0]"),
    ({"name": "a", "budgets": [{"amount": 1e-9, "unit": "money", "period": "day"}]}, "invalid_value", "budgets[0]"),
    ({"name": "a", "budgets": [{"amount": 1, "unit": "eur", "period": "day"}]}, "invalid_value", "budgets[0].unit"),
    (
        {"name": "a", "budgets": [{"amount": 1, "unit": "money", "period": "week"}]},
        "invalid_value",
        "budgets[0].period",
    ),
    ({"name": "a", "budgets": [{"amount": 1, "unit": "money", "period": "day"}] * 2}, "invalid_value", "budgets"),
    ({"name": "a", "expires_in_seconds": 0}, "integer_below_min_value", "expires_in_seconds"),
    ({"name": "a", "expires_in_seconds": 10**10}, "integer_above_max_value", "expires_in_seconds"),
    ({"name": "a", "expires_at": 1800000000}, "invalid_value", "expires_at"),
    ({"name": "a", "expires_at": "tomorrow"}, "invalid_value", "expires_at"),
    ({"name": "a", "expires_at": "2027-02-30T00:00:00Z"}, "invalid_value", "expires_at"),
    ({"name": "a", "expires_at": "2027-01-01T00:00:00"}, "invalid_value", "expires_at"),
    ({"name": "a", "expires_at": "0000-01-01T00:00:00Z"}, "invalid_value", "expires_at"),
    ({"name": "a", "expires_at": "9999-12-31T23:59:59-23:59"}, "invalid_value", "expires_at"),
    ({"name": "a", "expires_at": "0001-01-01T00:00:00+23:59"}, "invalid_value", "expires_at"),
    ({"name": "a", "expires_at": "2020-01-01T00:00:00Z"}, "invalid_value", "expires_at"),
    (
        {"name": "a", "expires_at": "2027-01-01T00:00:00Z", "expires_in_seconds": 5},
        "invalid_value",
        "expires_in_seconds",
    ),
    ({"name": "a", "note": "x" * 1001}, "string_above_max_length", "note"),
    ({"name": "a", "owner": ["me"]}, "invalid_type", "owner"),
    ({"name": "a", "team": ""}, "invalid_value", "team"),
]


@pytest.mark.parametrize(("body", "code", "param"), BAD)
def test_what_is_refused(body: dict[str, Any], code: str, param: str) -> None:
    try:
        changed_key(blank_key("sk-ps-x", NOW), NewKey.model_validate(body), None, NOW)
    except ValidationError as error:
        refused = from_fault({**error.errors()[0], "loc": ("body", *error.errors()[0]["loc"])})
    except GatewayError as error:
        refused = error
    else:
        raise AssertionError("it was not refused")
    assert (refused.status, refused.code, refused.param) == (400, code, param)
    assert refused.message.isprintable()
    assert param in refused.message


def test_models_by_name_must_be_there_and_patterns_need_not() -> None:
    judge_models(["tiny", "default", "other-*", "*"], {"tiny", "default"})
    with pytest.raises(GatewayError) as refused:
        judge_models(["*", "tinny"], {"tiny", "default"})
    assert refused.value.param == "models[1]"
    assert "'tinny'" in refused.value.message
    assert "tiny" in refused.value.message


# ---- what is kept


def test_a_new_key_with_nothing_said() -> None:
    record = made()
    assert record.models == ("*",)
    assert (record.limits, record.budgets, record.expires_at, record.revoked_at) == (Limits(), (), None, None)
    assert record.secrets[0].digest == digest(b"sk-ps-old-1234")
    assert "sk-ps-old" not in repr(record)
    assert re.fullmatch(r"key_[0-9a-f]{16}", record.id)


def test_a_change_leaves_alone_what_it_does_not_name() -> None:
    record = made(
        owner="o",
        note="n",
        models=["tiny", "tiny"],
        limits={"requests_per_minute": 5, "tokens_per_minute": 7},
        budgets=[{"amount": 2.5, "unit": "money", "period": "month"}],
        expires_in_seconds=60,
    )
    assert record.models == ("tiny",)
    assert record.budgets == (Budget(2_500_000, "money", "month"),)
    assert record.expires_at == NOW + 60
    assert changed(record) == record
    assert changed(record, name="bob").name == "bob"
    assert changed(record, limits={"tokens_per_minute": None}).limits == Limits(5, None, None)
    assert changed(record, limits={"parallel_requests": 2}).limits == Limits(5, 7, 2)


def test_null_clears() -> None:
    record = made(owner="o", note="n", models=["tiny"], limits={"requests_per_minute": 5}, expires_in_seconds=60)
    cleared = changed(record, owner=None, note=None, models=None, limits=None, budgets=None, expires_at=None, team=None)
    assert (cleared.owner, cleared.note, cleared.models, cleared.limits) == ("", "", ("*",), Limits())
    assert (cleared.budgets, cleared.expires_at, cleared.team_id) == ((), None, None)
    assert changed(record, expires_in_seconds=None).expires_at is None


def test_a_team_changes_alike() -> None:
    team = changed_team(blank_team(NOW), TeamAsked.model_validate({"name": "red", "limits": {"parallel_requests": 3}}))
    assert (team.name, team.limits, team.models) == ("red", Limits(None, None, 3), ("*",))
    assert changed_team(team, TeamAsked.model_validate({"note": "x"})).limits == team.limits


# ---- what is shown


def test_a_key_is_shown_without_its_secret() -> None:
    record = made(limits={"requests_per_minute": 5}, budgets=[{"amount": 100, "unit": "tokens", "period": "day"}])
    shown = key_shown(
        record, "red", budget_use(record.budgets, {"day": Spent(40, 5_000_000)}, NOW), NOT_COUNTED, NOW
    ).model_dump()
    assert shown["last4"] == "1234"
    assert record.secrets[0].digest.hex() not in str(shown)
    assert shown["created_at"] == "2026-11-24T10:30:00Z"
    assert shown["limits"] == {"requests_per_minute": 5, "tokens_per_minute": None, "parallel_requests": None}
    assert shown["budgets"] == [
        {"amount": 100, "unit": "tokens", "period": "day", "used": 40, "resets_at": "2026-11-25T00:00:00Z"}
    ]


def test_money_is_shown_in_its_unit() -> None:
    [shown] = budgets_shown(budget_use([Budget(2_500_000, "money", "total")], {"total": Spent(7, 1_250_001)}, NOW))
    assert (shown.amount, shown.used, shown.resets_at) == (2.5, 1.250001, None)


@given(st.floats(0, 32503680000))
def test_periods_end_in_the_future_and_at_midnight(now: float) -> None:
    lengths: list[tuple[Period, int]] = [("day", 86_400), ("month", 31 * 86_400)]
    for kind, longest in lengths:
        end = resets_at(kind, now)
        assert end is not None
        assert now < end <= now + longest
        assert end % 86_400 == 0
