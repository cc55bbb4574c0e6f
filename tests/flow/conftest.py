"""Flow tests: a real gateway process, fake engines on real sockets, and each test through both doors.

`served` is one gateway that all tests share which need no config of their own; `start` makes one for a single test.
All tests here run on one event loop, because the shared processes belong to it.
"""

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
import pytest_asyncio

from tests.fake_engine import FakeEngine
from tests.flow.admin import ENGINE_KEY, config
from tests.flow.talk import Served
from tests.served import KEY, Penstock, simple_config, until

Start = Callable[..., Awaitable[Penstock]]

NARROW = "sk-narrow-0123456789"  # may use `other` alone
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE) and pytest_asyncio.is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@pytest.fixture(scope="session", params=["edge", "asgi"])
def door(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest_asyncio.fixture(loop_scope="session")
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine() as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def start(door: str) -> AsyncIterator[Start]:
    """Starts a gateway with this config (by default: one model over the given endpoints), and waits until it is ready."""
    async with AsyncExitStack() as stack:

        async def started(*endpoints: str, config: str | None = None, ready: bool = True, **more: str) -> Penstock:
            text = config if config is not None else simple_config(*endpoints, **more)
            gateway = await stack.enter_async_context(Penstock(text, door))
            return await gateway.ready() if ready else gateway

        yield started


# ---- what is shared


@pytest.fixture(scope="session")
def dead_port() -> Iterator[int]:
    """A port on which nobody listens, and nobody else can."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        yield port


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def chat_engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(models=("tiny", "other"), api_key="sk-engine-secret") as running:
        yield running


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def pooling_engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine("--pooling", models=("vec",)) as running:
        yield running


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared(
    door: str, chat_engine: FakeEngine, pooling_engine: FakeEngine, dead_port: int
) -> AsyncIterator[Penstock]:
    config = f"""\
server: {{max_body_bytes: 4194304}}
models:
  tiny:
    aliases: [default]
    endpoints: ["{chat_engine.url}"]
    engine_api_key: sk-engine-secret
  other:
    endpoints: ["{chat_engine.url}"]
    engine_api_key: sk-engine-secret
  vec: {{endpoints: ["{pooling_engine.url}"]}}
  lost: {{endpoints: ["http://127.0.0.1:{dead_port}"]}}
keys:
  - {{name: test, key: {KEY}, models: ["*"]}}
  - {{name: narrow, key: {NARROW}, models: [other]}}
"""
    async with Penstock(config, door) as gateway:
        for model in ("tiny", "other", "vec"):

            async def up(model: str = model) -> bool:
                return await gateway.metric("penstock_engine_up", model=model) == 1

            await until(up)
        yield gateway


class Pair(NamedTuple):
    """A gateway, and one engine process that is both replicas of `tiny`."""

    gateway: Penstock
    engine: FakeEngine


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def two_replicas(door: str) -> AsyncIterator[Pair]:
    async with FakeEngine(replicas=2) as engine, Penstock(simple_config(*engine.urls), door) as gateway:
        for replica in ("tiny/0", "tiny/1"):

            async def up(replica: str = replica) -> bool:
                return await gateway.metric("penstock_engine_up", replica=replica) == 1

            await until(up)
        yield Pair(gateway, engine)


@pytest_asyncio.fixture(loop_scope="session")
async def pair(two_replicas: Pair) -> Pair:
    """A shared gateway before two replicas without a past, each of which has answered well since its last failure."""
    gateway, engine = two_replicas
    for replica in (0, 1):
        await engine.reset(replica)
    while not all([(await engine.stats(replica))["finished"] for replica in (0, 1)]):
        assert (await gateway.chat()).status == 200
    for replica in (0, 1):
        await engine.reset(replica)
    return two_replicas


@pytest_asyncio.fixture(loop_scope="session")
async def served(shared: Penstock, chat_engine: FakeEngine, pooling_engine: FakeEngine) -> Served:
    """The shared gateway before two engines without a past: `tiny` and `other` chat, `vec` embeds, `lost` is down."""
    await chat_engine.until(running=0)
    await chat_engine.reset()
    await pooling_engine.reset()
    return Served(shared, chat_engine, pooling_engine)


# ---- for the admin API


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def chat() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(models=("tiny", "org/other"), api_key=ENGINE_KEY) as running:
        yield running


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def admin(door: str, chat: FakeEngine) -> AsyncIterator[Penstock]:
    """A gateway with an admin key, which tests that change nothing share."""
    async with Penstock(config(chat.url), door) as gateway:
        await gateway.ready()
        yield gateway
