"""Keys and teams through the admin API, and what they open and close for clients."""

import asyncio
import csv
import io
import json
import re
from typing import Any

import pytest

from tests.fake_engine import FakeEngine
from tests.flow.admin import ADMIN, ask, config, judge
from tests.flow.conftest import Start
from tests.served import JSON_TYPE, KEY, Answer, Penstock, bearer, chat_body, until

FULL = re.compile(r"sk-ps-[0-9A-Za-z]{38}")


async def make(gateway: Penstock, **fields: Any) -> dict[str, Any]:
    answer = await ask(gateway, "/keys", "POST", fields)
    assert answer.status == 201, answer.body
    made: dict[str, Any] = answer.json
    assert FULL.fullmatch(made["key"])
    return made


async def talk(gateway: Penstock, key: str, model: str = "tiny") -> Answer:
    return await gateway.post("/v1/chat/completions", chat_body("hello there", model=model, max_tokens=2), key)


# ---- a key's life


async def test_a_new_key_works_at_once_and_is_shown_once(admin: Penstock) -> None:
    made = await make(admin, name="once", owner="o@example.com", note="a note", limits={"requests_per_minute": 9})
    assert (await talk(admin, made["key"])).status == 200
    shown = (await ask(admin, f"/keys/{made['id']}")).json
    assert shown["now"] == {"requests": 1, "tokens": shown["now"]["tokens"], "parallel": 0}
    assert shown | {"now": None} == {
        "id": made["id"],
        "name": "once",
        "team": None,
        "owner": "o@example.com",
        "note": "a note",
        "models": ["*"],
        "limits": {"requests_per_minute": 9, "tokens_per_minute": None, "parallel_requests": None},
        "budgets": [],
        "last4": made["key"][-4:],
        "created_at": made["created_at"],
        "expires_at": None,
        "revoked_at": None,
        "status": "active",
        "source": "store",
        "now": None,
    }
    assert shown in [one | {"now": shown["now"]} for one in (await ask(admin, "/keys")).json["data"]]
    for path in ("/keys", f"/keys/{made['id']}", "/audit", "/config", "/requests"):
        assert made["key"].encode() not in (await ask(admin, path)).body
    for file in admin.folder.rglob("*"):
        assert not file.is_file() or made["key"].encode() not in file.read_bytes(), file


async def test_what_a_key_may_use(admin: Penstock) -> None:
    narrow = await make(admin, name="narrow", models=["org/*"], limits={"requests_per_minute": 2})
    assert (await talk(admin, narrow["key"])).status == 404
    assert (await talk(admin, narrow["key"], "org/other")).status == 200
    assert [m["id"] for m in (await admin.get("/v1/models", narrow["key"])).json["data"]] == ["org/other"]
    changed = await ask(admin, f"/keys/{narrow['id']}", "PATCH", {"models": ["tiny"]})
    assert (changed.status, changed.json["models"]) == (200, ["tiny"])
    assert (await talk(admin, narrow["key"], "org/other")).status == 404
    assert (await talk(admin, narrow["key"])).status == 200
    assert (await talk(admin, narrow["key"])).status == 429
    lifted = (await ask(admin, f"/keys/{narrow['id']}", "PATCH", {"limits": None})).json
    assert lifted["limits"] == {"requests_per_minute": None, "tokens_per_minute": None, "parallel_requests": None}
    assert (await talk(admin, narrow["key"])).status == 200


async def test_revoking_is_at_once_and_for_good(admin: Penstock) -> None:
    made = await make(admin, name="gone")
    path = f"/keys/{made['id']}"
    assert (await talk(admin, made["key"])).status == 200
    revoked = await ask(admin, path, "DELETE")
    assert (revoked.status, revoked.json["status"]) == (200, "revoked")
    judge(await talk(admin, made["key"]), 401, "invalid_api_key")
    assert (await ask(admin, path, "DELETE")).json["revoked_at"] == revoked.json["revoked_at"]
    judge(await ask(admin, path, "PATCH", {"note": "back?"}), 409, "key_revoked")
    judge(await ask(admin, f"{path}/rotate", "POST"), 409, "key_revoked")
    found = (await ask(admin, "/keys?status=revoked")).json["data"]
    assert made["id"] in [one["id"] for one in found]
    assert {one["status"] for one in found} == {"revoked"}
    assert (await make(admin, name="gone"))["id"] != made["id"]  # the name is free again


