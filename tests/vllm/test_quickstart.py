"""scripts/run as a user meets it: a banner whose commands work as pasted, and Ctrl-C."""

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator

import psutil
import pytest

from tests.served import ROOT
from tests.vllm.real import PATIENCE, START, alive

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
async def quickstart() -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        str(ROOT / "scripts/run"),
        "--port",
        str(free_port()),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a group of its own, as a shell gives it
    )
    yield process
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
    process._transport.close()  # type: ignore[attr-defined]  # or its pipes close only when collected


async def banner(process: asyncio.subprocess.Process) -> list[str]:
    """What is printed, up to the word on how to stop it."""
    assert process.stdout is not None
    lines: list[str] = []
    async with asyncio.timeout(START):
        while not lines or "Ctrl-C" not in lines[-1]:
            line = await process.stdout.readline()
            assert line, "it ended:\n" + "\n".join(lines)
            lines.append(line.decode().rstrip("\n"))
    return lines


def example(lines: list[str], title: str) -> str:
    """The indented lines below a title."""
    start = next(n for n, line in enumerate(lines) if line.startswith(title)) + 1
    end = lines.index("", start)
    assert all(line.startswith("  ") for line in lines[start:end])
    return "\n".join(line[2:] for line in lines[start:end])


async def output(*argv: str) -> str:
    process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == 0, err
    return out.decode()


async def test_scripts_run(quickstart: asyncio.subprocess.Process) -> None:
    lines = await banner(quickstart)
    assert any("smollm2/0: ready" in line for line in lines)
    assert any("minilm/0: ready" in line for line in lines)
    assert "Paris" in await output("bash", "-c", example(lines, "curl:"))
    assert "Paris" in await output(str(ROOT / ".venv/bin/python"), "-c", example(lines, "Python"))

    _, dashboard, *_, admin_key = next(line for line in lines if line.startswith("Dashboard:")).split()
    assert "<!doctype html>" in await output("curl", "-s", dashboard)
    base = dashboard.removesuffix("/admin/")
    told = await output(
        "env", f"PENSTOCK_ADMIN_KEY={admin_key}", str(ROOT / ".venv/bin/penstock"), "engines", "--url", base
    )
    assert told.count(" ready ") == 2

    me = psutil.Process(quickstart.pid)
    processes = [me, *me.children(recursive=True)]
    assert len(processes) >= 6  # the script, the gateway, and two engines, each with its keeper
    os.killpg(quickstart.pid, signal.SIGINT)
    async with asyncio.timeout(60):
        assert await quickstart.wait() == 0
    assert alive(processes) == []
