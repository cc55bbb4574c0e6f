"""The composition root: config → resources (which outlive a reload) + policy (which it replaces), and the process around them."""

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Generator, Mapping
from pathlib import Path

import structlog
import uvicorn
import uvloop

from engines.fleet import Fleet
from engines.sources import ModelSource
from engines.types import EngineEvent, EventKind
from gateway.admin.context import Admin, ReloadFailedError
from gateway.admin.guard import AdminKey
from gateway.admin.live import make_pulse
from gateway.admin.recent import Recent
from gateway.app import Asgi, Console, make_app
from gateway.auth import Keyring, digest
from gateway.config.load import ConfigError, load
from gateway.config.schema import Config, ModelConfig, grants, listen_address
from gateway.edge.protocol import EdgeProtocol, Timeouts, bound
from gateway.limits.base import Limits
from gateway.limits.memory import MemoryLimiter
from gateway.observe.logs import UVICORN, AccessLog
from gateway.observe.loop import sample_loop_lag
from gateway.observe.metrics import Metrics
from gateway.policy import Gateway, Model, Policy
from gateway.types import Caller
from gateway.upstream.client import EngineClient
from gateway.usage.estimate import AnswerLengths, PromptEstimator
from gateway.usage.tokens import TokenCounter, load_counter

log = structlog.get_logger("penstock")

DRAIN_POLL = 0.05  # seconds
SWEEP = 1.0  # seconds between two looks at all connections


class Memory:
    """What is known of models beyond one policy: kept by name over reloads."""

    def __init__(self) -> None:
        self._estimators: dict[str, PromptEstimator] = {}
        self._answers: dict[str, AnswerLengths] = {}
        self._counters: dict[str, TokenCounter | None] = {}

    def model(self, name: str, config: ModelConfig, metrics: Metrics) -> Model:
        folder = config.tokenizer or (config.engine.model if config.engine else None)
        return Model(
            name=name,
            failover=config.failover,
            stall_timeout=config.stall_timeout,
            request_timeout=config.request_timeout,
            failover_wait=config.failover_wait,
            max_open_requests=config.max_open_requests,
            template_kwargs=frozenset(config.chat_template_kwargs),
            counter=self._counter(folder),
            estimator=self._estimators.setdefault(name, PromptEstimator()),
            answers=self._answers.setdefault(name, AnswerLengths()),
            metrics=metrics.model(name),
        )

    def _counter(self, folder: str | None) -> TokenCounter | None:
        if folder is None or not Path(folder).is_dir():
            return None
        if folder not in self._counters:
            self._counters[folder] = load_counter(Path(folder))
        return self._counters[folder]


def allowed(patterns: list[str], models: Mapping[str, ModelConfig]) -> frozenset[str] | None:
    """The models that a key's patterns cover, by their own names or by an alias; None: all there are and will be."""
    if "*" in patterns:
        return None
    return frozenset(
        name
        for name, config in models.items()
        if any(grants(pattern, known) for pattern in patterns for known in (name, *config.aliases))
    )


def make_policy(config: Config, memory: Memory, limiter: MemoryLimiter, metrics: Metrics) -> Policy:
    """Everything that a request is judged by. Builds all of it before anything is swapped."""
    models: dict[str, Model] = {}
    for name, one in config.models.items():
        model = memory.model(name, one, metrics)
        models.update(dict.fromkeys([name, *one.aliases], model))
    callers = {}
    for key in config.keys:
        account = limiter.account(key.name, Limits(**key.limits.model_dump()))
        callers[bytes.fromhex(key.digest())] = Caller(key.name, account, allowed(key.models, config.models))
    anonymous = Caller("anonymous", limiter.account("anonymous", Limits()), None) if config.auth == "none" else None
    server = config.server
    return Policy(
        Keyring(callers, anonymous),
        models,
        server.max_body_bytes,
        server.body_timeout,
        server.drain_timeout,
        frozenset(server.cors_origins),
    )


def sources(config: Config) -> dict[str, ModelSource]:
    return {
        name: ModelSource(
            one.engine,
            tuple(one.endpoints),
            one.engine_api_key.get_secret_value() if one.engine_api_key else None,
            one.served_model_name,
            one.stall_timeout,
        )
        for name, one in config.models.items()
    }


def admin_digest(config: Config) -> bytes | None:
    return digest(config.admin_key.get_secret_value().encode()) if config.admin_key else None


def on_engine_event(event: EngineEvent) -> None:
    level = log.warning if event.kind in (EventKind.UNHEALTHY, EventKind.DIED, EventKind.FAILED) else log.info
    level("engine " + event.kind, replica=event.replica, detail=event.message)


