"""One engine process, with all that it starts, as seen from an event loop."""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

from engines import keeper
from engines.command import Command

LOG_BYTES: Final = 16 << 20  # two times so much is kept of each engine's output
_TAIL_BYTES: Final = 64 << 10
_KILL_TIMEOUT: Final = 10.0  # a killed process that stays longer hangs in the kernel (a driver, a dead disk)


class EngineProcess:
    """A running engine. Not thread-safe: use it from the event loop that started it.

    Whatever becomes of this process, nothing of the engine outlives it: see engines/keeper.py.
    """

    def __init__(self, keeper_process: subprocess.Popen[bytes]) -> None:
        self._keeper = keeper_process
        loop = asyncio.get_running_loop()
        # Done when nothing of the engine is left: the exit status of its main process, 128 + n for signal n.
        self.exited: asyncio.Future[int] = loop.create_future()
        self._pidfd = os.pidfd_open(keeper_process.pid)
        loop.add_reader(self._pidfd, self._on_exit)

    @classmethod
    def start(cls, command: Command, log: Path) -> Self:
        """Launch. Blocks for the milliseconds of one fork. What the engine prints goes to `log`, and an older log to
        `LOG.1`. A program that does not exist is an exit with status 127. Raises OSError when the machine has no
        process or file to spare."""
        log.parent.mkdir(parents=True, exist_ok=True)
        cores = ",".join(map(str, command.cores))
        return cls(
            subprocess.Popen(
                [sys.executable, "-I", "-S", keeper.__file__, str(log), str(LOG_BYTES), cores, *command.argv],
                env=dict(command.env),
                cwd=command.cwd,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )

    @property
    def pid(self) -> int:
        """The leader of the engine's session and process group."""
        return self._keeper.pid

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._close_pipe()
        status = self._keeper.wait()  # has ended: does not block
        if status < 0:
            # Somebody killed the keeper, which therefore could not clean up.
            with suppress(ProcessLookupError):
                os.killpg(self._keeper.pid, signal.SIGKILL)
            status = 128 - status
        if not self.exited.done():
            self.exited.set_result(status)

    def kill(self) -> None:
        """Kill the engine and all that it started. Returns at once; `exited` tells when it is done."""
        self._close_pipe()
        self._wake()

    async def gone(self) -> None:
        """Wait for a killed engine to be gone, or to be so stuck in the kernel that waiting is of no use."""
        await asyncio.wait({self.exited}, timeout=_KILL_TIMEOUT)

    async def stop(self, timeout: float) -> None:
        """Ask the engine to end, and kill what is left after `timeout` seconds. Returns when nothing is left.
        Cancelling kills at once."""
        if self.exited.done():
            return
        try:
            self._keeper.send_signal(signal.SIGTERM)
            self._wake()
            await asyncio.wait({self.exited}, timeout=timeout)
            self._close_pipe()
            await self.gone()
        finally:
            self._close_pipe()

    def _wake(self) -> None:
        """Who stopped the engine's whole group has stopped its keeper too, which has work to do now."""
        if not self.exited.done():
            self._keeper.send_signal(signal.SIGCONT)

    def _close_pipe(self) -> None:
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()


def log_tail(log: Path, lines: int) -> list[str]:
    """The last lines that an engine printed, oldest first. Reads at most 64 KB; blocks for that long."""
    found: list[str] = []
    for path in (log, log.with_name(log.name + ".1")):
        if len(found) < lines:
            with suppress(FileNotFoundError), path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
                found = file.read().decode(errors="replace").splitlines() + found
    return found[-lines:] if lines > 0 else []
