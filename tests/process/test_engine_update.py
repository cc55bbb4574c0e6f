"""A fleet that changes over to another configuration: over real endpoints and real processes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from engines import fleet as fleet_module
from engines.command import Machine
from engines.fleet import Fleet
from engines.sources import ModelSource
from engines.spec import EngineSpec
from engines.types import EventKind, FleetView, Replica, ReplicaState
from tests.fake_engine import FakeEngine
from tests.process.world import EAGER, FAST, World, engine_pids, marked, until

TWO_GPUS = Machine(cores=(0,), gpus=("0", "1"))


class Changing:
    """A running fleet that is told to change, and whether its model was served all the while."""

    def __init__(self, world: World, source: ModelSource, machine: Machine | None = None) -> None:
        self.world = world
        self.open: dict[str, int] = {}  # requests, by replica
        self.fewest_ready = 99
        self.fleet = Fleet(
            {"m": source},
            base_dir=world.tmp_path,
            log_dir=world.tmp_path / "logs",
            on_event=world.events.append,
            open_requests=lambda replica: self.open.get(replica.id, 0),
            machine=machine,
            pace=FAST,
            restarts=EAGER,
        )

    def watch(self, view: FleetView) -> None:
        self.fewest_ready = min(self.fewest_ready, len(view.ready("m")))

    def states(self) -> dict[str, ReplicaState]:
        return {replica.id: replica.state for replica in self.fleet.view.of("m")}

    def get(self, replica_id: str) -> Replica:
        return next(replica for replica in self.fleet.view.of("m") if replica.id == replica_id)

    async def is_now(self, *ids: str, state: ReplicaState = ReplicaState.READY) -> None:
        await until(lambda: self.states() == dict.fromkeys(ids, state))


@asynccontextmanager
async def changing(world: World, source: ModelSource, machine: Machine | None = None) -> AsyncIterator[Changing]:
    one = Changing(world, source, machine)
    await one.fleet.start()
    try:
        await until(lambda: {*one.states().values()} == {ReplicaState.READY})
        one.fleet.subscribe(one.watch)
        yield one
    finally:
        await one.fleet.stop()


def at(*urls: str, key: str | None = None) -> ModelSource:
    return ModelSource(endpoints=urls, endpoint_api_key=key)


async def test_what_is_still_wanted_is_left_alone(world: World) -> None:
    async with FakeEngine(replicas=2) as engine, changing(world, at(*engine.urls)) as one:
        before = one.fleet.view
        assert one.fleet.update({"m": at(*engine.urls)}) == []
        assert one.fleet.view == before
        # and its id is its own wherever it stands
        assert one.fleet.update({"m": at(*reversed(engine.urls))}) == []
        assert [r.id for r in one.fleet.view.of("m")] == ["m/1", "m/0"]
        assert one.get("m/0").url == engine.urls[0]
        assert one.fewest_ready == 2


async def test_endpoints_come_and_go(world: World) -> None:
    async with FakeEngine(replicas=3) as engine, changing(world, at(*engine.urls[:2])) as one:
        one.open["m/0"] = 1
        changes = one.fleet.update({"m": at(engine.urls[1], engine.urls[2])})
        assert changes == ["m/2: comes", "m/0: goes"]
        await until(lambda: one.states().get("m/0") is ReplicaState.DRAINING)
        assert one.get("m/0").reason == "no longer in the configuration"
        assert [r.id for r in one.fleet.view.ready("m")] == ["m/1", "m/2"]
        await asyncio.sleep(0.2)  # it is not time that ends it
        assert "m/0" in one.states()
        one.open.clear()
        await one.is_now("m/1", "m/2")
        assert one.fewest_ready == 2
        # an id that is free is used again
        one.fleet.update({"m": at(*engine.urls)})
        await one.is_now("m/0", "m/1", "m/2")


async def test_the_last_endpoint_serves_until_its_successor_does(world: World) -> None:
    async with FakeEngine(replicas=2) as engine:
        await engine.health(503, replica=1)
        async with changing(world, at(engine.urls[0])) as one:
            one.fleet.update({"m": at(engine.urls[1])})
            await until(lambda: "503" in (one.get("m/1").reason or ""))
            assert one.states() == {"m/1": ReplicaState.STARTING, "m/0": ReplicaState.READY}
            one.fleet.update({"m": at(engine.urls[1])})  # asking again hurries nothing
            await asyncio.sleep(0.2)
            assert one.fewest_ready == 1
            await engine.health(200, replica=1)
            await one.is_now("m/1")
            assert one.fewest_ready == 1


async def test_what_comes_back_into_the_configuration_in_time_has_never_left(world: World) -> None:
    async with FakeEngine(replicas=2) as engine, changing(world, at(*engine.urls)) as one:
        one.open["m/1"] = 1
        one.fleet.drain("m/0")
        one.fleet.update({"m": at(engine.urls[0])})
        await until(lambda: one.states()["m/1"] is ReplicaState.DRAINING)
        one.fleet.update({"m": at(*engine.urls)})
        assert one.states() == {"m/0": ReplicaState.DRAINING, "m/1": ReplicaState.READY}
        one.open.clear()
        await asyncio.sleep(0.2)
        assert one.states() == {"m/0": ReplicaState.DRAINING, "m/1": ReplicaState.READY}


async def test_another_key_for_the_same_endpoint_is_a_change_without_a_gap(world: World) -> None:
    async with FakeEngine() as engine, changing(world, at(engine.url, key="old")) as one:
        one.open["m/0"] = one.open["m/1"] = 1  # counted by address
        one.fleet.update({"m": at(engine.url, key="new")})
        await one.is_now("m/1")
        assert one.get("m/1").api_key == "new"
        assert one.fewest_ready == 1


async def test_models_come_and_go(world: World) -> None:
    async with FakeEngine(models=("m", "other")) as engine, changing(world, at(engine.url)) as one:
        one.fleet.update({"m": at(engine.url), "other": at(engine.url)})
        await one.fleet.wait_ready("other", 10)
        one.fleet.update({"other": at(engine.url)})
        await until(lambda: [*one.fleet.view.replicas] == ["other"])
        with pytest.raises(KeyError):
            one.fleet.drain("m/0")


def engines(spec: EngineSpec, stall_timeout: float = 60.0) -> ModelSource:
    return ModelSource(engine=spec, stall_timeout=stall_timeout)


async def test_an_engine_whose_process_need_not_change_is_not_restarted(world: World) -> None:
    spec = world.spec()
    async with changing(world, engines(spec)) as one:
        before = engine_pids(world.marker)
        calm = spec.model_copy(update={"start_timeout": 99.0, "stop_timeout": 0.5})
        assert one.fleet.update({"m": engines(calm, stall_timeout=0.5)}) == []
        assert engine_pids(world.marker) == before
        # what can change in place has changed
        world.control.write_text("stuck")
        await until(lambda: world.told(EventKind.DIED))
        world.control.write_text("")
        assert world.told(EventKind.DIED)[0].startswith("no token for 0.5 s")
        await one.is_now("m/0")


async def test_an_engine_is_replaced_by_one_that_is_started_beside_it(world: World) -> None:
    async with changing(world, engines(world.spec())) as one:
        before = engine_pids(world.marker)
        one.open["m/0"] = 1
        changes = one.fleet.update({"m": engines(world.spec(other="1"))})
        assert changes == ["m/1: comes", "m/0: goes"]
        await until(lambda: one.states() == {"m/1": ReplicaState.READY, "m/0": ReplicaState.DRAINING})
        assert before < engine_pids(world.marker)
        one.open.clear()
        await one.is_now("m/1")
        assert not before & engine_pids(world.marker)
        assert one.fewest_ready == 1


async def test_an_engine_whose_successor_fails_goes_on(world: World) -> None:
    async with changing(world, engines(world.spec())) as one:
        before = engine_pids(world.marker)
        one.fleet.update({"m": engines(world.spec(at_start="exit:3"))})
        await until(lambda: one.states() == {"m/1": ReplicaState.FAILED, "m/0": ReplicaState.READY})
        # back to what it was
        one.fleet.update({"m": engines(world.spec())})
        await one.is_now("m/0")
        assert engine_pids(world.marker) == before
        assert one.fewest_ready == 1


async def test_without_room_the_old_engine_goes_first(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "available_memory", lambda: 0)
    seen: list[set[str]] = []
    async with changing(world, engines(world.spec(replicas=2))) as one:
        one.fleet.subscribe(lambda view: seen.append({r.id for r in view.of("m") if r.url}))
        one.fleet.update({"m": engines(world.spec(replicas=2, other="1"))})
        await one.is_now("m/2", "m/3")
        assert one.fewest_ready == 1  # one by one
        assert max(map(len, seen)) == 2


async def test_engines_are_moved_to_gpus_that_are_free(world: World) -> None:
    async with changing(world, engines(world.spec(replicas=1)), TWO_GPUS) as one:
        one.fleet.update({"m": engines(world.spec(other="1"))})
        await one.is_now("m/1")
        (engine,) = (p for p in marked(world.marker) if p.pid in engine_pids(world.marker))
        assert engine.environ()["CUDA_VISIBLE_DEVICES"] == "1"
        assert one.fewest_ready == 1


async def test_more_and_fewer_replicas(world: World) -> None:
    async with changing(world, engines(world.spec())) as one:
        first = engine_pids(world.marker)
        one.fleet.update({"m": engines(world.spec(replicas=3))})
        await one.is_now("m/0", "m/1", "m/2")
        one.fleet.update({"m": engines(world.spec())})
        await one.is_now("m/0")
        assert engine_pids(world.marker) == first


async def test_an_engine_that_is_on_its_way_out_is_not_restarted(world: World) -> None:
    async with changing(world, engines(world.spec(replicas=2))) as one:
        one.open["m/1"] = 1
        one.fleet.update({"m": engines(world.spec())})
        await until(lambda: one.states()["m/1"] is ReplicaState.DRAINING)
        before = engine_pids(world.marker)
        await one.fleet.restart("m/1")
        assert engine_pids(world.marker) == before
        # nor when it dies: its requests are lost to it
        next(p for p in marked(world.marker) if p.environ()["VLLM_API_KEY"] == one.get("m/1").api_key).kill()
        await one.is_now("m/0")


async def test_a_fleet_may_stop_in_the_middle_of_a_change(world: World) -> None:
    async with changing(world, engines(world.spec(replicas=2))) as one:
        one.open["m/0"] = one.open["m/1"] = 1
        one.fleet.update({"m": engines(world.spec(other="1"))})
        await until(lambda: ReplicaState.DRAINING in one.states().values())
    assert marked(world.marker) == []
