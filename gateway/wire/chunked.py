"""HTTP/1.1's chunked coding, taken off piece by piece (RFC 9112 §7.1). Pure."""

import re
from typing import Final

MAX_TRAILER: Final = 64 * 1024  # bytes
MAX_LINE: Final = 4 * 1024  # bytes of a chunk's size with its extensions, or of a field of the trailer
SIZE: Final = re.compile(rb"[0-9A-Fa-f]{1,15}(?=[ \t;]|\Z)")


def size_at(data: bytes, at: int) -> tuple[int, int]:
    """The size of the chunk that begins at `at`, and where its bytes begin; -1 if there are no plain digits with their line
    end, as where an extension follows them. Digit by digit: compiled, that is quicker than one call of `bytes.find`."""
    size, start, end = 0, at, min(len(data), at + 8)
    while at < end:
        digit = data[at]
        if 48 <= digit <= 57:
            size = size * 16 + digit - 48
        elif 97 <= digit <= 102:
            size = size * 16 + digit - 87
        elif 65 <= digit <= 70:
            size = size * 16 + digit - 55
        else:
            break
        at += 1
    if at == start or at + 1 >= len(data) or data[at] != 13 or data[at + 1] != 10:
        return -1, at
    return size, at + 2


class ChunkedError(ValueError):
    """This is not what chunks look like."""


class Chunks:
    """Reads one body. `whole` once its last chunk and its trailer have come; `rest` are bytes that are not read yet."""

    __slots__ = ("_left", "_trailer", "rest", "whole")

    def __init__(self) -> None:
        self.rest = b""
        self.whole = False
        self._left = 0  # bytes to come of the current chunk, with its line end
        self._trailer = 0  # bytes of it that have come, with the last chunk's line

    @property
    def between(self) -> bool:
        """The next byte begins a chunk."""
        return not self._left and not self.rest and not self._trailer

    def feed(self, data: bytes) -> bytes:
        """The payload that came. Raises `ChunkedError`."""
        if self.between and (payload := self._plain(data)) is not None:
            return payload
        data = self.rest + data
        pieces, at, end = [], 0, len(data)
        while at < end and not self.whole:
            if self._left > 2:
                step = min(self._left - 2, end - at)
                pieces.append(data[at : at + step])
                at += step
                self._left -= step
            elif self._left:
                if end - at < 2:
                    break
                if data[at : at + 2] != b"\r\n":
                    raise ChunkedError
                at += 2
                self._left = 0
            else:
                line = data.find(b"\r\n", at)
                if (line if line >= 0 else end) - at > MAX_LINE:
                    raise ChunkedError
                if line < 0:
                    break
                self._line(data, at, line)
                at = line + 2
        self.rest = data[at:]
        return b"".join(pieces)

    def take_rest(self) -> bytes:
        """`rest`, which the next call of `feed` must begin with then."""
        rest, self.rest = self.rest, b""
        return rest

    def _plain(self, data: bytes) -> bytes | None:
        """The quick way for whole chunks, which is what engines send; None if it is not that."""
        pieces: list[bytes] = []
        at, end, size = 0, len(data), -1
        while at < end and size:
            size, start = size_at(data, at)
            at = start + size
            if size < 0 or at + 2 > end or data[at] != 13 or data[at + 1] != 10:
                return None
            pieces.append(data[start:at])
            at += 2
        if at < end:
            return None
        self.whole = self.whole or not size
        return b"".join(pieces)

    def _line(self, data: bytes, at: int, end: int) -> None:
        if self._trailer:
            self._trailer += end + 2 - at
            if self._trailer > MAX_TRAILER:
                raise ChunkedError
            self.whole = at == end
        elif (digits := SIZE.match(data, at, end)) is None:
            raise ChunkedError
        elif size := int(digits[0], 16):
            self._left = size + 2
        else:
            self._trailer = end + 2 - at