async def test_rotation_with_and_without_an_overlap(admin: Penstock) -> None:
    first = await make(admin, name="turning")
    path = f"/keys/{first['id']}/rotate"
    second = (await ask(admin, path, "POST", {"overlap_seconds": 3600})).json
    assert second["id"] == first["id"]
    assert second["last4"] == second["key"][-4:]
    assert second["old_valid_until"] > first["created_at"]
    for key in (first["key"], second["key"]):
        assert (await talk(admin, key)).status == 200
    third = (await ask(admin, path, "POST")).json
    assert third["old_valid_until"] is None
    assert [(await talk(admin, one["key"])).status for one in (first, second, third)] == [401, 401, 200]


async def test_a_key_expires(admin: Penstock) -> None:
    made = await make(admin, name="brief", expires_in_seconds=1)
    assert made["status"] == "active"

    async def refused() -> bool:
        return (await talk(admin, made["key"])).status == 401

    await until(refused)
    assert (await ask(admin, f"/keys/{made['id']}")).json["status"] == "expired"
    longer = await ask(admin, f"/keys/{made['id']}", "PATCH", {"expires_at": "2999-12-31T23:59:59Z"})
    assert (longer.json["status"], longer.json["expires_at"]) == ("active", "2999-12-31T23:59:59Z")
    assert (await talk(admin, made["key"])).status == 200


async def test_keys_of_the_config_are_listed_and_read_only(admin: Penstock) -> None:
    first = (await ask(admin, "/keys")).json["data"][0]
    assert (first["id"], first["name"], first["source"], first["status"]) == ("config:test", "test", "config", "active")
    assert (await ask(admin, "/keys/config:test")).json["id"] == "config:test"
    judge(await ask(admin, "/keys/config:test", "PATCH", {"note": "x"}), 409, "read_only_key")
    judge(await ask(admin, "/keys/config:test", "DELETE"), 409, "read_only_key")
    judge(await ask(admin, "/keys/config:test/rotate", "POST"), 409, "read_only_key")
    judge(await ask(admin, "/keys/config:nobody"), 404, "not_found", "id")
    judge(await ask(admin, "/keys", "POST", {"name": "test"}), 409, "name_taken", "name")
    assert (await admin.chat(max_tokens=1)).status == 200


async def test_names_are_taken_once(admin: Penstock) -> None:
    await make(admin, name="taken")
    other = await make(admin, name="other")
    judge(await ask(admin, "/keys", "POST", {"name": "taken"}), 409, "name_taken", "name")
    judge(await ask(admin, f"/keys/{other['id']}", "PATCH", {"name": "taken"}), 409, "name_taken", "name")
    renamed = await ask(admin, f"/keys/{other['id']}", "PATCH", {"name": "<b>=önly 名前</b>"})
    assert renamed.json["name"] == "<b>=önly 名前</b>"
    assert (await talk(admin, other["key"])).status == 200


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
async def test_a_key_that_is_not_there(admin: Penstock, method: str) -> None:
    body: dict[str, Any] | None = {} if method == "PATCH" else None
    for key_id in ("key_0000000000000000", "x", "..%2f..", "%ff", "a/b/c"):
        judge(await ask(admin, f"/keys/{key_id}", method, body), 404, "not_found", "id")
    judge(await ask(admin, "/keys/key_0000000000000000/rotate", "POST", {}), 404, "not_found", "id")


# ---- teams


