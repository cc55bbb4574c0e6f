"""Long commands with a sign of life: for setup-engine and make-models."""

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

HEARTBEAT = 10.0  # seconds
SHOWN = 100  # characters of a command's last line


def say(text: str) -> None:
    print(text, flush=True)


def run(what: str, argv: Sequence[str | Path], log: Path, *, env: dict[str, str] | None = None) -> bool:
    """Run a command, its output going to `log`. Every ten seconds says how long it has been running and what it printed
    last, and at the end how long it took. Returns whether it succeeded; if not, shows the end of its output."""
    began = time.monotonic()
    say(f"  {what} …")
    with log.open("w") as output:
        process = subprocess.Popen([str(a) for a in argv], stdout=output, stderr=subprocess.STDOUT, env=env)
        done = threading.Event()

        def beat() -> None:
            while not done.wait(HEARTBEAT):
                say(f"    {time.monotonic() - began:4.0f} s  {last_line(log)}")

        threading.Thread(target=beat, daemon=True).start()
        try:
            ok = process.wait() == 0
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            sys.exit(130)
        finally:
            done.set()
    if ok:
        say(f"  {what}: done in {time.monotonic() - began:.0f} s")
    else:
        say(f"  {what}: failed after {time.monotonic() - began:.0f} s; the end of {log}:")
        for line in log.read_text(errors="replace").splitlines()[-15:]:
            say(f"    | {line}")
    return ok


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line[:SHOWN] for line in reversed(lines) if line and not line.startswith("WARNING")), "")
