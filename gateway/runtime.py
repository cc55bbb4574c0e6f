"""The composition root: config → resources (which outlive a reload) + policy (which it replaces), and the process around them."""

import asyncio
import contextlib
import ctypes
import dataclasses
import gc
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Generator, Mapping
from pathlib import Path
from typing import Any, cast

import structlog
import uvicorn
import uvloop

from engines.fleet import Fleet
from engines.machine import this_machine
from engines.types import EngineEvent, EventKind, ReplicaState
from gateway import COMPILED
from gateway.admin.context import Admin, ReloadFailedError
from gateway.admin.guard import AdminKey
from gateway.admin.live import make_pulse
from gateway.admin.recent import Recent
from gateway.app import Asgi, Console, make_app
from gateway.beat import until_beat
from gateway.books import Books, wanted
from gateway.compose import Memory, admin_digest, make_keyring, make_policy, sources
from gateway.config.load import load
from gateway.config.schema import Config, ServerConfig, listen_address
from gateway.config.watch import watch
from gateway.cork import Cork
from gateway.edge.protocol import EdgeProtocol, Timeouts, bound
from gateway.limits.memory import MemoryLimiter
from gateway.listen import CannotListenError, handed_over, listen, notify, url
from gateway.observe.access import AccessLog
from gateway.observe.logs import UVICORN
from gateway.observe.loop import LoopLag
from gateway.observe.metrics import Metrics
from gateway.policy import Gateway
from gateway.reload import Reloader, needs_restart, overridden
from gateway.turn import wake
from gateway.upstream.client import EngineClient

log = structlog.get_logger("penstock")

DRAIN_POLL = 0.05  # seconds
MAX_DESCRIPTORS = 1 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # as malloc.h has them
SWEEP = 1.0  # seconds between two looks at all connections
SWEEP_LIMITS = 60.0  # seconds between two looks at all keys' accounts
LINGER = 5.0  # seconds in which connections that are handed over may still send a request
REMOTE_START = 10.0  # seconds that a process with a predecessor waits for endpoints to answer
# States in which what a replica did still counts: a process that starts anew has a clean slate.
AT_WORK = (ReplicaState.READY, ReplicaState.UNHEALTHY, ReplicaState.DRAINING)


def on_engine_event(event: EngineEvent) -> None:
    level = log.warning if event.kind in (EventKind.UNHEALTHY, EventKind.DIED, EventKind.FAILED) else log.info
    level("engine " + event.kind, replica=event.replica, detail=event.message)


