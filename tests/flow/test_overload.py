"""More requests than the engines can take: who waits, in which order, for how long; and who is told to go at once."""

import asyncio
import signal
from contextlib import AsyncExitStack
from typing import Any

from tests.fake_engine import FakeEngine
from tests.flow.conftest import Start
from tests.flow.talk import Client, connect, logged, parse, post, text_of
from tests.served import Penstock, chat_body, simple_config, until


def capped(engine: FakeEngine, limits: str = "{}", more: str = "", **fields: object) -> str:
    """One place, and room for two to wait, unless told otherwise."""
    settings = {"max_open_requests": 1, "max_queue": 2, **fields}
    lines = "".join(f"{name}: {value}\n    " for name, value in settings.items())
    return simple_config(engine.url, limits=limits, more=more).replace("aliases:", f"{lines}aliases:")


async def queued(gateway: Penstock, count: int) -> None:
    async def so_many() -> bool:
        return await gateway.metric("penstock_queued_requests", model="tiny") == count

    await until(so_many)


class Line:
    """Requests that came one after the other: the first one is held by the engine, the others wait."""

    def __init__(self, gateway: Penstock, engine: FakeEngine, stack: AsyncExitStack) -> None:
        self.gateway = gateway
        self.engine = engine
        self._stack = stack
        self.clients: list[Client] = []

    async def come(self, text: str, more: str = "", **fields: Any) -> Client:
        client = await self._stack.enter_async_context(connect(self.gateway))
        await client.send(post(body=chat_body(text, max_tokens=2, **fields), more=more))
        self.clients.append(client)
        return client

    async def fill(self, *texts: str, **fields: Any) -> list[Client]:
        await self.come("held", fake={"hold": True})
        await self.engine.until(holding=1)
        found = []
        for number, text in enumerate(texts, start=1):
            found.append(await self.come(text, **fields))
            await queued(self.gateway, number)
        return found

    async def answers(self) -> list[int]:
        found = []
        for client in self.clients:
            [answer], _ = parse(await client.to_end())
            found.append(answer.status)
        return found


async def asked(engine: FakeEngine) -> list[str]:
    return [seen["json"]["messages"][0]["content"] for seen in (await engine.stats())["last"]]


async def test_first_come_first_served(engine: FakeEngine, start: Start) -> None:
    gateway = await start(config=capped(engine, max_queue=5))
    async with AsyncExitStack() as stack:
        line = Line(gateway, engine, stack)
        await line.fill("a", "b", "c", stream=True)
        assert await gateway.metric("penstock_inflight_requests", model="tiny") == 1
        await engine.release()
        for client in line.clients[1:]:
            [answer], _ = parse(await client.to_end())
            assert text_of(answer.body) == " t0 t1"
        assert await line.answers() == [200] * 4
    assert await asked(engine) == ["held", "a", "b", "c"]
    await queued(gateway, 0)


async def test_when_the_queue_is_full_a_client_hears_it_at_once(engine: FakeEngine, start: Start) -> None:
    gateway = await start(config=capped(engine))
    async with AsyncExitStack() as stack:
        line = Line(gateway, engine, stack)
        await line.fill("a", "b")
        for stream in (False, True):
            refused = await gateway.chat("too many", stream=stream)
            assert (refused.status, refused.error["code"], refused.error["type"]) == (503, "overloaded", "server_error")
            assert int(refused.headers["retry-after"]) >= 1
        assert (await gateway.get("/health/live")).status == 200
        assert (await gateway.get("/health/ready")).status == 200
        await engine.release()
        assert await line.answers() == [200] * 3
    assert "too many" not in await asked(engine)


async def test_who_waits_too_long_is_told_so_and_holds_up_nobody(engine: FakeEngine, start: Start) -> None:
    gateway = await start(config=capped(engine, queue_timeout=0.3))
    async with AsyncExitStack() as stack:
        line = Line(gateway, engine, stack)
        await line.come("held", fake={"hold": True})
        await engine.until(holding=1)
        for stream in (False, True):
            late = await gateway.chat("late", stream=stream)
            assert (late.status, late.error["code"]) == (503, "overloaded")
            assert int(late.headers["retry-after"]) >= 1
        await engine.release()
        assert await line.answers() == [200]
        assert (await gateway.chat("after")).status == 200
    assert await asked(engine) == ["held", "after"]


async def test_the_deadline_of_a_request_counts_in_the_queue_too(engine: FakeEngine, start: Start) -> None:
    gateway = await start(config=capped(engine, request_timeout=0.3))
    async with AsyncExitStack() as stack:
        line = Line(gateway, engine, stack)
        await line.come("held", fake={"hold": True})
        await engine.until(holding=1)
        late = await gateway.chat("late")
        assert late.error["code"] == "overloaded"
        assert late.status == 503
        # The held one runs out of time as well, and its place is free again.
        assert await line.answers() == [504]
        assert (await gateway.chat("after")).status == 200


