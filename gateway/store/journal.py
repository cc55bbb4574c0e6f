"""Where settled requests wait for the store: files that are mapped into memory, so that adding a row is copying some bytes,
and what was added is there after a `kill -9`.

A file is one segment: 8 bytes of name, 8 that tell up to where its rows are in the store, and rows as lines of JSON up to
the first zero byte. Its process holds a lock on it; a segment without one belongs to a process that is gone, and to
whoever locks it next. Where no file can be made (a full or read-only disk), a segment is memory alone.
"""

import fcntl
import mmap
import os
import secrets
import time
from collections import deque
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Final, NamedTuple, Self

import orjson
import structlog

from gateway.store.base import UsageRow

log = structlog.get_logger("penstock")

SEGMENT: Final = 1 << 20  # bytes; some 5000 rows. As much of it as is written stands in the process's memory
MOST_IN_MEMORY: Final = 256  # segments that are memory alone, before rows are lost
BATCH: Final = 128 << 10  # bytes of rows that go to the store at once
MAX_AGE: Final = (
    3600.0  # seconds after which another segment is begun: ids of rows grow with time, give or take as much
)

_MAGIC: Final = b"penstock"
_START: Final = 16
_SUFFIX: Final = ".rows"
_FIELDS: Final = len(UsageRow._fields) - 1  # all but the id, which the place gives
_APPEND_NEWLINE: Final = orjson.OPT_APPEND_NEWLINE


