"""The terminal's side of the admin API, as far as it needs no gateway."""

import io
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, strategies as st
from rich.console import Console, RenderableType

from gateway.console import given as typed, live, tables
from gateway.console.client import Address, escaped, parse_events
from gateway.console.named import find
from gateway.console.problem import Problem

NOW = datetime(2026, 11, 24, 10, 0, 0, tzinfo=UTC)


def printed(shown: RenderableType, width: int = 200, height: int = 50) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO(), highlight=False)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


# ---- what people type


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("90", 90), ("90s", 90), ("1.5m", 90), ("36h", 129_600), ("7d", 604_800), (" 2 w", 1_209_600)],
)
def test_seconds(text: str, wanted: float) -> None:
    assert typed.seconds(text) == wanted


@pytest.mark.parametrize("text", ["", "h", "7 days", "-3d", "1e3", "٣d", "7d 3h"])
def test_what_is_no_span(text: str) -> None:
    with pytest.raises(ValueError, match="no span of time"):
        typed.seconds(text)


@pytest.mark.parametrize(
    ("text", "past", "wanted"),
    [
        ("7d", True, "2026-11-17T10:00:00Z"),
        ("12h", False, "2026-11-24T22:00:00Z"),
        ("2026-11-01", True, "2026-11-01T00:00:00Z"),
        ("2026-11-01T12:30:00+02:00", False, "2026-11-01T10:30:00Z"),
    ],
)
def test_moment(text: str, past: bool, wanted: str) -> None:
    assert typed.moment(text, NOW, past=past) == wanted


@pytest.mark.parametrize("text", ["tomorrow", "2026-13-01", "9999999w", "99999999999999999999d"])
def test_what_is_no_moment(text: str) -> None:
    with pytest.raises(ValueError, match=r"no time|too far"):
        typed.moment(text, NOW, past=False)


@pytest.mark.parametrize(
    ("text", "amount", "unit", "period"),
    [
        ("5M tokens/month", 5_000_000, "tokens", "month"),
        ("1_000tokens / day", 1000, "tokens", "day"),
        ("12.5 money/total", 12.5, "money", "total"),
        ("0.5k tokens/day", 500, "tokens", "day"),
    ],
)
def test_budget(text: str, amount: float, unit: str, period: str) -> None:
    assert typed.budget(text) == {"amount": amount, "unit": unit, "period": period}


@pytest.mark.parametrize("text", ["", "5M", "5M tokens", "5M tokens/year", "5 euro/day", "-5 money/day", "_ money/day"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        typed.budget(text)


# ---- where the gateway is


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("gateway.example:8080", "http://gateway.example:8080"),
        ("http://[::1]:8081/", "http://[::1]:8081"),
        ("https://llm.example/v1", "https://llm.example:443"),
        ("https://example/penstock/", "https://example:443/penstock"),
        ("http://h:1/admin/", "http://h:1"),
    ],
)
def test_address(text: str, wanted: str) -> None:
    assert str(Address.parse(text)) == wanted


@pytest.mark.parametrize("text", ["", "ftp://h", "http://", "http://user:secret@h", "http://h?x=1", "http://h:99999"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        Address.parse(text)
    assert "secret" not in str(raised.value)


def test_ids_in_paths() -> None:
    assert escaped("smollm2/0") == "smollm2/0"
    assert escaped("config:a b?c#d") == "config:a%20b%3Fc%23d"


def test_events() -> None:
    stream = b': ping\r\n\r\nevent: history\ndata: {"a":\ndata: 1}\nid: 3\n\nevent: nothing\n\ndata: 2\n\ndata: lost'
    found = [(event.name, event.data) for event in parse_events(iter(stream.splitlines(keepends=True)))]
    assert found == [("history", {"a": 1}), ("message", 2)]


# ---- names

KEYS = [
    {"id": "key_1", "name": "alice", "status": "active"},
    {"id": "key_2", "name": "bob", "status": "revoked"},
    {"id": "key_3", "name": "bob", "status": "active"},
    {"id": "key_4", "name": "carol", "status": "revoked"},
    {"id": "key_5", "name": "dave", "status": "revoked"},
    {"id": "key_6", "name": "dave", "status": "expired"},
    {"id": "key_7", "name": "key_1", "status": "active"},  # named like another's id
]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("alice", "key_1"), ("key_1", "key_1"), ("bob", "key_3"), ("key_2", "key_2"), ("carol", "key_4")],
)
def test_a_key_by_its_name_or_id(wanted: str, found: str) -> None:
    assert find("key", KEYS, wanted)["id"] == found


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("alcie", "there is no key 'alcie'; did you mean 'alice'?"),
        ("ALICE", "there is no key 'ALICE'; did you mean 'alice'?"),
        ("zzz", "there is no key 'zzz'; there are: alice, bob, carol, dave, key_1"),
        ("dave", "2 keys are called 'dave'; give the id of the one you mean: key_5, key_6"),
    ],
)
def test_a_name_that_does_not_tell(wanted: str, said: str) -> None:
    with pytest.raises(Problem) as raised:
        find("key", KEYS, wanted)
    assert str(raised.value) == said


