"""What fails before the first byte goes elsewhere, within bounds; a replica that keeps failing is left out, and comes back."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

from gateway.resilience.attempts import SHARE
from gateway.resilience.breaker import DOUBTFUL, FAILURES
from tests.fake_engine import FakeEngine
from tests.flow.conftest import Pair, Start
from tests.flow.talk import Client, chunks, connect, logged, parse, post
from tests.served import Penstock, simple_config, until

MANY = 10_000  # more than any test asks for


async def requests_at(engine: FakeEngine) -> list[int]:
    return [(await engine.stats(replica))["requests"] for replica in (0, 1)]


async def attempts_of(gateway: Penstock, *outcomes: str) -> float:
    return sum([await gateway.metric("penstock_attempts_total", model="tiny", outcome=one) for one in outcomes])


async def both_up(gateway: Penstock) -> None:
    async def up() -> bool:
        return [await gateway.metric("penstock_engine_up", replica=f"tiny/{i}") for i in (0, 1)] == [1, 1]

    await until(up)


async def ask_at_once(stack: AsyncExitStack, gateway: Penstock, count: int, **fields: Any) -> list[Client]:
    """So many requests that are open at the same time; their answers are not waited for."""
    clients = [await stack.enter_async_context(connect(gateway)) for _ in range(count)]
    for client in clients:
        await client.send(post(**fields))
    return clients


async def statuses(clients: list[Client]) -> list[int]:
    found = []
    for client in clients:
        [answer], rest = parse(await client.to_end())
        assert not rest
        found.append(answer.status)
    return found


# ---- where a retry goes


@pytest.mark.parametrize("status", [502, 503])
async def test_a_retry_goes_to_another_replica(pair: Pair, status: int) -> None:
    gateway, engine = pair
    await engine.script([{"status": status}])
    while (await engine.stats())["scripted"]:
        request_id = f"retry-{status}-{sum(await requests_at(engine))}"
        answer = await gateway.post(
            "/v1/chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]},
            headers={"x-request-id": request_id, "x-stainless-retry-count": "2"},
        )
        assert answer.status == 200
    entry = await logged(gateway, request_id)
    assert (entry["attempts"], entry["replica"], entry["retry_count"]) == (2, "tiny/1", 2)


async def test_no_replica_is_asked_twice(pair: Pair) -> None:
    gateway, engine = pair
    for replica in (0, 1):
        await engine.script([{"status": 503}] * MANY, replica)
    answer = await gateway.chat()
    assert (answer.status, answer.error["code"]) == (503, "overloaded")
    assert await requests_at(engine) == [1, 1]


async def test_a_lost_request_waits_for_its_only_engine(engine: FakeEngine, start: Start) -> None:
    gateway = await start(config=simple_config(engine.url).replace("aliases:", "failover_wait: 15\n    aliases:"))
    await engine.script([{"accept_then_close": True}] * 2)
    assert (await gateway.chat()).status == 200
    assert (await engine.stats())["requests"] >= 2


# ---- the budget


@pytest.mark.parametrize(
    ("failure", "status"), [({"status": 503}, 503), ({"cut_after": -1}, 502)], ids=["refused", "lost"]
)
async def test_retries_of_a_storm_stay_within_the_budget(pair: Pair, failure: dict[str, Any], status: int) -> None:
    gateway, engine = pair
    for replica in (0, 1):
        await engine.script([failure] * DOUBTFUL + [{"hold": True, **failure}] * MANY, replica)
    for _ in range(DOUBTFUL):  # from now on no engine counts as one that is well
        assert (await gateway.chat()).status == status
    done = sum(await requests_at(engine))
    assert done == 2 * DOUBTFUL
    before = await attempts_of(gateway, "over_budget")
    count = 40
    budget = int(SHARE * count)

    async def holding(wanted: int) -> None:
        async def so_many() -> bool:
            return sum([int((await engine.stats(replica))["holding"]) for replica in (0, 1)]) == wanted

        await until(so_many)

    async with AsyncExitStack() as stack:
        clients = await ask_at_once(stack, gateway, count)
        await holding(count)
        await engine.release_all()

        async def decided() -> bool:
            return await attempts_of(gateway, "over_budget") - before == count - budget

        await until(decided)
        await holding(budget)  # the retries; all others have been told
        await engine.release_all()
        assert await statuses(clients) == [status] * count
    assert sum(await requests_at(engine)) - done == count + budget


async def test_the_death_of_an_engine_costs_no_request_for_want_of_budget(start: Start) -> None:
    count = 40
    async with FakeEngine() as first, FakeEngine() as second, AsyncExitStack() as stack:
        gateway = await start(first.url, second.url)

        await both_up(gateway)
        clients = await ask_at_once(stack, gateway, count, fake={"hold": True})

        async def shared_out() -> bool:
            held = [int((await engine.stats())["holding"]) for engine in (first, second)]
            return sum(held) == count and min(held) > SHARE * count

        await until(shared_out)
        first.kill()
        await second.until(holding=count)
        await second.release()
        assert await statuses(clients) == [200] * count


async def test_when_every_connection_is_refused_nobody_waits(start: Start) -> None:
    count = 60
    async with FakeEngine(replicas=2) as engine, AsyncExitStack() as stack:
        gateway = await start(*engine.urls)

        await both_up(gateway)
        engine.kill()
        clients = await ask_at_once(stack, gateway, count)
        found = set(await statuses(clients))
        assert found <= {502, 503}, [line for line in gateway.log if "exception" in line or "fault" in line["message"]]
        assert (await gateway.get("/health/live")).status == 200
        # No replica twice.
        assert count <= await attempts_of(gateway, "unreachable", "engine_failed") <= 2 * count


# ---- circuit breakers


async def test_a_replica_that_keeps_failing_is_left_out_and_comes_back(start: Start) -> None:
    async with FakeEngine(replicas=2) as engine:
        gateway = await start(*engine.urls)

        await both_up(gateway)
        await engine.script([{"status": 503}] * MANY)

        async def ejected(times: int) -> None:
            while sum("is left out" in line["message"] for line in gateway.log) < times:
                answer = await gateway.chat(max_tokens=1, stream=True)
                assert answer.status == 200
                assert chunks(answer.body)

        await ejected(1)
        assert (await engine.stats())["requests"] == FAILURES
        for trials in (1, 2):  # each one request that finds out whether the replica is well again
            await ejected(1 + trials)
            assert (await engine.stats())["requests"] == FAILURES + trials
        await engine.reset()
        while (await engine.stats())["finished"] < 5:
            assert (await gateway.chat(max_tokens=1)).status == 200
        # It counts from the beginning again.
        await engine.reset()
        await engine.script([{"status": 503}] * (FAILURES - 1))
        while (await engine.stats())["finished"] < 1:
            assert (await gateway.chat(max_tokens=1)).status == 200
        assert sum("is left out" in line["message"] for line in gateway.log) == 3


async def test_the_only_replica_is_never_left_out(engine: FakeEngine, start: Start) -> None:
    gateway = await start(engine.url)
    await engine.script([{"status": 503}] * 3 * FAILURES)
    assert {(await gateway.chat()).status for _ in range(3 * FAILURES)} == {503}
    assert (await engine.stats())["requests"] == 3 * FAILURES
    assert (await gateway.chat()).status == 200


async def test_one_of_two_that_both_fail_stays(pair: Pair) -> None:
    gateway, engine = pair
    for replica in (0, 1):
        await engine.script([{"status": 503}] * MANY, replica)
    for _ in range(3 * FAILURES):
        assert (await gateway.chat()).status == 503
    for replica in (0, 1):
        await engine.reset(replica)
    assert (await gateway.chat()).status == 200


async def test_a_burst_after_a_death_is_spread(start: Start) -> None:
    """The view of the fleet may lag behind a death; who asks meanwhile is answered by the survivors."""
    async with FakeEngine() as first, FakeEngine() as second:
        gateway = await start(first.url, second.url)

        await both_up(gateway)
        first.kill()
        answers = await asyncio.gather(*(gateway.chat(max_tokens=2) for _ in range(30)))
        assert [answer.status for answer in answers] == [200] * 30
