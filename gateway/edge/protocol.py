"""The protocol class: one connection, its requests one after the other, each in the fast lane or in uvicorn's own.

The parser is fed a request at a time: first its head, whole, then its body. So what is judged is judged before the
parser (or anything else) acts on it, a pipelined request waits as bytes, and each is authorised by itself.
"""

import asyncio
import re
from collections.abc import Callable, Mapping
from enum import Enum, auto
from functools import partial
from time import monotonic
from typing import Any, Final, NamedTuple

import httptools
from mypy_extensions import mypyc_attr
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from gateway.drive import Drive, Event
from gateway.edge import guard
from gateway.edge.flow import Flow
from gateway.edge.sink import EdgeSink, default_lines, status_line
from gateway.errors import GatewayError
from gateway.head import make_head, too_large
from gateway.policy import Gateway
from gateway.relay import ClientGone
from gateway.serve import Body, serve
from gateway.types import Endpoint, Head, lines
from gateway.wire import errors as wire_errors, sse
from gateway.wire.chunked import ChunkedError, Chunks
from gateway.wire.openai import ENDPOINTS

MAX_HELD: Final = 256 * 1024  # bytes of pipelined requests that may wait
MAX_DISCARDED: Final = 8 * 1024 * 1024  # bytes of a refused body that are read, so that the client hears why
HIGH_WATER: Final = 256 * 1024  # bytes that may wait for a client before its engine is no longer read from
WRITE_TIMEOUT: Final = 60.0  # seconds in which a client must take something of what waits for it
ASK_AGAIN: Final = 0.3  # seconds
MAX_LINGERED: Final = 24 * 1024 * 1024  # bytes read of a client that is being closed: it may read its answer only then
LINGER: Final = 5.0  # seconds in which a refused client may read its answer
GRACE_PER_BYTE: Final = 1 / 100_000  # seconds of body_timeout for each byte that has come
FOREIGN: Final = re.compile(rb"(?i)\norigin[ \t]*:")
FAST: Final[Mapping[bytes, Endpoint]] = {e.path.encode(): e for e in ENDPOINTS}


class Stage(Enum):
    HEAD = auto()  # waiting for a request, or for the rest of its head
    BODY = auto()  # its body is coming
    ANSWER = auto()  # it is all there; its answer is not
    CLOSING = auto()  # nothing that comes is read as a request any more


class Timeouts:
    """Seconds; what the config says under `server`. All connections share one."""

    def __init__(self, header: float, body: float, idle: float) -> None:
        self.change(header, body, idle)

    def change(self, header: float, body: float, idle: float) -> None:
        self.header = header
        self.body = body
        self.idle = idle


class Known(NamedTuple):
    """A head that was judged. A client's heads are all alike but for the length of the body, so one judgement does."""

    prefix: bytes  # up to the number in Content-Length
    suffix: bytes  # what follows it
    head: Head
    keep_alive: bool


