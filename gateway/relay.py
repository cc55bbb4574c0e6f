"""Stage 7: from an engine's connection to a client's, without a coroutine in between.

A relay is the receiver of one attempt's answer and the watcher of the client. Its callbacks run straight from the
engine's `data_received` to the client's `write`; `serve` awaits one future for the end. What it decides is pure and
lives in `wire.sse` and `usage.meter`.
"""

import asyncio
from time import monotonic
from typing import Final, Protocol

import orjson

from gateway import errors
from gateway.beat import until_beat
from gateway.drive import Event
from gateway.observe.counters import Histogram
from gateway.types import Call, Sink, Usage
from gateway.usage.meter import Meter, Verdict, meter as make_meter, usage_in, usage_of
from gateway.usage.trail import Lane, Trail
from gateway.wire import sse
from gateway.wire.errors import from_engine, from_engine_event

KEEP_ALIVE_AFTER: Final = 15.0  # seconds of silence towards the client
DOUBTFUL_AFTER: Final = 2.0  # seconds of the engine's silence before its health is looked at
MAX_ERROR_BODY: Final = 256 * 1024  # bytes
MAX_ANSWER: Final = 256 * 1024 * 1024  # bytes of an answer that is not streamed


class ClientGone(Exception):  # noqa: N818 - an event, not a fault
    """The client has left before the answer's end."""


