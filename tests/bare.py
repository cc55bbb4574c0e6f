"""A gateway without keys, models and engines, for tests of what does not ask for them."""

from typing import Any, cast

from gateway.auth import Keyring
from gateway.limits.memory import MemoryLimiter
from gateway.observe.access import AccessLog
from gateway.observe.metrics import Metrics
from gateway.policy import Gateway, Policy
from gateway.upstream.client import EngineClient


def bare_gateway(max_body_bytes: int = 100) -> Gateway:
    """On a running event loop."""
    policy = Policy(Keyring({}), {}, max_body_bytes, body_timeout=30.0, drain_timeout=30.0)
    fleet = cast(Any, None)
    return Gateway(policy, fleet, EngineClient(), MemoryLimiter(), Metrics(), AccessLog())