async def test_a_teams_life(admin: Penstock) -> None:
    made = await ask(admin, "/teams", "POST", {"name": "red", "note": "n", "limits": {"requests_per_minute": 2}})
    assert made.status == 201
    team = made.json
    assert (team["name"], team["keys"], team["limits"]["requests_per_minute"]) == ("red", 0, 2)
    keys = [await make(admin, name=f"red-{i}", team="red") for i in range(2)]
    assert {key["team"] for key in keys} == {"red"}
    assert (await ask(admin, f"/teams/{team['id']}")).json["keys"] == 2
    assert len((await ask(admin, "/keys?team=red")).json["data"]) == 2
    # The team's limit holds for its keys together.
    assert [(await talk(admin, keys[i % 2]["key"])).status for i in range(3)] == [200, 200, 429]
    judge(await ask(admin, f"/teams/{team['id']}", "DELETE"), 409, "team_in_use")
    judge(await ask(admin, "/teams", "POST", {"name": "red"}), 409, "name_taken", "name")
    renamed = await ask(admin, f"/teams/{team['id']}", "PATCH", {"name": "crimson", "limits": None})
    assert (renamed.status, renamed.json["name"]) == (200, "crimson")
    assert (await talk(admin, keys[0]["key"])).status == 200
    assert (await ask(admin, f"/keys/{keys[0]['id']}")).json["team"] == "crimson"
    await ask(admin, f"/keys/{keys[0]['id']}", "DELETE")
    assert (await ask(admin, f"/keys/{keys[1]['id']}", "PATCH", {"team": None})).json["team"] is None
    assert (await ask(admin, f"/teams/{team['id']}", "DELETE")).status == 200
    judge(await ask(admin, f"/teams/{team['id']}"), 404, "not_found", "id")
    assert (await talk(admin, keys[1]["key"])).status == 200


async def test_a_teams_models_bound_its_keys(admin: Penstock) -> None:
    await ask(admin, "/teams", "POST", {"name": "blue", "models": ["tiny"]})
    made = await make(admin, name="blue-1", team="blue")
    assert (await talk(admin, made["key"])).status == 200
    assert (await talk(admin, made["key"], "org/other")).status == 404


# ---- what is refused


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"name": "bad", "max_rpm": -1}, "unsupported_parameter", "max_rpm"),
        (
            {"name": "bad", "limits": {"requests_per_minute": -1}},
            "integer_below_min_value",
            "limits.requests_per_minute",
        ),
        (
            {"name": "bad", "limits": {"tokens_per_minute": 10**30}},
            "integer_above_max_value",
            "limits.tokens_per_minute",
        ),
        ({"name": "bad", "models": ["tiny", "nope"]}, "invalid_value", "models[1]"),
        ({"name": "bad", "team": "nope"}, "invalid_value", "team"),
        ({"name": "bad", "expires_at": "2001-01-01T00:00:00Z"}, "invalid_value", "expires_at"),
        ({"name": "bad", "expires_at": "soon"}, "invalid_value", "expires_at"),
        ({"name": "bad", "id": "key_1", "key": "sk-mine"}, "unsupported_parameter", "id"),
        ({"name": "bad", "revoked_at": None}, "unsupported_parameter", "revoked_at"),
        ({"name": 1}, "invalid_type", "name"),
        ({}, "missing_required_parameter", "name"),
    ],
)
async def test_fields(admin: Penstock, fields: dict[str, Any], code: str, param: str) -> None:
    judge(await ask(admin, "/keys", "POST", fields), 400, code, param)
    assert "bad" not in [one["name"] for one in (await ask(admin, "/keys")).json["data"]]


async def test_an_unknown_model_is_named(admin: Penstock) -> None:
    message = judge(
        await ask(admin, "/keys", "POST", {"name": "bad", "models": ["tinny"]}), 400, "invalid_value", "models[0]"
    )
    assert "'tinny'" in message
    assert "tiny" in message


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"name": NaN}', b"[" * 100_000, b'{"name": "\\ud800"}']
)
async def test_bodies(admin: Penstock, body: bytes) -> None:
    answer = await ask(admin, "/keys", "POST", body)
    assert answer.status == 400
    assert answer.error["code"] in ("invalid_json", "invalid_value", "invalid_type")


