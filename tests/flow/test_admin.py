"""The admin API and the dashboard's files, as an operator's client sees them."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.fake_engine import FakeEngine
from tests.flow.admin import ADMIN, ENGINE_KEY, PROMPT, ask, config, judge
from tests.flow.conftest import Start
from tests.served import DEADLINE, KEY, Penstock, bearer, close, until

# ---- who is let in

PATHS = ("/session", "/models", "/config", "/events", "/openapi.json", "/no/such/path", "/", "/keys/../session")


@pytest.mark.parametrize("path", PATHS)
async def test_nobody_else_gets_in(admin: Penstock, path: str) -> None:
    for key in (None, "sk-wrong-0123456789", ADMIN[:-1], ADMIN + "0", "", "x" * 10_000):
        answer = await ask(admin, path, key=key)
        judge(answer, 401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    judge(await ask(admin, path, key=KEY), 403, "permission_denied")


@pytest.mark.parametrize("method", ["POST", "PATCH", "DELETE", "PUT", "OPTIONS", "TRACE"])
async def test_whatever_the_method(admin: Penstock, method: str) -> None:
    judge(await ask(admin, "/reload", method, key=None), 401, "invalid_api_key")
    judge(await ask(admin, "/reload", method, key=KEY), 403, "permission_denied")


async def test_the_admin_key_opens_it(admin: Penstock) -> None:
    answer = await ask(admin, "/session")
    assert answer.status == 200
    assert answer.json.keys() == {"ok", "version"}
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert (await admin.request("GET", "/admin/api/session", {"x-api-key": ADMIN})).status == 200
    assert (await admin.request("GET", "/admin/api/session", {"authorization": f"bearer {ADMIN}"})).status == 200
    both = {"x-api-key": KEY, **bearer(ADMIN)}
    judge(await admin.request("GET", "/admin/api/session", both), 400, "ambiguous_credentials")


async def test_the_admin_key_is_no_clients_key(admin: Penstock) -> None:
    judge(await admin.chat(key=ADMIN), 401, "invalid_api_key")


async def test_without_an_admin_key_there_is_nothing(engine: FakeEngine, start: Start) -> None:
    gateway = await start(engine.url)
    for path in ("/admin", "/admin/", "/admin/app.js", "/admin/api/session", "/admin/api/"):
        for key in (None, KEY, ADMIN):
            judge(await gateway.get(path, key), 404, "unknown_url")


async def test_without_keys_nobody_is_a_client(chat: FakeEngine, start: Start) -> None:
    open_to_all = config(chat.url).partition("keys:")[0] + "auth: none\n"
    gateway = await start(config=open_to_all)
    judge(await ask(gateway, "/session", key="sk-anything"), 401, "invalid_api_key")
    assert (await ask(gateway, "/session")).status == 200


async def test_cors_is_not_for_the_admin_api(chat: FakeEngine, start: Start) -> None:
    gateway = await start(config=config(chat.url, server='{cors_origins: ["*"]}'))
    origin = {"origin": "https://evil.example"}
    assert "access-control-allow-origin" in (await gateway.request("GET", "/v1/models", origin | bearer(KEY))).headers
    for path in ("/admin/", "/admin/api/session"):
        answer = await gateway.request("GET", path, origin | bearer(ADMIN))
        assert answer.status == 200
        assert not [name for name in answer.headers if name.startswith("access-control")]


# ---- what it says


@pytest.mark.parametrize(
    "path", ["/session%0a", "/engines/%00/log", "/s%65ssion", "/engines/tiny/0/log%0a", "/engines/tiny/0%2flog%0d%0a"]
)
async def test_no_path_is_another_one(admin: Penstock, path: str) -> None:
    judge(await ask(admin, path), 404, "unknown_url")


async def test_unknown_paths_and_methods(admin: Penstock) -> None:
    judge(await ask(admin, "/nothing"), 404, "unknown_url")
    judge(await ask(admin, "/session/"), 404, "unknown_url")
    answer = await ask(admin, "/session", "DELETE")
    judge(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET"
    for path in ("/session", "/models", "/events"):
        assert (await ask(admin, path, "HEAD")).status == 200


async def test_the_description(admin: Penstock) -> None:
    document = (await ask(admin, "/openapi.json")).json
    assert [server["url"] for server in document["servers"]] == ["/admin/api"]
    assert "422" not in str(document["paths"])
    for methods in document["paths"].values():
        for operation in methods.values():
            assert operation["security"] == [{"HTTPBearer": []}]
            assert operation["responses"]["default"]["content"]["application/json"]["schema"]["$ref"].endswith(
                "/Failure"
            )


async def test_models(admin: Penstock) -> None:
    await admin.chat(max_tokens=2)
    tiny, other = (await ask(admin, "/models")).json["data"]
    assert tiny["requests"] >= 1
    assert tiny["completion_tokens"] >= 2
    assert tiny | {"requests": 1, "prompt_tokens": 1, "completion_tokens": 2} == {
        "name": "tiny",
        "aliases": ["default"],
        "failover": "exact",
        "ready": True,
        "replicas": 1,
        "open_requests": 0,
        "price": {"prompt": 100_000, "completion": 200_000, "cached": 100_000},
        "requests": 1,
        "prompt_tokens": 1,
        "completion_tokens": 2,
    }
    assert (other["name"], other["failover"], other["price"]) == ("org/other", "off", None)


async def test_engines(admin: Penstock, chat: FakeEngine) -> None:
    tiny, _ = (await ask(admin, "/engines")).json["data"]
    assert tiny["id"] == "tiny/0"
    assert tiny["url"] == chat.url
    assert (tiny["state"], tiny["managed"], tiny["restarts"], tiny["reason"]) == ("ready", False, 0, None)
    assert tiny["max_model_len"] > 0


@pytest.mark.parametrize("name", ["org/other/0", "org%2Fother%2F0"])
async def test_a_remote_engine(admin: Penstock, name: str) -> None:
    assert (await ask(admin, f"/engines/{name}/log")).json == {"lines": []}
    judge(await ask(admin, f"/engines/{name}/restart", "POST"), 409, "not_managed")


@pytest.mark.parametrize("name", ["tiny/7", "nope/0", "tiny", "..%2f..%2fetc", "%ff"])
async def test_an_engine_that_is_not_there(admin: Penstock, name: str) -> None:
    judge(await ask(admin, f"/engines/{name}/log"), 404, "not_found", "id")
    judge(await ask(admin, f"/engines/{name}/restart", "POST"), 404, "not_found", "id")


async def test_drain_and_resume(chat: FakeEngine, start: Start) -> None:
    gateway = await start(config=config(chat.url))
    for _ in range(2):
        drained = await ask(gateway, "/engines/tiny/0/drain", "POST")
        assert (drained.status, drained.json["state"]) == (202, "draining")
        assert (await gateway.chat()).status == 503
    assert (await gateway.chat(model="org/other")).status == 200
    for _ in range(2):
        resumed = await ask(gateway, "/engines/tiny/0/resume", "POST")
        assert (resumed.status, resumed.json["state"]) == (202, "ready")
        assert (await gateway.chat()).status == 200


async def test_config_without_its_secrets(admin: Penstock) -> None:
    answer = await ask(admin, "/config")
    shown = answer.json
    assert shown["path"] == str(admin.config)
    assert shown["config"]["models"]["tiny"]["engine_api_key"] == "***"
    assert shown["config"]["admin_key"] == shown["config"]["keys"][0]["key"] == "***"
    assert not [secret for secret in (ADMIN, KEY, ENGINE_KEY) if secret.encode() in answer.body]


async def test_recent_requests(chat: FakeEngine, start: Start) -> None:
    gateway = await start(config=config(chat.url))
    await gateway.chat(PROMPT, max_tokens=2)
    await gateway.chat(PROMPT, max_tokens=3, stream=True, model="default")
    await gateway.chat(PROMPT, model="no-\x1b[31m-such" + "x" * 1000)
    await gateway.chat(PROMPT, key="sk-unknown-0123456789")

    async def all_there() -> bool:
        return len((await ask(gateway, "/requests")).json["data"]) == 4

    await until(all_there)
    answer = await ask(gateway, "/requests")
    unknown, no_model, stream, whole = answer.json["data"]
    assert [unknown["seq"], no_model["seq"], stream["seq"], whole["seq"]] == [4, 3, 2, 1]
    assert (unknown["status"], unknown["error"], unknown["key"]) == (401, "invalid_api_key", None)
    assert (no_model["status"], no_model["outcome"], no_model["error"]) == (404, "refused", "model_not_found")
    assert no_model["model"].isprintable()
    assert len(no_model["model"]) < 400
    assert (stream["model"], stream["replica"], stream["key"], stream["team"]) == ("default", "tiny/0", "test", None)
    assert (stream["prompt_tokens"], stream["completion_tokens"], stream["attempts"]) == (len(PROMPT.split()), 3, 1)
    assert (stream["cost"], unknown["cost"]) == (1.3, None)
    assert 0 < stream["ttft_ms"] <= stream["duration_ms"] < 10_000
    assert whole["time"].startswith("20")
    assert whole["time"].endswith("Z")
    assert PROMPT.encode() not in answer.body
    for query, expected in (
        ("limit=2", [4, 3]),
        ("before=3", [2, 1]),
        ("limit=1&before=3", [2]),
        ("key=test&status=200", [2, 1]),
        ("status=4xx", [4, 3]),
        ("model=default", [2]),
        ("outcome=refused", [4, 3]),
        ("key=nobody", []),
    ):
        found = (await ask(gateway, f"/requests?{query}")).json["data"]
        assert [one["seq"] for one in found] == expected, query


@pytest.mark.parametrize(
    ("query", "code", "param"),
    [
        ("limit=0", "integer_below_min_value", "limit"),
        ("limit=1001", "integer_above_max_value", "limit"),
        ("limit=-1", "integer_below_min_value", "limit"),
        ("limit=ten", "invalid_type", "limit"),
        ("limit=", "invalid_type", "limit"),
        ("limit=1e999", "invalid_type", "limit"),
        ("limit=99999999999999999999999999", "integer_above_max_value", "limit"),
        ("before=0", "integer_below_min_value", "before"),
        ("status=999", "invalid_value", "status"),
        ("outcome=unknown", "invalid_value", "outcome"),
        ("key=" + "x" * 129, "string_above_max_length", "key"),
        ("limits=5", "unsupported_parameter", "limits"),
    ],
)
async def test_bad_queries(admin: Penstock, query: str, code: str, param: str) -> None:
    message = judge(await ask(admin, f"/requests?{query}"), 400, code, param)
    assert param in message


# ---- live figures


class Events:
    """An event stream that is being read."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader

    async def next(self) -> tuple[str, Any]:
        name = ""
        async with asyncio.timeout(DEADLINE):
            while line := await self._reader.readline():
                text = line.decode().rstrip("\n")
                if text.startswith("event: "):
                    name = text.removeprefix("event: ")
                if text.startswith("data: "):
                    return name, json.loads(text.removeprefix("data: "))
        raise EOFError

    async def rest(self) -> bytes:
        async with asyncio.timeout(DEADLINE):
            return await self._reader.read()


