"""A sink that writes HTTP/1.1 straight to the transport."""

from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from uvicorn.server import ServerState

from gateway.cork import Cork
from gateway.types import Headers, Watcher, lines

if TYPE_CHECKING:
    import asyncio

STATUS_LINES: Final = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}


def status_line(status: int) -> bytes:
    return STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


_SIZE_LINES: Final = [b"%x\r\n" % size for size in range(1024)]


def size_line(size: int) -> bytes:
    """What a chunk begins with."""
    return _SIZE_LINES[size] if size < 1024 else b"%x\r\n" % size


_default: tuple[Headers, bytes] = ([], b"")  # the last ones seen, and the same as lines: they change once a second


def default_lines(headers: Headers) -> bytes:
    """uvicorn's own headers, as lines."""
    global _default  # noqa: PLW0603 - a cache of one
    if _default[0] is not headers:
        _default = (headers, lines(headers))
    return _default[1]


class EdgeSink:
    """The client's side of one request. Every write is a system call, so status line, headers and the body's first piece
    leave together, and so do its last piece and its end."""

    def __init__(
        self,
        transport: "asyncio.Transport",
        state: ServerState,
        on_finish: Callable[[], None],
        cork: Cork,
        *,
        keep_alive: bool,
        version_1_0: bool = False,
    ) -> None:
        self._transport = transport
        self._state = state
        self._on_finish = on_finish
        self._cork = cork
        self._keep_alive = keep_alive
        self._version_1_0 = version_1_0
        self.gone = False
        self.started = False
        self.finished = False
        self.paused = False
        self._chunked = False
        self._head = b""
        self._watcher: Watcher | None = None

    @property
    def keep_alive(self) -> bool:
        return self._keep_alive

    def close_after(self) -> None:
        """The connection will not be used for another request; the headers say so if they are not out yet."""
        self._keep_alive = False

    def start(self, status: int, headers: bytes, length: int | None) -> None:
        self.started = True
        if length is not None:
            framing = b"content-length: %d\r\n\r\n" % length
        elif self._version_1_0:
            self._keep_alive = False  # the end of the connection is the end of the body
            framing = b"\r\n"
        else:
            self._chunked = True
            framing = b"transfer-encoding: chunked\r\n\r\n"
        if not self._keep_alive:
            framing = b"connection: close\r\n" + framing
        # Goes out with the first piece of the body.
        self._head = status_line(status) + default_lines(self._state.default_headers) + headers + framing

    def write(self, data: bytes) -> None:
        if self.gone or not data:
            return
        if self._chunked and not self._head:
            data = b"%b%b\r\n" % (size_line(len(data)), data)
        elif self._chunked:
            data = b"%b%b%b\r\n" % (self._head, size_line(len(data)), data)
            self._head = b""
        elif self._head:
            data = self._head + data
            self._head = b""
        self._cork.write(self._transport, data)

    def finish(self, last: bytes = b"") -> None:
        if self.finished:
            return
        self.finished = True
        if not self.gone:
            if self._chunked:
                if last:
                    last = b"%b%b\r\n" % (size_line(len(last)), last)
                self._cork.write(self._transport, b"%b%b0\r\n\r\n" % (self._head, last))
            elif self._head or last:
                self._cork.write(self._transport, self._head + last)
            self._head = b""
        self._on_finish()

    def abort(self) -> None:
        self.finished = True
        self._transport.abort()

    def watch(self, watcher: Watcher | None) -> None:
        self._watcher = watcher
        if watcher is not None:
            if self.gone:
                watcher.client_gone()
            elif self.paused:
                watcher.pause()

    # ---- what the protocol tells

    def client_left(self) -> None:
        self.gone = True
        if self._watcher is not None:
            self._watcher.client_gone()

    def pause(self) -> None:
        self.paused = True
        if self._watcher is not None:
            self._watcher.pause()

    def resume(self) -> None:
        self.paused = False
        if self._watcher is not None:
            self._watcher.resume()
