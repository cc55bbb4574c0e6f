"""Runs one engine of ours: starts it, waits until it generates, watches it, and starts it again when it dies."""

import asyncio
import secrets
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from engines import command, probe
from engines.autopsy import Verdict, explain
from engines.command import LOOPBACK, Machine, Placement
from engines.lifecycle import Happening, RestartPolicy
from engines.machine import find_python
from engines.monitor import HungError, Monitor, Pace
from engines.probe import Address, ProbeError
from engines.process import EngineProcess, log_tail
from engines.record import Record
from engines.spec import EngineSpec
from engines.types import EventKind, ReplicaState

_TAIL_FOR_AUTOPSY: Final = 200  # lines: a Python traceback of several processes, interleaved
_DEATH_THROES: Final = 5.0  # seconds from a wrong answer to the exit that explains it


@dataclass(frozen=True, slots=True)
class Job:
    """What to run, and where."""

    spec: EngineSpec
    placement: Placement
    machine: Machine
    base_dir: Path  # relative paths of the spec count from here; the engine's working directory
    log: Path
    stall_timeout: float  # seconds


class LocalEngine:
    """One replica that is a process of ours, over all its starts. Each start has a port and a key of its own."""

    def __init__(self, record: Record, job: Job, pace: Pace, policy: RestartPolicy) -> None:
        self.record = record
        self.job = job
        self._pace = pace
        self._policy = policy
        self._monitor: Monitor | None = None
        self._ready_at: float | None = None
        self._launches = 0
        self.pid: int | None = None  # of the engine's keeper, while there is one

    def adjust(self, spec: EngineSpec, stall_timeout: float) -> None:
        """Take up what changes without a new process (`rollout.same_process`)."""
        self.job = replace(self.job, spec=spec, stall_timeout=stall_timeout)
        if self._monitor is not None:
            self._monitor.stall_timeout = stall_timeout

    def poke(self) -> None:
        if self._monitor is not None:
            self._monitor.poke()

    def suspect(self) -> None:
        if self._monitor is not None:
            self._monitor.suspect()

    async def run(self) -> None:
        """Keep an engine running. Returns when that is given up: the replica has FAILED then, and `run` may be called
        again. Cancelling stops the engine and returns when nothing of it is left, after `stop_timeout` at most; a
        second cancellation kills it."""
        record, policy = self.record, self._policy
        starts: list[float] = []
        deaths = 0
        try:
            while True:
                starts = [*starts[1 - policy.starts :], time.monotonic()]
                verdict = await self._live()
                now = time.monotonic()
                if not verdict.port_taken:
                    deaths = deaths + 1 if policy.died_too_soon(self._ready_at, now) else 0
                delay = None if verdict.hopeless else policy.delay(starts, deaths, now)
                # No longer at that address; another process could be there soon.
                record.happened(Happening.DIED, reason=verdict.reason, load=None, url="", api_key=None)
                if delay is None:
                    record.happened(Happening.GAVE_UP)
                    record.tell(EventKind.FAILED, f"{verdict.reason}; not started again until asked")
                    return
                record.tell(EventKind.DIED, f"{verdict.reason}; starts again in {delay:g} s")
                await asyncio.sleep(delay)
        finally:
            if record.state is not ReplicaState.FAILED:
                record.happened(Happening.ENDED, reason=None, load=None, url="", api_key=None)

    async def _live(self) -> Verdict:
        """One engine from its start to its death, and why it died."""
        record, log = self.record, self.job.log
        self._ready_at = None
        record.happened(Happening.LAUNCHED, reason="starting")
        prepared = await self._prepare()
        if isinstance(prepared, Verdict):
            return prepared
        at, how = prepared
        try:
            process = EngineProcess.start(how, log)
        except OSError as error:
            return Verdict(f"cannot start a process: {error}")
        self._launches += 1
        record.change(url=at.url, api_key=at.api_key, card={}, restarts=self._launches - 1, reason="loading the model")
        record.tell(EventKind.STARTED, f"started process {process.pid} at {at.url}, log in {log}")
        self.pid = process.pid
        self._monitor = monitor = Monitor(
            at,
            self._pace,
            on_load=lambda load: record.change(load=load),
            stall_timeout=self.job.stall_timeout,
        )
        serving = asyncio.ensure_future(self._serve(monitor))
        ends: set[asyncio.Future[Any]] = {serving, process.exited}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not process.exited.done():
                try:
                    serving.result()
                except HungError as error:
                    return Verdict(str(error))
                except ProbeError as error:
                    await asyncio.wait({process.exited}, timeout=_DEATH_THROES)
                    if not process.exited.done():
                        return Verdict(f"it does not get ready: {error}")
            return explain(process.exited.result(), log_tail(log, _TAIL_FOR_AUTOPSY))
        except asyncio.CancelledError:
            record.happened(Happening.STOPPING, reason="stopping")
            await process.stop(self.job.spec.stop_timeout)
            record.tell(EventKind.STOPPED, "stopped")
            raise
        finally:
            self._monitor = self.pid = None
            serving.cancel()
            monitor.close()
            process.kill()
            await asyncio.gather(serving, process.gone(), return_exceptions=True)

    async def _prepare(self) -> tuple[Address, command.Command] | Verdict:
        job, spec = self.job, self.job.spec
        folder = command.local_model(spec.model, job.base_dir)
        if command.names_a_path(spec.model) and not folder.exists():
            return Verdict(f"there is no model at {folder}", hopeless=True)
        python = await asyncio.to_thread(find_python, spec.python, job.base_dir)
        if python is None:
            where = spec.python or ".venv-engine nor in Penstock's own environment"
            return Verdict(
                f"no vLLM in {where}: run scripts/setup-engine, or set engine.python to an interpreter that has it",
                hopeless=True,
            )
        port, key = _free_port(), secrets.token_hex(32)  # no dash in front, which a wrapper could take for a flag
        how = command.build(
            spec,
            name=self.record.replica.served_name,
            port=port,
            api_key=key,
            python=python,
            local_model=folder if folder.exists() else None,
            placement=job.placement,
            machine=job.machine,
            cwd=job.base_dir,
        )
        return Address(f"http://{LOOPBACK}:{port}", key), how

    async def _serve(self, monitor: Monitor) -> None:
        """Get ready, then watch. Ends only by raising: `HungError` when the engine must be killed, `ProbeError` when it
        cannot generate."""
        record, spec = self.record, self.job.spec
        name = record.replica.served_name
        started = time.monotonic()
        try:
            async with asyncio.timeout(spec.start_timeout):
                await monitor.until_well(self._pace.starting)
                record.change(reason="generating a first token")
                await probe.trial(monitor.line, name, spec.start_timeout)
                cards = await probe.cards(monitor.line)
        except TimeoutError:
            raise HungError(f"not ready {spec.start_timeout:g} s after its start (start_timeout)") from None
        self._ready_at = time.monotonic()
        card = probe.pick_card(cards, model=name, served_model_name=name).card
        record.happened(Happening.ANSWERED, card=card, reason=None)
        record.tell(EventKind.READY, f"ready after {self._ready_at - started:.1f} s")
        while True:
            why = await monitor.until_silent(model=name)
            record.happened(Happening.SILENT, reason=why)
            record.tell(EventKind.UNHEALTHY, why)
            stall_timeout = self.job.stall_timeout
            try:
                async with asyncio.timeout(stall_timeout):
                    await monitor.until_well(self._pace.doubtful)
            except TimeoutError:
                raise HungError(f"no good health check for {stall_timeout:g} s: {why}") from None
            record.happened(Happening.ANSWERED, reason=None)
            record.tell(EventKind.READY, "answers again")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        port: int = listener.getsockname()[1]
        return port
