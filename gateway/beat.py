"""What comes again and again comes at the same moments, so that the event loop wakes once for all of it.

To wake a process that sleeps costs more than most of what it wakes for.
"""

from math import floor
from time import monotonic


def until_beat(interval: float) -> float:
    """Seconds until the next multiple of `interval` on the monotonic clock, from half an interval to one and a half.

    So what is due at a multiple and wakes a little before it, as timers do, does not wake twice.
    """
    now = monotonic()
    return floor(now / interval + 1.5) * interval - now
