"""What a person does with the dashboard."""

import asyncio
import contextlib
import csv
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from playwright.async_api import Page, expect

from tests.browser.conftest import ADMIN_KEY, OpenTab, Site
from tests.fake_engine import FakeEngine
from tests.served import ROOT, Penstock, until

STANDIN = ROOT / "tests/process/standin_engine.py"
MADE_KEY = re.compile(r"sk-ps-[0-9A-Za-z]{38}")


async def make_key(page: Page, name: str, requests_per_minute: int | None = None) -> str:
    """In the form; returns the key that is shown, with its dialog still open."""
    await page.get_by_role("button", name="New key").first.click()
    await page.get_by_label("Name").fill(name)
    if requests_per_minute:
        await page.get_by_label("Requests per minute").fill(str(requests_per_minute))
    await page.get_by_role("button", name="Make the key").click()
    key = await page.get_by_label("The key").input_value()
    assert MADE_KEY.fullmatch(key)
    return key


async def test_the_life_of_a_key(site: Site, open_tab: OpenTab) -> None:
    tab = await open_tab(site)
    page = tab.page
    await tab.log_in()
    await tab.go("keys")
    key = await make_key(page, "life", requests_per_minute=60)
    await page.get_by_role("button", name="Use in the playground").click()

    await expect(page.get_by_label("API key")).to_have_value(key)
    await page.get_by_label("Message").fill("Count, please")
    await page.keyboard.press("Enter")
    answer = page.locator(".turn.assistant")
    await expect(answer.locator(".text")).to_contain_text("t0 t1 t2 t3")
    await expect(answer.locator(".stats")).to_have_text(
        re.compile(r"first token [\d.]+ m?s · [\d,.k]+ tok/s · \d+ \+ \d+ tokens · .* · (stop|length)")
    )

    await tab.go("requests")
    row = page.get_by_role("row").filter(has_text="life")
    await expect(row).to_contain_text("200")
    await expect(row).to_contain_text("tiny/0")
    await row.click()
    await expect(page.get_by_role("dialog")).to_contain_text("/v1/chat/completions")
    await page.keyboard.press("Escape")

    await tab.go("usage")
    used = page.get_by_role("row").filter(has_text="life")
    await expect(used.get_by_role("cell").nth(1)).to_have_text("1")
    assert int((await used.get_by_role("cell").nth(5).inner_text()).replace(",", "")) > 1

    await tab.go("keys")
    row = page.get_by_role("row").filter(has_text="life")
    await expect(row.get_by_role("meter", name="1 of 60 requests in this minute")).to_be_visible()
    assert key not in await page.content()
    await row.get_by_role("button", name="Revoke").click()
    await page.get_by_role("button", name="Revoke the key").click()
    await expect(row).to_have_count(0)
    await page.get_by_label("Status").select_option("Revoked")
    await expect(row).to_contain_text("revoked")

    await tab.go("playground")
    await page.get_by_label("Message").fill("And now?")
    await page.keyboard.press("Enter")
    await expect(page.locator(".turn.failed .failure")).to_contain_text("401 invalid_api_key")


async def test_only_the_admin_key_opens_it(site: Site, open_tab: OpenTab) -> None:
    user = await site.make_key("no-admin")
    tab = await open_tab(site)
    page = tab.page
    await tab.open("keys")
    for wrong, said in (
        ("sk-nonsense", "This is not the admin key"),
        (user, "a user's key"),
        ("", "Enter the admin key"),
    ):
        await page.get_by_label("Admin key").fill(wrong)
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("alert")).to_contain_text(said)
    await expect(page.locator(".shell")).to_have_count(0)


async def test_a_reload_stays_and_a_logout_forgets(site: Site, open_tab: OpenTab) -> None:
    tab = await open_tab(site)
    page = tab.page
    await tab.log_in("keys/teams")
    await page.reload()
    await tab.is_live()
    await expect(page.get_by_role("link", name="Teams")).to_have_attribute("aria-current", "page")
    await page.get_by_role("button", name="Log out").click()
    await expect(page.get_by_label("Admin key")).to_be_focused()
    assert ADMIN_KEY not in await page.evaluate("JSON.stringify([{...sessionStorage}, {...localStorage}])")
    await page.reload()
    await expect(page.get_by_label("Admin key")).to_be_visible()


