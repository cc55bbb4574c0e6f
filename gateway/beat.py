"""What comes again and again comes at the same moments, so that the event loop wakes once for all of it.

To wake a process that sleeps costs more than most of what it wakes for.
"""

import asyncio
from math import floor


def until_beat(interval: float) -> float:
    """Seconds until the next multiple of `interval` on the running loop's clock, the first one that is not near."""
    now = asyncio.get_running_loop().time()
    # A timer may be early by a millisecond: the multiple that it was set for is then not taken for the next one.
    return floor(now / interval + 1.5) * interval - now
