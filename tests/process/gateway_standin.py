"""Stands in for the gateway: runs a fleet of one engine, on the gateway's own event loop, until somebody ends it, and
prints what happens to the engine. Usage: MODEL_DIR PYTHON ENV_JSON LOGS"""

import asyncio
import json
import signal
import sys
from pathlib import Path

import uvloop

from engines.fleet import Fleet
from engines.sources import ModelSource
from engines.spec import EngineSpec


async def main(model: str, python: str, env: str, logs: str) -> None:
    spec = EngineSpec(model=model, python=python, env=json.loads(env))
    fleet = Fleet(
        {"m": ModelSource(engine=spec)},
        base_dir=Path(model),
        log_dir=Path(logs),
        on_event=lambda event: print(event.kind, flush=True),
    )
    asked_to_stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked_to_stop.set)
    await fleet.start()
    await asked_to_stop.wait()
    await fleet.stop()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