async def test_a_fresh_gateway_says_what_to_do(fresh_site: Site, open_tab: OpenTab) -> None:
    tab = await open_tab(fresh_site)
    page = tab.page
    await tab.log_in("keys")
    await expect(page.get_by_text("No keys yet: make one")).to_be_visible()
    await tab.go("usage")
    await expect(page.get_by_text("Nothing used in this time")).to_be_visible()
    await tab.go("requests")
    await expect(page.get_by_text("No requests yet")).to_be_visible()
    await tab.go("playground")
    await page.get_by_label("Message").fill("Hello?")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alert")).to_contain_text("Enter an API key first")


async def test_a_mistake_in_a_form_is_told_at_its_place(site: Site, open_tab: OpenTab) -> None:
    await site.make_key("taken")
    tab = await open_tab(site)
    page = tab.page
    await tab.log_in("keys")
    await page.get_by_role("button", name="New key").first.click()
    await page.get_by_role("button", name="Make the key").click()
    await expect(page.get_by_role("alert").first).to_contain_text("Name")
    await page.get_by_label("Name").fill("taken")
    await page.get_by_role("button", name="Make the key").click()
    await expect(page.get_by_label("Name")).to_have_attribute("aria-invalid", "true")
    await expect(page.get_by_label("Name")).to_be_focused()
    await page.get_by_label("Name").fill("not taken")
    await page.get_by_label("Requests per minute").fill("-1")
    await page.get_by_role("button", name="Make the key").click()
    await expect(page.get_by_role("alert").first).to_contain_text("Requests per minute")
    await page.get_by_label("Requests per minute").fill("5")
    await page.get_by_role("button", name="Make the key").click()
    await expect(page.get_by_label("The key")).to_be_visible()


async def test_change_and_rotate(site: Site, open_tab: OpenTab) -> None:
    old = await site.make_key("turning")
    tab = await open_tab(site)
    page = tab.page
    await tab.log_in("keys")
    await page.get_by_role("button", name="Edit turning").click()
    await page.get_by_label("Note").fill("for the night shift")
    await page.get_by_label("Tokens per minute").fill("5000")
    await page.get_by_role("button", name="Add a budget").click()
    await page.get_by_label("Amount").fill("1000000")
    await page.get_by_role("button", name="Save").click()
    row = page.get_by_role("row").filter(has_text="turning")
    await expect(row).to_contain_text("for the night shift")
    await expect(row).to_contain_text("of 5,000")
    await expect(row).to_contain_text("of 1M tok")

    await row.get_by_role("button", name="Rotate").click()
    await page.get_by_label("The old key stops").select_option("after an hour")
    await page.get_by_role("button", name="Make the new key").click()
    new = await page.get_by_label("The key").input_value()
    await page.get_by_role("button", name="I have copied it").click()
    assert MADE_KEY.fullmatch(new)
    assert new != old
    await page.get_by_role("link", name="Changes").click()
    newest = page.locator("tbody tr").filter(has_text="turning").first
    await expect(newest).to_contain_text(new[-4:])
    await expect(page.locator("tbody tr").filter(has_text="for the night shift")).to_have_count(1)
    for key in (old, new):
        assert (await site.gateway.chat(key=key)).status == 200


async def test_teams(site: Site, open_tab: OpenTab) -> None:
    tab = await open_tab(site)
    page = tab.page
    await tab.log_in("keys/teams")
    await page.get_by_role("button", name="New team").first.click()
    await page.get_by_label("Name").fill("Night shift")
    await page.get_by_label("Requests per minute").fill("100")
    await page.get_by_role("button", name="Make the team").click()
    team = page.get_by_role("row").filter(has_text="Night shift")
    await expect(team).to_contain_text("100")

    await page.get_by_role("link", name="Keys", exact=True).last.click()
    await page.get_by_role("button", name="New key").first.click()
    await page.get_by_label("Name").fill("owl")
    await page.get_by_role("dialog").get_by_label("Team").select_option("Night shift")
    await page.get_by_role("button", name="Make the key").click()
    await page.get_by_role("button", name="I have copied it").click()
    await expect(page.get_by_role("row").filter(has_text="owl")).to_contain_text("Night shift")

    await page.get_by_role("link", name="Teams").click()
    await team.get_by_role("button", name="Delete").click()
    await page.get_by_role("button", name="Delete the team").click()
    await expect(page.get_by_role("dialog").get_by_role("alert")).not_to_be_empty()


