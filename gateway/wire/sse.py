"""Server-sent events, bytes in and bytes out. Works on whole events, whatever pieces the network hands over.

https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

from typing import Final

# As numbers: `10 in data` is ten times as quick as `b"\n" in data`, which first takes what is sought for a number.
LF: Final = 10
CR: Final = 13
DONE: Final = b"[DONE]"
DONE_EVENT: Final = b"data: [DONE]\n\n"
KEEP_ALIVE: Final = b": keep-alive\n\n"
LONG_LINE: Final = 2048  # bytes
MAX_EVENT: Final = 16 * 1024 * 1024  # bytes; more than any engine sends in one event


class EventTooLargeError(ValueError):
    """One event passed `MAX_EVENT` without an end."""


class Splitter:
    """Cuts a byte stream into events, each without its closing blank line and with LF as line end.

    Bytes of an event that has not ended stay inside: at the end of the stream `rest` tells whether the last event was
    cut off. CR and CRLF line ends are read too; a raw CR or LF cannot occur inside an event's JSON.
    """

    __slots__ = ("_held", "_held_cr", "_started", "_waiting")

    def __init__(self) -> None:
        self._held: list[bytes] = []  # the event that has not ended, in pieces
        self._waiting = 0  # bytes of it
        self._started = False
        self._held_cr = False

    @property
    def rest(self) -> bytes:
        """Of the event that has not ended."""
        return b"".join(self._held)

    @property
    def between(self) -> bool:
        """The next byte begins an event."""
        return not self._held

    def feed(self, data: bytes) -> list[bytes]:
        """Returns the events that ended with these bytes. Raises `EventTooLargeError`."""
        if not self._started:
            data = self.rest + data
            self._hold(b"")
            if len(data) < 3 and b"\xef\xbb\xbf".startswith(data):
                self._hold(data)
                return []
            self._started = True
            data = data.removeprefix(b"\xef\xbb\xbf")
        if self._held_cr or CR in data:
            data = self._with_lf(data)
        if self._held:
            self._held.append(data)
            if LF not in data:  # it has not ended yet: a long one is not looked through with each piece
                self._waiting += len(data)
                self._bound()
                return []
            data = self.rest
        # Lines are found several times as quickly as blank lines, and an event is one line as a rule.
        parts = _lines(data)
        parts = parts[::2] if len(parts) % 2 and not any(parts[1::2]) else data.split(b"\n\n")
        self._hold(parts.pop())
        # A further blank line between events leaves a part that is empty or starts with LF.
        for part in parts:
            if not part or part[0] == LF:
                return [part for raw in parts if (part := raw.lstrip(b"\n"))]
        return parts

    def _hold(self, rest: bytes) -> None:
        self._held = [rest] if rest else []
        self._waiting = len(rest)
        self._bound()

    def _bound(self) -> None:
        if self._waiting > MAX_EVENT:
            raise EventTooLargeError

    def _with_lf(self, data: bytes) -> bytes:
        if self._held_cr:
            data = b"\r" + data
        self._held_cr = data.endswith(b"\r")  # it may be the first half of a CRLF
        if self._held_cr:
            data = data[:-1]
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _lines(data: bytes) -> list[bytes]:
    """`data.split(b"\\n")`, which looks at byte after byte: in a long line (the ids of a prompt) ten times as slow as `find`."""
    if len(data) > LONG_LINE and data.find(b"\n", 0, LONG_LINE) < 0:
        end = data.find(b"\n", LONG_LINE)
        return [data[:end], *data[end + 1 :].split(b"\n")] if end >= 0 else [data]
    return data.split(b"\n")


def payload(event: bytes) -> bytes | None:
    """The data of an event (as `Splitter` gives it); None if it has none, as a comment."""
    if event.startswith(b"data: ") and LF not in event:
        return event[6:]
    lines = []
    for line in event.split(b"\n"):
        name, colon, value = line.partition(b":")
        if name == b"data":
            lines.append(value.removeprefix(b" ") if colon else b"")
    return b"\n".join(lines) if lines else None


def name(event: bytes) -> bytes | None:
    """The event's own name (`event: …`), None without one."""
    if event.startswith(b"data: "):
        return None
    found = None
    for line in event.split(b"\n"):
        field, _, value = line.partition(b":")
        if field == b"event":
            found = value.removeprefix(b" ")
    return found


def event(data: bytes, name: bytes | None = None) -> bytes:
    """One event. `data` must be one line."""
    if name is not None:
        return b"event: %b\ndata: %b\n\n" % (name, data)
    return b"data: %b\n\n" % data
