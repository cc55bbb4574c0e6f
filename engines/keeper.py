"""Keeps one engine: starts it, bounds its log, and leaves nothing of it behind.

A program of its own, between the gateway and the engine, because only a process that is still there can clean up
after a gateway that was killed, and because an engine's worker processes outlive its main process. Standard library
only: it runs under `python -I -S`. Usage:

    keeper.py LOG LOG_BYTES CORES PROGRAM [ARGUMENT…]      (CORES: "0,1", or "" for all)

- Standard input is a pipe that the gateway holds open. When it closes, or the gateway is gone, all is killed at once.
- SIGTERM is passed on to the engine's main process only.
- When the main process ends, whatever it left is killed. The exit status is the main process's own, or 128 + the
  number of the signal that ended it.
- Kills reach every descendant, also those in sessions of their own: this process is their subreaper, so each one
  whose parent dies becomes its child.
"""

import ctypes
import os
import select
import signal
import sys

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
CANNOT_EXECUTE = 127  # the shell's exit status for a command that is not there


class Log:
    """A file that is moved to `NAME.1` when it is full, so that two times `limit` bytes are kept at most."""

    def __init__(self, path: str, limit: int) -> None:
        self.path, self.limit, self.size = path, limit, 0
        self.fd = -1
        self._open()

    def _open(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        if os.path.exists(self.path):
            os.replace(self.path, self.path + ".1")
        # Not readable by others: engines can be told to log prompts.
        self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self.size = 0

    def write(self, data: bytes) -> None:
        try:
            if self.size and self.size + len(data) > self.limit:
                self._open()
            self.size += os.write(self.fd, data)
        except OSError:
            pass  # a full disk costs log lines, not the engine


def children() -> list[int]:
    me, found = str(os.getpid()), []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                # "pid (name) state ppid …", where the name may hold anything
                if file.read().rpartition(")")[2].split()[1] == me:
                    found.append(int(name))
        except OSError:
            pass  # ended meanwhile
    return found


def kill_all() -> None:
    while pids := children():
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)


def launch(argv: list[str], cores: set[int], output: int, libc: ctypes.CDLL) -> int:
    keeper = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        # If someone kills the keeper, the main process goes too. (Its own children then stay: that is what the keeper
        # is for.) The check is for a keeper that was killed before the call.
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != keeper:
            os._exit(CANNOT_EXECUTE)
        if cores:
            os.sched_setaffinity(0, cores)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.execvp(argv[0], argv)  # noqa: S606  argv comes from the operator's own config
    except BaseException as error:  # noqa: BLE001  the fork must not return into the keeper's code
        os.write(output, f"cannot start {argv[0]}: {error}\n".encode())
        os._exit(CANNOT_EXECUTE)


def main(log_path: str, log_bytes: str, cores: str, *argv: str) -> int:
    gateway = os.getppid()
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    log = Log(log_path, int(log_bytes))
    wake_r, wake_w = os.pipe()
    os.set_blocking(wake_r, False)
    os.set_blocking(wake_w, False)
    signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    output_r, output_w = os.pipe()
    os.set_blocking(output_r, False)
    engine = launch(list(argv), {int(c) for c in cores.split(",") if c}, output_w, libc)
    os.close(output_w)

    def copy_output() -> bool:
        """Whether there may be more."""
        try:
            data = os.read(output_r, 65536)
        except BlockingIOError:
            return False
        log.write(data)
        return bool(data)

    poll = select.poll()
    for fd in (0, wake_r, output_r):
        poll.register(fd, select.POLLIN | select.POLLHUP)
    status: int | None = None
    while status is None:
        # The time-out is for a copy of the pipe's other end in some fork of the gateway, which would hide its death.
        ready = {fd for fd, _ in poll.poll(1000)}
        if output_r in ready and not copy_output():
            poll.unregister(output_r)  # the engine has closed its output
        if 0 in ready or os.getppid() != gateway:
            break
        if wake_r in ready and signal.SIGTERM in os.read(wake_r, 64):
            os.kill(engine, signal.SIGTERM)
        if wake_r in ready:
            status = reap(engine)
    kill_all()
    while copy_output():
        pass
    if status is None:
        return 128 + signal.SIGKILL
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def reap(engine: int) -> int | None:
    """Collect what has ended; the engine's wait status if it is among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == engine:
            found = status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