async def test_two_models_side_by_side_and_stop(site: Site, open_tab: OpenTab) -> None:
    key = await site.make_key("pair")
    tab = await open_tab(site)
    page = tab.page
    await tab.log_in("playground")
    await page.get_by_label("API key").fill(key)
    await page.get_by_role("button", name="Compare two").click()
    await expect(page.get_by_label("Model", exact=True)).to_have_value("tiny")
    await page.get_by_label("Second model").first.get_by_role("combobox").select_option("other")
    await page.get_by_label("Max tokens").fill("5")
    await page.get_by_label("Message").fill("Both of you")
    await page.keyboard.press("Enter")
    for pane in range(2):
        await expect(page.locator(".pane").nth(pane).locator(".text").last).to_have_text(re.compile(r"t0 t1 t2 t3 t4$"))

    await site.engine.script([{"hold_after": 2}, {"hold_after": 2}])
    await page.get_by_label("Message").fill("Again")
    await page.keyboard.press("Enter")
    for pane in range(2):
        await expect(page.locator(".pane").nth(pane).locator(".text").last).to_have_text(re.compile(r"t0 t1$"))
    await page.get_by_role("button", name="Stop").click()
    for pane in range(2):
        await expect(page.locator(".pane").nth(pane).locator(".stats").last).to_contain_text("stopped")
    await site.engine.until(running=0)
    await expect(page.get_by_role("button", name="Send")).to_be_visible()


async def test_settings_reach_the_engine(site: Site, open_tab: OpenTab) -> None:
    key = await site.make_key("settings")
    tab = await open_tab(site)
    page = tab.page
    await tab.log_in("playground")
    await page.get_by_label("API key").fill(key)
    await page.get_by_label("Temperature").fill("0.3")
    await page.get_by_label("Max tokens").fill("7")
    await page.get_by_label("System prompt").fill("Be brief.")
    await page.get_by_label("Message").fill("Hello")
    await page.keyboard.press("Enter")
    await expect(page.locator(".stats").last).to_contain_text("7 tokens")
    sent = (await site.engine.stats())["last"][-1]["json"]
    assert sent["temperature"] == 0.3
    assert sent["max_tokens"] == 7
    assert [m["content"] for m in sent["messages"]] == ["Be brief.", "Hello"]


async def test_an_engine_is_drained_and_resumed(fresh_site: Site, open_tab: OpenTab) -> None:
    tab = await open_tab(fresh_site)
    page = tab.page
    await tab.log_in("engines")
    row = page.get_by_role("row").filter(has_text="other/0")
    await expect(row).to_contain_text("ready")
    await page.get_by_role("button", name="Drain other/0").click()
    await page.get_by_role("dialog").get_by_role("button", name="Drain").click()
    await expect(page.get_by_role("button", name="Resume other/0")).to_be_visible()
    key = await fresh_site.make_key("drained")
    assert (await fresh_site.gateway.chat(key=key, model="other")).status == 503
    await page.get_by_role("button", name="Resume other/0").click()
    await page.get_by_role("dialog").get_by_role("button", name="Resume").click()
    await expect(row).to_contain_text("ready")
    assert (await fresh_site.gateway.chat(key=key, model="other")).status == 200