def test_names_in_a_message_are_few() -> None:
    many = [{"id": f"key_{i}", "name": f"n{i:04}"} for i in range(5000)]
    with pytest.raises(Problem, match=r"n0000, .*, n0007 and 4992 more$"):
        find("key", many, "???")
    with pytest.raises(Problem, match="there are no keys at all"):
        find("key", [], "alice")


# ---- tables

KEY: Mapping[str, Any] = {
    "id": "key_0123456789abcdef",
    "name": "alice",
    "team": "research",
    "owner": None,
    "note": "",
    "models": ["llama-*", "smollm2"],
    "limits": {"requests_per_minute": 600, "tokens_per_minute": 200_000, "parallel_requests": None},
    "budgets": [
        {"amount": 5_000_000, "unit": "tokens", "period": "month", "used": 1_234_567, "resets_at": None},
        {"amount": 25, "unit": "money", "period": "total", "used": 25.5, "resets_at": None},
    ],
    "last4": "x9Yz",
    "created_at": "2026-11-24T10:00:00Z",
    "expires_at": None,
    "revoked_at": None,
    "status": "active",
    "source": "store",
    "now": {"requests": 3, "tokens": 12_345, "parallel": None},
}


def test_table_of_keys() -> None:
    head, row = printed(tables.keys([KEY]))
    assert head.split() == ["NAME", "ID", "KEY", "STATUS", "TEAM", "MODELS", "LIMITS", "BUDGETS", "EXPIRES"]
    assert row == (
        "alice  key_0123456789abcdef  …x9Yz  active  research  llama-*, smollm2  600 req/min, 200k tok/min  "
        "1.2M/5M tokens a month, 25.5/25 money in total  –"
    )


def test_one_key() -> None:
    lines = dict(line.split(maxsplit=1) for line in printed(tables.key(KEY)))
    assert lines["note"] == lines["owner"] == lines["expires"] == "–"
    assert lines["now"] == "3 requests, 12 345 tokens"
    assert printed(tables.key({**KEY, "models": ["*"]}))[7].split() == ["models", "all"]
    assert printed(tables.key({**KEY, "models": []}))[7].split() == ["models", "none"]


def test_table_of_usage() -> None:
    sums = {
        "requests": 12_345,
        "errors": 2,
        "prompt_tokens": 5,
        "completion_tokens": 6,
        "cached_tokens": 1,
        "cost": 0.25,
    }
    answer = {"group_by": ["key", "day"], "data": [{"key": "alice", "day": "2026-11-24", **sums}], "total": sums}
    head, row, total = printed(tables.usage(answer))
    assert head.split() == ["KEY", "DAY", "REQUESTS", "ERRORS", "PROMPT", "CACHED", "COMPLETION", "COST"]
    assert row.split() == ["alice", "2026-11-24", "12", "345", "2", "5", "1", "6", "0.25"]
    assert total.split() == ["total", "12", "345", "2", "5", "1", "6", "0.25"]


@given(st.text())
def test_no_name_moves_the_cursor(name: str) -> None:
    [_, *rows] = printed(tables.keys([{**KEY, "name": f"\x1b[2J{name}\x1b]0;owned\x07"}]), width=1000)
    text = "".join(rows)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert len(rows) == 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (7.04, "7"),
        (950, "950"),
        (1000, "1k"),
        (12_345, "12.3k"),
        (1_234_567, "1.2M"),
        (5e9, "5G"),
        (123_456, "123k"),
    ],
)
def test_short(value: float, shown: str) -> None:
    assert tables.short(value) == shown


# ---- the live screen


