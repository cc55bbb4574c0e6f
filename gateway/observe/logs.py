"""The program's log: what happened to the gateway, as JSON lines on stderr.

It never holds a prompt, an answer or a key, and lets no slow terminal or pipe stop the event loop.
"""

import logging
import os
import select
import stat
from contextlib import suppress
from typing import Any, Final

import structlog
from structlog.typing import Processor

# For `uvicorn.Config(log_config=UVICORN, access_log=False)`: what uvicorn has to say goes where the program's messages
# go. Incremental, because logging would otherwise close the handler that `configure` has set.
UVICORN: Final[dict[str, Any]] = {
    "version": 1,
    "incremental": True,
    "loggers": {"uvicorn.access": {"level": "CRITICAL", "propagate": False}},
}


def write(fd: int, data: bytes | bytearray, patience: float) -> int:
    """Writes until all is out or the reader has taken nothing for `patience` seconds. Returns how many bytes went.

    Pieces no larger than what a pipe takes at once, each asked for before: a write that could block is never begun.
    """
    done = 0
    if stat.S_ISREG(os.fstat(fd).st_mode):  # a file always takes all at once
        while done < len(data):
            done += os.write(fd, data[done:])
        return done
    room = select.poll()
    room.register(fd, select.POLLOUT)
    while done < len(data) and room.poll(patience * 1000):
        with suppress(BlockingIOError):
            done += os.write(fd, data[done : done + select.PIPE_BUF])
    return done


def configure(level: str = "info", json: bool | None = None, fd: int = 2) -> None:
    """Sends structlog's and the standard library's messages to `fd`; may be called again.

    `json` None: JSON unless `fd` is a terminal. Messages that `fd` does not take are kept up to a megabyte, then counted.
    """
    if json is None:
        json = not os.isatty(fd)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler = _Lines(fd)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_rendering(json)],
        )
    )
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _Lines)]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(level.upper())


def _rendering(json: bool) -> list[Processor]:
    # Plain tracebacks: the richer ones show local variables, and so prompts and keys.
    if json:
        return [
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("message"),
            structlog.processors.JSONRenderer(),
        ]
    return [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]


class _Lines(logging.Handler):
    """Writes what `fd` takes at once; the rest waits for the next message, or for `flush` at exit."""

    ROOM: Final = 1 << 20  # bytes that may wait

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._waiting = bytearray()
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._send(0)
            if len(self._waiting) > self.ROOM:
                self._lost += 1
                return
            if self._lost:
                self._line(logging.LogRecord(__name__, logging.WARNING, "", 0, "%d messages lost", (self._lost,), None))
                self._lost = 0
            self._line(record)
            self._send(0)
        except Exception:  # noqa: BLE001 - the convention of every handler: a message must not break its sender
            self.handleError(record)

    def flush(self) -> None:
        self.acquire()
        try:
            self._send(1)
        finally:
            self.release()

    def _line(self, record: logging.LogRecord) -> None:
        self._waiting += self.format(record).encode(errors="backslashreplace") + b"\n"

    def _send(self, patience: float) -> None:
        try:
            del self._waiting[: write(self._fd, self._waiting, patience)]
        except OSError:  # nobody reads any more, and there is nowhere left to say so
            self._waiting.clear()