class Segment:
    """`at`: where the next row goes. `done`: up to where rows are in the store."""

    __slots__ = ("_fd", "at", "done", "id", "map", "path", "size")

    def __init__(self, id: str, map: mmap.mmap, path: Path | None, fd: int) -> None:  # noqa: A002
        self.id = id
        self.map = map
        self.path = path  # None: memory alone
        self._fd = fd
        self.size = len(map)
        self.at = self.done = _START

    @classmethod
    def on_disk(cls, folder: Path, id: str, size: int) -> Self:  # noqa: A002
        """Raises OSError."""
        path, new = folder / (id + _SUFFIX), folder / (id + ".new")
        folder.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(fd, 0, size)  # or writing to the map would be a signal, once the disk is full
            new.rename(path)  # only now may others look at it
            return cls(id, _mapped(fd, size), path, fd)
        except BaseException:
            os.close(fd)
            new.unlink(missing_ok=True)
            raise

    @classmethod
    def in_memory(cls, id: str, size: int) -> Self:  # noqa: A002
        segment = cls(id, mmap.mmap(-1, size), None, -1)
        segment.map[:_START] = _MAGIC + _START.to_bytes(8, "little")
        return segment

    @classmethod
    def left_behind(cls, path: Path) -> Self | None:
        """A segment whose process is gone; None if another one has it. Raises OSError."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = os.fstat(fd).st_size
            if not os.path.samestat(os.fstat(fd), path.stat()) or size <= _START:
                raise BlockingIOError
            segment = cls(path.name.removesuffix(_SUFFIX), mmap.mmap(fd, size), path, fd)
        except (BlockingIOError, FileNotFoundError):
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        segment.at = segment.map.rfind(b"\n", _START) + 1 or _START  # a line that has no end was not finished
        segment.done = min(max(int.from_bytes(segment.map[8:_START], "little"), _START), segment.at)
        return segment

    def next(self, end: int) -> "Batch":
        """The rows that follow `done`, up to `end` at most."""
        stop = self.map.rfind(b"\n", self.done, min(self.done + BATCH, end)) + 1 or end
        return Batch(self, stop, _rows(self.id, self.done, self.map[self.done : stop]))

    def finish(self, batch: "Batch") -> None:
        """Its rows are in the store."""
        self.done = batch.end
        self.map[8:_START] = batch.end.to_bytes(8, "little")

    def close(self, *, keep: bool = False) -> None:
        """`keep`: rows in it wait for the next start."""
        self.map.close()
        if self.path is not None and not keep:
            self.path.unlink(missing_ok=True)
        if self._fd >= 0:
            os.close(self._fd)


class Batch(NamedTuple):
    segment: Segment
    end: int
    rows: list[UsageRow]


class Cut(NamedTuple):
    """A place in the journal: what was added before it."""

    segment: Segment
    at: int


def _mapped(fd: int, size: int) -> mmap.mmap:
    found = mmap.mmap(fd, size)
    found[:_START] = _MAGIC + _START.to_bytes(8, "little")
    return found


def _rows(segment: str, start: int, data: bytes) -> list[UsageRow]:
    lines = data.split(b"\n")[:-1]
    try:
        values = orjson.loads(b"[" + b",".join(lines) + b"]")
    except orjson.JSONDecodeError:  # one that was being written when the machine stopped
        values = [_value(line) for line in lines]
    places = accumulate((len(line) + 1 for line in lines), initial=start)
    return [
        # `UsageRow(…)` takes five times as long, which is a fifth of what a row costs on its way into the store.
        tuple.__new__(UsageRow, ("%s%08x" % (segment, place), *fields))  # noqa: UP031 - quicker, too
        for place, fields in zip(places, values, strict=False)
        if isinstance(fields, list) and len(fields) == _FIELDS
    ]


def _value(line: bytes) -> object:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        log.warning("a row of usage is damaged", bytes=len(line))
        return None


class Journal:
    """All segments of this process, and those that others left behind. For one thread."""

    def __init__(self, folder: Path | None, size: int = SEGMENT, most_in_memory: int = MOST_IN_MEMORY) -> None:
        """`folder`: where segments are kept; made if its parent is there. None: memory alone."""
        self.lost = 0  # rows for which there was no room
        self._folder = folder
        self._size = size
        self._most_in_memory = most_in_memory
        self._complained = False
        self._segments: deque[Segment] = deque()  # the oldest first; the last one is written to
        self._begin(memory=True)

    def append(self, row: tuple[object, ...]) -> None:
        """`row`: the fields of a `UsageRow` after its id, as a plain tuple. Never blocks for long, never raises."""
        line = orjson.dumps(row, None, _APPEND_NEWLINE)
        segment = self._current
        at = segment.at
        end = at + len(line)
        if end > segment.size:
            if not self._turn(len(line)):
                return
            segment = self._current
            at = segment.at
            end = at + len(line)
        segment.map[at:end] = line
        segment.at = end

    def _turn(self, needed: int) -> bool:
        in_memory = sum(segment.path is None for segment in self._segments)
        if needed > self._size - _START or not self._begin(memory=in_memory < self._most_in_memory):
            if not self.lost:
                log.error("rows of usage are lost: the store is down, and there is no room left to keep them")
            self.lost += 1
            return False
        return True

    def _begin(self, *, memory: bool) -> bool:
        """Another segment, on disk if possible; else, if `memory` allows, in memory."""
        id_ = f"{time.time_ns() // 1000:015x}{secrets.token_hex(3)}"
        segment = self._on_disk(id_)
        if segment is None:
            if not memory:
                return False
            segment = Segment.in_memory(id_, self._size)
        self._began = time.monotonic()
        self._current = segment
        self._segments.append(segment)
        return True

    def _on_disk(self, id: str) -> Segment | None:  # noqa: A002
        if self._folder is None:
            return None
        try:
            segment = Segment.on_disk(self._folder, id, self._size)
        except OSError as error:
            if not self._complained:
                log.error(
                    "usage that waits for the store is kept in memory", folder=str(self._folder), why=error.strerror
                )
            self._complained = True
            return None
        self._complained = False
        return segment

    def adopt(self) -> int:
        """Takes over what processes that are gone left behind. Returns how many segments. Blocks on the disk."""
        found = 0
        for path in sorted(self._folder.glob("*" + _SUFFIX)) if self._folder is not None else ():
            try:
                segment = Segment.left_behind(path)
            except OSError:
                continue
            if segment is not None:
                self._segments.appendleft(segment)
                found += 1
        return found

    @property
    def waiting(self) -> int:
        """Bytes of rows that are not in the store yet."""
        return sum(segment.at - segment.done for segment in self._segments)

    def cut(self) -> Cut:
        return Cut(self._current, self._current.at)

    def batches(self, cut: Cut) -> Iterator[Batch]:
        """What is to be put into the store, up to `cut`: each batch must be finished before the next one is asked for."""
        while True:
            segment = self._segments[0]
            end = cut.at if segment is cut.segment else segment.at
            if segment.done < end:
                yield segment.next(end)
            elif segment is self._current or segment is cut.segment:
                return
            else:
                self._segments.popleft().close()

    def tidy(self) -> None:
        """Begins another segment if the current one is old, or is memory alone and the disk is there again."""
        old = time.monotonic() - self._began > MAX_AGE and self._current.at > _START
        if old or (self._current.path is None and self._folder is not None):
            self._begin(memory=False)

    def close(self) -> None:
        """What is not in the store waits on disk for the next start, if it can."""
        for segment in self._segments:
            if segment.path is None and segment.done < segment.at and self._folder is not None:
                try:
                    kept = Segment.on_disk(self._folder, segment.id, segment.size)
                except OSError:
                    self.lost += segment.map[segment.done : segment.at].count(b"\n")
                    continue
                kept.map[_START : segment.at] = segment.map[_START : segment.at]
                kept.map[8:_START] = segment.done.to_bytes(8, "little")
                kept.close(keep=True)
            segment.close(keep=segment.done < segment.at)
        self._segments.clear()
