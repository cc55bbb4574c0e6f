"""What an operator does to an engine of ours."""

import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.flow.admin import ADMIN, ask
from tests.served import Penstock, until

STANDIN = Path(__file__).parent / "standin_engine.py"


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Penstock]:
    (tmp_path / "model").mkdir()
    python = tmp_path / "python-with-vllm"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {STANDIN} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    engine = f"{{model: {tmp_path / 'model'}, python: {python}, stop_timeout: 2, env: {{HF_TOKEN: hf-secret-0123}}}}"
    async with Penstock(f"admin_key: {ADMIN}\nmodels: {{org/tiny: {{engine: {engine}}}}}\n") as running:
        yield await running.ready()


async def test_an_engine_of_ours(gateway: Penstock) -> None:
    async def shown() -> dict[str, Any]:
        [engine] = (await ask(gateway, "/engines")).json["data"]
        return dict(engine)

    before = await shown()
    assert (before["id"], before["managed"], before["state"]) == ("org/tiny/0", True, "ready")
    log = (await ask(gateway, "/engines/org/tiny/0/log?lines=50")).json["lines"]
    assert any("standin says hello" in line for line in log)
    assert len((await ask(gateway, "/engines/org/tiny/0/log?lines=1")).json["lines"]) == 1
    assert b"hf-secret" not in (await ask(gateway, "/config")).body

    engines = [
        one for one in psutil.Process(gateway.pid).children(recursive=True) if STANDIN.name in str(one.cmdline())
    ]
    restarted = await ask(gateway, "/engines/org/tiny/0/restart", "POST")
    assert (restarted.status, restarted.json["id"]) == (202, "org/tiny/0")

    async def ready_elsewhere() -> bool:
        now = await shown()
        return bool(now["state"] == "ready" and now["url"] != before["url"])

    await until(ready_elsewhere)
    assert not any(one.is_running() for one in engines)
    what = [(entry["what"], entry["target"]) for entry in (await ask(gateway, "/audit")).json["data"]]
    assert what == [("restart_engine", "org/tiny/0")]


async def test_the_last_engine_can_be_drained(gateway: Penstock) -> None:
    assert (await ask(gateway, "/engines/org/tiny/0/drain", "POST")).json["state"] == "draining"
    assert (await gateway.get("/health/ready")).status == 503
    assert (await ask(gateway, "/engines/org/tiny/0/resume", "POST")).json["state"] == "ready"
    assert (await gateway.get("/health/ready")).status == 200
