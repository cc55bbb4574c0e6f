"""How late the event loop wakes: the one number that tells a blocked gateway from a slow engine."""

import asyncio

from gateway.observe.counters import Histogram


async def sample_loop_lag(lag: Histogram, interval: float = 0.25) -> None:
    """Observes, every `interval` seconds, by how much a sleep overran. Runs until cancelled."""
    now = asyncio.get_running_loop().time
    while True:
        due = now() + interval
        await asyncio.sleep(interval)
        lag.observe(max(0.0, now() - due))
