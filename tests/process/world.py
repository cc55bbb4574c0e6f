"""A fleet over real processes, with a stand-in for vLLM, and what is left of it."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from engines.fleet import Fleet
from engines.lifecycle import RestartPolicy
from engines.monitor import Pace
from engines.sources import ModelSource
from engines.spec import EngineSpec
from engines.types import EngineEvent, EventKind, FleetView, ReplicaState

FAST = Pace(starting=0.05, absent=0.05, doubtful=0.05, watching=0.05)
EAGER = RestartPolicy(first_delay=0.02, longest_delay=0.1)


def marked(marker: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("STANDIN_MARKER") == marker and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            pass
    return found


def zombies() -> list[psutil.Process]:
    """Children of this process that have ended and that nobody has asked for."""
    found = []
    for process in psutil.Process().children():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def engine_pids(marker: str) -> set[int]:
    """The main processes of the engines."""
    found = set()
    for process in marked(marker):
        with suppress(psutil.NoSuchProcess):
            if "standin_engine.py" in " ".join(process.cmdline()[:2]):
                found.add(process.pid)
    return found


async def until(condition: Callable[[], object], timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.02)


class World:
    """A fleet under test, and what it told."""

    def __init__(self, tmp_path: Path, python: str, marker: str) -> None:
        self.tmp_path, self.python, self.marker = tmp_path, python, marker
        self.control = tmp_path / "control"
        self.events: list[EngineEvent] = []
        self.views: list[FleetView] = []
        (tmp_path / "model").mkdir()

    def spec(
        self, *, replicas: int = 1, stop_timeout: float = 2.0, start_timeout: float = 30.0, **env: str
    ) -> EngineSpec:
        return EngineSpec(
            model="./model",
            replicas=replicas,
            python=self.python,
            stop_timeout=stop_timeout,
            start_timeout=start_timeout,
            env={"STANDIN_MARKER": self.marker, "STANDIN_CONTROL": str(self.control)}
            | {f"STANDIN_{name.upper()}": value for name, value in env.items()},
        )

    def fleet(self, spec: EngineSpec, stall_timeout: float = 60.0, **more: ModelSource) -> Fleet:
        fleet = Fleet(
            {"m": ModelSource(engine=spec, stall_timeout=stall_timeout), **more},
            base_dir=self.tmp_path,
            log_dir=self.tmp_path / "logs",
            on_event=self.events.append,
            pace=FAST,
            restarts=EAGER,
        )
        fleet.subscribe(self.views.append)
        return fleet

    def told(self, kind: EventKind) -> list[str]:
        return [event.message for event in self.events if event.kind is kind]

    def states(self) -> list[ReplicaState]:
        states = [view.of("m")[0].state for view in self.views]
        return [state for i, state in enumerate(states) if i == 0 or state is not states[i - 1]]