@asynccontextmanager
async def events(gateway: Penstock) -> AsyncIterator[Events]:
    reader, writer = await gateway.connect()
    writer.write(f"GET /admin/api/events HTTP/1.1\r\nhost: t\r\nauthorization: Bearer {ADMIN}\r\n\r\n".encode())
    async with asyncio.timeout(DEADLINE):
        head = await reader.readuntil(b"\r\n\r\n")
    assert b"200 OK" in head
    assert b"text/event-stream" in head
    assert b"no-store" in head
    try:
        yield Events(reader)
    finally:
        await close(writer)


async def test_events_begin_with_history_and_go_on_live(admin: Penstock) -> None:
    async with events(admin) as stream:
        name, history = await stream.next()
        assert name == "history"
        assert history["interval"] == 10
        assert isinstance(history["points"], list)
        for _ in range(3):
            await admin.chat(max_tokens=4, stream=True)
        figures: dict[str, Any] = {"output_tokens_per_second": 0}
        while not figures["output_tokens_per_second"]:
            name, figures = await stream.next()
            assert name == "figures"
        assert figures["requests_per_second"] > 0
        assert figures["ttft_ms"]["p50"] > 0
        assert figures["ttft_ms"]["p95"] >= figures["ttft_ms"]["p50"]
        assert [model["name"] for model in figures["models"]] == ["tiny", "org/other"]
        assert figures["models"][0]["output_tokens_per_second"] == figures["output_tokens_per_second"]
        assert [engine["id"] for engine in figures["engines"]] == ["tiny/0", "org/other/0"]
        assert figures["engines"][0]["state"] == "ready"


