"""What the admin API works with. Made by the composition root, in which config and files are known."""

import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import structlog

from engines.fleet import Fleet
from gateway.admin.guard import AdminKey
from gateway.admin.recent import Recent
from gateway.limits.memory import Use
from gateway.policy import Gateway
from gateway.store.base import AuditEntry, KeyRecord, StoreError, TeamRecord

if TYPE_CHECKING:
    from gateway.store.db import Store

log = structlog.get_logger("penstock")

WHO: Final = "admin"


class Held(Protocol):
    """The store's keys and teams as this process holds them."""

    @property
    def keys(self) -> Mapping[str, KeyRecord]:
        """By id."""
        ...

    @property
    def teams(self) -> Mapping[str, TeamRecord]: ...

    async def refresh(self) -> None:
        """Whatever anybody has changed by now is held, and in force, when it returns. Raises `StoreError`."""
        ...

    async def settle(self) -> None:
        """What was used so far is in the store when it returns, unless the store is slow or down. Never raises."""
        ...


class ReloadFailedError(Exception):
    """Nothing has changed. The message holds one line for each fault."""


@dataclass(slots=True, eq=False)
class Admin:
    gateway: Gateway
    fleet: Fleet
    key: AdminKey
    recent: Recent
    config_path: str
    config: Callable[
        [], Mapping[str, Any]
    ]  # the config in force as plain values, secrets and all: only `masked` is shown
    reload: Callable[[], Awaitable[list[str]]]  # returns what an operator should know; raises ReloadFailedError
    store: "Store"
    held: Held
    use: Callable[[str], Use | None]  # how the account of a key or team stands, by its id

    async def note(self, what: str, target: str, after: object = None) -> None:
        """What an operator did that is no change of the store's own: into the audit table, and into the log, in which it
        stands even if the store is down."""
        log.info("admin", what=what, target=target)
        try:
            await self.store.add_audit(
                AuditEntry(time.time(), WHO, what, target, None, None if after is None else json.dumps(after))
            )
        except StoreError:
            log.warning("the audit table has no row of this", what=what, target=target)
