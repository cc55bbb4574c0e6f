"""All engines of a gateway: one view of them, replaced whole on each change."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from urllib.parse import quote

from engines.command import Machine, Placement, place
from engines.lifecycle import Happening, RestartPolicy
from engines.machine import available_memory, resident_memory, this_machine
from engines.monitor import Pace
from engines.process import log_tail
from engines.record import Record
from engines.rollout import Seat, memory_allows, next_steps, room_beside, same_process
from engines.sources import ModelSource, RemoteEngine
from engines.spec import EngineSpec
from engines.supervisor import Job, LocalEngine
from engines.types import EngineEvent, EventKind, FleetView, Replica, ReplicaState

_log: Final = logging.getLogger("engines")
_AFTER_A_BUG: Final = 1.0  # seconds
_DRAIN_POLL: Final = 0.05  # seconds
_DRAINED: Final = "drained by an operator"
_LEAVES: Final = "no longer in the configuration"

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
        open_requests: Callable[[Replica], int] = lambda _: 0,
        machine: Machine | None = None,
        pace: Pace | None = None,
        restarts: RestartPolicy | None = None,
    ) -> None:
        """`base_dir`: where relative paths of the specs count from. `log_dir`: what engines print goes there, a file
        for each. `on_event` is called from the event loop and must not block. `open_requests`: how many there are on a
        replica, which is not stopped before they have ended. The rest is for tests."""
        self.view = FleetView()
        self._base_dir, self._log_dir = base_dir.absolute(), log_dir.absolute()
        self._on_event = on_event
        self._open_requests = open_requests
        self._machine = machine or this_machine()
        self._pace, self._policy = pace or Pace(), restarts or RestartPolicy()
        self._subscribers: list[Callable[[FleetView], None]] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._restarts: dict[str, asyncio.Task[None]] = {}
        self._retiring: dict[str, asyncio.Task[None]] = {}
        self._running = self._settling = False
        self._members: dict[str, list[Member]] = {}
        self._places: dict[str, int] = {}  # engines of ours that ran for a model when it last changed
        self.update(models)

    def _record(self, model: str, index: int, url: str, api_key: str | None, served_name: str) -> Record:
        replica = Replica(f"{model}/{index}", model, url, api_key, served_name, ReplicaState.STOPPED, managed=not url)
        return Record(replica, on_change=self._publish, on_event=self._tell)

    # What there shall be

    def update(self, models: Mapping[str, ModelSource]) -> list[str]:
        """Change over to another configuration, in the background; returns at once what that will do, a line for each
        replica that comes or goes. Never fails.

        A replica whose own settings are the same is kept, under its id. One that is no longer wanted takes nothing new,
        ends its open requests, and is stopped; but where others come in its place, it serves until they are ready. An
        engine of ours is replaced by one that is started beside it if there is room, else after it has gone.
        """
        before = {member.id for member in self._all() if not member.leaving}
        wanted = {model: list(_wanted(model, source)) for model, source in models.items()}
        specs = [want.spec for wants in wanted.values() for want in wants if want.spec is not None]
        placements = iter(place(specs, self._machine))
        for model in {**self._members, **wanted}:
            members = self._members.get(model, [])
            self._places[model] = sum(m.want.spec is not None and m.id in self._tasks for m in members)
            self._members[model] = self._match(model, members, wanted.get(model, []), placements)
        self._publish()
        after = {member.id for member in self._all() if not member.leaving}
        return [f"{id_}: comes" for id_ in sorted(after - before)] + [f"{id_}: goes" for id_ in sorted(before - after)]

    def _match(
        self, model: str, members: list["Member"], wants: list["Want"], placements: Iterator[Placement]
    ) -> list["Member"]:
        """The members of a model, those that stay first, in the order of the configuration."""
        # Who serves is kept rather than who does not, and who was to stay anyway.
        free = sorted(
            (member for member in members if not member.ending),
            key=lambda m: (m.engine.record.state is not ReplicaState.READY, m.leaving),
        )
        staying: list[Member] = []
        for want in wants:
            placement = next(placements) if want.spec is not None else Placement()
            member = next((one for one in free if one.want.same(want)), None)
            if member is None:
                taken = {one.id for one in [*members, *staying]}
                index = next(i for i in itertools.count() if f"{model}/{i}" not in taken)
                member = self._make(model, index, want, placement)
            else:
                free.remove(member)
                self._keep(member, want)
            staying.append(member)
        gone = [member for member in members if member not in staying]
        for member in gone:
            member.leaving = True
        return staying + [member for member in gone if member.id in self._tasks]

    def _make(self, model: str, index: int, want: "Want", placement: Placement) -> "Member":
        record = self._record(model, index, want.url, want.api_key, want.served_model_name or model)
        if want.spec is None:
            return Member(want, RemoteEngine(record, want.served_model_name, self._pace))
        job = Job(
            spec=want.spec,
            placement=placement,
            machine=self._machine,
            base_dir=self._base_dir,
            # Model names may hold slashes.
            log=self._log_dir / f"{quote(model, safe='')}-{index}.log",
            stall_timeout=want.stall_timeout,
        )
        return Member(want, LocalEngine(record, job, self._pace, self._policy))

    def _keep(self, member: "Member", want: "Want") -> None:
        member.want = want
        if isinstance(member.engine, LocalEngine) and want.spec is not None:
            member.engine.adjust(want.spec, want.stall_timeout)
        if member.leaving:
            member.leaving = False
            retiring = self._retiring.pop(member.id, None)
            if retiring is not None:
                retiring.cancel()
            member.engine.record.hold(_DRAINED if member.drained else None)

    def _settle_soon(self) -> None:
        """Have the change-over looked at when whatever is under way has been done."""
        if self._running and not self._settling:
            self._settling = True
            asyncio.get_running_loop().call_soon(self._settle)

    def _settle(self) -> None:
        self._settling = False
        if not self._running:
            return
        for members in self._members.values():
            waiting = any(m.id not in self._tasks and not m.leaving for m in members)
            if not waiting and not any(m.leaving and m.id not in self._retiring for m in members):
                continue
            by_id = {member.id: member for member in members}
            seats = [self._seat(member, members) for member in members if member.id not in self._retiring]
            room_to_come = any(m.id in self._retiring and m.want.spec is not None for m in self._all())
            steps = next_steps(seats, room_to_come=room_to_come)
            for id_ in steps.launch:
                self._launch(by_id[id_].engine)
                if by_id[id_].want.spec is not None:
                    break  # whether there is room for another one is seen with this one in its place
            for id_ in steps.retire:
                self._retiring[id_] = asyncio.create_task(self._retire(by_id[id_]))

    def _seat(self, member: "Member", members: list["Member"]) -> Seat:
        record, launched = member.engine.record, member.id in self._tasks
        return Seat(
            id=member.id,
            local=member.want.spec is not None,
            leaving=member.leaving,
            launched=launched,
            ready=record.replica.state is ReplicaState.READY,
            proven=record.proven,
            fits=launched or member.leaving or self._fits(member, members),
        )

    def _fits(self, member: "Member", members: list["Member"]) -> bool:
        """Whether an engine can be started beside those that run; moves it to free GPUs if need be."""
        engine = member.engine
        if not isinstance(engine, LocalEngine):
            return True
        running = [m.engine.job for m in self._all() if isinstance(m.engine, LocalEngine) and m.id in self._tasks]
        others = [(job.spec, job.placement) for job in running]
        placement = room_beside(engine.job.spec, engine.job.placement, others, self._machine)
        if placement is None:
            return False
        engine.job = replace(engine.job, placement=placement)
        ours = [m for m in members if isinstance(m.engine, LocalEngine) and m.id in self._tasks]
        if len(ours) < self._places.get(engine.record.replica.model, 0):
            return True  # in the place of one that has gone
        old = [m.engine.pid for m in ours if m.leaving and isinstance(m.engine, LocalEngine)]
        return all(memory_allows(available_memory(), resident_memory(pid)) for pid in old if pid is not None)

    async def _retire(self, member: "Member") -> None:
        """Let a replica end what it has, and let it go."""
        record = member.engine.record
        record.hold(_LEAVES)
        record.tell(EventKind.NOTE, f"{_LEAVES}: takes nothing new, and stops when its open requests have ended")
        # What has died meanwhile need not come back for it. An endpoint that is there under another id counts there.
        while record.state in {ReplicaState.READY, ReplicaState.UNHEALTHY} and self._open_requests(record.replica):
            if any(m.want.url and m.want.url == member.want.url and not m.leaving for m in self._all()):
                break
            await asyncio.sleep(_DRAIN_POLL)
        member.ending = True
        if member.id in self._restarts:
            await asyncio.wait({self._restarts[member.id]})
        task = self._tasks[member.id]
        task.cancel()
        await asyncio.wait({task})
        model = record.replica.model
        self._members[model].remove(member)
        if not self._members[model]:
            del self._members[model], self._places[model]
        del self._tasks[member.id], self._retiring[member.id]
        self._publish()

    # What everybody sees

    def subscribe(self, callback: Callable[[FleetView], None]) -> Callable[[], None]:
        """Have `callback` called with each new view, from the event loop; it must not block. Returns how to end that."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def _publish(self) -> None:
        self.view = FleetView({m: tuple(e.engine.record.replica for e in all_) for m, all_ in self._members.items()})
        for callback in tuple(self._subscribers):
            try:
                callback(self.view)
            except Exception:  # noqa: BLE001  a listener's fault must not end the watch over the engines
                _log.exception("a subscriber of the fleet's view failed")
        self._settle_soon()

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
        self._settle()

    def _launch(self, engine: Engine) -> None:
        if self._running:
            # At once, so that nobody who looks now takes the last life's end for this one's.
            engine.record.happened(Happening.LAUNCHED, reason="starting")
            self._tasks[engine.record.replica.id] = asyncio.create_task(_never_die(engine))

    async def stop(self) -> None:
        """Stop all engines of ours and all watching. Returns when nothing is left, `stop_timeout` later at most (and
        some seconds if the kernel is slow to kill). Cancelling kills what still runs. May be called twice."""
        self._running = False
        tasks = [*self._retiring.values(), *self._restarts.values(), *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def restart(self, replica_id: str) -> None:
        """Stop an engine of ours if it runs, and start it again with a clean slate: also one that has FAILED. Returns
        when the old process is gone and the new start is under way; a restart that is asked for meanwhile is the
        same one; to a replica that is on its way out it does nothing. Raises KeyError for an unknown replica, ValueError
        for one that runs elsewhere."""
        member = self._member(replica_id)
        engine = member.engine
        if not isinstance(engine, LocalEngine):
            raise ValueError(f"{replica_id} runs elsewhere: only whoever runs it can restart it")
        if replica_id in self._retiring:
            return
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
        member = self._member(replica_id)
        if not member.drained:
            member.drained, record = True, member.engine.record
            record.hold(record.held or _DRAINED)
            record.tell(EventKind.NOTE, f"{_DRAINED}: takes nothing new until resumed")

    def resume(self, replica_id: str) -> None:
        """Let a replica that was drained take requests again; does nothing to any other. Raises KeyError for an unknown
        replica."""
        member = self._member(replica_id)
        if member.drained:
            member.drained, record = False, member.engine.record
            record.hold(None if record.held == _DRAINED else record.held)
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
            self._member(replica_id).engine.poke()

    def report_stall(self, replica_id: str) -> None:
        """A request waited for tokens in vain (`stall_timeout`): find out whether the engine gets anywhere, and
        restart it if not. A hung engine's health check is good, so `report_failure` would not notice. Ignores
        replicas that are gone."""
        with suppress(KeyError):
            self._member(replica_id).engine.suspect()

    def log_tail(self, replica_id: str, lines: int = 20) -> list[str]:
        """The last lines that an engine of ours printed; none for one that runs elsewhere. Raises KeyError for an
        unknown replica."""
        engine = self._member(replica_id).engine
        return log_tail(engine.job.log, lines) if isinstance(engine, LocalEngine) else []

    def _all(self) -> Iterator["Member"]:
        return (member for members in self._members.values() for member in members)

    def _member(self, replica_id: str) -> "Member":
        for member in self._all():
            if member.id == replica_id:
                return member
        raise KeyError(replica_id)


@dataclass(frozen=True, slots=True)
class Want:
    """One replica that the configuration asks for."""

    spec: EngineSpec | None  # None: it runs elsewhere
    stall_timeout: float
    url: str = ""
    api_key: str | None = None
    served_model_name: str | None = None

    def same(self, other: "Want") -> bool:
        """Whether a replica that was made for this one can be kept for the other one."""
        if self.spec is None or other.spec is None:
            return replace(self, stall_timeout=0) == replace(other, stall_timeout=0)
        return same_process(self.spec, other.spec)


@dataclass(slots=True, eq=False)
class Member:
    """A replica of the fleet."""

    want: Want
    engine: Engine
    leaving: bool = False  # the configuration no longer has it
    ending: bool = False  # it is being stopped: too late to keep it
    drained: bool = False  # by an operator

    @property
    def id(self) -> str:
        return self.engine.record.replica.id


def _wanted(model: str, source: ModelSource) -> Iterator[Want]:
    if source.engine is not None:
        for _ in range(source.engine.replicas):
            yield Want(source.engine, source.stall_timeout)
    for url in source.endpoints:
        yield Want(None, source.stall_timeout, url.rstrip("/"), source.endpoint_api_key, source.served_model_name)


async def _never_die(engine: Engine) -> None:
    """Look after an engine until that is cancelled or given up. A bug must not leave it unwatched."""
    while True:
        try:
            return await engine.run()
        except Exception:  # noqa: BLE001  whatever it is, it is logged, and the engine is watched again
            _log.exception("looking after %s failed; starting over", engine.record.replica.id)
            await asyncio.sleep(_AFTER_A_BUG)
