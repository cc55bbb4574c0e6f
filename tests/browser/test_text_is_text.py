"""No name, note, error or answer becomes HTML: what looks like a script is shown, letter by letter, and does not run."""

import pytest
from playwright.async_api import Error, expect

from tests.browser.conftest import OpenTab, Site

RUN = "window.__pwned=1"
PAYLOADS = (
    f"<script>{RUN}</script>",
    f"</script><script>{RUN}</script>",
    f"<img src=x onerror={RUN}>",
    f'<img src="x" onerror="alert(1);{RUN}">',
    f"<svg onload={RUN}>",
    f"<svg><script>{RUN}</script></svg>",
    f"<svg><animate onbegin={RUN} attributeName=x dur=1s>",
    f'<iframe src="javascript:parent.{RUN.removeprefix("window.")}"></iframe>',
    f'<iframe srcdoc="<script>parent.{RUN}</script>"></iframe>',
    f'<a href="javascript:{RUN}">click me</a>',
    f"<body onload={RUN}>",
    f"<input autofocus onfocus={RUN}>",
    f"<details open ontoggle={RUN}>x</details>",
    f"<video><source onerror={RUN}></video>",
    f"<audio src=x onerror={RUN}>",
    f"<marquee onstart={RUN}>x</marquee>",
    f'<object data="javascript:{RUN}"></object>',
    f'<embed src="javascript:{RUN}">',
    f'<form action="javascript:{RUN}"><button autofocus onfocus={RUN}>x</button></form>',
    '<link rel="stylesheet" href="http://127.0.0.1:9/x.css">',
    '<meta http-equiv="refresh" content="0;url=http://127.0.0.1:9/">',
    '<base href="http://127.0.0.1:9/">',
    "<style>*{display:none!important}</style>",
    '<img src="http://127.0.0.1:9/leak">',
    f'"><img src=x onerror={RUN}>',
    f"'-{RUN}-'",
    f"${{{RUN}}}",
    f"{{{{constructor.constructor('{RUN}')()}}}}",
    f"javascript:{RUN}",
    f"<math><mtext><table><mglyph><style><img src=x onerror={RUN}>",
    f'<noscript><p title="</noscript><img src=x onerror={RUN}>">',
    f"<template><script>{RUN}</script></template><x-y is=z onclick={RUN}>",
)


async def test_there_are_enough() -> None:
    assert len(set(PAYLOADS)) >= 30


async def test_names_and_notes(site: Site, open_tab: OpenTab) -> None:
    keys = []
    for number, payload in enumerate(PAYLOADS):
        await site.api("POST", "teams", {"name": payload, "note": payload})
        made = await site.api("POST", "keys", {"name": payload, "owner": payload, "note": payload, "team": payload})
        if made.status != 201:  # a name that is refused is refused; its note may be anything
            made = await site.api("POST", "keys", {"name": f"marked-{number}", "owner": payload, "note": payload})
        assert made.status == 201, made.body
        keys.append(made.json)
        await site.gateway.chat(key=made.json["key"])
    tab = await open_tab(site)
    page = tab.page
    await tab.log_in("keys")
    for key in keys:
        row = page.locator("tbody tr").filter(has_text=f"…{key['last4']}")
        await expect(row.first).to_contain_text(key["note"])
    await page.get_by_role("button", name=f"Edit {keys[0]['name']}", exact=True).click()
    await expect(page.get_by_label("Note")).to_have_value(keys[0]["note"])
    await page.keyboard.press("Escape")
    await page.get_by_role("button", name=f"Revoke {keys[0]['name']}", exact=True).click()
    await expect(page.get_by_role("dialog")).to_contain_text(keys[0]["name"])
    await page.keyboard.press("Escape")
    await page.get_by_role("link", name="Teams").click()
    await tab.picture("xss-teams")
    for view in ("requests", "usage", "overview"):
        await tab.go(view)
    await tab.go("usage")
    for by in ("Team", "Key"):
        await page.get_by_label(by, exact=True).check()
        await expect(page.get_by_role("columnheader").first).to_contain_text(by)
        await expect(page.locator("tbody tr").first).to_be_visible()
    await tab.go("requests")
    await expect(page.locator("tbody tr").first).to_be_visible()
    await tab.no_script_ran()


async def test_answers_of_a_model(site: Site, open_tab: OpenTab) -> None:
    key = await site.make_key("listener")
    tab = await open_tab(site)
    page = tab.page
    await tab.log_in("playground")
    await page.get_by_label("API key").fill(key)
    for number, payload in enumerate(PAYLOADS):
        await site.engine.script([{"tokens": [payload[:5], payload[5:]]}])
        await page.get_by_label("Message").fill(payload)
        await page.keyboard.press("Enter")
        answer = page.locator(".turn.assistant").nth(number)
        await expect(answer.locator(".stats")).to_contain_text("first token")
        assert await answer.locator(".text").text_content() == payload
    await tab.no_script_ran()


async def test_errors_of_an_engine(site: Site, open_tab: OpenTab) -> None:
    key = await site.make_key("unlucky")
    tab = await open_tab(site)
    page = tab.page
    await tab.log_in("playground")
    await page.get_by_label("API key").fill(key)
    for number, payload in enumerate(PAYLOADS):
        body = '{"error":{"message":%s,"type":"BadRequestError","param":null,"code":400}}'
        escaped = '"' + payload.replace("\\", "\\\\").replace('"', '\\"') + '"'
        shown = payload.partition("http:")[0]  # the gateway takes addresses out
        await site.engine.script([{"status": 400, "body": body % escaped}])
        await page.get_by_label("Message").fill("Say no")
        await page.keyboard.press("Enter")
        await expect(page.locator(".failure").nth(number)).to_contain_text(shown)
    await tab.no_script_ran()


async def test_the_page_itself_has_no_way_from_text_to_html(site: Site, open_tab: OpenTab) -> None:
    """What the other tests rely on: that a script which could run would be noticed, and that the policy stops it."""
    tab = await open_tab(site)
    page = tab.page
    await tab.log_in()
    with pytest.raises(Error, match="TrustedHTML"):
        await page.evaluate(f"document.body.innerHTML = '<img src=x onerror={RUN}>'")
    with pytest.raises(Error, match="TrustedScript"):
        await page.evaluate(f"document.body.setAttribute('onclick', '{RUN}')")
    await page.evaluate(
        f"""() => {{
            const link = document.createElement("a");
            link.href = "javascript:{RUN}";
            document.body.append(link);
            link.click();
        }}"""
    )
    await expect(page.locator("h1")).to_have_text("Overview")
    assert await page.evaluate("window.__pwned") is None
    assert any("BREACH script-src" in fault for fault in tab.faults), tab.faults
    tab.faults.clear()
