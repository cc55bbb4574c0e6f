"""tests/fake_engine.py as an interpreter that has "vLLM" sees it: started with vLLM's flags, it streams. While the file
that FAKE_BROKEN names is there, it ends at once."""

import os
import sys
from pathlib import Path

ENGINE = Path(__file__).resolve().parents[1] / "fake_engine.py"


def flag(name: str) -> str:
    return next(a.partition("=")[2] for a in sys.argv if a.startswith(f"--{name}="))


def main() -> None:
    if Path(os.environ["FAKE_BROKEN"]).exists():
        print("RuntimeError: no kernel image is available", flush=True)
        sys.exit(1)
    argv = ["--port", flag("port"), "--model", flag("served-model-name")]  # the key is in the environment, as for vLLM
    os.execv(sys.executable, [sys.executable, str(ENGINE), *argv])


if __name__ == "__main__":
    # As an interpreter that is asked whether it has vLLM.
    sys.exit(0) if "-c" in sys.argv else main()
