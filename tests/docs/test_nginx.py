"""configs/nginx.conf, with a real nginx where there is one."""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.docs.readme import ROOT
from tests.fake_engine import FakeEngine
from tests.served import DEADLINE, KEY, Penstock, chat_body, close, http_post, simple_config

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
CONFIG = (ROOT / "configs/nginx.conf").read_text()

pytestmark = pytest.mark.skipif(NGINX is None, reason="there is no nginx")


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine() as running:
        yield running


@pytest.fixture
async def socket(tmp_path: Path, engine: FakeEngine) -> AsyncIterator[Path]:
    """Where nginx listens, in front of a gateway."""
    async with Penstock(simple_config(engine.url)) as gateway:
        await gateway.ready()
        socket = tmp_path / "nginx.sock"
        site = CONFIG.replace("listen 80;", f"listen unix:{socket};").replace(
            "127.0.0.1:8080", f"127.0.0.1:{gateway.port}"
        )
        assert site.count(str(socket)) == site.count(f"127.0.0.1:{gateway.port};") == 1
        folders = "".join(
            f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        main = tmp_path / "nginx.conf"
        main.write_text(
            f"daemon off; master_process off; pid {tmp_path}/pid; error_log stderr notice;\n"
            f"events {{}}\nhttp {{\naccess_log off;\n{folders}{site}\n}}\n"
        )
        assert NGINX is not None
        process = await asyncio.create_subprocess_exec(
            NGINX, "-e", "stderr", "-p", tmp_path, "-c", main, stderr=asyncio.subprocess.PIPE
        )
        try:
            assert process.stderr is not None
            async with asyncio.timeout(DEADLINE):
                async for line in process.stderr:
                    assert b"[emerg]" not in line
                    assert b"[warn]" not in line
                    if b"start worker" in line or b"using the" in line:
                        break
            yield socket
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.communicate()
            process._transport.close()  # type: ignore[attr-defined]  # or its pipes close only when collected


async def test_streams_pass_as_they_come_and_leaving_is_noticed(socket: Path, engine: FakeEngine) -> None:
    await engine.script([{"hold_after": 2, "delay": 0.02}])
    reader, writer = await asyncio.open_unix_connection(socket)
    writer.write(http_post("/v1/chat/completions", chat_body(stream=True, max_tokens=10_000), KEY))
    async with asyncio.timeout(DEADLINE):
        await reader.readuntil(b'" t1"')  # the engine waits with the rest
        await engine.until(holding=1)
        await close(writer)
        await engine.release()
        await engine.until(disconnects=1)


async def test_what_is_not_for_everybody(socket: Path) -> None:
    reader, writer = await asyncio.open_unix_connection(socket)
    async with asyncio.timeout(DEADLINE):
        for path, status in (("/metrics", b"404"), ("/admin/api/keys", b"404"), ("/health/live", b"200")):
            writer.write(f"HEAD {path} HTTP/1.1\r\nhost: test\r\n\r\n".encode())
            assert (await reader.readuntil(b"\r\n\r\n")).split()[1] == status, path
        await close(writer)