async def test_an_engine_of_ours_shows_its_log_and_is_restarted(open_tab: OpenTab, tmp_path: Path) -> None:
    said = "<img src=x onerror=window.__pwned=1> is what it said"
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\necho "{said}"\nexec {sys.executable} {STANDIN} "$@"\n')
    interpreter.chmod(0o755)
    config = f"""\
admin_key: {ADMIN_KEY}
models:
  own: {{engine: {{model: someone/some-model, python: {interpreter}}}}}
"""
    async with FakeEngine() as unused, Penstock(config) as gateway:
        await gateway.ready()
        tab = await open_tab(Site(gateway, unused))
        page = tab.page
        await tab.log_in("engines")
        row = page.get_by_role("row").filter(has_text="own/0")
        await expect(row).to_contain_text("run by Penstock")
        await page.get_by_role("button", name="Log of own/0").click()
        log = page.get_by_label("Log of own/0").last
        await expect(log).to_contain_text(said)
        await page.get_by_role("button", name="Restart own/0").click()
        await page.get_by_role("dialog").get_by_role("button", name="Restart").click()
        await expect(row.get_by_role("cell").nth(7)).to_have_text("1")
        await expect(row).to_contain_text("ready")
        await tab.picture("an-engine-of-ours")
        await page.goto("about:blank")


async def test_usage_as_csv(site: Site, open_tab: OpenTab) -> None:
    key = await site.make_key("sheet")
    await site.gateway.chat(key=key)
    tab = await open_tab(site)
    page = tab.page
    await tab.log_in("usage")
    await expect(page.get_by_role("row").filter(has_text="sheet")).to_be_visible()
    async with page.expect_download() as coming:
        await page.get_by_role("button", name="CSV").click()
    file = await (await coming.value).path()
    rows = list(csv.DictReader(Path(file).read_text().splitlines()))  # noqa: ASYNC240 - a few hundred bytes
    assert [row["requests"] for row in rows if row["key"] == "sheet"] == ["1"]


@pytest.mark.parametrize(
    ("group", "first"), [("Team", "no team"), ("Model", "tiny"), ("Day", re.compile(r"\d{4}-\d\d-\d\d"))]
)
async def test_usage_by_all_that_there_is(
    site: Site, open_tab: OpenTab, group: str, first: str | re.Pattern[str]
) -> None:
    key = await site.make_key(f"usage by {group}")
    await site.gateway.chat(key=key)
    tab = await open_tab(site)
    page = tab.page
    await tab.log_in("usage")
    await page.get_by_label(group, exact=True).check()
    await expect(page.get_by_role("columnheader").first).to_contain_text(group)
    await expect(page.get_by_role("row").nth(1)).to_contain_text(first)
    await expect(page.locator(".bars canvas")).to_be_visible()


async def test_requests_are_filtered_and_paused(site: Site, open_tab: OpenTab) -> None:
    key = await site.make_key("tail")
    other = await site.make_key("not tail")
    await site.gateway.chat(key=key)
    await site.gateway.chat(key=other)
    tab = await open_tab(site)
    page = tab.page
    await tab.log_in("requests")
    rows = page.locator("tbody tr")
    await page.get_by_label("Key", exact=True).select_option("tail")
    await expect(rows).to_have_count(1)
    await page.get_by_role("button", name="Pause").click()
    assert (await site.gateway.chat(key=key, temperature=-1)).status == 400
    await expect(page.get_by_text("Paused, 1 newer request")).to_be_visible()
    await expect(rows).to_have_count(1)
    await page.get_by_role("button", name="Go on").click()
    await expect(rows).to_have_count(2)
    await page.get_by_label("Status").select_option("4xx")
    await expect(rows).to_have_count(1)
    await expect(rows).to_contain_text("400")


# ---- the keyboard


async def focused(page: Page) -> str:
    """The accessible name of what has the focus, as far as the dashboard gives names."""
    name: str = await page.evaluate(
        """() => { const e = document.activeElement;
                   return e.getAttribute("aria-label") || e.labels?.[0]?.textContent || e.textContent; }"""
    )
    return name


async def tab_to(page: Page, name: str) -> None:
    """Presses Tab until something has the focus; what has it on the way must be seen to have it."""
    for _ in range(80):
        if await focused(page) == name:
            return
        await page.keyboard.press("Tab")
        outline = await page.evaluate(
            "() => document.activeElement === document.body || getComputedStyle(document.activeElement).outlineStyle"
        )
        assert outline in (True, "solid"), f"nothing shows that {await focused(page)!r} has the focus"
    raise AssertionError(f"Tab does not lead to {name!r}")


