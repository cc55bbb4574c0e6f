"""configs/grafana/penstock.json: its shape, and every query of it on a real Prometheus that scrapes a gateway at work."""

import asyncio
import contextlib
import json
import re
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from gateway.observe.metrics import Metrics, _Exposition
from tests.fake_engine import FakeEngine
from tests.ops.prometheus import Prometheus, QueryError, program
from tests.ops.test_alerts import CASES, RULES
from tests.served import DEADLINE, KEY, ROOT, Penstock, chat_body, close, http_post, until

DASHBOARD: Mapping[str, Any] = json.loads((ROOT / "configs/grafana/penstock.json").read_text())
ROWS = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES: Mapping[str, Mapping[str, Any]] = {one["name"]: one for one in DASHBOARD["templating"]["list"]}
# Engines that run elsewhere are never restarted.
QUIET = {"Restarts", "Engine restarts", "Waiting for a place"}


class Query(NamedTuple):
    title: str  # of the panel or annotation
    expression: str  # as Prometheus gets it
    legend: str


def substituted(expression: str) -> str:
    """As Grafana sends it, with every variable at All."""
    for name, value in {"__rate_interval": "1m", "__range": "1m", **dict.fromkeys(VARIABLES, ".*")}.items():
        expression = re.sub(rf"\${name}\b", value, expression)
    assert "$" not in expression, "a variable that nobody defines"
    return expression


def queries() -> Iterator[Query]:
    for panel in PANELS:
        for target in panel["targets"]:
            yield Query(panel["title"], substituted(target["expr"]), target["legendFormat"])
    for one in DASHBOARD["annotations"]["list"]:
        if "expr" in one:
            yield Query(one["name"], substituted(one["expr"]), one["titleFormat"])


def metric_names(text: str) -> set[str]:
    return set(re.findall(r"\b(?:penstock|process)_\w+", text))


# ---- shape


def test_it_can_be_imported() -> None:
    assert DASHBOARD["id"] is None, "an id is the importing Grafana's to give"
    assert DASHBOARD["uid"] == "penstock"
    assert DASHBOARD["schemaVersion"] >= 39  # below, Grafana migrates it at every load
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    assert next(iter(VARIABLES)) == "datasource", "the others are queries to it"
    assert {"model", "key", "instance"} <= VARIABLES.keys()


