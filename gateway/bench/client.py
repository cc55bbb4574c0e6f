"""A streaming HTTP/1.1 client that costs a few microseconds a token: one callback per read, no coroutine, and no JSON
parsed where a byte search tells as much.

`Reader` is pure; `Client` does the I/O, on one event loop and from its thread only.
"""

import asyncio
import socket
import ssl
import time
from array import array
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Self
from urllib.parse import urlsplit

import httptools
import orjson

from gateway.bench.results import Cause
from gateway.wire import sse

now: Final = time.monotonic  # the loop's own clock has a resolution of 1 ms under uvloop

_UNFINISHED: Final = b'"finish_reason":null'  # quotes inside a JSON string are escaped: these bytes are always a field
_MAX_ERROR_BODY: Final = 64 * 1024
_CONNECT_TIMEOUT: Final = 10.0  # seconds for one address, TLS included
_CONNECTING_AT_ONCE: Final = 128  # more would overflow a usual listen backlog, and a lost SYN costs a second


class Usage(NamedTuple):
    prompt_tokens: int
    completion_tokens: int


class Reader:
    """Reads one answer's event stream, in any pieces. Pure: the time of each piece is passed in."""

    __slots__ = ("_between_events", "_splitter", "done", "error", "events", "finished", "malformed", "times", "usage")

    def __init__(self, keep_events: bool = False) -> None:
        self.times: array[float] = array("d")  # of every chunk from the first with output
        self.finished = False  # a finish reason came
        self.done = False  # [DONE] came
        self.error: str | None = None  # the message of an error event
        self.malformed: str | None = None  # what could not be read
        self.usage: Usage | None = None
        self.events: list[bytes] | None = [] if keep_events else None
        self._splitter = sse.Splitter()
        self._between_events = False  # all bytes so far are whole events

    def feed(self, data: bytes, at: float) -> None:
        if (
            self._between_events
            and self.times
            and _UNFINISHED in data
            and data.startswith(b"data: ")
            and data.find(b"\n\n") == len(data) - 2
        ):
            self.times.append(at)
            if self.events is not None:
                self.events.append(data[6:-2])
            return
        try:
            for event in self._splitter.feed(data):
                self._read(event, at)
        except sse.EventTooLargeError:
            self.malformed = "an event of more than 16 MB"
        self._between_events = not self.done and data.endswith(b"\n\n") and self._splitter.between

    def text(self) -> str:
        """The answer's text. Only with `keep_events`."""
        parts = []
        for raw in self.events or ():
            for choice in orjson.loads(raw)["choices"]:
                delta = choice.get("delta") or choice
                parts.append(delta.get("content") or delta.get("text") or "")
        return "".join(parts)

    def _read(self, event: bytes, at: float) -> None:
        payload = sse.payload(event)
        if payload is None or self.done:
            return
        if self.times and _UNFINISHED in payload:
            self.times.append(at)
            if self.events is not None:
                self.events.append(payload)
            return
        if payload == sse.DONE:
            self.done = True
            return
        try:
            self._take(orjson.loads(payload), at)
        except (orjson.JSONDecodeError, TypeError, KeyError, AttributeError):
            self.malformed = payload[:200].decode(errors="replace")
            return
        if self.events is not None and self.times:
            self.events.append(payload)

    def _take(self, chunk: dict[str, Any], at: float) -> None:
        if "error" in chunk or chunk.get("object") == "error":
            self.error = error_message(chunk)
            return
        choices = chunk["choices"]
        self.finished |= any(choice.get("finish_reason") is not None for choice in choices)
        if choices and (self.times or any(map(has_output, choices))):
            self.times.append(at)
        if usage := chunk.get("usage"):
            self.usage = Usage(int(usage["prompt_tokens"]), int(usage.get("completion_tokens") or 0))


def has_output(choice: dict[str, Any]) -> bool:
    """Whether a choice shows that the engine has made a token: the role alone does not."""
    delta = choice.get("delta") or choice
    return choice.get("finish_reason") is not None or any(
        delta.get(name) for name in ("content", "text", "reasoning", "reasoning_content", "tool_calls", "refusal")
    )


