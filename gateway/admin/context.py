"""What the admin API works with. Made by the composition root, in which config and files are known."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from engines.fleet import Fleet
from gateway.admin.guard import AdminKey
from gateway.admin.recent import Recent
from gateway.policy import Gateway


class Prices(NamedTuple):
    """Money per million tokens."""

    prompt: float
    completion: float
    cached: float


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
    prices: Callable[[str], Prices | None]  # of a model, by name or alias