async def test_the_form_of_a_body(admin: Penstock) -> None:
    data = json.dumps({"name": "bad"}).encode()
    for headers in ({}, {"content-type": "text/plain"}, JSON_TYPE | {"content-encoding": "gzip"}):
        answer = await admin.request("POST", "/admin/api/keys", bearer(ADMIN) | headers, data)
        judge(answer, 415, "unsupported_media_type")
    judge(await ask(admin, "/keys", "POST", {"name": "bad", "note": "x" * (1 << 20)}), 413, "request_too_large")


async def test_a_budget_that_is_used_up(admin: Penstock) -> None:
    budgets = [
        {"amount": 4, "unit": "tokens", "period": "day"},
        {"amount": 1000.5, "unit": "money", "period": "total"},
    ]
    made = await make(admin, name="thrifty", budgets=budgets)
    assert (await talk(admin, made["key"])).status == 200  # two tokens in, two out
    shown = (await ask(admin, f"/keys/{made['id']}")).json["budgets"]
    assert [(one["amount"], one["used"]) for one in shown] == [(4, 4), (1000.5, 0.6)]
    assert shown[0]["resets_at"].endswith("T00:00:00Z")
    assert shown[1]["resets_at"] is None
    assert (await talk(admin, made["key"])).status == 429
    assert (await ask(admin, f"/keys/{made['id']}", "PATCH", {"budgets": budgets[1:]})).status == 200
    assert (await talk(admin, made["key"])).status == 200


# ---- without a store


async def test_a_store_that_is_down(chat: FakeEngine, start: Start) -> None:
    gateway = await start(config=config(chat.url, store="sqlite:////proc/nothing/penstock.db"))
    for method, path, body in (
        ("GET", "/keys", None),
        ("POST", "/keys", {"name": "a"}),
        ("PATCH", "/keys/key_0", {}),
        ("GET", "/teams", None),
        ("GET", "/usage", None),
        ("GET", "/audit", None),
    ):
        answer = await ask(gateway, path, method, body)
        assert (answer.status, answer.error["type"], answer.error["code"]) == (503, "server_error", "store_unavailable")
        assert answer.headers["retry-after"]
        assert "/proc" not in answer.error["message"]
    assert (await gateway.chat(max_tokens=1)).status == 200
    assert (await ask(gateway, "/models")).status == 200
    assert (await ask(gateway, "/engines/tiny/0/drain", "POST")).status == 202
    assert (await ask(gateway, "/requests")).status == 200


# ---- usage and audit