async def test_an_open_stream_of_events_does_not_hold_up_the_end(chat: FakeEngine, start: Start) -> None:
    gateway = await start(config=config(chat.url, server="{drain_timeout: 10}"))
    async with events(gateway) as stream:
        await stream.next()
        gateway.signal(signal.SIGTERM)
        assert (await stream.rest()).endswith(b"0\r\n\r\n")
        assert await gateway.exit_code() == 0
    assert not [line for line in gateway.log if line.get("level") in ("warning", "error", "critical")]


# ---- reload


async def test_reload(chat: FakeEngine, start: Start) -> None:
    gateway = await start(config=config(chat.url))
    text = gateway.config.read_text()
    gateway.config.write_text(text.replace("aliases: [default]", "aliases: [standard]"))
    answer = await ask(gateway, "/reload", "POST")
    assert (answer.status, answer.json["outcome"]) == (200, "applied")
    assert (await ask(gateway, "/models")).json["data"][0]["aliases"] == ["standard"]
    gateway.config.write_text(text + "nonsense: 1\n")
    message = judge(await ask(gateway, "/reload", "POST"), 400, "invalid_config")
    assert "nonsense" in message
    assert (await ask(gateway, "/models")).json["data"][0]["aliases"] == ["standard"]
    gateway.config.write_text(text.replace(ADMIN, "sk-admin-changed-1"))
    assert (await ask(gateway, "/reload", "POST")).status == 200
    judge(await ask(gateway, "/session"), 401, "invalid_api_key")
    assert (await ask(gateway, "/session", key="sk-admin-changed-1")).status == 200


