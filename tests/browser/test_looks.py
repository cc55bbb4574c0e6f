"""How it looks, as far as that can be measured: nothing sideways, nothing too faint, everything named. And pictures."""

from typing import Any

import pytest
from playwright.async_api import Page, expect

from tests.browser.conftest import DESKTOP, PHONE, OpenTab, Site

VIEWS = ("overview", "engines", "keys", "keys/teams", "keys/changes", "usage", "requests", "playground")
LONG = "a-name-that-somebody-made-without-a-thought-for-those-who-have-to-read-it-on-a-phone-in-the-underground-"

# Text whose contrast to what lies behind it is below 4.5 : 1 (3 : 1 if it is large), as WCAG 2 AA asks.
TOO_FAINT = """
() => {
  const context = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const behind = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(rgba(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((under, top) => over(top, under), rgba("white"));
  };
  const light = ([r, g, b]) => {
    const [R, G, B] = [r, g, b].map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * R + 0.7152 * G + 0.0722 * B;
  };
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility({visibilityProperty: true})) continue;
    if (element.closest(":disabled, noscript, option, script, style, .offscreen")) continue;
    const style = getComputedStyle(element);
    let opacity = 1;
    for (let e = element; e; e = e.parentElement) opacity *= Number(getComputedStyle(e).opacity);
    const back = behind(element);
    const colour = rgba(style.color);
    const front = over([...colour.slice(0, 3), colour[3] * opacity], back);
    const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 600);
    if (ratio < (large ? 3 : 4.5)) faint.push(`${ratio.toFixed(2)} ${element.tagName}.${element.className} ${walker.currentNode.data.trim().slice(0, 40)}`);
  }
  return [...new Set(faint)];
}
"""

NAMELESS = """
() => [...document.querySelectorAll("button, a, input, select, textarea, [role=img], [role=meter], dialog, section, table")]
  .filter((e) => e.checkVisibility())
  .filter((e) => !(e.getAttribute("aria-label") || document.getElementById(e.getAttribute("aria-labelledby"))?.textContent
                   || e.labels?.[0]?.textContent.trim() || e.caption?.textContent
                   || (e.matches("button, a") && e.textContent.trim())))
  .map((e) => e.outerHTML.slice(0, 120))
"""


@pytest.fixture(scope="module")
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    looks: dict[str, dict[str, Any]] = {
        "desktop-dark": {"viewport": DESKTOP, "color_scheme": "dark"},
        "desktop-light": {"viewport": DESKTOP, "color_scheme": "light"},
        "phone": {"viewport": PHONE, "color_scheme": "dark", "has_touch": True, "is_mobile": True},
    }
    return looks[request.param]


async def settled(page: Page, view: str) -> None:
    """The view's own data has come, not only its frame."""
    ready = {
        "overview": ".panel canvas",
        "engines": ".card",
        "keys": "tbody tr",
        "keys/teams": ".table",
        "keys/changes": "tbody tr",
        "usage": ".bars canvas",
        "requests": "tbody tr",
        "playground": ".talk",
    }[view]
    await expect(page.locator(ready).first).to_be_visible()


async def some_use(site: Site) -> None:
    """Something to look at, with names that try the layout; made once."""
    if any(key["name"] == "search" for key in (await site.api("GET", "keys")).json["data"]):
        return
    await site.api("POST", "teams", {"name": "Search", "limits": {"requests_per_minute": 1200}})
    limits = {"requests_per_minute": 600, "tokens_per_minute": 200_000, "parallel_requests": 32}
    budgets = [{"amount": 50_000_000, "unit": "tokens", "period": "month"}]
    long = await site.make_key(LONG, note=LONG, owner=LONG)
    key = await site.make_key("search", team="Search", owner="mira@example.org", limits=limits, budgets=budgets)
    for _ in range(8):
        await site.gateway.chat(key=key, max_tokens=40)
        await site.gateway.chat(key=long, model="other")
    for name in ("revoked", "also revoked"):
        await site.make_key(name, limits=limits, note="gone")
    for gone in (await site.api("GET", "keys")).json["data"]:
        if gone["note"] == "gone":
            await site.api("DELETE", f"keys/{gone['id']}")
    await site.gateway.chat(key=key, temperature=-1)
    await site.gateway.chat(key=key, model="missing")


@pytest.mark.parametrize("options", ["desktop-dark", "desktop-light", "phone"], indirect=True)
async def test_views(site: Site, open_tab: OpenTab, options: dict[str, Any], request: pytest.FixtureRequest) -> None:
    await some_use(site)
    look = request.node.callspec.id
    tab = await open_tab(site, **options)
    page = tab.page
    await tab.open()
    await tab.picture(f"{look}-login")
    await tab.log_in()
    wrong = []
    for view in VIEWS:
        await tab.open(view)
        await settled(page, view)
        if view == "keys":
            await page.get_by_label("Status").select_option("All")
        width = await page.evaluate("document.documentElement.scrollWidth")
        if width > options["viewport"]["width"]:
            wrong.append(f"{view}: scrolls sideways, {width} px")
        wrong += [f"{view}: too faint: {what}" for what in await page.evaluate(TOO_FAINT)]
        wrong += [f"{view}: without a name: {what}" for what in await page.evaluate(NAMELESS)]
        await tab.picture(f"{look}-{view}")
    assert not wrong, "\n".join(wrong)


async def test_a_long_chat_scrolls_in_its_own_box(site: Site, open_tab: OpenTab) -> None:
    key = await site.make_key("talker")
    tab = await open_tab(site)
    page = tab.page
    await tab.log_in("playground")
    await page.get_by_label("API key").fill(key)
    for _ in range(12):
        await page.get_by_label("Message").fill("And then?")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("button", name="Send")).to_be_visible()
    await expect(page.locator(".stats").last).to_be_in_viewport()
    await expect(page.get_by_label("API key")).to_be_in_viewport()
    assert await page.evaluate("document.documentElement.scrollHeight <= innerHeight")


async def test_the_theme_follows_the_system_until_told(site: Site, open_tab: OpenTab) -> None:
    tab = await open_tab(site, color_scheme="light")
    page = tab.page
    await tab.log_in()

    async def background() -> str:
        colour: str = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        return colour

    light = await background()
    await page.emulate_media(color_scheme="dark")
    dark = await background()
    assert dark != light
    await page.get_by_role("button", name="Theme: system").click()
    assert await background() == light
    await page.reload()
    assert await background() == light
    await page.get_by_role("button", name="Theme: light").click()
    await page.emulate_media(color_scheme="light")
    assert await background() == dark


@pytest.mark.parametrize("options", ["phone"], indirect=True)
async def test_dialogs_fit_a_phone(site: Site, open_tab: OpenTab, options: dict[str, Any]) -> None:
    tab = await open_tab(site, **options)
    page = tab.page
    await tab.log_in("keys")
    await page.get_by_role("button", name="New key").first.click()
    box = await page.get_by_role("dialog").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= PHONE["width"]
    assert box["y"] + box["height"] <= PHONE["height"]
    await expect(page.get_by_role("button", name="Make the key")).to_be_in_viewport()
