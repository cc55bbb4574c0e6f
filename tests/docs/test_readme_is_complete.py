"""The README names what there is, and nothing that is not: checked against the code and a running gateway."""

import ast
import re
from collections.abc import AsyncIterator

import pytest
import typer.main

from gateway import cli
from gateway.config.load import ConfigError, parse
from gateway.observe.metrics import Metrics, _Exposition
from gateway.wire.openai import ENDPOINTS
from tests.docs.readme import ROOT, TEXT, blocks, quoted, rows, section
from tests.fake_engine import FakeEngine
from tests.flow.admin import ADMIN
from tests.served import Penstock, simple_config

CODE = re.compile(r"[a-z]+(_[a-z]+)*")


def sources() -> str:
    return "\n".join(path.read_text() for path in sorted((ROOT / "gateway").rglob("*.py")))


# ---- metrics, commands, errors


def test_metrics() -> None:
    exposed = set()
    for family in _Exposition(Metrics()).collect():
        name = family.name.removeprefix("penstock_") + ("_total" if family.type == "counter" else "")
        labels = ",".join(family._labelnames)  # type: ignore[attr-defined]
        exposed.add(f"{name}{{{labels}}}" if labels else name)
    cells = [row[0] for row in rows(section("Running it")) if not row[0].startswith("SIG")]
    assert {name for cell in cells for name in quoted(cell)} == exposed


def test_commands() -> None:
    command = typer.main.get_command(cli.app)
    there = set(command.commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"\bpenstock ([a-z]+)\b(?=[ `\n])", " ".join(quoted(TEXT) + [b.text for b in blocks("sh")])))
    assert there <= {*named}, f"the README does not name {there - named}"
    assert {name for name in named if f"`penstock {name}" in TEXT} <= there


def test_error_codes() -> None:
    named = [code for row in rows(section("Errors")) for code in quoted(row[1])]
    assert len(named) == len(set(named))
    text = sources()
    assert not [code for code in named if f'"{code}"' not in text]
    assert raised_codes() <= set(named), "the README's table of errors lacks some"


def raised_codes() -> set[str]:
    """The codes of all errors that the gateway makes: the first code-like string of each call that makes one."""
    found = set()
    for node in ast.walk(ast.parse(sources())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("GatewayError", "bad", "fail")
        ):
            strings = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            found |= set([s for s in strings if CODE.fullmatch(s)][:1])
    assert {"invalid_json", "empty_array", "uri_too_long"} <= found
    return found


# ---- what is missing


@pytest.mark.parametrize(
    "setting",
    [
        "limiter: redis://localhost",
        "server: {workers: 2}",
    ],
)
def test_what_is_missing_is_refused(setting: str) -> None:
    name = setting.split(": ", maxsplit=1)[0]
    assert name in section("Not there yet")
    with pytest.raises(ConfigError, match="not supported yet"):
        parse(f"auth: none\nmodels: {{a: {{endpoints: ['http://h:1']}}}}\n{setting}\n", "it", {})


def test_layout() -> None:
    [tree] = [block for block in blocks("text") if block.section == "The code"]
    folder, seen = "", 0
    for line in tree.text.splitlines():
        for name in re.findall(r"(?<=\s)[\w.]+(?:/|\.py)(?=\s)|^\w+/", f"{line} "):
            folder = name if line.startswith(name) else folder
            path = name if line.startswith(name) else folder + name
            assert (ROOT / path).exists(), path
            seen += 1
    assert seen >= 14


# ---- endpoints and headers, on a running gateway


@pytest.fixture
async def gateway() -> AsyncIterator[Penstock]:
    async with FakeEngine() as engine:
        limits = "{requests_per_minute: 2, tokens_per_minute: 1000}"
        async with Penstock(simple_config(engine.url, limits=limits)) as running:
            yield await running.ready()


async def test_endpoints(gateway: Penstock) -> None:
    paths: dict[str, list[str]] = {"POST": [], "GET": []}
    for row in rows(section("Endpoints")):
        method, *others = quoted(row[0])
        verb, _, first = method.partition(" ")
        paths[verb] += [first, *others]
    assert sorted(paths["POST"]) == sorted(endpoint.path for endpoint in ENDPOINTS)
    for path in paths["GET"]:
        assert (await gateway.get(path.replace("{name}", "tiny"))).status == 200, path
    for path in paths["POST"]:
        assert (await gateway.post(path, {}, key=None)).status == 401, path


async def test_admin_api() -> None:
    async with FakeEngine() as engine, Penstock(simple_config(engine.url, more=f"admin_key: {ADMIN}\n")) as running:
        described = (await running.get("/admin/api/openapi.json", ADMIN)).json["paths"]
    there = {f"{method.upper()} {path}" for path, methods in described.items() for method in methods}
    assert {name for row in rows(section("Dashboard and admin API")) for name in quoted(row[0])} == there


async def test_headers(gateway: Penstock) -> None:
    too_large = await gateway.chat("word " * 5000)
    answered = [await gateway.chat(max_tokens=1) for _ in range(3)]
    assert [answer.status for answer in (too_large, *answered)] == [429, 200, 200, 429]
    sent = {name for answer in (too_large, *answered) for name in answer.headers}
    named = {name for row in rows(section("Keys and limits")) if len(row) == 2 for name in quoted(row[0])}
    assert {name.partition(":")[0] for name in named} == sent - {"date", "content-type", "content-length"}
    assert too_large.headers["x-should-retry"] == "false"
