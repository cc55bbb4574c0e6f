"""A sink that writes HTTP/1.1 straight to the transport."""

from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from gateway.types import Headers, Watcher

if TYPE_CHECKING:
    import asyncio

STATUS_LINES: Final = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}


def status_line(status: int) -> bytes:
    return STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


def head(status: int, headers: Headers, default: Headers, *, close: bool) -> list[bytes]:
    """Status line and headers, without the blank line."""
    parts = [status_line(status)]
    parts += [b"%b: %b\r\n" % field for field in default]
    parts += [b"%b: %b\r\n" % field for field in headers]
    if close:
        parts.append(b"connection: close\r\n")
    return parts


class EdgeSink:
    """The client's side of one request. Every write is a system call, so status line, headers and the body's first piece
    leave together, and so do its last piece and its end."""

    __slots__ = (
        "_chunked",
        "_default",
        "_head",
        "_keep_alive",
        "_on_finish",
        "_transport",
        "_version_1_0",
        "_watcher",
        "finished",
        "gone",
        "paused",
        "started",
    )

    def __init__(
        self,
        transport: "asyncio.Transport",
        default: Headers,
        on_finish: Callable[[], None],
        *,
        keep_alive: bool,
        version_1_0: bool,
    ) -> None:
        self._transport = transport
        self._default = default
        self._on_finish = on_finish
        self._keep_alive = keep_alive
        self._version_1_0 = version_1_0
        self._chunked = False
        self._head = b""
        self._watcher: Watcher | None = None
        self.gone = False
        self.started = False
        self.finished = False
        self.paused = False

    @property
    def keep_alive(self) -> bool:
        return self._keep_alive

    def close_after(self) -> None:
        """The connection will not be used for another request; the headers say so if they are not out yet."""
        self._keep_alive = False

    def start(self, status: int, headers: Headers, length: int | None) -> None:
        self.started = True
        if length is None and self._version_1_0:
            self._keep_alive = False  # the end of the connection is the end of the body
        parts = head(status, headers, self._default, close=not self._keep_alive)
        if length is not None:
            parts.append(b"content-length: %d\r\n\r\n" % length)
        elif self._version_1_0:
            parts.append(b"\r\n")
        else:
            self._chunked = True
            parts.append(b"transfer-encoding: chunked\r\n\r\n")
        self._head = b"".join(parts)  # goes out with the first piece of the body

    def write(self, data: bytes) -> None:
        if self.gone or not data:
            return
        if self._chunked:
            data = b"%b%x\r\n%b\r\n" % (self._head, len(data), data)
            self._head = b""
        elif self._head:
            data = self._head + data
            self._head = b""
        self._transport.write(data)

    def finish(self, last: bytes = b"") -> None:
        if self.finished:
            return
        self.finished = True
        if not self.gone:
            if self._chunked:
                end = b"%b%x\r\n%b\r\n0\r\n\r\n" % (self._head, len(last), last) if last else self._head + b"0\r\n\r\n"
                self._transport.write(end)
            elif self._head or last:
                self._transport.write(self._head + last)
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
