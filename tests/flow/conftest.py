"""Flow tests: a real gateway process, fake engines on real sockets, and each test through both doors."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from tests.fake_engine import FakeEngine
from tests.served import Penstock, simple_config

Start = Callable[..., Awaitable[Penstock]]


@pytest.fixture(params=["edge", "asgi"])
def door(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine() as running:
        yield running


@pytest.fixture
async def start(door: str) -> AsyncIterator[Start]:
    """Starts a gateway with this config (by default: one model over the given endpoints), and waits until it is ready."""
    async with AsyncExitStack() as stack:

        async def started(*endpoints: str, config: str | None = None, ready: bool = True, **more: str) -> Penstock:
            text = config if config is not None else simple_config(*endpoints, **more)
            gateway = await stack.enter_async_context(Penstock(text, door))
            return await gateway.ready() if ready else gateway

        yield started