async def test_a_client_that_leaves_the_queue_frees_its_place_in_it(engine: FakeEngine, start: Start) -> None:
    gateway = await start(config=capped(engine, limits="{requests_per_minute: 10, parallel_requests: 3}"))
    async with AsyncExitStack() as stack:
        line = Line(gateway, engine, stack)
        await line.come("held", fake={"hold": True})
        await engine.until(holding=1)
        leaving = await line.come("leaves", more="x-request-id: leaver\r\n")
        await queued(gateway, 1)
        await line.come("stays")
        await queued(gateway, 2)
        line.clients.remove(leaving)
        await leaving.leave()
        await queued(gateway, 1)
        await line.come("comes later")
        await queued(gateway, 2)
        await engine.release()
        assert await line.answers() == [200, 200, 200]
    assert await asked(engine) == ["held", "stays", "comes later"]
    entry = await logged(gateway, "leaver")
    assert (entry["status"], entry["outcome"], entry["attempts"]) == (499, "client_cancelled", 0)


async def test_a_client_that_leaves_its_place_lets_the_next_one_in(engine: FakeEngine, start: Start) -> None:
    gateway = await start(config=capped(engine))
    async with AsyncExitStack() as stack:
        line = Line(gateway, engine, stack)
        [waiting] = await line.fill("next")
        await line.clients.pop(0).leave()
        assert await line.answers() == [200]
        assert waiting is line.clients[0]


async def test_a_failure_lets_the_next_one_in(engine: FakeEngine, start: Start) -> None:
    """Also when a whole line of requests fails at once."""
    count = 300
    gateway = await start(config=capped(engine, max_queue=count, failover='"off"'))
    async with AsyncExitStack() as stack:
        line = Line(gateway, engine, stack)
        await line.come("held", fake={"hold": True})
        await engine.until(holding=1)
        for _ in range(count):
            await line.come("waits")
        await queued(gateway, count)
        await engine.exit()
        assert set(await line.answers()) <= {502, 503}
    await queued(gateway, 0)
    assert await gateway.metric("penstock_inflight_requests", model="tiny") == 0
    assert not [entry for entry in gateway.log if "fault" in entry["message"]]


async def test_a_request_that_is_refused_for_load_costs_nothing(engine: FakeEngine, start: Start) -> None:
    gateway = await start(config=capped(engine, limits="{requests_per_minute: 3}", max_queue=1, queue_timeout=0.3))
    async with AsyncExitStack() as stack:
        line = Line(gateway, engine, stack)
        await line.come("held", fake={"hold": True})
        await engine.until(holding=1)
        for _ in range(4):
            assert (await gateway.chat()).status == 503
        await engine.release()
        assert await line.answers() == [200]
    assert [(await gateway.chat()).status for _ in range(3)] == [200, 200, 429]


async def test_who_waits_is_served_while_the_gateway_drains(engine: FakeEngine, start: Start) -> None:
    gateway = await start(config=capped(engine))
    async with AsyncExitStack() as stack:
        line = Line(gateway, engine, stack)
        await line.fill("a", "b")
        gateway.signal(signal.SIGTERM)
        await gateway.logged(lambda entry: entry["message"] == "draining")
        await engine.release()
        assert await line.answers() == [200] * 3
    assert await gateway.exit_code() == 0


async def test_who_still_waits_when_draining_ends_is_told_so(engine: FakeEngine, start: Start) -> None:
    gateway = await start(config=capped(engine, more="server: {drain_timeout: 0.2}"))
    async with AsyncExitStack() as stack:
        line = Line(gateway, engine, stack)
        await line.fill("a", "b")
        gateway.signal(signal.SIGTERM)
        assert await line.answers() == [503] * 3
    assert await gateway.exit_code() == 0
    assert await asked(engine) == ["held"]


async def test_more_places_after_a_reload_are_taken_at_once(engine: FakeEngine, start: Start) -> None:
    gateway = await start(config=capped(engine))
    async with AsyncExitStack() as stack:
        line = Line(gateway, engine, stack)
        waiting = await line.fill("a", "b")
        gateway.config.write_text(capped(engine, max_open_requests=3))
        gateway.signal(signal.SIGHUP)
        for client in waiting:
            [answer], _ = parse(await client.to_end())
            assert answer.status == 200
        await engine.release()
        assert await line.answers() == [200] * 3


async def test_no_cap_where_engines_run_elsewhere(engine: FakeEngine, start: Start) -> None:
    gateway = await start(engine.url)
    async with AsyncExitStack() as stack:
        line = Line(gateway, engine, stack)
        for number in range(1, 301):
            await line.come("held", fake={"hold": True})
            if not number % 100:
                await engine.until(holding=number)
        await engine.release()
        assert await line.answers() == [200] * 300


async def test_models_do_not_wait_for_one_another(start: Start) -> None:
    async with FakeEngine(models=("tiny", "other")) as engine:
        config = capped(engine, max_queue=0).replace(
            "keys:", f'  other:\n    endpoints: ["{engine.url}"]\n    max_open_requests: 1\nkeys:', 1
        )
        gateway = await start(config=config)

        async def up() -> bool:
            return await gateway.metric("penstock_engine_up", model="other") == 1

        await until(up)
        async with AsyncExitStack() as stack:
            line = Line(gateway, engine, stack)
            await line.fill()
            refused, other = await asyncio.gather(gateway.chat(), gateway.chat(model="other"))
            assert (refused.status, other.status) == (503, 200)
            await engine.release()
            assert await line.answers() == [200]
