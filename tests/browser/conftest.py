"""The dashboard in a real Chromium, over a real gateway and a fake engine.

Whatever a test does, its tab must end without a script error, a dialog, a breach of the content security policy, or a
request to another origin. The last look of each tab is kept as a picture under $PENSTOCK_ARTIFACTS (or .artifacts/).
"""

import os
import re
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio
from playwright.async_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Dialog,
    Page,
    Request,
    async_playwright,
    expect,
)

from tests.fake_engine import FakeEngine
from tests.served import DEADLINE, ROOT, Answer, Penstock

HERE = Path(__file__).parent
ARTIFACTS = Path(os.environ.get("PENSTOCK_ARTIFACTS", ROOT / ".artifacts")) / "browser"
ADMIN_KEY = "sk-admin-0123456789"
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
DESKTOP = {"width": 1440, "height": 900}
PHONE = {"width": 390, "height": 844}
BREACHES = """
document.addEventListener("securitypolicyviolation", (event) => {
  console.error(`BREACH ${event.violatedDirective} ${event.blockedURI} ${event.sample}`);
});
"""

expect.set_options(timeout=DEADLINE * 1000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.browser)
            if pytest_asyncio.is_async_test(item):
                item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


def config(*endpoints: str) -> str:
    urls = ", ".join(f'"{url}"' for url in endpoints)
    return f"""\
admin_key: {ADMIN_KEY}
models:
  tiny: {{aliases: [default], endpoints: [{urls}]}}
  other: {{endpoints: [{urls}]}}
"""


class Site(NamedTuple):
    """A gateway with two models, `tiny` and `other`, that one fake engine serves."""

    gateway: Penstock
    engine: FakeEngine

    async def api(self, method: str, path: str, body: object = None) -> Answer:
        """The admin API, without the dashboard."""
        if method == "POST":
            return await self.gateway.post(f"/admin/api/{path}", body, key=ADMIN_KEY)
        return await self.gateway.request(method, f"/admin/api/{path}", {"authorization": f"Bearer {ADMIN_KEY}"})

    async def make_key(self, name: str, **fields: object) -> str:
        made = await self.api("POST", "keys", {"name": name, **fields})
        assert made.status == 201, made.body
        key: str = made.json["key"]
        return key


class Tab:
    """A page of a fresh browser profile, and what went wrong in it."""

    def __init__(self, context: BrowserContext, page: Page, base: str) -> None:
        self.context, self.page, self.base = context, page, base
        self.faults: list[str] = []
        page.on("pageerror", lambda error: self.faults.append(f"script error: {error}"))
        page.on("dialog", self._dialog)
        page.on("console", self._console)
        context.on("request", self._request)

    async def _dialog(self, dialog: Dialog) -> None:
        self.faults.append(f"dialog: {dialog.message}")
        await dialog.dismiss()

    def _console(self, message: ConsoleMessage) -> None:
        if re.search("BREACH|Content Security Policy|Trusted", message.text):
            self.faults.append(f"console: {message.text}")

    def _request(self, request: Request) -> None:
        if not request.url.startswith((f"{self.base}/", "data:", f"blob:{self.base}/")):
            self.faults.append(f"request to another origin: {request.url}")

    async def open(self, view: str = "") -> None:
        await self.page.goto(f"{self.base}/admin/{f'#/{view}' if view else ''}")

    async def log_in(self, view: str = "", key: str = ADMIN_KEY) -> None:
        await self.open(view)
        await self.page.get_by_label("Admin key").fill(key)
        await self.page.get_by_role("button", name="Log in").click()
        await self.is_live()

    async def is_live(self) -> None:
        await expect(self.page.locator(".connection")).to_have_attribute("data-state", "live")

    async def go(self, view: str) -> None:
        """By the navigation, as a person would."""
        await self.page.locator(f"nav a[data-view={view}]").click()
        await expect(self.page.locator("h1")).to_have_text(view.capitalize())

    async def picture(self, name: str) -> None:
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        await self.page.screenshot(path=ARTIFACTS / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}.png")

    async def no_script_ran(self) -> None:
        assert await self.page.evaluate("window.__pwned") is None
        assert not self.faults, "\n".join(self.faults)


OpenTab = Callable[..., Awaitable[Tab]]


@pytest.fixture(scope="session")
def chromium() -> str:
    found = subprocess.run(
        [ROOT / "scripts/setup-tool", "--find", "chromium"], check=False, capture_output=True, text=True
    )
    if found.returncode:
        pytest.fail("there is no Chromium here: scripts/setup-tool chromium brings it")
    return found.stdout.strip()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser(chromium: str) -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        launched = await playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield launched
        await launched.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def site() -> AsyncIterator[Site]:
    """Shared: tests use names of their own in it."""
    async with FakeEngine(models=("tiny", "other")) as engine, Penstock(config(engine.url)) as gateway:
        await gateway.ready()
        yield Site(gateway, engine)


@pytest_asyncio.fixture(loop_scope="session")
async def fresh_site() -> AsyncIterator[Site]:
    """A gateway of one test's own, that nobody has used."""
    async with FakeEngine(models=("tiny", "other")) as engine, Penstock(config(engine.url)) as gateway:
        await gateway.ready()
        yield Site(gateway, engine)


@pytest_asyncio.fixture(loop_scope="session")
async def open_tab(browser: Browser, request: pytest.FixtureRequest) -> AsyncIterator[OpenTab]:
    """Opens tabs at a gateway (or at another origin that leads to it); `expected`: faults that the test is about."""
    tabs: list[Tab] = []

    async def opened(site: Site, *, base: str | None = None, **options: Any) -> Tab:
        context = await browser.new_context(**{"viewport": DESKTOP, "color_scheme": "dark", **options})
        await context.add_init_script(BREACHES)
        context.set_default_timeout(DEADLINE * 1000)
        tab = Tab(context, await context.new_page(), base or site.gateway.url)
        tabs.append(tab)
        return tab

    yield opened
    for number, tab in enumerate(tabs):
        await tab.picture(f"{request.node.name}-{number}")
        await tab.no_script_ran()
        await tab.context.close()
