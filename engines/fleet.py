"""All engines of a gateway: one view of them, replaced whole on each change."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.parse import quote

from engines.command import Machine, Placement, place
from engines.lifecycle import Happening, RestartPolicy
from engines.machine import this_machine
from engines.monitor import Pace
from engines.process import log_tail
from engines.record import Record
from engines.sources import ModelSource, RemoteEngine
from engines.supervisor import Job, LocalEngine
from engines.types import EngineEvent, EventKind, FleetView, Replica, ReplicaState

_log: Final = logging.getLogger("engines")
_AFTER_A_BUG: Final = 1.0  # seconds
_DRAINED: Final = "drained by an operator"

Engine = LocalEngine | RemoteEngine


class EngineFailedError(Exception):
    """A model has no replica left that could become ready by itself. The message says why."""


class Fleet:
    """Starts, watches and restarts engines, and tells what there is. Not thread-safe: it belongs to one event loop.

    `view` is always the latest state and never waits. Nothing that one engine does affects another's.
    """

    def __init__(
        self,
        models: Mapping[str, ModelSource],
        *,
        base_dir: Path,
        log_dir: Path,
        on_event: Callable[[EngineEvent], None] | None = None,
        machine: Machine | None = None,
        pace: Pace | None = None,
        restarts: RestartPolicy | None = None,
    ) -> None:
        """`base_dir`: where relative paths of the specs count from. `log_dir`: what engines print goes there, a file
        for each. `on_event` is called from the event loop and must not block. The rest is for tests."""
        self.view = FleetView()
        self._base_dir, self._log_dir = base_dir.absolute(), log_dir.absolute()
        self._on_event = on_event
        self._machine = machine or this_machine()
        self._pace, self._policy = pace or Pace(), restarts or RestartPolicy()
        self._subscribers: list[Callable[[FleetView], None]] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._restarts: dict[str, asyncio.Task[None]] = {}
        self._running = False
        self._engines: dict[str, list[Engine]] = {}
        specs = [source.engine for source in models.values() if source.engine for _ in range(source.engine.replicas)]
        placements = iter(place(specs, self._machine))
        for model, source in models.items():
            self._engines[model] = [*self._locals(model, source, placements), *self._remotes(model, source)]
        self._publish()

    def _locals(self, model: str, source: ModelSource, placements: Iterator[Placement]) -> Iterator[LocalEngine]:
        if source.engine is None:
            return
        for index in range(source.engine.replicas):
            job = Job(
                spec=source.engine,
                placement=next(placements),
                machine=self._machine,
                base_dir=self._base_dir,
                # Model names may hold slashes.
                log=self._log_dir / f"{quote(model, safe='')}-{index}.log",
                stall_timeout=source.stall_timeout,
            )
            yield LocalEngine(self._record(model, index, "", None, model), job, self._pace, self._policy)

    def _remotes(self, model: str, source: ModelSource) -> Iterator[RemoteEngine]:
        for index, url in enumerate(source.endpoints, start=source.engine.replicas if source.engine else 0):
            name = source.served_model_name or model
            record = self._record(model, index, url.rstrip("/"), source.endpoint_api_key, name)
            yield RemoteEngine(record, source.served_model_name, self._pace)

    def _record(self, model: str, index: int, url: str, api_key: str | None, served_name: str) -> Record:
        replica = Replica(f"{model}/{index}", model, url, api_key, served_name, ReplicaState.STOPPED, managed=not url)
        return Record(replica, on_change=self._publish, on_event=self._tell)

    # What everybody sees

    def subscribe(self, callback: Callable[[FleetView], None]) -> Callable[[], None]:
        """Have `callback` called with each new view, from the event loop; it must not block. Returns how to end that."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def _publish(self) -> None:
        self.view = FleetView({m: tuple(e.record.replica for e in engines) for m, engines in self._engines.items()})
        for callback in tuple(self._subscribers):
            try:
                callback(self.view)
            except Exception:  # noqa: BLE001  a listener's fault must not end the watch over the engines
                _log.exception("a subscriber of the fleet's view failed")

    def _tell(self, event: EngineEvent) -> None:
        try:
            if self._on_event is not None:
                self._on_event(event)
        except Exception:  # noqa: BLE001  as above
            _log.exception("the listener of engine events failed")

    # Starting and stopping

    async def start(self) -> None:
        """Start and watch all engines, in the background. Returns at once."""
        self._running = True
        for engine in self._all():
            self._launch(engine)

    def _launch(self, engine: Engine) -> None:
        if self._running:
            # At once, so that nobody who looks now takes the last life's end for this one's.
            engine.record.happened(Happening.LAUNCHED, reason="starting")
            self._tasks[engine.record.replica.id] = asyncio.create_task(_never_die(engine))

    async def stop(self) -> None:
        """Stop all engines of ours and all watching. Returns when nothing is left, `stop_timeout` later at most (and
        some seconds if the kernel is slow to kill). Cancelling kills what still runs. May be called twice."""
        self._running = False
        tasks = [*self._tasks.values(), *self._restarts.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def restart(self, replica_id: str) -> None:
        """Stop an engine of ours if it runs, and start it again with a clean slate: also one that has FAILED. Returns
        when the old process is gone and the new start is under way; a restart that is asked for meanwhile is the
        same one. Raises KeyError for an unknown replica, ValueError for one that runs elsewhere."""
        engine = self._engine(replica_id)
        if not isinstance(engine, LocalEngine):
            raise ValueError(f"{replica_id} runs elsewhere: only whoever runs it can restart it")
        task = self._restarts.get(replica_id)
        if task is None:
            task = asyncio.create_task(self._restart(engine))
            self._restarts[replica_id] = task
            task.add_done_callback(lambda _: self._restarts.pop(replica_id, None))
        await asyncio.shield(task)

    async def _restart(self, engine: LocalEngine) -> None:
        task = self._tasks.get(engine.record.replica.id)
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        self._launch(engine)

    def drain(self, replica_id: str) -> None:
        """Let a replica take nothing new until `resume`: it runs on, shows as DRAINING, and its open requests end in
        their time. That outlives restarts of its engine. May be called twice. Raises KeyError for an unknown replica."""
        record = self._engine(replica_id).record
        if record.held is None:
            record.hold(_DRAINED)
            record.tell(EventKind.NOTE, f"{_DRAINED}: takes nothing new until resumed")

    def resume(self, replica_id: str) -> None:
        """Let a replica that was drained take requests again; does nothing to any other. Raises KeyError for an unknown
        replica."""
        record = self._engine(replica_id).record
        if record.held == _DRAINED:
            record.hold(None)
            record.tell(EventKind.NOTE, "resumed by an operator")

    async def wait_ready(self, model: str, timeout: float) -> Replica:
        """Wait until `model` has a replica that takes requests; the first such one. Raises TimeoutError after
        `timeout` seconds, EngineFailedError at once when every replica has FAILED, KeyError for an unknown model."""
        changed = asyncio.Event()
        unsubscribe = self.subscribe(lambda _: changed.set())
        try:
            async with asyncio.timeout(timeout):
                while True:
                    replicas = self.view.replicas[model]
                    for replica in replicas:
                        if replica.state is ReplicaState.READY:
                            return replica
                    if replicas and all(r.state is ReplicaState.FAILED for r in replicas):
                        raise EngineFailedError("; ".join(f"{r.id}: {r.reason}" for r in replicas))
                    await changed.wait()
                    changed.clear()
        finally:
            unsubscribe()

    # What the request path reports, and what operators ask. None of these blocks.

    def report_failure(self, replica_id: str) -> None:
        """A request could not reach this replica: have a look at once. Ignores replicas that are gone."""
        with suppress(KeyError):
            self._engine(replica_id).poke()

    def report_stall(self, replica_id: str) -> None:
        """A request waited for tokens in vain (`stall_timeout`): find out whether the engine gets anywhere, and
        restart it if not. A hung engine's health check is good, so `report_failure` would not notice. Ignores
        replicas that are gone."""
        with suppress(KeyError):
            self._engine(replica_id).suspect()

    def log_tail(self, replica_id: str, lines: int = 20) -> list[str]:
        """The last lines that an engine of ours printed; none for one that runs elsewhere. Raises KeyError for an
        unknown replica."""
        engine = self._engine(replica_id)
        return log_tail(engine.job.log, lines) if isinstance(engine, LocalEngine) else []

    def _all(self) -> Iterator[Engine]:
        return (engine for engines in self._engines.values() for engine in engines)

    def _engine(self, replica_id: str) -> Engine:
        for engine in self._all():
            if engine.record.replica.id == replica_id:
                return engine
        raise KeyError(replica_id)


async def _never_die(engine: Engine) -> None:
    """Look after an engine until that is cancelled or given up. A bug must not leave it unwatched."""
    while True:
        try:
            return await engine.run()
        except Exception:  # noqa: BLE001  whatever it is, it is logged, and the engine is watched again
            _log.exception("looking after %s failed; starting over", engine.record.replica.id)
            await asyncio.sleep(_AFTER_A_BUG)