class Server(uvicorn.Server):
    """Signals are the process's own matter: SIGTERM drains before the server is told to go, by `leave`.

    It waits for that, and does not look ten times a second; whoever holds it calls `on_tick(0)` once a second, for the
    date that answers carry.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._leaving = asyncio.Event()

    def leave(self, *, at_once: bool = False) -> None:
        """`at_once`: does not wait for what is open."""
        self.should_exit = True
        self.force_exit = self.force_exit or at_once
        self._leaving.set()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self._leaving.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class Process:
    """A serving process, from its config to its exit code."""

    http: str | None = None  # a protocol of uvicorn's own in place of the edge's

    def __init__(self, config: Config, path: Path, given: Mapping[str, object], *, watch: bool = False) -> None:
        """`given`: fields of `server` that were set on the command line and win over the file's. `watch`: reload when
        the file changes."""
        self._config = config
        self._path = path
        self._given = given
        self._watch = watch
        self._machine = this_machine()
        self._memory = Memory(self._machine)
        self._limiter = MemoryLimiter()
        self._background: set[asyncio.Task[None]] = set()
        self._stopping: asyncio.Task[None] | None = None
        self._told_to_stop = asyncio.Event()

    async def run(self) -> int:
        """Serves until told to stop. Returns the exit code."""
        server_config = self._config.server
        self._handed_over = handed_over(os.environ)
        try:
            listeners = listeners_for(server_config, self._handed_over)
        except CannotListenError as error:
            sys.stderr.write(f"penstock: {error}\n")
            return 1
        metrics = Metrics()
        cork = Cork()
        client = EngineClient(cork)
        self._fleet = Fleet(
            sources(self._config),
            base_dir=Path.cwd(),
            log_dir=Path(".penstock") / "logs",
            on_event=on_engine_event,
            open_requests=client.open,
            machine=self._machine,
        )
        recent = Recent()
        self._memory.prepare(self._config)
        self._gateway = gateway = Gateway(
            policy=make_policy(self._config, self._memory, self._limiter, metrics, None),
            fleet=self._fleet,
            client=client,
            limiter=self._limiter,
            metrics=metrics,
            access_log=AccessLog(tap=recent.extend),
            cork=cork,
        )
        self._books = Books(self._config.store, self._limiter, self._rekey)
        self._fleet.subscribe(lambda view: gateway.breakers.keep(one.id for one in view.all() if one.state in AT_WORK))
        self._admin_key = AdminKey(admin_digest(self._config))
        self._reloader = Reloader(self._read, self._apply, metrics)
        admin = Admin(
            gateway,
            self._fleet,
            self._admin_key,
            recent,
            str(self._path),
            config=lambda: self._config.model_dump(mode="json"),
            reload=self._reloader.reload,
            store=self._books.store,
            held=self._books,
            use=self._limiter.use,
        )
        self._pulse = pulse = make_pulse(admin)
        self._timeouts = Timeouts(*timeouts(server_config))
        self._protocol = bound(gateway, self._timeouts)
        whole = make_app(gateway, Console(admin, pulse))
        apps = [whole] if len(listeners) == 1 else [make_app(gateway), whole]
        self._servers = [self._make_server(app) for app in apps]
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        loop.add_signal_handler(signal.SIGINT, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._on_sighup)
        background = [
            asyncio.create_task(self._sweep()),
            asyncio.create_task(pulse.run()),
        ]
        if self._watch:
            background.append(asyncio.create_task(watch(self._path, self._reload)))
        gateway.access_log.start()
        loop_lag = LoopLag(metrics.loop_lag)
        for timer in (gateway.ticker, loop_lag):
            timer.start()
        await self._keep_books()
        await self._fleet.start()
        gc.collect()
        gc.freeze()  # what is here now stays: no collection needs to look at it again
        # Requests leave hardly any cycles, and most of what they make is gone before a rarer collection would look at it.
        gc.set_threshold(20_000, 20, 20)
        if self._handed_over:
            await self._engines_ready()
        try:
            if not self._told_to_stop.is_set():
                urls = dict(zip(("url", "admin_url"), map(url, listeners), strict=False))
                log.info("serving", **urls, models=list(self._config.models), compiled=COMPILED, pid=os.getpid())
                notify("READY=1", os.environ)
                await asyncio.gather(
                    *(server.serve(sockets=[at]) for server, at in zip(self._servers, listeners, strict=True))
                )
        finally:
            for task in background:
                task.cancel()
            for timer in (gateway.ticker, loop_lag):
                timer.stop()
            gateway.client.close()
            await self._fleet.stop()
            await gateway.access_log.stop()
            await self._books.stop()
        log.info("stopped")
        return 0

    def _make_server(self, app: Asgi) -> Server:
        idle_timeout = self._config.server.idle_timeout
        return Server(
            uvicorn.Config(
                app,
                http=self.http or cast(type[asyncio.Protocol], self._protocol),
                lifespan="off",
                ws="none",
                log_config=UVICORN,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=int(idle_timeout),
                timeout_graceful_shutdown=2,
            )
        )

    async def _sweep(self) -> None:
        limits_at = 0.0
        while True:
            await asyncio.sleep(until_beat(SWEEP))
            now = time.monotonic()
            self._gateway.client.sweep(now)
            if now >= limits_at:
                limits_at = now + SWEEP_LIMITS
                self._limiter.sweep()
            for server in self._servers:
                if server.started:
                    await server.on_tick(0)
                for connection in list(server.server_state.connections):
                    if isinstance(connection, EdgeProtocol):
                        connection.tick(now)

    async def _engines_ready(self) -> None:
        """Waits until each model has an engine, or will not have one soon: until then, whoever shares the sockets with
        this process takes what comes."""
        log.info("waiting for the engines before connections are taken", models=list(self._config.models))
        changed = asyncio.Event()
        unsubscribe = self._fleet.subscribe(lambda _: changed.set())
        began = time.monotonic()
        own = [one.engine.start_timeout for one in self._config.models.values() if one.engine is not None]
        stopped = asyncio.create_task(self._told_to_stop.wait())
        try:
            async with asyncio.timeout(max([REMOTE_START, *own])):
                while not stopped.done() and not self._settled(time.monotonic() - began):
                    changed.clear()
                    change = asyncio.create_task(changed.wait())
                    await asyncio.wait({change, stopped}, timeout=SWEEP, return_when=asyncio.FIRST_COMPLETED)
                    change.cancel()
        except TimeoutError:
            log.warning("not every model has an engine that is ready; serving all the same")
        finally:
            stopped.cancel()
            unsubscribe()

    def _settled(self, waited: float) -> bool:
        """Whether no model's first engine is to be waited for any longer. `waited`: seconds."""
        return all(
            self._fleet.view.ready(model)
            or not any(r.state is ReplicaState.STARTING and (r.managed or waited < REMOTE_START) for r in replicas)
            for model, replicas in self._fleet.view.replicas.items()
        )

    # ---- signals

    def _stop(self) -> None:
        """The first time: drain. The second time: at once."""
        if self._stopping is not None:
            log.warning("stopping at once")
            self._give_up()
            for server in self._servers:
                server.leave(at_once=True)
            return
        self._told_to_stop.set()
        notify("STOPPING=1", os.environ)
        self._stopping = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        gateway = self._gateway
        gateway.draining = True
        timeout = gateway.policy.drain_timeout
        log.info("draining", open_requests=len(gateway.requests), timeout=timeout, handing_over=bool(self._handed_over))
        now = time.monotonic()
        deadline, linger = now + timeout, now
        if self._handed_over:
            # New connections wait in a queue that does not end with this process; what was taken out of it is served.
            for server in self._servers:
                stop_listening(server)
            linger = min(now + LINGER, deadline)
        else:
            gateway.refusing = True
        while self._busy(linger) and time.monotonic() < deadline:  # noqa: ASYNC110 - an event would cost every request
            await asyncio.sleep(DRAIN_POLL)
        self._give_up()
        for server in self._servers:
            server.leave()

    def _busy(self, linger: float) -> bool:
        """Whether something is still open; until `linger` (monotonic seconds), a connection is enough."""
        if self._gateway.requests:
            return True
        return time.monotonic() < linger and any(server.server_state.connections for server in self._servers)

    def _give_up(self) -> None:
        """What is still open ends: requests with an error event."""
        self._pulse.close()
        for request in list(self._gateway.requests):
            request.give_up()

    # ---- reload

    def _on_sighup(self) -> None:
        self._spawn(self._reload())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _reload(self) -> None:
        """The log tells how it went."""
        with contextlib.suppress(ReloadFailedError):
            await self._reloader.reload()

    # ---- the store

    async def _keep_books(self) -> None:
        """From now on, if the config wants it."""
        if self._gateway.note_usage is None and wanted(self._config):
            self._gateway.note_usage = self._books.open(self._config.retention_days)
            self._rekey()
            await self._books.start()

    @property
    def _known(self) -> Books | None:
        return self._books if self._gateway.note_usage is not None else None

    def _rekey(self) -> None:
        """Brings the store's keys into force as they are known and valid now."""
        keyring = make_keyring(self._config, self._limiter, self._known)
        self._gateway.policy = dataclasses.replace(self._gateway.policy, keyring=keyring)

    def _read(self) -> Config:
        config = overridden(load(self._path, os.environ), self._given)
        self._memory.prepare(config)
        return config

    def _apply(self, config: Config) -> list[str]:
        """Builds all that can fail, and swaps then."""
        policy = make_policy(config, self._memory, self._limiter, self._gateway.metrics, self._known)
        notes = needs_restart(self._config, config)
        self._limiter.sweep()
        self._gateway.policy = policy
        for model in policy.models.values():
            for turn in model.places.resize(model.max_open_requests, model.max_queue):
                wake(turn)
        self._admin_key.digest = admin_digest(config)
        self._timeouts.change(*timeouts(config.server))
        for server in self._servers:
            server.config.timeout_keep_alive = int(config.server.idle_timeout)
        notes += self._fleet.update(sources(config))
        self._config = config
        self._spawn(self._keep_books())
        return notes


