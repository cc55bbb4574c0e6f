"""The access log: one line of JSON a request. It never holds a prompt, an answer or a key, and lets no slow terminal or
pipe stop the event loop."""

import asyncio
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final, Literal, NamedTuple

import orjson
import structlog

from gateway.observe.logs import write

Outcome = Literal["completed", "client_cancelled", "engine_failed", "refused", "error"]


class AccessRecord(NamedTuple):
    """One request as the access log tells it. None: not known, or there was none."""

    time: float  # its arrival, in seconds since the epoch
    request_id: str
    key: str | None  # the key's name
    model: str | None  # as the client asked for it
    endpoint: str  # the route
    replica: str | None  # the id of the last one that was tried
    status: int
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    ttft: float | None  # seconds from arrival to the first token
    duration: float  # seconds from arrival to the last byte
    attempts: int  # how many engines were asked
    outcome: Outcome
    code: str | None  # of the error, as in CONTRACT.md §6
    retry_count: int | None  # x-stainless-retry-count: how often the client's SDK has tried already
    client: str  # address


def encode(record: AccessRecord) -> bytes:
    """One line of JSON, in which nothing that a client chose can be long, end the line or steer a terminal.

    Put together by hand, in a fraction of the time that a dict and a general encoder take: most of it comes again and again.
    """
    (
        at,
        request_id,
        key,
        model,
        endpoint,
        replica,
        status,
        prompt,
        completion,
        cached,
        ttft,
        duration,
        attempts,
        outcome,
        code,
        retries,
        client,
    ) = record
    second = int(at)
    # Compiled, an f-string is put together at once, and one with formats (or `%`) is not: hence the digits cut from sums.
    line = (
        f'{{"time":"{_utc(second)}.{str(1000 + int((at - second) * 1000))[1:]}Z","request_id":{_fresh(request_id)},'
        f'{_where(key, model, endpoint, replica)},"status":{status},{_tokens(prompt, completion, cached)},'
        f'"ttft":{"null" if ttft is None else _seconds(ttft)},"duration":{_seconds(duration)},"attempts":{attempts},'
        f"{_end(outcome, code, retries, client)}}}\n"
    )
    return line.encode()


@lru_cache(maxsize=4)
def _utc(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


@lru_cache(maxsize=1024)
def _where(key: str | None, model: str | None, endpoint: str, replica: str | None) -> str:
    return f'"key":{_quoted(key)},"model":{_quoted(model)},"endpoint":{_quoted(endpoint)},"replica":{_quoted(replica)}'


@lru_cache(maxsize=1024)
def _end(outcome: Outcome, code: str | None, retries: int | None, client: str) -> str:
    tried = _number(retries)
    return f'"outcome":{_quoted(outcome)},"code":{_quoted(code)},"retry_count":{tried},"client":{_quoted(client)}'


def _tokens(prompt: int | None, completion: int | None, cached: int | None) -> str:
    return (
        f'"prompt_tokens":{_number(prompt)},"completion_tokens":{_number(completion)},"cached_tokens":{_number(cached)}'
    )


def _seconds(value: float) -> str:
    """With microseconds."""
    micros = int(value * 1e6 + 0.5)
    return f"{micros // 1_000_000}.{str(1_000_000 + micros % 1_000_000)[1:]}"


def _number(value: int | None) -> str:
    return "null" if value is None else str(value)


def _quoted(text: str | None, longest: int = 256) -> str:
    """As JSON, without what a terminal would obey."""
    if text is None:
        return "null"
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:longest])
    return orjson.dumps(plain).decode()


def _fresh(text: str) -> str:
    """As `_quoted`, for what comes once."""
    return f'"{text}"' if text.isidentifier() and len(text) <= 128 else _quoted(text)


SLICE: Final = 32  # records encoded in one go, some 0.15 ms


class AccessLog:
    """Collects records and writes them to a file descriptor in batches, every `interval` seconds or `batch` records.

    Drops nothing unless the descriptor is broken: an error, or no byte taken for `patience` seconds.
    `tap` is given each record once, before its batch is written or when `show` is called; it must not block.
    """

    def __init__(
        self,
        fd: int = 1,
        *,
        interval: float = 0.2,
        batch: int = 500,
        patience: float = 5,
        tap: Callable[[Sequence[AccessRecord]], None] | None = None,
    ) -> None:
        self.dropped = 0
        self._tap = tap
        self._fd = fd
        self._interval = interval
        self._batch = batch
        self._patience = patience
        self._records: list[AccessRecord] = []
        self._shown = 0  # of them, how many `tap` has seen
        self._torn = b""  # the rest of a line that was given up in its middle
        self._some = asyncio.Event()  # there are records
        self._full = asyncio.Event()  # … enough for a batch
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    def append(self, record: AccessRecord) -> None:
        """On the event loop's thread; never blocks."""
        records = self._records
        records.append(record)
        waiting = len(records)
        if waiting == 1:
            self._some.set()
        if waiting >= self._batch:
            self._full.set()

    def show(self) -> None:
        """Lets `tap` see what it has not seen yet, now. Never blocks."""
        new, self._shown = self._records[self._shown :], len(self._records)
        if new and self._tap is not None:
            self._tap(new)

    def start(self) -> None:
        self._stopping = False
        self._full.clear()
        self._task = asyncio.create_task(self._run(), name="access log")

    async def stop(self) -> None:
        """Writes what is left. Call it after the last request has ended."""
        self._stopping = True
        self._some.set()
        self._full.set()
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        while not (self._stopping and not self._records):
            await self._some.wait()
            timer = asyncio.get_running_loop().call_later(self._interval, self._full.set)  # no timeout: it would raise
            await self._full.wait()
            timer.cancel()
            if not self._stopping:
                self._some.clear()
                self._full.clear()
            if self._records:
                lost, why = await asyncio.to_thread(self._write, await self._encoded())
                self._report(lost, why)

    async def _encoded(self) -> bytes:
        """What has come, as lines. Here and not in the thread: two threads that compute would wait for one another's
        turns, which are long; so a slice at a time, and the loop in between."""
        lines: list[bytes] = []
        self.show()
        records, self._records, self._shown = self._records, [], 0
        for start in range(0, len(records), SLICE):
            lines += map(encode, records[start : start + SLICE])
            await asyncio.sleep(0)
        return b"".join(lines)

    def _write(self, data: bytes) -> tuple[int, str]:
        """In a thread. Returns how many records were lost, and why."""
        data = self._torn + data
        done, why = 0, "the reader is stuck"
        try:
            done = write(self._fd, data, self._patience)
        except OSError as error:
            why = os.strerror(error.errno or 0)
        line_end = data.find(b"\n", done) + 1 if done and data[done - 1] != 0x0A else done
        self._torn = data[done:line_end]
        return data.count(b"\n", line_end), why

    def _report(self, lost: int, why: str) -> None:
        if lost and not self.dropped:
            structlog.get_logger(__name__).error("access log records are being dropped", why=why)
        self.dropped += lost
