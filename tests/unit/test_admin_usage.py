"""Sums of usage: the time that is meant, totals, CSV."""

import csv
import io
from typing import Any

import pytest
from pydantic import ValidationError

from gateway.admin.shapes import instant
from gateway.admin.usage import UsageAsked, as_csv, called, period, rows, total
from gateway.errors import GatewayError
from gateway.store.base import UsageSum

NOW = instant("2026-11-24T10:00:00Z")
DAY = 86_400.0


def asked(**fields: str) -> UsageAsked:
    return UsageAsked.model_validate(fields)


@pytest.mark.parametrize(
    ("query", "start", "end"),
    [
        ({}, NOW - 30 * DAY, NOW),
        ({"from": "2026-11-23T10:00:00Z"}, NOW - DAY, NOW),
        ({"from": "2026-11-23T11:00:00+01:00"}, NOW - DAY, NOW),
        ({"from": "2026-11-23", "to": "2026-11-24"}, NOW - DAY - 36_000, NOW - 36_000),
        ({"to": "2026-11-24"}, NOW - 30 * DAY - 36_000, NOW - 36_000),
    ],
)
def test_the_time_that_is_meant(query: dict[str, str], start: float, end: float) -> None:
    assert period(asked(**query), NOW) == (start, end)


@pytest.mark.parametrize(
    "query", [{"from": "2026-11-25"}, {"from": "2026-11-24", "to": "2026-11-24"}, {"from": "1970-01-01"}]
)
def test_times_that_make_no_sense_together(query: dict[str, str]) -> None:
    with pytest.raises(GatewayError) as refused:
        period(asked(**query), NOW)
    assert (refused.value.status, refused.value.param) == (400, "from")


@pytest.mark.parametrize(
    "query",
    [
        {"from": "yesterday"},
        {"from": "2026-13-01"},
        {"from": "2026-W01-1"},
        {"from": "20261124"},
        {"to": "2026-11-24T25:00:00Z"},
        {"to": "9999-12-31T23:59:59-23:59"},
        {"to": "2026-11-24T10:00:00 00:00"},  # a plus that nobody escaped
        {"group_by": ""},
        {"group_by": "user"},
        {"group_by": "key,key"},
        {"group_by": "key,"},
        {"format": "xml"},
        {"until": "2026-11-24"},
    ],
)
def test_what_is_refused(query: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        asked(**query)


def test_rows_and_their_total() -> None:
    found = [
        UsageSum(("key_1", "2026-11-24"), 3, 1, 100, 50, 10, 1_500_000),
        UsageSum(("config:demo", "x"), 1, 0, 1, 2, 0, 1),
    ]
    made = rows(found, ["key", "day"], lambda group, member: called(group, member, {"key_1": "alice"}))
    assert made[0] == {
        "key": "alice",
        "day": "2026-11-24",
        "requests": 3,
        "errors": 1,
        "prompt_tokens": 100,
        "completion_tokens": 50,
        "cached_tokens": 10,
        "cost": 1.5,
    }
    assert made[1]["key"] == "demo"
    assert total(found) == UsageSum((), 4, 1, 101, 52, 10, 1_500_001)
    assert total([]) == UsageSum((), 0, 0, 0, 0, 0, 0)


def test_what_is_in_no_team() -> None:
    assert called("team", "", {}) is None
    assert called("model", "", {}) == ""


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@cmd", "\tx", 'a,"b"', "", None, "plain"])
def test_csv_is_text_whatever_the_names(name: Any) -> None:
    sums = {"requests": 1, "errors": 0, "prompt_tokens": 2, "completion_tokens": 3, "cached_tokens": 0, "cost": -0.5}
    text = as_csv(["key"], [{"key": name, **sums}])
    head, row = csv.reader(io.StringIO(text, newline=""))
    assert head == ["key", "requests", "errors", "prompt_tokens", "completion_tokens", "cached_tokens", "cost"]
    assert row[0] == (f"'{name}" if name and name[0] in "=+-@\t" else name or "")
    assert row[1:] == ["1", "0", "2", "3", "0", "-0.5"]