def timeouts(server: ServerConfig) -> tuple[float, float, float]:
    return server.header_timeout, server.body_timeout, server.idle_timeout


def listeners_for(server: ServerConfig, handed_over: list[socket.socket]) -> list[socket.socket]:
    """The public socket, and the one of `admin_listen` if there is one: those that came with the process, in this order,
    else new ones. Raises `CannotListenError`."""
    wanted = [(server.host, server.port, "with --port")]
    if server.admin_listen is not None:
        wanted.append((*listen_address(server.admin_listen), "as server.admin_listen"))
    if not handed_over:
        return [listen(host, port, setting) for host, port, setting in wanted]
    if len(handed_over) != len(wanted):
        raise CannotListenError(
            f"{len(handed_over)} sockets were handed over (LISTEN_FDS), but {len(wanted)} are needed: "
            "the public one, and a second one where server.admin_listen is set."
        )
    return handed_over


def raise_descriptor_limit() -> None:
    """As far as the system allows: each client takes a descriptor, and slow ones must not use up the 1024 of most shells."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def bound_free_memory() -> None:
    """Has blocks of 8 MB and more returned to the system as soon as they are free, and 16 MB kept of smaller ones at the end
    of the heap. By itself glibc would raise both bounds, to 32 and 64 MB, once it has seen large blocks go (mallopt(3)).

    Lower bounds are dear: a block from the system costs a page fault for each 4 KB. The buffers around a prompt of 512 KB
    (orjson's takes 12 times its size) had 1 100 of them, two thirds of the request's CPU. Other C libraries have no such
    setting."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 8 << 20)
        mallopt(_M_TRIM_THRESHOLD, 16 << 20)


def stop_listening(server: uvicorn.Server) -> None:
    """Takes no more connections; those that wait are somebody else's to take."""
    for one in getattr(server, "servers", ()):  # there are none before it has begun to serve
        one.close()


def run(config: Config, path: Path, given: Mapping[str, object], *, watch: bool = False) -> int:
    """Serves `config`, read from `path`, until SIGTERM or Ctrl-C. Blocks; returns the exit code. `given`: the fields of
    `server` that win over the file's. `watch`: read the file again whenever it changes."""
    raise_descriptor_limit()
    bound_free_memory()
    config = overridden(config, given)
    return uvloop.run(Process(config, path, given, watch=watch).run())