# ---- the dashboard's files, and a port of its own


async def test_the_dashboards_files(admin: Penstock) -> None:
    page = await admin.get("/admin/", None)
    assert page.status == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    script = await admin.get("/admin/app.js", None)
    assert script.headers["content-type"].startswith("text/javascript")
    for answer in (page, script):
        assert answer.headers["content-security-policy"] == (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
            "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
    again = await admin.request("GET", "/admin/app.js", {"if-none-match": script.headers["etag"]})
    assert again.status == 304
    moved = await admin.get("/admin", None)
    assert (moved.status, moved.headers["location"]) == (308, "admin/")


@pytest.mark.parametrize(
    "path",
    [
        "/admin/nothing.js",
        "/admin/../api.py",
        "/admin/..%2fapi.py",
        "/admin/%2e%2e/api.py",
        "/admin//app.js",
        "/admin/./app.js",
        "/admin/app.js/",
    ],
)
async def test_no_other_file(admin: Penstock, path: str) -> None:
    judge(await admin.get(path, None), 404, "unknown_url")


async def test_a_port_of_its_own(chat: FakeEngine, start: Start) -> None:
    gateway = await start(config=config(chat.url, server='{admin_listen: "127.0.0.1:0"}'))
    public = gateway.port
    serving = await gateway.logged(lambda line: line.get("message") == "serving")
    private = int(serving["admin_url"].rpartition(":")[2])
    for path in ("/admin", "/admin/", "/admin/app.js", "/admin/api/session", "/metrics"):
        judge(await gateway.get(path, ADMIN), 404, "unknown_url")
    assert (await gateway.get("/health")).status == 200
    gateway.port = private
    assert (await ask(gateway, "/session")).status == 200
    assert b"penstock_engine_up" in (await gateway.get("/metrics", None)).body
    for path in ("/admin/", "/health"):
        assert (await gateway.get(path, None)).status == 200
    assert (await gateway.chat(max_tokens=1)).status == 200  # the playground asks on the page's own origin
    assert public != private