async def test_usage_by_anything(chat: FakeEngine, start: Start) -> None:
    gateway = await start(config=config(chat.url))
    await ask(gateway, "/teams", "POST", {"name": "red"})
    made = await make(gateway, name="=cmd", team="red")
    for key, model in ((made["key"], "tiny"), (made["key"], "default"), (KEY, "org/other"), (KEY, "nope")):
        await talk(gateway, key, model)

    answer = (await ask(gateway, "/usage?group_by=key")).json  # at once: it does not wait for the next batch
    by_key = {row["key"]: row for row in answer["data"]}
    assert answer["group_by"] == ["key"]
    assert answer["from"] < answer["to"]
    assert by_key["=cmd"] == {
        "key": "=cmd",
        "requests": 2,
        "errors": 0,
        "prompt_tokens": 4,
        "completion_tokens": 4,
        "cached_tokens": 0,
        "cost": 1.2,
    }
    assert (by_key["test"]["requests"], by_key["test"]["errors"]) == (2, 1)
    assert answer["total"] == {
        "requests": 4,
        "errors": 1,
        "prompt_tokens": 6,
        "completion_tokens": 6,
        "cached_tokens": 0,
        "cost": 1.2,
    }

    async def listed() -> bool:
        return [one["team"] for one in (await ask(gateway, "/requests?key=%3Dcmd")).json["data"]] == ["red", "red"]

    await until(listed)
    rows = (await ask(gateway, "/usage?group_by=team,model")).json["data"]
    assert {"team": "red", "model": "tiny", "requests": 2} in [
        {k: r[k] for k in ("team", "model", "requests")} for r in rows
    ]
    assert {row["team"] for row in rows} == {"red", None}
    [hour] = (await ask(gateway, "/usage?group_by=hour")).json["data"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:00:00Z", hour["hour"])
    assert (await ask(gateway, "/usage?from=2001-01-01&to=2001-01-02")).json["data"] == []
    sheet = await ask(gateway, "/usage?group_by=key,day&format=csv")
    assert sheet.headers["content-type"] == "text/csv; charset=utf-8"
    assert sheet.headers["content-disposition"].startswith("attachment")
    head, *lines = csv.reader(io.StringIO(sheet.body.decode(), newline=""))
    assert head[:3] == ["key", "day", "requests"]
    assert {line[0] for line in lines} == {"'=cmd", "test"}


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("from=yesterday", "from"),
        ("to=2026-02-30", "to"),
        ("from=2026-02-02&to=2026-02-01", "from"),
        ("from=0001-01-01", "from"),
        ("to=9999-12-31T23:59:59-23:59", "to"),
        ("group_by=user", "group_by"),
        ("group_by=", "group_by"),
        ("format=xml", "format"),
    ],
)
async def test_usage_of_what_makes_no_sense(admin: Penstock, query: str, param: str) -> None:
    judge(await ask(admin, f"/usage?{query}"), 400, "invalid_value", param)


async def test_every_change_is_in_the_audit(chat: FakeEngine, start: Start) -> None:
    gateway = await start(config=config(chat.url))
    team = (await ask(gateway, "/teams", "POST", {"name": "red"})).json
    made = await make(gateway, name="watched", team="red")
    await ask(gateway, f"/keys/{made['id']}", "PATCH", {"note": "changed"})
    await ask(gateway, f"/keys/{made['id']}/rotate", "POST")
    await ask(gateway, f"/keys/{made['id']}", "DELETE")
    await ask(gateway, f"/teams/{team['id']}", "DELETE")
    await ask(gateway, "/reload", "POST")
    await ask(gateway, "/keys", "POST", {"name": ""})  # refused, and so no change
    answer = await ask(gateway, "/audit")
    rows = answer.json["data"]
    assert [(row["what"], row["target"]) for row in reversed(rows)] == [
        ("create_team", team["id"]),
        ("create_key", made["id"]),
        ("change_key", made["id"]),
        ("change_key", made["id"]),
        ("change_key", made["id"]),
        ("delete_team", team["id"]),
        ("reload", str(gateway.config)),
    ]
    assert {row["who"] for row in rows} == {"admin"}
    note = rows[4]
    assert (note["before"]["note"], note["after"]["note"]) == ("", "changed")
    assert (rows[5]["before"], rows[5]["after"]["name"]) == (None, "watched")
    assert not re.search(r"sk-ps-|digest|[0-9a-f]{64}", answer.body.decode())
    assert len((await ask(gateway, "/audit?limit=2")).json["data"]) == 2


async def test_changes_at_the_same_time_are_all_kept(admin: Penstock) -> None:
    made = await make(admin, name="busy")
    path = f"/keys/{made['id']}"
    await asyncio.gather(
        ask(admin, path, "PATCH", {"note": "n"}),
        ask(admin, path, "PATCH", {"owner": "o"}),
        ask(admin, path, "PATCH", {"limits": {"parallel_requests": 3}}),
        ask(admin, f"{path}/rotate", "POST", {"overlap_seconds": 60}),
    )
    shown = (await ask(admin, path)).json
    assert (shown["note"], shown["owner"], shown["limits"]["parallel_requests"]) == ("n", "o", 3)
    assert shown["last4"] != made["last4"]