def error_message(body: Any) -> str:
    """What an error object says, in whichever of the usual shapes."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return " ".join(str(message or error).split())[:300]


def status_cause(status: int) -> Cause:
    known = {401: Cause.UNAUTHORIZED, 404: Cause.NOT_FOUND, 429: Cause.RATE_LIMITED, 503: Cause.UNAVAILABLE}
    if status in known:
        return known[status]
    if status >= 500:
        return Cause.SERVER_ERROR
    return Cause.REJECTED if status >= 400 else Cause.MALFORMED


def judge(status: int, error_body: bytes, reader: Reader) -> tuple[Cause | None, str]:
    """The verdict on an answer that has ended, for whatever reason: a cause and what the server said."""
    if not status:
        return Cause.CUT, "the connection was closed without an answer"
    if status != 200:
        try:
            said = error_message(orjson.loads(error_body))
        except orjson.JSONDecodeError:
            said = error_message(error_body.decode(errors="replace"))
        return status_cause(status), f"HTTP {status}: {said}"
    if reader.malformed is not None:
        return Cause.MALFORMED, f"not a chunk: {reader.malformed}"
    if reader.error is not None:
        return Cause.ERROR_EVENT, reader.error
    if not reader.done or not reader.finished:
        missing = "[DONE]" if reader.finished else "a finish reason"
        return Cause.CUT, f"ended after {len(reader.times)} chunks, without {missing}"
    return None, ""


class Target(NamedTuple):
    """Where requests go, and the head they are sent with."""

    name: str  # the URL as given
    host: str
    port: int
    tls: ssl.SSLContext | None
    head: bytes  # up to the value of Content-Length

    @classmethod
    def parse(cls, url: str, path: str, key: str | None, *, insecure: bool = False) -> Self:
        """`url` is a base such as `http://host:8000` or `http://host:8000/v1`. Raises `ValueError`."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"'{url}' is no http:// or https:// URL")
        if not all("!" <= char <= "~" for char in (key or "") + url):
            raise ValueError("the URL and the key may hold visible ASCII characters only")
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        if tls and insecure:
            tls.check_hostname = False
            tls.verify_mode = ssl.CERT_NONE
        base = parts.path.rstrip("/").removesuffix("/v1")
        lines = [
            f"POST {base}/v1/{path} HTTP/1.1",
            f"Host: {parts.netloc.rpartition('@')[2]}",
            "User-Agent: penstock-bench",
            "Accept: text/event-stream",
            "Content-Type: application/json",
            *([f"Authorization: Bearer {key}"] if key else []),
            "Content-Length: ",
        ]
        port = parts.port or (443 if tls else 80)
        return cls(url, parts.hostname, port, tls, "\r\n".join(lines).encode())


class Exchange:
    """One request and what came back. Written by `Client` until `on_end` is called with it, exactly once."""

    __slots__ = (
        "_connecting", "_connection", "_retried", "body", "cause", "detail", "due", "ended", "error_body", "index", "on_end",
        "reader", "sent", "status", "turn",
    )  # fmt: skip

    def __init__(
        self,
        body: bytes,
        on_end: "Callable[[Exchange], None]",
        *,
        due: float,
        index: int = 0,
        turn: int = 0,
        keep_events: bool = False,
    ) -> None:
        self.body = body
        self.due = due
        self.index = index
        self.turn = turn
        self.on_end = on_end
        self.sent = 0.0
        self.ended = False
        self.status = 0
        self.error_body = b""
        self.reader = Reader(keep_events)
        self.cause: Cause | None = None
        self.detail = ""
        self._retried = False
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[None] | None = None