class Reading(Protocol):
    """What an answer is read from."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...


class Terms(Protocol):
    """What a relay needs to know beside the call: the same for all attempts of a request."""

    arrived: float  # monotonic seconds
    deadline: float  # monotonic seconds; the request fails with 504 after it
    stall_timeout: float  # seconds without a byte in mid-stream: the engine hangs
    ttft: Histogram
    inter_token: Histogram
    trail: Trail | None  # kept if the stream could be continued by another engine

    def headers(self) -> bytes:
        """Of the reply, made when it starts: whole lines."""
        ...

    def better_elsewhere(self) -> bool:
        """Whether the engine at work has stopped answering its health checks while another one answers."""
        ...


class _Attempt(Event):
    """What both kinds of relay share. It happens when the attempt is over: with None at a good end, else with `ClientGone`,
    `StaleConnectionError` or a `GatewayError`. `first_byte` is when the answer's first byte went out (monotonic seconds).
    """

    def __init__(self, call: Call, model: str, sink: Sink, terms: Terms) -> None:
        super().__init__()
        self.call = call
        self.model = model
        self.sink = sink
        self.terms = terms
        self.connection: Reading | None = None
        self.first_byte: float | None = None
        self.paused = False  # the client reads too slowly: the engine is silent because nobody reads from it
        self._refused = 0  # the engine's status, if it is an error
        self._body: bytes | bytearray = b""

    def collect(self, chunk: bytes, most: int) -> None:
        if not self._body:
            self._body = chunk
        else:
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += chunk
        if len(self._body) > most:
            self.happen(errors.upstream_error("The engine's answer is too large."))

    # Receiver

    def lost(self, why: Exception) -> None:
        self.happen(why)

    # Watcher

    def client_gone(self) -> None:
        self.happen(ClientGone())

    def pause(self) -> None:
        self.paused = True
        if self.connection is not None:
            self.connection.pause()

    def resume(self) -> None:
        self.paused = False
        if self.connection is not None:
            self.connection.resume()


class WholeRelay(_Attempt):
    """An answer that comes in one piece."""

    def __init__(self, call: Call, model: str, sink: Sink, terms: Terms) -> None:
        super().__init__(call, model, sink, terms)
        self.usage: Usage | None = None
        self._since: float | None = None  # monotonic seconds: the first tick

    def head(self, status: int, content_type: bytes) -> None:
        self._refused = 0 if status == 200 else status

    def data(self, chunk: bytes) -> None:
        self.collect(chunk, MAX_ERROR_BODY if self._refused else MAX_ANSWER)

    def end(self) -> None:
        if self.happened:
            return
        body = bytes(self._body)
        if self._refused:
            self.happen(from_engine(self._refused, body, self.call.endpoint, self.model))
            return
        self.usage = usage_in(body)
        if self.usage is None:
            try:
                answer = orjson.loads(body)
            except orjson.JSONDecodeError:
                answer = None
            if isinstance(answer, dict):
                self.usage = usage_of(answer) or Usage()
            elif not isinstance(answer, list):
                self.happen(errors.upstream_error())
                return
        terms, sink = self.terms, self.sink
        self.first_byte = now = monotonic()
        terms.ttft.observe(now - terms.arrived)
        sink.start(200, b"%bcontent-type: application/json\r\n" % terms.headers(), len(body))
        sink.finish(body)
        self.happen()

    def tick(self, now: float) -> None:
        if now > self.terms.deadline:
            self.happen(errors.timeout())
        elif self._since is None:
            self._since = now
        elif now - self._since > DOUBTFUL_AFTER and self.terms.better_elsewhere():
            self.happen(errors.EngineStalledError())


EVENT_STREAM: Final = (
    b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
)


class StreamRelay(_Attempt):
    """An answer that comes as events. The status line waits for the first one, so that an early error is a real status."""

    def __init__(self, call: Call, model: str, sink: Sink, terms: Terms, resumed: Meter | None = None) -> None:
        """`resumed` reads on for a stream that another engine has begun."""
        super().__init__(call, model, sink, terms)
        self.meter: Meter = resumed or make_meter(call, terms.trail)
        self._lane = self.meter.lane
        self._flowing = False  # a token has come
        # How to read the next token, if it comes alone as the last one did.
        self._steady: Lane | None = None
        self._splitter = sse.Splitter()
        self._inter_token = terms.inter_token
        self._last = self._last_written = monotonic()  # when something came from the engine, went to the client
        self._judged = resumed is not None  # the first event has been

    @property
    def usage(self) -> Usage | None:
        counted = self.meter.usage
        if counted is not None and self.meter.complete:
            return counted
        tokens = self.meter.tokens
        if counted is not None and counted.completion >= tokens:
            return counted
        return Usage(counted.prompt if counted else 0, tokens) if self._judged else None

    def head(self, status: int, content_type: bytes) -> None:
        if status != 200:
            self._refused = status
        elif not content_type.startswith(b"text/event-stream"):
            self.happen(errors.upstream_error("The engine did not stream its answer."))

    def data(self, chunk: bytes) -> None:
        lane = self._steady
        if lane is not None and (out := lane.lone(chunk)):
            self.sink.write(out)  # the client first, the books afterwards
            now = monotonic()
            self._inter_token.observe(now - self._last)
            self._last = now
            return
        self._steady = None
        if self._refused:
            self.collect(chunk, MAX_ERROR_BODY)
            return
        if self.happened:
            return  # a late byte never reaches the client
        try:
            events = self._splitter.feed(chunk)
        except sse.EventTooLargeError:
            self.happen(errors.upstream_error())
            return
        if events:
            self._events(events)
        if self._flowing and self._splitter.between and not self.happened:
            self._steady = self._lane

    def _events(self, events: list[bytes]) -> None:
        meter = self.meter
        out: list[bytes] = []
        tokens = at = 0
        ended: Exception | bool = False
        while at < len(events):
            first, at = at, meter.plain(events, at, out)
            tokens += at - first
            if at == len(events):
                break
            verdict = meter.read(events[at])
            if verdict is Verdict.TOKEN:
                tokens += 1
            elif verdict is not Verdict.OTHER and verdict is not Verdict.DROP:
                ended = self._end_of_stream(verdict, events[at])
                break
            if verdict is not Verdict.DROP:
                out.append(meter.forward)
            at += 1
        if not out and ended is False:
            return
        now = monotonic()
        data = b""
        if ended is True and (held := meter.release()):
            out.append(held)
            tokens += 1
        if out:
            out.append(b"")
            data = b"\n\n".join(out)
            if tokens:
                self._count(tokens, now)
        self._last = self._last_written = now
        if data or ended is True:
            self._start(now)
        if ended is False:
            self.sink.write(data)
        elif ended is True:
            self._whole(data)
        else:
            if data:
                self.sink.write(data)
            self.lost(ended)

    def _start(self, now: float) -> None:
        if not self._judged:
            self._judged = True
            self.first_byte = now
            if not self.sink.started:
                self.sink.start(200, self.terms.headers() + EVENT_STREAM, None)

    def _whole(self, last: bytes) -> None:
        """The stream has ended as it should."""
        self.sink.finish(last + sse.DONE_EVENT if self.call.endpoint.dialect == "openai" else last)
        self.happen()

    def _count(self, tokens: int, now: float) -> None:
        if self._flowing:
            self._inter_token.observe(now - self._last)
        else:
            self.terms.ttft.observe(now - self.terms.arrived)
            self._flowing = True
        self._inter_token.counts[0] += tokens - 1  # those that came together with the one before

    def _end_of_stream(self, verdict: Verdict, event: bytes) -> Exception | bool:
        if verdict is Verdict.DONE:
            # `[DONE]` without a finish reason is a failure that looks like an end (facts: vllm.md §4).
            return self.meter.complete or errors.engine_failed()
        if verdict is Verdict.ERROR:
            return from_engine_event(sse.payload(event) or b"", self.call.endpoint, self.model)
        return errors.upstream_error()

    def end(self) -> None:
        if self._refused:
            self.happen(from_engine(self._refused, bytes(self._body), self.call.endpoint, self.model))
        else:
            self.lost(errors.engine_failed())

    def lost(self, why: Exception) -> None:
        # Every finish reason has come: what is missing (usage, `[DONE]`) is not the client's loss, and nothing may follow.
        if not self.happened and self.meter.complete:
            self._start(monotonic())
            self._whole(b"".join(event + b"\n\n" for event in (self.meter.release(), self.meter.owed()) if event))
        else:
            self.happen(why)

    def tick(self, now: float) -> None:
        if now > self.terms.deadline:
            self.happen(errors.timeout())
        elif self.paused:
            self._last = self._last_written = now
        elif self._hangs(now - self._last):
            self.lost(errors.EngineStalledError())
        elif now - max(self._last, self._last_written) > KEEP_ALIVE_AFTER and not self._refused:
            # Also before the first event: a proxy in between would give up during a long prefill.
            self._last_written = now
            if not self.sink.started:
                self.sink.start(200, self.terms.headers() + EVENT_STREAM, None)
            self.sink.write(sse.KEEP_ALIVE)

    def _hangs(self, silent: float) -> bool:
        """After so many seconds without a byte from the engine. Before the first event no clock can tell a hang from a queue."""
        terms = self.terms
        if self._judged and silent > terms.stall_timeout:
            return True
        movable = not self._judged or (terms.trail is not None and terms.trail.whole)
        return movable and silent > DOUBTFUL_AFTER and terms.better_elsewhere()


def relay(call: Call, model: str, sink: Sink, terms: Terms, resumed: Meter | None = None) -> WholeRelay | StreamRelay:
    if call.stream:
        return StreamRelay(call, model, sink, terms, resumed)
    return WholeRelay(call, model, sink, terms)


class Ticking(Protocol):
    """An open relay, or what else has deadlines."""

    def tick(self, now: float) -> None: ...


class Ticker:
    """Wakes all open relays about once a second: one timer for all, none for each token."""

    def __init__(self, interval: float = 1.0) -> None:
        self.relays: set[Ticking] = set()
        self._interval = interval
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._handle = asyncio.get_running_loop().call_later(until_beat(self._interval), self._tick)

    def _tick(self) -> None:
        self.start()
        now = monotonic()
        for one in list(self.relays):
            one.tick(now)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
