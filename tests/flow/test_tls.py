"""An engine behind https://, as remote ones should be."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme

from tests.fake_engine import FakeEngine
from tests.served import Penstock, simple_config


async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def terminator(target: str, context: ssl.SSLContext) -> AsyncIterator[int]:
    """A TLS terminator in front of `target`; its port."""
    parts = urlsplit(target)
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection(parts.hostname, parts.port)
        for one in (pour(reader, inner_writer), pour(inner_reader, writer)):
            task = asyncio.create_task(one)
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


async def test_an_engine_behind_tls(tmp_path: Path, authority: trustme.CA) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trusted = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(trusted))
    async with FakeEngine() as engine, terminator(engine.url, context) as port:
        config = simple_config(f"https://127.0.0.1:{port}")
        async with Penstock(config, env={"SSL_CERT_FILE": str(trusted)}) as gateway:
            await gateway.ready()
            whole = await gateway.chat(max_tokens=3)
            assert whole.json["choices"][0]["message"]["content"] == " t0 t1 t2"
            assert b'" t2"' in (await gateway.chat(max_tokens=3, stream=True)).body


async def test_an_engine_with_a_certificate_that_nobody_knows_is_not_used(authority: trustme.CA) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    async with FakeEngine() as engine, terminator(engine.url, context) as port:
        async with Penstock(simple_config(f"https://127.0.0.1:{port}")) as gateway:
            refused = await gateway.chat()
            assert refused.status == 503
            assert refused.error["code"] == "no_healthy_engine"
        assert (await engine.stats())["requests"] == 0
