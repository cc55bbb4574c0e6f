"""Bringing another configuration into force while requests run."""

import asyncio
from collections.abc import Callable, Mapping

import structlog

from gateway.admin.context import ReloadFailedError
from gateway.config.load import ConfigError
from gateway.config.schema import Config
from gateway.observe.metrics import Metrics

log = structlog.get_logger("penstock")

# What a process has only once. All else under `server` comes into force.
FIXED = (
    ("server", "host"),
    ("server", "port"),
    ("server", "workers"),
    ("server", "admin_listen"),
    ("store",),
    ("retention_days",),
    ("limiter",),
)


class Reloader:
    """Reads the configuration again, one time after the other, whoever asks."""

    def __init__(self, read: Callable[[], Config], apply: Callable[[Config], list[str]], metrics: Metrics) -> None:
        """`read` blocks, is run in a thread, and raises `ConfigError`. `apply` runs on the loop: it builds first and
        swaps then, and returns what an operator should know."""
        self._read = read
        self._apply = apply
        self._metrics = metrics
        self._lock = asyncio.Lock()

    async def reload(self) -> list[str]:
        """Returns what an operator should know, a line for each point. Raises `ReloadFailedError`: then nothing has
        changed, which the log tells too. The event loop goes on meanwhile."""
        async with self._lock:
            try:
                config = await asyncio.to_thread(self._read)
                notes = self._apply(config)
            except ConfigError as error:
                raise self._failed([str(fault) for fault in error.faults]) from None
            except Exception as error:
                log.exception("a fault in the gateway: reload")
                raise self._failed([f"a fault in Penstock: {error!r}"]) from None
            self._metrics.reloads["applied"] += 1
            log.info("reloaded", models=list(config.models), keys=len(config.keys), notes=notes)
            return notes

    def _failed(self, faults: list[str]) -> ReloadFailedError:
        self._metrics.reloads["failed"] += 1
        log.error("reload failed; the old configuration stays", faults=faults)
        return ReloadFailedError("\n".join(faults))


def needs_restart(old: Config, new: Config) -> list[str]:
    """A note for each field whose change comes into force with the next start only."""
    return [
        f"{'.'.join(path)}: a change comes into force with a restart; all else has"
        for path in FIXED
        if _value(old, path) != _value(new, path)
    ]


def _value(config: Config, path: tuple[str, ...]) -> object:
    value: object = config
    for name in path:
        value = getattr(value, name)
    return value


def overridden(config: Config, server: Mapping[str, object]) -> Config:
    """The config with fields of `server` from the command line in the place of its own."""
    return config.model_copy(update={"server": config.server.model_copy(update=dict(server))})
