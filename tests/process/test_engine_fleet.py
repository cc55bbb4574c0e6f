"""The fleet over real processes, with a stand-in for vLLM."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from engines.fleet import EngineFailedError, Fleet
from engines.sources import ModelSource
from engines.spec import EngineSpec
from engines.types import EventKind, Replica, ReplicaState
from tests.process.world import FAST, World, engine_pids, marked, until

HERE = Path(__file__).parent
Start = Callable[..., Awaitable[Fleet]]


@pytest.fixture
async def running(world: World) -> AsyncIterator[Start]:
    """Starts fleets and stops them at the end."""
    fleets: list[Fleet] = []

    async def start(spec: EngineSpec, stall_timeout: float = 60.0) -> Fleet:
        fleet = world.fleet(spec, stall_timeout)
        fleets.append(fleet)
        await fleet.start()
        return fleet

    yield start
    for fleet in fleets:
        await fleet.stop()


def one(fleet: Fleet) -> Replica:
    return fleet.view.of("m")[0]


async def test_an_engine_becomes_ready_and_stops_without_a_trace(world: World) -> None:
    fleet = world.fleet(world.spec(child="1"))
    assert one(fleet).state is ReplicaState.STOPPED
    await fleet.start()
    replica = await fleet.wait_ready("m", 20)
    assert replica.id == "m/0"
    assert replica.url.startswith("http://127.0.0.1:")
    assert replica.api_key
    assert len(replica.api_key) > 30
    assert (replica.served_name, replica.max_model_len, replica.restarts) == ("m", 2048, 0)
    await until(lambda: one(fleet).load is not None)
    load = one(fleet).load
    assert load is not None
    assert load.waiting == 1
    assert len(marked(world.marker)) >= 3  # keeper, engine, its child
    assert all(replica.api_key not in " ".join(process.cmdline()) for process in marked(world.marker))
    assert any("standin says hello" in line for line in fleet.log_tail("m/0"))
    await fleet.stop()
    await fleet.stop()
    assert marked(world.marker) == []
    assert world.states() == [
        ReplicaState.STARTING,
        ReplicaState.READY,
        ReplicaState.DRAINING,
        ReplicaState.STOPPED,
    ]
    assert one(fleet).url == ""


async def test_a_pooling_engine_is_tried_by_an_embedding(world: World, running: Start) -> None:
    fleet = await running(world.spec(pooling="1"))
    await fleet.wait_ready("m", 20)


async def test_a_killed_engine_comes_back_at_another_address_with_another_key(world: World, running: Start) -> None:
    fleet = await running(world.spec(child="1"))
    before = await fleet.wait_ready("m", 20)
    engine = next(p for p in marked(world.marker) if "standin_engine.py" in " ".join(p.cmdline()[:2]))
    keeper = engine.parent()
    assert keeper is not None
    engine.kill()
    await until(lambda: one(fleet).state is not ReplicaState.READY)
    after = await fleet.wait_ready("m", 20)
    assert after.restarts == 1
    assert (after.url, after.api_key) != (before.url, before.api_key)
    assert after.api_key != before.api_key
    assert world.told(EventKind.DIED)[0].startswith("killed (SIGKILL)")
    assert not keeper.is_running()
    assert len(marked(world.marker)) == 3


async def test_a_killed_keeper_takes_the_engine_with_it(world: World, running: Start) -> None:
    fleet = await running(world.spec())
    await fleet.wait_ready("m", 20)
    old = marked(world.marker)
    keeper = next(p for p in old if "keeper.py" in " ".join(p.cmdline()))
    keeper.kill()
    await until(lambda: one(fleet).restarts == 1 and one(fleet).state is ReplicaState.READY)
    await until(lambda: not any(process in old for process in marked(world.marker)))


async def test_an_engine_whose_worker_is_killed_is_started_again(world: World, running: Start) -> None:
    fleet = await running(world.spec(child="needed"))
    await fleet.wait_ready("m", 20)
    worker = next(p for p in marked(world.marker) if "signal.pause" in " ".join(p.cmdline()))
    worker.kill()
    await until(lambda: one(fleet).restarts == 1 and one(fleet).state is ReplicaState.READY)
    assert "EngineDeadError: a worker has died" in world.told(EventKind.DIED)[0]
    assert len(marked(world.marker)) == 3


@pytest.mark.parametrize("group", [False, True], ids=["the engine alone", "its keeper too"])
async def test_a_frozen_engine_is_killed_and_started_again(world: World, running: Start, group: bool) -> None:
    fleet = await running(world.spec(child="1"), stall_timeout=0.5)
    await fleet.wait_ready("m", 20)
    old = marked(world.marker)
    (engine,) = engine_pids(world.marker)
    if group:
        os.killpg(os.getpgid(engine), signal.SIGSTOP)
    else:
        os.kill(engine, signal.SIGSTOP)
    fleet.report_failure("m/0")
    await until(lambda: one(fleet).restarts == 1 and one(fleet).state is ReplicaState.READY)
    assert world.told(EventKind.DIED)[0].startswith("no good health check for 0.5 s: no answer in time")
    await until(lambda: not any(process in old for process in marked(world.marker)))


async def test_a_frozen_engine_can_be_stopped(world: World) -> None:
    fleet = world.fleet(world.spec(stop_timeout=0.2))
    await fleet.start()
    await fleet.wait_ready("m", 20)
    (engine,) = engine_pids(world.marker)
    os.killpg(os.getpgid(engine), signal.SIGSTOP)
    await fleet.stop()
    assert marked(world.marker) == []


async def test_an_engine_that_exits_with_code_zero_unasked_has_died(
    world: World, running: Start, tmp_path: Path
) -> None:
    fleet = await running(world.spec(at_start="exit:0", once=str(tmp_path / "once")))
    replica = await fleet.wait_ready("m", 20)
    assert replica.restarts == 1
    assert world.told(EventKind.DIED)[0].startswith("exited with code 0")


async def test_a_crash_loop_is_contained_and_touches_nobody_else(world: World, tmp_path: Path, python: str) -> None:
    other = ModelSource(engine=world.spec())
    fleet = world.fleet(world.spec(at_start="exit:3"), other=other)
    await fleet.start()
    try:
        with pytest.raises(EngineFailedError, match="m/0: exited with code 3"):
            await fleet.wait_ready("m", 20)
        await fleet.wait_ready("other", 20)
        assert len([e for e in world.events if e.kind is EventKind.STARTED and e.model == "m"]) == 5
        assert one(fleet).state is ReplicaState.FAILED
        assert fleet.view.of("other")[0].restarts == 0
        # A restart has a clean slate: five more starts.
        await fleet.restart("m/0")
        with pytest.raises(EngineFailedError):
            await fleet.wait_ready("m", 20)
        assert len([e for e in world.events if e.kind is EventKind.STARTED and e.model == "m"]) == 10
        assert one(fleet).restarts == 9
    finally:
        await fleet.stop()
    assert (one(fleet).state, one(fleet).reason) == (ReplicaState.FAILED, "exited with code 3")


async def test_a_restart_replaces_the_process(world: World, running: Start) -> None:
    fleet = await running(world.spec())
    before = await fleet.wait_ready("m", 20)
    await asyncio.gather(fleet.restart("m/0"), fleet.restart("m/0"))
    after = await fleet.wait_ready("m", 20)
    assert after.api_key != before.api_key
    assert after.restarts == 1
    with pytest.raises(KeyError):
        await fleet.restart("m/7")


async def test_a_drained_engine_stays_drained_over_a_restart(world: World, running: Start) -> None:
    fleet = await running(world.spec())
    before = await fleet.wait_ready("m", 20)
    fleet.drain("m/0")
    assert one(fleet).state is ReplicaState.DRAINING
    assert (one(fleet).url, one(fleet).reason) == (before.url, "drained by an operator")
    await fleet.restart("m/0")
    await until(lambda: len(world.told(EventKind.READY)) == 2)
    assert one(fleet).state is ReplicaState.DRAINING
    fleet.resume("m/0")
    assert one(fleet).state is ReplicaState.READY


async def test_an_engine_that_is_deaf_to_sigterm_is_killed(world: World) -> None:
    fleet = world.fleet(world.spec(deaf="1", child="1", stop_timeout=0.3))
    await fleet.start()
    await fleet.wait_ready("m", 20)
    began = time.monotonic()
    await fleet.stop()
    assert 0.3 <= time.monotonic() - began < 5
    assert marked(world.marker) == []


async def test_stopping_may_come_at_any_moment(world: World) -> None:
    fleet = world.fleet(world.spec(at_start="hang", replicas=2))
    await fleet.start()
    await until(lambda: len(world.told(EventKind.STARTED)) == 2)
    await fleet.stop()
    assert [replica.state for replica in fleet.view.of("m")] == [ReplicaState.STOPPED] * 2
    assert marked(world.marker) == []


async def test_an_engine_that_hangs_at_start_is_given_another_try(world: World, running: Start, tmp_path: Path) -> None:
    fleet = await running(world.spec(at_start="hang", once=str(tmp_path / "once"), start_timeout=1.5))
    assert (await fleet.wait_ready("m", 20)).restarts == 1
    assert world.told(EventKind.DIED)[0].startswith("not ready 1.5 s after its start")


async def test_an_engine_that_dies_of_its_first_token_says_why(world: World, running: Start) -> None:
    world.control.write_text("fragile")
    fleet = await running(world.spec())
    await until(lambda: world.told(EventKind.DIED))
    assert "exited with code 0: vllm.v1.engine.exceptions.EngineDeadError: gone" in world.told(EventKind.DIED)[0]
    assert world.told(EventKind.READY) == []
    world.control.write_text("")
    await fleet.wait_ready("m", 20)


async def test_a_taken_port_is_no_misfortune(world: World, running: Start, tmp_path: Path) -> None:
    fleet = await running(world.spec(at_start="port", once=str(tmp_path / "once")))
    assert (await fleet.wait_ready("m", 20)).restarts == 1
    assert world.told(EventKind.DIED) == ["its port was taken by another process; starts again in 0 s"]


@pytest.mark.parametrize(
    ("what", "reason", "starts"),
    [
        ("flag", "vLLM does not know this flag: --nonsense=1 (see engine.args)", 1),
        (
            "say:torch.OutOfMemoryError: CUDA out of memory.",
            "out of memory: torch.OutOfMemoryError: CUDA out of memory.",
            5,
        ),
        ("sigkill", "killed (SIGKILL), most likely because the machine is out of memory", 5),
        ("say:ValueError: no such dtype", "exited with code 1: ValueError: no such dtype", 5),
    ],
)
async def test_a_start_that_fails_says_why(world: World, running: Start, what: str, reason: str, starts: int) -> None:
    fleet = await running(world.spec(at_start=what))
    with pytest.raises(EngineFailedError) as caught:
        await fleet.wait_ready("m", 20)
    assert str(caught.value) == f"m/0: {reason}"
    assert len(world.told(EventKind.STARTED)) == starts


async def test_without_a_model_or_an_interpreter_nothing_is_started(
    world: World, running: Start, tmp_path: Path
) -> None:
    fleet = await running(world.spec().model_copy(update={"model": "./nowhere"}))
    with pytest.raises(EngineFailedError, match=r"there is no model at .*nowhere"):
        await fleet.wait_ready("m", 20)
    fleet = await running(world.spec().model_copy(update={"python": "./no-such-python"}))
    with pytest.raises(EngineFailedError, match=r"no vLLM in ./no-such-python: run scripts/setup-engine"):
        await fleet.wait_ready("m", 20)
    assert world.told(EventKind.STARTED) == []


async def test_an_engine_that_is_unwell_comes_and_goes(world: World, running: Start) -> None:
    fleet = await running(world.spec())
    before = await fleet.wait_ready("m", 20)
    world.control.write_text("unwell")
    fleet.report_failure("m/0")
    await until(lambda: one(fleet).state is ReplicaState.UNHEALTHY)
    assert one(fleet).reason == "its health check says HTTP 503"
    world.control.write_text("")
    after = await fleet.wait_ready("m", 20)
    assert after.url == before.url


async def test_an_engine_that_stays_unwell_is_started_again(world: World, running: Start) -> None:
    fleet = await running(world.spec(), stall_timeout=0.5)
    await fleet.wait_ready("m", 20)
    world.control.write_text("unwell")
    await until(lambda: world.told(EventKind.DIED))
    world.control.write_text("")
    assert (await fleet.wait_ready("m", 20)).restarts == 1
    assert world.told(EventKind.DIED)[0].startswith("no good health check for 0.5 s: its health check says HTTP 503")


async def test_an_engine_without_progress_is_started_again(world: World, running: Start) -> None:
    fleet = await running(world.spec(), stall_timeout=0.5)
    await fleet.wait_ready("m", 20)
    world.control.write_text("stuck")
    await until(lambda: world.told(EventKind.DIED))
    world.control.write_text("")
    assert (await fleet.wait_ready("m", 20)).restarts == 1
    assert world.told(EventKind.DIED)[0].startswith("no token for 0.5 s with 2 requests running")


async def test_a_reported_stall_is_looked_into(world: World, running: Start) -> None:
    fleet = await running(world.spec(), stall_timeout=1.0)
    await fleet.wait_ready("m", 20)
    # Its counters move, so a trial request without an answer proves nothing.
    world.control.write_text("mute")
    fleet.report_stall("m/0")
    fleet.report_stall("gone/0")

    def asked_and_well_again() -> bool:
        lines = fleet.log_tail("m/0", 1000)
        trials = [i for i, line in enumerate(lines) if line == "asked: /v1/completions"]
        return len(trials) == 2 and "access: /health 200" in lines[trials[1] :]

    await until(asked_and_well_again)
    assert world.told(EventKind.DIED) == []
    # Now they do not.
    world.control.write_text("mute quiet")
    fleet.report_stall("m/0")
    await until(lambda: world.told(EventKind.DIED))
    world.control.write_text("")
    assert (await fleet.wait_ready("m", 20)).restarts == 1
    assert world.told(EventKind.DIED)[0].startswith("a trial request got no answer in 1 s")


async def test_a_broken_listener_does_not_end_the_watch(world: World, caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("listener")

    fleet = Fleet(
        {"m": ModelSource(engine=world.spec())},
        base_dir=world.tmp_path,
        log_dir=world.tmp_path / "logs",
        on_event=broken,
        pace=FAST,
    )
    fleet.subscribe(broken)
    await fleet.start()
    await fleet.wait_ready("m", 20)
    await fleet.stop()
    assert "a subscriber of the fleet's view failed" in caplog.text
    assert "the listener of engine events failed" in caplog.text


class Gateway:
    """A gateway stand-in in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def says(self, *kinds: str) -> None:
        assert self.process.stdout is not None
        for kind in kinds:
            assert await asyncio.wait_for(self.process.stdout.readline(), 30) == f"{kind}\n".encode()


@pytest.fixture
async def gateway(world: World) -> AsyncIterator[Gateway]:
    env = dict(world.spec(child="1").env)
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(HERE / "gateway_standin.py"),
        str(world.tmp_path), world.python, json.dumps(env), str(world.tmp_path / "logs"),
        stdout=asyncio.subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(HERE.parents[1])},
    )  # fmt: skip
    yield Gateway(process)
    if process.returncode is None:
        process.kill()
    await process.communicate()


async def test_a_killed_gateway_leaves_no_orphan(world: World, gateway: Gateway) -> None:
    await gateway.says("started", "ready")
    assert len(marked(world.marker)) == 3
    gateway.process.kill()
    await until(lambda: marked(world.marker) == [], timeout=5)


async def test_on_the_gateways_event_loop_too_deaths_are_noticed_and_a_stop_leaves_nothing(
    world: World, gateway: Gateway
) -> None:
    await gateway.says("started", "ready")
    next(p for p in marked(world.marker) if "standin_engine.py" in " ".join(p.cmdline()[:2])).kill()
    await gateway.says("died", "started", "ready")
    gateway.process.send_signal(signal.SIGTERM)
    await gateway.says("stopped")
    assert await gateway.process.wait() == 0
    assert marked(world.marker) == []