class Client:
    """Sends requests to one target over connections that are kept open, as many as it takes."""

    def __init__(self, target: Target, timeout: float) -> None:
        self.target = target
        self.running: dict[Exchange, None] = {}  # in the order they were sent
        self._timeout = timeout
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()
        self._address: tuple[Any, ...] | None = None  # (family, type, protocol, name, address) that worked
        self._gate = asyncio.Semaphore(_CONNECTING_AT_ONCE)

    def send(self, exchange: Exchange) -> None:
        """Never fails and never blocks: what goes wrong is told through `exchange.on_end`, from a later callback."""
        exchange.sent = now()
        self.running[exchange] = None
        if self._idle:
            self._idle.pop().send(exchange)
        else:
            self._connect_for(exchange)

    def sweep(self, at: float) -> None:
        """Ends the requests that have run for too long."""
        late = []
        for exchange in self.running:
            if at - exchange.sent < self._timeout:
                break
            late.append(exchange)
        for exchange in late:
            self._give_up(exchange, Cause.TIMEOUT, f"no whole answer within {self._timeout:g} s")

    def abandon(self) -> None:
        """Ends all requests that run."""
        for exchange in list(self.running):
            self._give_up(exchange, Cause.ABANDONED, "")

    def close(self) -> None:
        self.abandon()
        for connection in list(self._open):
            connection.abort()

    def _connect_for(self, exchange: Exchange) -> None:
        exchange._connecting = asyncio.get_running_loop().create_task(self._connect(exchange))

    async def _connect(self, exchange: Exchange) -> None:
        try:
            async with self._gate:
                connection = await self._opened()
        except ConnectionRefusedError as error:
            self.finish(exchange, Cause.REFUSED, f"{self.target.host}:{self.target.port}: {error.strerror or error}")
        except (OSError, UnicodeError) as error:  # also: name resolution, TLS
            said = getattr(error, "strerror", None) or str(error) or type(error).__name__
            self.finish(exchange, Cause.UNREACHABLE, f"{self.target.host}:{self.target.port}: {said}")
        else:
            exchange._connecting = None
            connection.send(exchange)

    async def _opened(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        target = self.target
        addresses = (
            [self._address]
            if self._address
            else await loop.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        )
        failure: OSError | None = None
        for address in addresses:
            host, port = address[4][:2]
            try:
                async with asyncio.timeout(_CONNECT_TIMEOUT):
                    _, connection = await loop.create_connection(
                        lambda: _Connection(self),
                        host,
                        port,
                        ssl=target.tls,
                        server_hostname=target.host if target.tls else None,
                    )
            except TimeoutError:
                failure = OSError(f"no {'TLS ' if target.tls else ''}connection within {_CONNECT_TIMEOUT:g} s")
                continue
            except OSError as error:
                failure = error
                continue
            self._address = address
            return connection
        raise failure or OSError("the host's name has no address")

    def _give_up(self, exchange: Exchange, cause: Cause, detail: str) -> None:
        if exchange._connecting is not None:
            exchange._connecting.cancel()
        if exchange._connection is not None:
            exchange._connection.abort()
        self.finish(exchange, cause, detail)

    # What connections report.

    def opened(self, connection: "_Connection") -> None:
        self._open.add(connection)

    def idle(self, connection: "_Connection") -> None:
        self._idle.append(connection)

    def lost(self, connection: "_Connection") -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def broken(self, exchange: Exchange, *, reused: bool) -> None:
        """The connection ended under a request. One that was kept open may have been closed as the request was sent."""
        exchange._connection = None
        if reused and not exchange.status and not exchange._retried:
            exchange._retried = True
            self._connect_for(exchange)
        else:
            self.finish(exchange, *judge(exchange.status, exchange.error_body, exchange.reader))

    def finish(self, exchange: Exchange, cause: Cause | None, detail: str) -> None:
        if exchange.ended:
            return
        exchange.ended = True
        exchange._connecting = exchange._connection = None
        exchange.cause, exchange.detail = cause, detail
        del self.running[exchange]
        exchange.on_end(exchange)


class _Connection(asyncio.Protocol):
    """One connection: idle, or with one request on it."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._parser: Any = httptools.HttpResponseParser(self)
        self._answers = 0  # complete ones
        self._at = 0.0  # when the bytes at hand came
        self._keep = False
        self._complete = False

    def send(self, exchange: Exchange) -> None:
        if self._transport is None or self._transport.is_closing():
            self._client.broken(exchange, reused=True)
            return
        self._exchange = exchange
        exchange._connection = self
        head = self._client.target.head
        self._transport.write(b"%b%d\r\n\r\n%b" % (head, len(exchange.body), exchange.body))

    def abort(self) -> None:
        """Closes at once, without a word to the client's request."""
        self._exchange = None
        if self._transport is not None:
            self._transport.abort()

    # asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._client.opened(self)

    def data_received(self, data: bytes) -> None:
        self._at = now()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._unreadable(f"not HTTP/1.1: {error}")
            return
        if self._complete:
            self._ended()

    def eof_received(self) -> None:
        return None  # closes the transport

    def connection_lost(self, _exception: Exception | None) -> None:
        self._parser = self._transport = None  # they refer back: the cycle collector may be off
        self._client.lost(self)
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            self._client.broken(exchange, reused=self._answers > 0)

    # httptools

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._exchange is not None and status >= 200:
            self._exchange.status = status
        self._keep = self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        if exchange.status == 200:
            exchange.reader.feed(body, self._at)
        elif len(exchange.error_body) < _MAX_ERROR_BODY:
            exchange.error_body += body

    def on_message_complete(self) -> None:
        self._complete = self._exchange is None or self._exchange.status != 0  # else: an interim 1xx

    def _ended(self) -> None:
        self._complete = False
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            self._unreadable("bytes that nobody asked for")
            return
        self._answers += 1
        exchange._connection = None
        if self._keep:
            self._client.idle(self)
        else:
            self.abort()
        self._client.finish(exchange, *judge(exchange.status, exchange.error_body, exchange.reader))

    def _unreadable(self, why: str) -> None:
        exchange = self._exchange
        self.abort()
        if exchange is not None:
            self._client.finish(exchange, Cause.MALFORMED, why)