@given(st.lists(st.floats(0, 1e9), max_size=300), st.integers(0, 200))
def test_sparkline(values: list[float], width: int) -> None:
    drawn = live.sparkline(values, width)
    assert len(drawn) == width
    heights = [live.BLOCKS.index(c) for c in drawn[width - min(width, len(values)) :]]
    shown = values[-width:] if width else []
    if any(shown):
        assert max(heights) == 8
        for (value, height), (other, other_height) in zip(
            list(zip(shown, heights, strict=True))[1:], zip(shown, heights, strict=True), strict=False
        ):
            assert height >= other_height if value >= other else height <= other_height
        assert all(height >= 1 for value, height in zip(shown, heights, strict=True) if value > 0)
        assert all(height == 0 for value, height in zip(shown, heights, strict=True) if value == 0)


@given(st.integers(-5, 60), st.integers(0, 60), st.integers(0, 60))
def test_shares(room: int, first: int, second: int) -> None:
    one, two = live.shares(room, first, second)
    assert 0 <= one <= first
    assert 0 <= two <= second
    assert one + two == min(max(0, room), first + second)
    assert one >= min(first, max(0, room) // 2)
    assert two >= min(second, max(0, room) // 2)


def figures(models: int = 1, engines: int = 2, rate: float = 1234.5, **more: Any) -> dict[str, Any]:
    return {
        "time": "2026-11-24T10:00:00Z",
        "requests_per_second": 2.5,
        "output_tokens_per_second": rate,
        "prompt_tokens_per_second": 0.0,
        "errors_per_second": 0.0,
        "open_requests": 3,
        "ttft_ms": {"p50": 80.0, "p95": 1250.0},
        "itl_ms": {"p50": None, "p95": None},
        "loop_lag_ms": 0.4,
        "models": [
            {"name": f"m{i}", "requests_per_second": 1.0, "output_tokens_per_second": float(i), "open_requests": i}
            for i in range(models)
        ],
        "engines": [
            {
                "id": f"m/{i}",
                "state": "ready" if i else "failed",
                "running": None,
                "waiting": 0,
                "kv_cache_usage": 0.5,
                "restarts": 0,
                "open_requests": i,
            }
            for i in range(engines)
        ],
        **more,
    }


@given(st.integers(20, 160), st.integers(12, 60), st.integers(0, 40), st.integers(0, 40))
def test_the_screen_fits(width: int, height: int, models: int, engines: int) -> None:
    view = live.View("http://127.0.0.1:8080")
    view.history({"interval": 10, "points": [figures()] * 50})
    view.figures(figures(models, engines))
    lines = printed(live.screen(view, width, height), width, height)
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)


def test_the_screen() -> None:
    view = live.View("http://127.0.0.1:8080")
    assert "waiting for the first figures" in "\n".join(printed(live.screen(view, 80, 24)))
    view.figures(figures(models=2))
    lines = printed(live.screen(view, 100, 24), 100, 24)
    assert lines[2].split() == [
        *["req/s", "err/s", "open", "out", "tok/s", "in", "tok/s"],
        *["ttft", "p50/p95", "itl", "p50/p95", "loop", "lag"],
    ]
    assert lines[3].split() == ["2.5", "0", "3", "1.2k", "0", "80", "ms/1.25", "s", "–", "0.4", "ms"]
    assert [line.split()[0] for line in lines[9:11]] == ["m1", "m0"], "the busiest first"
    assert [line.split()[0] for line in lines[13:15]] == ["m/0", "m/1"], "those with trouble first"
    view.trouble = "the gateway is gone"
    assert "the gateway is gone" in printed(live.screen(view, 100, 24))[0]
    view.figures(figures())
    assert "gone" not in printed(live.screen(view, 100, 24))[0]


def test_what_does_not_fit_is_counted() -> None:
    view = live.View("http://h:1")
    view.figures(figures(models=30, engines=30))
    lines = printed(live.screen(view, 100, 31), 100, 31)
    assert " … and 21 more" in lines
    assert len(lines) == 31


def test_seconds_become_points_of_the_hour() -> None:
    view = live.View("http://h:1")
    view.history({"interval": 10.0, "points": [figures(rate=5.0)]})
    for rate in range(10):
        assert list(view.hour) == [5.0]
        view.figures(figures(rate=float(rate)))
    assert list(view.hour) == [5.0, 4.5]


def test_a_line_a_second() -> None:
    assert live.line(json.loads(json.dumps(figures()))) == (
        "2026-11-24T10:00:00Z  2.5 req/s  1234.5 tok/s  3 open  0.0 errors/s  ttft p95 1.25 s  itl p95 –  1/2 engines"
    )
