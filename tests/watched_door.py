"""`penstock serve` that can be looked into: on SIGUSR1 it says in its log what lives in it, and how much was dead, but in
cycles of references, which only a collection could undo."""

import gc
import json
import os
import signal
import sys
import threading
from collections import Counter

from gateway import cli

WATCHED = ("gateway.", "uvicorn.", "uvloop.", "asyncio.", "_asyncio", "httptools.")


def census() -> dict[str, int]:
    """Living objects by type. What was there when serving began is not counted: `gc.freeze` took it out of sight."""
    kinds = (type(one) for one in gc.get_objects())
    return Counter(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds if kind.__module__.startswith(WATCHED))


def watch() -> None:
    while True:
        signal.sigwait({signal.SIGUSR1})
        line = {"message": "census", "in_cycles": gc.collect(), "objects": census()}
        os.write(2, json.dumps(line).encode() + b"\n")


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # inherited by all threads: `watch` alone takes it
    threading.Thread(target=watch, daemon=True).start()
    sys.argv[0] = "penstock"
    cli.main()
