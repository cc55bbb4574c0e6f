"""A gateway that is replaced by another one on the same sockets, as a service manager does it: nobody notices."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.config.schema import ServerConfig
from gateway.listen import CannotListenError, handed_over, notify
from gateway.runtime import listeners_for
from tests.fake_engine import FakeEngine
from tests.process.load import Load
from tests.process.test_serve import OpenStream
from tests.served import DEADLINE, Penstock, chat_body, close, http_post, simple_config

# Becomes the gateway, as what systemd starts does: the sockets are from 3 on, and LISTEN_PID is its own.
LAUNCH = """
import fcntl, os, sys
fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 20) for fd in sys.argv[1].split(",")]
for i, fd in enumerate(fds):
    os.dup2(fd, 3 + i)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds))}
os.execv(sys.argv[2], sys.argv[2:])
"""


class Activated(Penstock):
    """A gateway that is handed sockets, and tells its service manager when it is ready."""

    def __init__(self, config: str, *listeners: socket.socket) -> None:
        super().__init__(config)
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._manager.bind(str(self.folder / "notify"))
        self._manager.setblocking(False)
        self.pass_fds = [listener.fileno() for listener in listeners]
        self._argv = [sys.executable, "-c", LAUNCH, ",".join(map(str, self.pass_fds)), *self._argv[:-2]]
        self._env["NOTIFY_SOCKET"] = str(self.folder / "notify")

    async def says(self, state: str) -> None:
        async with asyncio.timeout(DEADLINE):
            assert await asyncio.get_running_loop().sock_recv(self._manager, 100) == state.encode()

    async def stopped(self) -> int:
        try:
            return await self.exit_code()
        finally:
            self._manager.close()


@pytest.fixture
def listener() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0), backlog=512)


@contextlib.asynccontextmanager
async def activated(config: str, *listeners: socket.socket) -> AsyncIterator[Activated]:
    async with Activated(config, *listeners) as gateway:
        try:
            yield gateway
        finally:
            gateway._manager.close()


async def test_three_replacements_under_load_refuse_and_cut_nothing(listener: socket.socket) -> None:
    async with FakeEngine(replicas=2) as engine, contextlib.AsyncExitStack() as stack:
        config = simple_config(*engine.urls)
        old = await stack.enter_async_context(activated(config, listener))
        await old.says("READY=1")
        load = Load(listener.getsockname()[1], clients=6)
        async with load.running():
            await load.more(40)
            for _ in range(3):
                new = await stack.enter_async_context(activated(config, listener))
                await new.says("READY=1")
                old.signal(signal.SIGTERM)
                await old.says("STOPPING=1")
                await load.more(60)
                assert await old.exit_code() == 0
                old = new
            await load.more(40)
        assert load.failures == []
        listener.close()


async def test_what_waits_in_the_queue_while_no_gateway_runs_is_served_by_the_next_one(
    listener: socket.socket,
) -> None:
    async with FakeEngine() as engine:
        config = simple_config(engine.url)
        async with activated(config, listener) as gateway:
            await gateway.says("READY=1")
            gateway.signal(signal.SIGTERM)
            assert await gateway.exit_code() == 0
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(http_post("/v1/chat/completions", chat_body(), more="connection: close\r\n"))
        async with activated(config, listener), asyncio.timeout(DEADLINE):
            assert (await reader.read(-1)).startswith(b"HTTP/1.1 200 ")
        await close(writer)
    listener.close()


async def test_open_streams_and_kept_connections_of_the_old_gateway_are_served_to_their_end(
    listener: socket.socket,
) -> None:
    async with FakeEngine() as engine, activated(simple_config(engine.url), listener) as gateway:
        await gateway.ready()
        stream = OpenStream(gateway)
        await stream.open()
        reader, writer = await gateway.connect()
        writer.write(http_post("/v1/chat/completions", chat_body()))
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"connection: close" not in head
        gateway.signal(signal.SIGTERM)
        await gateway.logged(lambda line: line["message"] == "draining" and line["handing_over"])
        writer.write(http_post("/v1/chat/completions", chat_body()))
        async with asyncio.timeout(DEADLINE):
            answer = await reader.read(-1)
        assert b"HTTP/1.1 200 " in answer
        assert b"connection: close" in answer
        await close(writer)
        await engine.release()
        assert b"data: [DONE]" in await stream.rest()
        assert await gateway.exit_code() == 0
    listener.close()


async def test_a_gateway_takes_nothing_before_an_engine_is_ready(listener: socket.socket) -> None:
    async with FakeEngine() as engine:
        await engine.health(503)
        gateway = Activated(simple_config(engine.url), listener)
        entering = asyncio.create_task(gateway.__aenter__())
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(http_post("/v1/chat/completions", chat_body(), more="connection: close\r\n"))
        answering = asyncio.create_task(reader.read(-1))
        done, _ = await asyncio.wait({answering, entering}, timeout=2)
        assert not done
        await engine.health(200)
        async with asyncio.timeout(DEADLINE):
            assert (await answering).startswith(b"HTTP/1.1 200 ")
        await entering
        gateway.signal(signal.SIGTERM)
        await gateway.stopped()
        await gateway.__aexit__(None, None, None)
        await close(writer)
    listener.close()


async def test_a_gateway_that_waits_for_its_engines_can_be_told_to_stop(listener: socket.socket) -> None:
    async with FakeEngine() as engine:
        await engine.health(503)
        gateway = Activated(simple_config(engine.url), listener)
        entering = asyncio.create_task(gateway.__aenter__())
        await gateway.logged(lambda line: line["message"].startswith("waiting for the engines"))
        gateway.signal(signal.SIGTERM)
        assert await gateway.stopped() == 0
        with pytest.raises(AssertionError, match="the gateway ended"):
            await entering
        await gateway.__aexit__(None, None, None)
    listener.close()


async def test_the_admin_port_is_handed_over_too(listener: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as admin:
        more = "server: {admin_listen: '127.0.0.1:1'}\nadmin_key: sk-admin-0123456789\n"
        async with FakeEngine() as engine:
            config = simple_config(engine.url, more=more)
            async with activated(config, listener, admin) as gateway:
                assert (await gateway.get("/admin/")).status == 404
                gateway.port = admin.getsockname()[1]
                assert (await gateway.get("/admin/")).status == 200
    listener.close()


def test_what_is_handed_over_is_for_this_process_and_once() -> None:
    env = {"LISTEN_FDS": "2", "LISTEN_PID": "1", "LISTEN_FDNAMES": "a:b", "OTHER": "x"}
    assert handed_over(env) == []
    assert env == {"OTHER": "x"}
    assert handed_over(env) == []


def test_as_many_sockets_as_the_configuration_needs(listener: socket.socket) -> None:
    with (
        listener,
        pytest.raises(CannotListenError, match=r"^1 sockets were handed over \(LISTEN_FDS\), but 2 are needed"),
    ):
        listeners_for(ServerConfig(admin_listen="127.0.0.1:1"), [listener])


def test_nobody_need_want_to_know(tmp_path: Path) -> None:
    notify("READY=1", {})
    notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "gone")})
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = f"penstock-test-{os.getpid()}"
        manager.bind("\0" + name)
        manager.settimeout(DEADLINE)
        notify("READY=1", {"NOTIFY_SOCKET": "@" + name})
        assert manager.recv(100) == b"READY=1"