@mypyc_attr(native_class=False)  # as its base is not
class EdgeProtocol(HttpToolsProtocol):
    """Made by uvicorn for each connection; `bound` gives it what it works with."""

    # Apart from its base's attributes, whose dictionary then is a small one: 1 KB less for each connection.
    __slots__ = (
        "_body",
        "_came",
        "_chunks",
        "_discard",
        "_ended",
        "_fault",
        "_first",
        "_head",
        "_held",
        "_known",
        "_left",
        "_lingered",
        "_past_parser",
        "_refusal",
        "_unread",
        "_unread_since",
        "_whole",
        "gateway",
        "since",
        "sink",
        "stage",
        "timeouts",
        "touched",
        "version",
    )

    def __init__(
        self,
        gateway: Gateway,
        timeouts: Timeouts,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.pipeline = ()  # type: ignore[assignment]  # stays empty, as what is pipelined waits as bytes
        self.gateway = gateway
        self.timeouts = timeouts
        self.stage = Stage.HEAD
        self.since = monotonic()  # when the stage's deadline began to run
        self.touched = False  # bytes of the next request have come
        self.version = "1.1"
        self.sink: EdgeSink | None = None  # of the request in the fast lane
        self._head: Head | None = None  # of that request
        self._known: Known | None = None
        self._first = True  # no request has been answered yet
        self._held = b""  # bytes not yet fed
        self._left = 0  # bytes to come of a body whose length was told
        self._chunks: Chunks | None = None  # of a body that is chunked
        self._came = 0  # bytes of the body that have come
        self._lingered = 0  # bytes that came when nothing was read as a request any more
        self._body = bytearray()
        self._refusal: GatewayError | None = None
        self._fault: GatewayError | None = None  # what is wrong with the body
        self._discard = False  # the answer is out, the rest of the body is not wanted
        self._whole: Event | None = None  # the body is all there
        self._past_parser = False  # it sees nothing of this message, whose head was known
        self._ended = False  # the message has
        self._unread = 0  # bytes that waited for the client at the last look
        self._unread_since = 0.0

    # ---- bytes come in

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = Flow(transport)
        transport.set_write_buffer_limits(HIGH_WATER)

    def data_received(self, data: bytes) -> None:
        if self._held:
            data = self._held + data
            self._held = b""
        elif self._known is not None and self.stage is Stage.HEAD and self._take(self._known, data):
            return
        while data:
            stage = self.stage
            if stage is Stage.HEAD:
                data = self._feed_head(data)
            elif stage is Stage.BODY:
                data = self._feed_body(data)
            elif stage is Stage.ANSWER:
                self._hold(data)
                return
            else:  # read and dropped, so that the client hears why; but not all that it may have
                self._lingered += len(data)
                if self._lingered > MAX_LINGERED:
                    self.transport.pause_reading()
                return

    def _take(self, known: Known, data: bytes) -> bool:
        """Serves a request whose head is known, and all there. Its body may come later, as most clients send it apart."""
        prefix, suffix, head, keep_alive = known
        if not data.startswith(prefix):
            return False
        start = len(prefix)
        end = data.find(suffix, start, start + 16 + len(suffix))
        digits = data[start:end]
        if end < 0 or not digits.isdigit():
            return False
        body = data[end + len(suffix) :]
        size = int(digits)
        missing = size - len(body)
        if missing < 0 or size > self.gateway.policy.max_body_bytes:
            return False
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        self._fault = self._whole = None
        gateway = self.gateway
        sink = EdgeSink(
            self.transport,
            self.server_state,
            self._answered,
            gateway.cork,
            keep_alive=keep_alive and not gateway.draining,
        )
        self.sink = sink
        if not missing:
            self.stage = Stage.ANSWER
            self._drive(head, body, sink)
        else:
            self.touched = self._past_parser = True
            self._expect(missing)
            self._came = len(body)
            self._body += body
            self.expect_100_continue = False
            self._drive(head, self._read_body, sink)
        return True

    def _expect(self, length: int) -> None:
        """The body comes next."""
        self.stage = Stage.BODY
        self._left, self._came = length, 0
        self._chunks = None
        self._body = bytearray()
        self._ended = self._discard = False

    def _hold(self, data: bytes) -> None:
        """Keeps what was pipelined. Reading goes on, or a disconnect would go unnoticed."""
        if len(data) > MAX_HELD:
            self.transport.abort()
        else:
            self._held = data

    def _feed_head(self, data: bytes) -> bytes:
        if not self.touched:
            if data[0] == 13:  # RFC 9112 §2.2: an empty line before a request is no request
                data = guard.without_empty_lines(data)
                if data in (b"", b"\r"):
                    self._held = data
                    return b""
            self.touched = True
            if not self._first:
                self.since = monotonic()
            self._unset_keepalive_if_required()
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > guard.MAX_HEAD:
                self._refuse(guard.oversized(data))
            elif not _could_be_http(data):
                self._refuse(guard.bad("This is not HTTP/1.1."))
            elif b"\n" in data and (refusal := guard.request_line(data)) is not None:
                self._refuse(refusal)
            else:
                self._held = data
            return b""
        end += 4
        head = data[:end]
        if end > guard.MAX_HEAD:
            self._refuse(guard.oversized(head))
            return b""
        refusal = guard.request_line(head)
        if refusal is not None:
            self._refuse(refusal)
            return b""
        self._expect(0)
        self._fault = None
        self._past_parser = False
        if not self._feed(guard.without_upgrade(head)):
            if self.sink is not None and self._head is not None:
                self._drive(self._head, self._read_body, self.sink)  # it tells what is wrong
            return b""
        if self._refusal is not None:
            self._refuse(self._refusal)
            return b""
        self.headers = []  # what a trailer holds is never taken for a header
        data = data[end:]
        if self._ended:
            self._message_ends()
        sink, judged = self.sink, self._head
        if sink is not None and judged is not None:
            if not self._first and self._known is None:
                self._known = self._learn(head, judged, sink)
            if data and self.stage is Stage.BODY and len(data) >= self._left:
                data = self._feed_body(data)
            self._drive(judged, self._read_body, sink)
        return data

    def _learn(self, raw: bytes, head: Head, sink: EdgeSink) -> Known | None:
        """What to know this head by when it comes again: this is no one-off, but a client with more to ask."""
        found = guard.CONTENT_LENGTH.findall(raw)
        if len(found) != 1 or self.version != "1.1" or self._chunks or self.expect_100_continue or FOREIGN.search(raw):
            return None
        prefix, number = found[0]
        start = raw.index(prefix) + len(prefix)
        # The length is each request's own.
        return Known(
            raw[:start], raw[start + len(number) :], head._replace(content_length=None), keep_alive=sink.keep_alive
        )

    def _feed_body(self, data: bytes) -> bytes:
        """Feeds the parser what is this message's own, and no more: the next one must not go along with it."""
        if self._chunks is None:
            cut = min(self._left, len(data))
            self._left -= cut
        else:
            try:
                self._chunks.feed(data)
            except ChunkedError:
                self._refuse(guard.bad("The request is not valid HTTP/1.1."))
                return b""
            cut = len(data) - len(self._chunks.take_rest())
        if cut and not self._feed(data[:cut]):
            return b""
        if self._ended:
            self._message_ends()
            return data[cut:]
        self._held = data[cut:]  # a torn line
        return b""

    def _feed(self, data: bytes) -> bool:
        try:
            if self._past_parser:
                self.on_body(data)
                if not self._left:
                    self.on_message_complete()
            else:
                self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(guard.no_connect())
            return False
        except httptools.HttpParserError:
            self._refuse(guard.bad("The request is not valid HTTP/1.1."))
            return False
        return self.stage is not Stage.CLOSING

    def _message_ends(self) -> None:
        if self._discard:
            self._next()
            return
        self.stage = Stage.ANSWER
        self._wake()

    def _wake(self) -> None:
        """No more of the body is to be waited for."""
        if self._whole is not None:
            self._whole.happen()

    # ---- what the parser tells

    def on_message_begin(self) -> None:
        # uvicorn's own lane wants a scope as well; most requests do not take it.
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        version = self.version = self.parser.get_http_version()
        fields = dict(self.headers)
        self._refusal = guard.headers(self.headers, fields, version)
        if self._refusal is not None:
            return
        length = fields.get(b"content-length")
        if length is not None:
            self._left = int(length)
        else:
            self._chunks = Chunks() if b"transfer-encoding" in fields else None
        self.expect_100_continue = b"expect" in fields
        endpoint = FAST.get(self.url)
        # A web page of another origin needs what the fast lane has not: headers that say whether it may read the answer.
        foreign = b"origin" in fields and self.gateway.policy.cors_origins
        if endpoint is None or foreign or self.parser.get_method() != b"POST":
            if self.parser.get_method() == b"CONNECT":
                self._refusal = guard.no_connect()
                return
            url, found, expected = self.url, self.headers, self.expect_100_continue
            super().on_message_begin()
            self.url, self.headers[:], self.expect_100_continue = url, found, expected
            super().on_headers_complete()
            if self.gateway.draining and self.cycle is not None:
                self.cycle.keep_alive = False
            return
        self._prepare(endpoint)

    def on_body(self, body: bytes) -> None:
        self._came += len(body)
        if self._discard:
            if self._came > MAX_DISCARDED:
                self._close_gently()
        elif self.sink is None:
            super().on_body(body)
        elif self._fault is not None:
            return
        elif self._came > self.gateway.policy.max_body_bytes:
            self._refuse(too_large(self.gateway.policy.max_body_bytes))
        else:
            self._body += body

    def on_message_complete(self) -> None:
        self._ended = True
        if self.sink is None and self._refusal is None:
            super().on_message_complete()

    # ---- the fast lane

    def _prepare(self, endpoint: Endpoint) -> None:
        client = self.client
        self._head = make_head(endpoint, self.headers, client[0] if client else "")
        self._whole = None
        self.sink = EdgeSink(
            self.transport,
            self.server_state,
            self._answered,
            self.gateway.cork,
            keep_alive=self.version != "1.0" and self.parser.should_keep_alive() and not self.gateway.draining,
            version_1_0=self.version == "1.0",
        )

    def _drive(self, head: Head, body: Body, sink: EdgeSink) -> None:
        drive = Drive(serve(self.gateway, head, body, sink), self.tasks.discard)
        self.tasks.add(drive)  # type: ignore[arg-type]  # uvicorn counts and cancels them: both work
        drive.step()

    async def _read_body(self) -> bytearray:
        """The body, when it is all there. Raises `GatewayError`, `ClientGone`."""
        sink = self.sink
        assert sink is not None
        if self.stage is Stage.BODY:
            if self.expect_100_continue:
                self.gateway.cork.write(self.transport, b"HTTP/1.1 100 Continue\r\n\r\n")
            self.since = monotonic()
            self._whole = Event()
            await self._whole
        if sink.gone:
            raise ClientGone
        if self._fault is not None:
            raise self._fault
        body, self._body = self._body, bytearray()
        return body

    def _answered(self) -> None:
        """The fast lane's answer is complete."""
        self.server_state.total_requests += 1
        sink = self.sink
        if sink is None or sink.gone or self.transport.is_closing():
            return
        if not sink.keep_alive:
            if self.stage is Stage.ANSWER:
                self.gateway.cork.flush(self.transport)
                self.transport.close()
            else:
                self._close_gently()
        elif self.stage is Stage.BODY:
            self._discard = True
            self.since = monotonic()
        elif not self.flow.write_paused:  # else there is no next request before this answer has been read
            self._next()

    def on_response_complete(self) -> None:
        """uvicorn's own lane has answered."""
        super().on_response_complete()
        if not self.transport.is_closing():
            if self.stage is Stage.BODY and not self._ended:
                self._discard = True
            else:
                self._next()

    def _next(self) -> None:
        """On to the next request of this connection."""
        self.sink = self._head = None
        self.stage = Stage.HEAD
        self.touched = self._first = False
        self.since = monotonic()
        if self._held:
            self.loop.call_soon(self._pipelined)

    def _pipelined(self) -> None:
        if self.stage is Stage.HEAD and not self.transport.is_closing():
            data, self._held = self._held, b""
            self.data_received(data)

    # ---- refusing

    def _refuse(self, error: GatewayError) -> None:
        """Answers what HTTP still can, and closes. Into a running answer nothing is written."""
        sink = self.sink
        cycle: RequestResponseCycle | None = self.cycle
        if sink is not None and not sink.started:  # then the request's own answer says what is wrong with its body
            self.stage, self._held, self._body = Stage.CLOSING, b"", bytearray()
            self._fault = error
            sink.close_after()
            self._wake()
            return
        if sink is not None and sink.finished:
            self._close_gently()
            return
        if sink is not None or (cycle is not None and not cycle.response_complete):
            self.transport.abort()
            return
        body = wire_errors.body(error)
        fields = [*wire_errors.headers(error), (b"content-type", b"application/json"), (b"connection", b"close")]
        fields.append((b"content-length", b"%d" % len(body)))
        head = status_line(error.status) + default_lines(self.server_state.default_headers) + lines(fields)
        self.gateway.cork.write(self.transport, b"%b\r\n%b" % (head, body))
        self.gateway.metrics.other_model.request("none", error.status, 0)
        self._close_gently()

    def _close_gently(self) -> None:
        """Closes for writing, and reads on for a while: closing with unread bytes would reset the connection, and the
        client might never see the answer."""
        self.stage = Stage.CLOSING
        self.since = monotonic()
        self._held = b""
        self.gateway.cork.flush(self.transport)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER, self.transport.abort)

    # ---- what the event loop tells

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """The client has sent all it will. It may still read; whether it does, only writing tells."""
        sink = self.sink
        if sink is None or not sink.started or sink.finished:
            return False
        sink.close_after()
        self._ask_whether_it_reads(sink)
        return True

    def _ask_whether_it_reads(self, sink: EdgeSink) -> None:
        """A comment costs a reader nothing; to who is gone, the first one brings a reset and the next one an error."""
        if self.sink is sink and not sink.finished and not sink.gone:
            sink.write(sse.KEEP_ALIVE)
            self.loop.call_later(ASK_AGAIN, self._ask_whether_it_reads, sink)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.sink is not None and not self.sink.finished:
            self.sink.client_left()
            self._wake()
        self.stage = Stage.CLOSING
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread, self._unread_since = self.transport.get_write_buffer_size(), monotonic()
        if self.sink is not None:
            self.sink.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.sink is None:
            return
        self.sink.resume()
        if self.sink.finished and self.stage is Stage.ANSWER:
            self._next()

    def shutdown(self) -> None:
        if self.sink is not None and not self.sink.finished:
            self.sink.close_after()
        else:
            self.gateway.cork.flush(self.transport)
            super().shutdown()

    # ---- deadlines

    def tick(self, now: float) -> None:
        """Called about once a second for every connection: one timer for all."""
        if self.flow.write_paused:
            unread = self.transport.get_write_buffer_size()
            if unread < self._unread:
                self._unread_since = now
            elif now - self._unread_since > WRITE_TIMEOUT:
                self.transport.abort()
                return
            self._unread = unread
        waited = now - self.since
        if self.stage is Stage.HEAD:
            if not self.touched:
                if waited > self.timeouts.idle:
                    self.gateway.cork.flush(self.transport)
                    self.transport.close()
            elif waited > self.timeouts.header:
                self._refuse(GatewayError(408, "request_timeout", "The request's headers took too long to come."))
        elif self.stage is Stage.BODY and waited > self.timeouts.body + self._came * GRACE_PER_BYTE:
            self._refuse(GatewayError(408, "request_timeout", "The request's body took too long to come."))


def _could_be_http(data: bytes) -> bool:
    """Whether what has come so far can be the beginning of a request: a method is letters, and not many."""
    method = data[:24].partition(b" ")[0]
    return len(method) < 24 and method.replace(b"-", b"").isalpha()


def bound(gateway: Gateway, timeouts: Timeouts) -> Callable[..., EdgeProtocol]:
    """For `uvicorn.Config(http=…)`, which calls it as it would the class of a protocol."""
    return partial(EdgeProtocol, gateway, timeouts)