async def test_everything_by_keyboard(site: Site, open_tab: OpenTab) -> None:
    tab = await open_tab(site)
    page = tab.page
    await tab.open()
    await page.keyboard.type(ADMIN_KEY)
    await page.keyboard.press("Enter")
    await tab.is_live()
    await page.keyboard.press("3")
    await expect(page.locator("h1")).to_have_text("Keys")
    await expect(page.get_by_role("button", name="New key").first).to_be_visible()
    await page.keyboard.press("n")
    await expect(page.get_by_label("Name")).to_be_focused()
    await page.keyboard.type("by keyboard")
    await page.keyboard.press("Enter")
    await expect(page.get_by_label("The key")).to_be_visible()
    await page.keyboard.press("Escape")  # must not lose a key that is shown once
    await expect(page.get_by_label("The key")).to_be_visible()
    await tab_to(page, "I have copied it")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("dialog")).to_have_count(0)
    await tab_to(page, "Revoke by keyboard")
    await page.keyboard.press("Enter")
    assert await focused(page) == "Cancel"
    await page.keyboard.press("Escape")
    assert await focused(page) == "Revoke by keyboard"
    await page.keyboard.press("Enter")
    await tab_to(page, "Revoke the key")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("row").filter(has_text="by keyboard")).to_have_count(0)
    await page.keyboard.press("6")
    await expect(page.locator("h1")).to_have_text("Playground")
    await page.keyboard.press("?")
    await expect(page.get_by_role("dialog")).to_contain_text("go to a view")


# ---- the live stream


class Line:
    """A way to the gateway that can be cut, or go dead."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._open: set[asyncio.StreamWriter] = set()
        self.up = True
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.port = 0

    @asynccontextmanager
    async def laid(self) -> AsyncIterator["Line"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            self.cut()
            self.thaw()
            server.close()
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            if self.up:
                there, back = await asyncio.open_connection("127.0.0.1", self._to)
                self._open |= {writer, back}
                await asyncio.gather(self._pass(reader, back), self._pass(there, writer))
                self._open -= {writer, back}
        writer.close()

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                await self._flowing.wait()
                sink.write(data)
                await sink.drain()
        sink.close()

    def cut(self) -> None:
        self.up = False
        for writer in list(self._open):
            writer.transport.abort()

    def mend(self) -> None:
        self.up = True

    def freeze(self) -> None:
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()


async def test_a_lost_connection_is_told_and_comes_back(site: Site, open_tab: OpenTab) -> None:
    async with Line(site.gateway.port).laid() as line:
        tab = await open_tab(site, base=f"http://127.0.0.1:{line.port}")
        page = tab.page
        await tab.log_in()
        line.cut()
        await expect(page.locator(".connection")).to_contain_text("Connection lost, retry in")
        await expect(page.get_by_text("These are the last figures that came")).to_be_visible()
        await tab.picture("connection-lost")
        line.mend()
        await page.get_by_role("button", name="Retry now").click()
        await tab.is_live()
        await expect(page.get_by_text("These are the last figures that came")).to_be_hidden()
        await page.goto("about:blank")


async def test_a_silent_connection_counts_as_lost(site: Site, open_tab: OpenTab) -> None:
    async with Line(site.gateway.port).laid() as line:
        tab = await open_tab(site, base=f"http://127.0.0.1:{line.port}")
        page = tab.page
        await page.clock.install()
        await tab.log_in()
        line.freeze()
        await page.clock.fast_forward(10_000)
        await expect(page.locator(".connection")).to_contain_text("Connection lost")
        line.cut()
        line.thaw()
        line.mend()
        await page.get_by_role("button", name="Retry now").click()
        await tab.is_live()
        await page.goto("about:blank")


async def test_the_overview_shows_what_happens(site: Site, open_tab: OpenTab) -> None:
    key = await site.make_key("busy")
    tab = await open_tab(site)
    page = tab.page
    await tab.log_in()
    await expect(page.locator(".panel canvas")).to_have_count(6)
    requests = page.locator(".panel").filter(has_text="Requests").first.locator("b").first

    async def shown() -> bool:
        await site.gateway.chat(key=key)
        return float(await requests.inner_text()) > 0

    await until(shown)
    engine = page.get_by_role("row").filter(has_text="tiny/0")
    await expect(engine).to_contain_text("ready")
