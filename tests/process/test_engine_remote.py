"""Endpoints that run elsewhere, as the fleet sees them: over real sockets, with a look-alike of vLLM."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from engines import probe
from engines.fleet import Fleet
from engines.monitor import Pace
from engines.sources import ModelSource
from engines.types import EngineEvent, EventKind, Load, Replica, ReplicaState
from tests.fake_engine import FakeEngine

FAST = Pace(starting=0.05, absent=0.05, doubtful=0.05, watching=0.05)


async def until(condition: Callable[[], object], timeout: float = 10) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


class Watched:
    """A running fleet of endpoints of the model "tiny"."""

    def __init__(self, tmp_path: Path, source: ModelSource) -> None:
        self.events: list[EngineEvent] = []
        self.fleet = Fleet(
            {"tiny": source}, base_dir=tmp_path, log_dir=tmp_path, on_event=self.events.append, pace=FAST
        )

    def replica(self) -> Replica:
        return self.fleet.view.of("tiny")[0]

    def told(self, kind: EventKind) -> list[str]:
        return [event.message for event in self.events if event.kind is kind]


@asynccontextmanager
async def watching(
    tmp_path: Path, *urls: str, api_key: str | None = None, served_model_name: str | None = None
) -> AsyncIterator[Watched]:
    source = ModelSource(endpoints=urls, endpoint_api_key=api_key, served_model_name=served_model_name)
    watched = Watched(tmp_path, source)
    await watched.fleet.start()
    try:
        yield watched
    finally:
        await watched.fleet.stop()
    assert {replica.state for replica in watched.fleet.view.of("tiny")} == {ReplicaState.STOPPED}


async def test_endpoints_are_ready_when_they_answer_and_show_their_load(tmp_path: Path) -> None:
    async with FakeEngine(replicas=2, api_key="k") as engine, watching(tmp_path, *engine.urls, api_key="k") as watched:
        replica = await watched.fleet.wait_ready("tiny", 10)
        await until(lambda: len(watched.fleet.view.ready("tiny")) == 2)
        assert [r.id for r in watched.fleet.view.of("tiny")] == ["tiny/0", "tiny/1"]
        assert (replica.url, replica.api_key, replica.served_name) == (engine.urls[0], "k", "tiny")
        assert replica.max_model_len is not None
        await engine.load(running=3, waiting=2, kv_cache_usage=0.5)
        await until(lambda: watched.replica().load == Load(3, 2, 0.5))


async def test_an_endpoint_that_fails_its_health_check_twice_is_unhealthy_until_the_first_good_one(
    tmp_path: Path,
) -> None:
    async with FakeEngine() as engine, watching(tmp_path, engine.url) as watched:
        await watched.fleet.wait_ready("tiny", 10)
        await engine.health(503)
        await until(lambda: watched.replica().state is ReplicaState.UNHEALTHY)
        assert watched.replica().reason == "its health check says HTTP 503"
        assert watched.replica().load is None
        await engine.health(200)
        await watched.fleet.wait_ready("tiny", 10)
        assert watched.replica().reason is None
        assert len(watched.told(EventKind.READY)) == 2
        assert len(watched.told(EventKind.UNHEALTHY)) == 1


async def test_a_dead_endpoint_is_noticed_when_a_request_fails_without_waiting_for_the_next_probe(
    tmp_path: Path,
) -> None:
    slow = Pace(starting=0.05, absent=0.05, doubtful=0.05, watching=3600)
    async with FakeEngine() as engine:
        fleet = Fleet({"tiny": ModelSource(endpoints=(engine.url,))}, base_dir=tmp_path, log_dir=tmp_path, pace=slow)
        await fleet.start()
        try:
            await fleet.wait_ready("tiny", 10)
            engine.kill()
            fleet.report_failure("tiny/0")
            await until(lambda: fleet.view.of("tiny")[0].state is ReplicaState.UNHEALTHY)
        finally:
            await fleet.stop()


async def test_nobody_at_the_address_is_said_so(tmp_path: Path) -> None:
    async with FakeEngine() as engine:
        url = engine.url
    async with watching(tmp_path, url) as watched:
        await until(lambda: watched.replica().reason not in {None, "starting"})
        assert watched.replica().state is ReplicaState.STARTING
        assert (watched.replica().reason or "").startswith("no connection")
        with pytest.raises(TimeoutError):
            await watched.fleet.wait_ready("tiny", 0.1)


async def test_a_wrong_key_is_said_so_and_keeps_the_endpoint_out(tmp_path: Path) -> None:
    async with FakeEngine(api_key="k") as engine, watching(tmp_path, engine.url, api_key="wrong") as watched:
        await until(lambda: (watched.replica().reason or "").startswith("it refuses engine_api_key"))
        assert watched.replica().state is ReplicaState.STARTING


async def test_an_engine_that_calls_the_model_otherwise_is_asked_by_its_own_name(tmp_path: Path) -> None:
    async with FakeEngine(models=("other", "third")) as engine:
        async with watching(tmp_path, engine.url) as watched:
            replica = await watched.fleet.wait_ready("tiny", 10)
            assert (replica.served_name, replica.card["id"]) == ("other", "other")
            assert "does not serve 'tiny' but 'other', 'third'" in watched.told(EventKind.NOTE)[0]
        async with watching(tmp_path, engine.url, served_model_name="third") as watched:
            replica = await watched.fleet.wait_ready("tiny", 10)
            assert (replica.served_name, replica.card["id"]) == ("third", "third")
            assert watched.told(EventKind.NOTE) == []


async def test_what_runs_elsewhere_has_no_log_here_and_is_not_ours_to_restart(tmp_path: Path) -> None:
    async with FakeEngine() as engine, watching(tmp_path, engine.url) as watched:
        await watched.fleet.wait_ready("tiny", 10)
        watched.fleet.report_stall("tiny/0")
        assert watched.fleet.log_tail("tiny/0") == []
        with pytest.raises(ValueError, match="runs elsewhere"):
            await watched.fleet.restart("tiny/0")
        with pytest.raises(KeyError):
            watched.fleet.log_tail("tiny/1")


async def test_an_endpoint_that_an_operator_drains_takes_nothing_until_resumed(tmp_path: Path) -> None:
    async with FakeEngine(replicas=2) as engine, watching(tmp_path, *engine.urls) as watched:
        fleet = watched.fleet
        await until(lambda: len(fleet.view.ready("tiny")) == 2)
        fleet.drain("tiny/0")
        fleet.drain("tiny/0")
        assert [r.id for r in fleet.view.ready("tiny")] == ["tiny/1"]
        assert (watched.replica().state, watched.replica().reason) == (ReplicaState.DRAINING, "drained by an operator")
        await engine.health(503, replica=0)
        await until(lambda: (watched.replica().reason or "").endswith("its health check says HTTP 503"))
        assert watched.replica().state is ReplicaState.DRAINING
        await engine.health(200, replica=0)
        await until(lambda: watched.replica().reason == "drained by an operator")
        fleet.resume("tiny/0")
        fleet.resume("tiny/0")
        assert [r.id for r in fleet.view.ready("tiny")] == ["tiny/0", "tiny/1"]
        assert watched.told(EventKind.NOTE) == [
            "drained by an operator: takes nothing new until resumed",
            "resumed by an operator",
        ]
        for act in (fleet.drain, fleet.resume):
            with pytest.raises(KeyError):
                act("tiny/2")


async def test_a_bug_in_the_watch_does_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faults = [RuntimeError("bug")]
    health = probe.health

    async def buggy(engine: probe.Line) -> None:
        if faults:
            raise faults.pop()
        await health(engine)

    monkeypatch.setattr("engines.fleet._AFTER_A_BUG", 0.01)
    monkeypatch.setattr(probe, "health", buggy)
    async with FakeEngine() as engine, watching(tmp_path, engine.url) as watched:
        await watched.fleet.wait_ready("tiny", 10)
    assert "looking after tiny/0 failed; starting over" in caplog.text