def test_panels_lie_side_by_side() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24, panel["title"]
        for x in range(grid["x"], grid["x"] + grid["w"]):
            for y in range(grid["y"], grid["y"] + grid["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies over {taken[x, y]}"
                taken[x, y] = panel["title"]
    assert len(taken) == 24 * (1 + max(y for _, y in taken)), "there is a hole"


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panel_explains_itself(panel: Mapping[str, Any]) -> None:
    assert panel["title"]
    assert len(panel["description"]) > 20
    unit = panel["options"].get("yAxis", {}).get("unit") or panel["fieldConfig"]["defaults"]["unit"]
    assert unit in {"s", "reqps", "short", "none", "percentunit", "bytes"}
    wanted = "s" if "_seconds_bucket" in panel["targets"][0]["expr"] else unit
    assert unit == wanted
    for one in (panel, *panel["targets"]):
        assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_every_metric_is_shown() -> None:
    there = set()
    for family in _Exposition(Metrics()).collect():
        suffix = {"counter": "_total", "histogram": "_bucket"}.get(family.type, "")
        there.add(family.name + suffix)
    shown = metric_names(" ".join(query.expression for query in queries()))
    assert there == {name for name in shown if name.startswith("penstock_")}


# ---- on a real Prometheus

CONFIG = """\
models:
  tiny: {{endpoints: {replicas}}}
  lost: {{endpoints: ["http://127.0.0.1:9"]}}
keys:
  - {{name: test, key: {key}}}
  - {{name: narrow, key: sk-narrow-0123456789, limits: {{requests_per_minute: 1}}}}
"""
CACHED = {
    "prompt_tokens": 9,
    "completion_tokens": 16,
    "total_tokens": 25,
    "prompt_tokens_details": {"cached_tokens": 4},
}


async def a_bit_of_everything(gateway: Penstock, first: FakeEngine) -> int:
    """Gives the number of requests that were answered."""

    async def first_is_up() -> bool:
        return await gateway.metric("penstock_engine_up", replica="tiny/0") == 1

    await first.script([{"usage": CACHED}, {"cut_after": 3}, {"cut_after": 3}])
    answers = [await gateway.chat(stream=True), await gateway.chat(stream=True)]  # the second one is resumed
    await until(first_is_up)
    answers += [
        await gateway.chat(stream=True, n=2),  # is not to be resumed
        await gateway.chat(model="lost"),
        await gateway.chat(model="nobody's"),
        *[await gateway.chat(key="sk-narrow-0123456789") for _ in range(2)],
    ]
    return len(answers)


of_module = pytest.mark.asyncio(loop_scope="module")  # Prometheus waits 5 s before its first scrape: once is enough


class Watched(NamedTuple):
    prometheus: Prometheus
    gateway: Penstock


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def watched(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Watched]:
    """Has been at work twice, so that every counter grows between two scrapes; one stream is open."""
    async with contextlib.AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(FakeEngine()) for _ in range(2)]
        await second.load(running=2, waiting=3, kv_cache_usage=0.5)  # so the first one is picked
        config = CONFIG.format(replicas=json.dumps([first.url, second.url]), key=KEY)
        gateway = await stack.enter_async_context(Penstock(config))
        prometheus = await stack.enter_async_context(
            Prometheus(tmp_path_factory.mktemp("prometheus"), [f"127.0.0.1:{gateway.port}"])
        )

        async def seen(total: float, metric: str) -> None:
            async def asked() -> bool:
                return sum(sample.value for sample in await prometheus.query(metric)) >= total

            await until(asked)

        await seen(2, "penstock_engine_up")
        answered = 0
        for _ in range(2):
            await seen(3, "penstock_engine_waiting_requests")
            answered += await a_bit_of_everything(gateway, first)
            await seen(answered, "penstock_requests_total")
            await seen(2, "penstock_engine_up")
        gateway.signal(signal.SIGHUP)
        await first.script([{"hold_after": 1}])
        reader, writer = await gateway.connect()
        stack.push_async_callback(close, writer)
        writer.write(http_post("/v1/chat/completions", chat_body(stream=True)))
        async with asyncio.timeout(DEADLINE):
            await reader.readuntil(b" t0")
        await seen(1, "penstock_inflight_requests")
        await seen(1, "penstock_config_reloads_total")
        yield Watched(prometheus, gateway)


@of_module
async def test_every_query_shows_something(watched: Watched) -> None:
    wrong = []
    for title, expression, legend in queries():
        try:
            found = await watched.prometheus.query(expression)
        except QueryError as refused:
            wrong.append(f"{title}: {refused}")
            continue
        if not any(sample.value > 0 for sample in found) and title not in QUIET:
            wrong.append(f"{title}: nothing above 0: {expression}: {found}")
        named = set(re.findall(r"\{\{(\w+)\}\}", legend))
        if not all(named <= sample.labels.keys() for sample in found):
            wrong.append(f"{title}: the legend names {named}, but there is {found[0].labels}")
        if len({tuple(sorted((k, sample.labels[k]) for k in named)) for sample in found}) != len(found):
            wrong.append(f"{title}: lines that the legend does not tell apart")
    assert not wrong, "\n".join(wrong)


@of_module
async def test_variables_find_their_values(watched: Watched) -> None:
    found = {}
    for name, variable in VARIABLES.items():
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
            assert match is not None
            found[name] = {sample.labels.get(match[2]) for sample in await watched.prometheus.query(match[1])}
    assert found == {
        "job": {"penstock"},
        "instance": {f"127.0.0.1:{watched.gateway.port}"},
        "model": {"tiny", "lost", "other"},
        "key": {"test", "narrow", "other"},
    }


@of_module
async def test_alerts_are_about_series_that_there_are(watched: Watched) -> None:
    rules = {rule["name"]: rule for rule in await watched.prometheus.rules()}
    assert rules.keys() == RULES.keys()
    assert {name: rule["lastError"] for name, rule in rules.items() if rule["health"] != "ok"} == {}
    wrong = []
    for name, case in CASES.items():
        for series in (*case.bad, *case.fine):
            metric, _, labels = series.partition("{")
            named = set(re.findall(r'(\w+)="', labels))
            found = await watched.prometheus.query(metric)
            wrong += [] if any(named <= sample.labels.keys() for sample in found) else [f"{name}: {series}"]
    assert not wrong, "\n".join(wrong)


@of_module
async def test_the_exposition_is_clean(watched: Watched) -> None:
    text = (await watched.gateway.get("/metrics")).body
    process = await asyncio.create_subprocess_exec(
        program("promtool"), "check", "metrics",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate(text)
    assert said == b""
