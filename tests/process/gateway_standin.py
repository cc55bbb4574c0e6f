"""Stands in for the gateway: runs a fleet of one engine until somebody ends it. Usage: MODEL_DIR PYTHON ENV_JSON LOGS"""

import asyncio
import json
import sys
from pathlib import Path

from engines.fleet import Fleet
from engines.sources import ModelSource
from engines.spec import EngineSpec


async def main(model: str, python: str, env: str, logs: str) -> None:
    spec = EngineSpec(model=model, python=python, env=json.loads(env))
    fleet = Fleet({"m": ModelSource(engine=spec)}, base_dir=Path(model), log_dir=Path(logs))
    await fleet.start()
    await fleet.wait_ready("m", 30)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