class Server(uvicorn.Server):
    """Signals are the process's own matter: SIGTERM drains before the server is told to go."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class Process:
    """A serving process, from its config to its exit code."""

    http: str | None = None  # a protocol of uvicorn's own in place of the edge's

    def __init__(self, config: Config, path: Path) -> None:
        self._config = config
        self._path = path
        self._overrides = {"host": config.server.host, "port": config.server.port}
        self._memory = Memory()
        self._limiter = MemoryLimiter()
        self._stopping: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Serves until told to stop. Returns the exit code."""
        server_config = self._config.server
        wanted = [(server_config.host, server_config.port, "with --port")]
        if server_config.admin_listen is not None:
            wanted.append((*listen_address(server_config.admin_listen), "as server.admin_listen"))
        listeners = []
        for host, port, setting in wanted:
            try:
                listeners.append(listen(host, port))
            except OSError as error:
                sys.stderr.write(
                    f"penstock: cannot listen on {host}:{port}: {error.strerror or error}. "
                    f"Choose another port {setting}, or stop what listens there.\n"
                )
                return 1
        metrics = Metrics()
        sourced = sources(self._config)
        self._fleet = Fleet(sourced, base_dir=Path.cwd(), log_dir=Path(".penstock") / "logs", on_event=on_engine_event)
        recent = Recent()
        self._gateway = gateway = Gateway(
            policy=make_policy(self._config, self._memory, self._limiter, metrics),
            fleet=self._fleet,
            client=EngineClient(),
            limiter=self._limiter,
            metrics=metrics,
            access_log=AccessLog(tap=recent.extend),
        )
        self._admin_key = AdminKey(admin_digest(self._config))
        admin = Admin(
            gateway,
            self._fleet,
            self._admin_key,
            recent,
            str(self._path),
            config=lambda: self._config.model_dump(mode="json"),
            reload=self._reload_now,
            prices=lambda _: None,
        )
        self._pulse = pulse = make_pulse(admin)
        self._sources = sourced
        self._protocol = bound(
            gateway, Timeouts(server_config.header_timeout, server_config.body_timeout, server_config.idle_timeout)
        )
        whole = make_app(gateway, Console(admin, pulse))
        apps = [whole] if len(listeners) == 1 else [make_app(gateway), whole]
        self._servers = [self._make_server(app) for app in apps]
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        loop.add_signal_handler(signal.SIGINT, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        background = [
            asyncio.create_task(sample_loop_lag(metrics.loop_lag)),
            asyncio.create_task(self._sweep()),
            asyncio.create_task(pulse.run()),
        ]
        gateway.access_log.start()
        gateway.ticker.start()
        await self._fleet.start()
        gc.collect()
        gc.freeze()  # what is here now stays: no collection needs to look at it again
        # Requests leave hardly any cycles, and most of what they make is gone before a rarer collection would look at it.
        gc.set_threshold(20_000, 20, 20)
        urls = dict(zip(("url", "admin_url"), map(url, listeners), strict=False))
        log.info("serving", **urls, models=list(self._config.models), pid=os.getpid())
        try:
            await asyncio.gather(
                *(server.serve(sockets=[at]) for server, at in zip(self._servers, listeners, strict=True))
            )
        finally:
            for task in background:
                task.cancel()
            gateway.ticker.stop()
            gateway.client.close()
            await self._fleet.stop()
            await gateway.access_log.stop()
        log.info("stopped")
        return 0

    def _make_server(self, app: Asgi) -> Server:
        idle_timeout = self._config.server.idle_timeout
        return Server(
            uvicorn.Config(
                app,
                http=self.http or self._protocol,
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
        while True:
            await asyncio.sleep(SWEEP)
            now = time.monotonic()
            self._gateway.client.sweep(now)
            for server in self._servers:
                for connection in list(server.server_state.connections):
                    if isinstance(connection, EdgeProtocol):
                        connection.tick(now)

    # ---- signals

    def _stop(self) -> None:
        """The first time: drain. The second time: at once."""
        if self._stopping is not None:
            log.warning("stopping at once")
            self._give_up()
            for server in self._servers:
                server.should_exit = server.force_exit = True
            return
        self._stopping = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        gateway = self._gateway
        gateway.draining = True
        log.info("draining", open_requests=len(gateway.requests), timeout=gateway.policy.drain_timeout)
        deadline = time.monotonic() + gateway.policy.drain_timeout
        while gateway.requests and time.monotonic() < deadline:  # noqa: ASYNC110 - an event would cost every request
            await asyncio.sleep(DRAIN_POLL)
        self._give_up()
        for server in self._servers:
            server.should_exit = True

    def _give_up(self) -> None:
        """What is still open ends: requests with an error event."""
        self._pulse.close()
        for request in list(self._gateway.requests):
            request.give_up()

    def _reload(self) -> None:
        """SIGHUP. The log tells how it went."""
        with contextlib.suppress(ReloadFailedError):
            self._apply()

    async def _reload_now(self) -> list[str]:
        return self._apply()

    def _apply(self) -> list[str]:
        """Builds a new policy and swaps it in; whatever is wrong with the file changes nothing. Returns what did not
        come into force. Raises `ReloadFailedError`."""
        gateway = self._gateway
        try:
            config = load(self._path, os.environ)
            if sources(config) != self._sources:
                raise ConfigError([])
            policy = make_policy(config, self._memory, self._limiter, gateway.metrics)
        except ConfigError as error:
            gateway.metrics.reloads["failed"] += 1
            why = [str(fault) for fault in error.faults] or ["a change of engines or endpoints needs a restart"]
            log.error("reload failed; the old configuration stays", faults=why)
            raise ReloadFailedError("\n".join(why)) from None
        notes = []
        if config.server != self._config.server:
            notes.append("changes under server need a restart; all else is in force")
            log.warning(notes[0])
        gateway.policy = policy
        self._config = config
        self._admin_key.digest = admin_digest(config)
        gateway.metrics.reloads["applied"] += 1
        log.info("reloaded", models=list(config.models), keys=len(config.keys))
        return notes


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def url(listener: socket.socket) -> str:
    """Where it is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(config: Config, path: Path) -> int:
    """Serves `config`, read from `path`, until SIGTERM or Ctrl-C. Blocks; returns the exit code."""
    return uvloop.run(Process(config, path).run())
