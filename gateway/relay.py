"""Stage 7: from an engine's connection to a client's, without a coroutine in between.

A relay is the receiver of one attempt's answer and the watcher of the client. Its callbacks run straight from the
engine's `data_received` to the client's `write`; `serve` awaits one future for the end. What it decides is pure and
lives in `wire.sse` and `usage.meter`.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final, NamedTuple

import orjson

from gateway import errors
from gateway.observe.metrics import Histogram
from gateway.types import Call, Headers, Sink, Usage
from gateway.upstream.client import Connection
from gateway.usage.meter import Meter, Verdict, meter as make_meter, usage_of
from gateway.usage.trail import Trail
from gateway.wire import sse
from gateway.wire.errors import from_engine, from_engine_event

KEEP_ALIVE_AFTER: Final = 15.0  # seconds of silence towards the client
MAX_ERROR_BODY: Final = 256 * 1024  # bytes
MAX_ANSWER: Final = 256 * 1024 * 1024  # bytes of an answer that is not streamed


class ClientGone(Exception):  # noqa: N818 - an event, not a fault
    """The client has left before the answer's end."""


class Terms(NamedTuple):
    """What a relay needs to know beside the call: fixed for all attempts of a request."""

    arrived: float  # monotonic seconds
    deadline: float  # monotonic seconds; the request fails with 504 after it
    stall_timeout: float  # seconds without a byte in mid-stream: the engine hangs
    headers: Callable[[], Headers]  # of the reply, made when it starts
    ttft: Histogram
    inter_token: Histogram
    trail: Trail | None  # kept if the stream could be continued by another engine


class _Attempt:
    """What both kinds of relay share.

    `done` gets None at a good end, else `ClientGone`, `StaleConnectionError` or a `GatewayError`. `first_byte` is when the
    answer's first byte went out (monotonic seconds).
    """

    __slots__ = (
        "_body",
        "_refused",
        "_size",
        "call",
        "connection",
        "done",
        "first_byte",
        "model",
        "paused",
        "sink",
        "terms",
    )

    def __init__(self, call: Call, model: str, sink: Sink, terms: Terms) -> None:
        self.call = call
        self.model = model
        self.sink = sink
        self.terms = terms
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.connection: Connection | None = None
        self.first_byte: float | None = None
        self.paused = False  # the client reads too slowly: the engine is silent because nobody reads from it
        self._refused = 0  # the engine's status, if it is an error
        self._body: list[bytes] = []
        self._size = 0

    def finish(self, why: Exception | None = None) -> None:
        if self.done.done():
            return
        if why is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(why)

    def collect(self, chunk: bytes, most: int) -> None:
        self._size += len(chunk)
        if self._size > most:
            self.finish(errors.upstream_error("The engine's answer is too large."))
        else:
            self._body.append(chunk)

    # Receiver

    def lost(self, why: Exception) -> None:
        self.finish(why)

    # Watcher

    def client_gone(self) -> None:
        self.finish(ClientGone())

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

    __slots__ = ("usage",)

    def __init__(self, call: Call, model: str, sink: Sink, terms: Terms) -> None:
        super().__init__(call, model, sink, terms)
        self.usage: Usage | None = None

    def head(self, status: int, content_type: bytes) -> None:
        self._refused = 0 if status == 200 else status

    def data(self, chunk: bytes) -> None:
        self.collect(chunk, MAX_ERROR_BODY if self._refused else MAX_ANSWER)

    def end(self) -> None:
        if self.done.done():
            return
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        if self._refused:
            self.finish(from_engine(self._refused, body, self.call.endpoint, self.model))
            return
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict | list):
            self.finish(errors.upstream_error())
            return
        if isinstance(answer, dict):
            self.usage = usage_of(answer) or Usage()
        self.first_byte = now = time.monotonic()
        self.terms.ttft.observe(now - self.terms.arrived)
        sink = self.sink
        sink.start(200, [*self.terms.headers(), (b"content-type", b"application/json")], len(body))
        sink.finish(body)
        self.finish()

    def tick(self, now: float) -> None:
        if now > self.terms.deadline:
            self.finish(errors.timeout())


EVENT_STREAM: Final[Headers] = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class StreamRelay(_Attempt):
    """An answer that comes as events. The status line waits for the first one, so that an early error is a real status."""

    __slots__ = ("_judged", "_last_event", "_last_token", "_last_written", "_lone", "_splitter", "meter")

    def __init__(self, call: Call, model: str, sink: Sink, terms: Terms, resumed: Meter | None = None) -> None:
        """`resumed` reads on for a stream that another engine has begun."""
        super().__init__(call, model, sink, terms)
        self.meter: Meter = resumed or make_meter(call, terms.trail)
        self._lone = self.meter.lone
        self._splitter = sse.Splitter()
        self._last_event = self._last_written = time.monotonic()
        self._last_token = 0.0
        self._judged = resumed is not None  # the first event has been

    @property
    def usage(self) -> Usage | None:
        counted, tokens = self.meter.usage, self.meter.tokens
        if counted is not None and (self.meter.complete or counted.completion >= tokens):
            return counted
        return Usage(counted.prompt if counted else 0, tokens) if self._judged else None

    def head(self, status: int, content_type: bytes) -> None:
        if status != 200:
            self._refused = status
        elif not content_type.startswith(b"text/event-stream"):
            self.finish(errors.upstream_error("The engine did not stream its answer."))

    def data(self, chunk: bytes) -> None:
        if self._refused:
            self.collect(chunk, MAX_ERROR_BODY)
            return
        if self.done.done():
            return  # a late byte never reaches the client
        if self._judged and not self._splitter.rest and (out := self._lone(chunk)):
            now = self._last_event = self._last_written = time.monotonic()
            self._count(1, now)
            self.sink.write(out)
            return
        try:
            events = self._splitter.feed(chunk)
        except sse.EventTooLargeError:
            self.finish(errors.upstream_error())
            return
        if events:
            self._events(events)

    def _events(self, events: list[bytes]) -> None:
        meter, out, tokens = self.meter, [], 0
        read = meter.read
        ended: Exception | bool = False
        for event in events:
            verdict = read(event)
            if verdict is Verdict.TOKEN:
                tokens += 1
            elif verdict is Verdict.DROP:
                continue
            elif verdict is not Verdict.OTHER:
                ended = self._end_of_stream(verdict, event)
                break
            out.append(meter.forward)
        if not out and ended is False:
            return
        now = self._last_event = self._last_written = time.monotonic()
        data = b""
        if ended is True and (held := meter.release()):
            out.append(held)
            tokens += 1
        if out:
            out.append(b"")
            data = b"\n\n".join(out)
            if tokens:
                self._count(tokens, now)
        if data or ended is True:
            self._start(now)
        if ended is False:
            self.sink.write(data)
        elif ended is True:
            self._whole(data)
        else:
            if data:
                self.sink.write(data)
            self.finish(ended)

    def _start(self, now: float) -> None:
        if not self._judged:
            self._judged = True
            self.first_byte = now
            if not self.sink.started:
                self.sink.start(200, [*self.terms.headers(), *EVENT_STREAM], None)

    def _whole(self, last: bytes) -> None:
        """The stream has ended as it should."""
        self.sink.finish(last + sse.DONE_EVENT if self.call.endpoint.dialect == "openai" else last)
        self.finish()

    def _count(self, tokens: int, now: float) -> None:
        if self._last_token:
            self.terms.inter_token.observe(now - self._last_token)
        else:
            self.terms.ttft.observe(now - self.terms.arrived)
        self.terms.inter_token.counts[0] += tokens - 1  # those that came together with the one before
        self._last_token = now

    def _end_of_stream(self, verdict: Verdict, event: bytes) -> Exception | bool:
        if verdict is Verdict.DONE:
            # `[DONE]` without a finish reason is a failure that looks like an end (facts: vllm.md §4).
            return self.meter.complete or errors.engine_failed()
        if verdict is Verdict.ERROR:
            return from_engine_event(sse.payload(event) or b"", self.call.endpoint, self.model)
        return errors.upstream_error()

    def end(self) -> None:
        if self._refused:
            self.finish(from_engine(self._refused, b"".join(self._body), self.call.endpoint, self.model))
        else:
            self.lost(errors.engine_failed())

    def lost(self, why: Exception) -> None:
        # Every finish reason has come: what is missing (usage, `[DONE]`) is not the client's loss.
        if not self.done.done() and self._judged and self.meter.complete:
            held = self.meter.release()
            self._whole(held + b"\n\n" if held else b"")
        else:
            self.finish(why)

    def tick(self, now: float) -> None:
        if now > self.terms.deadline:
            self.finish(errors.timeout())
        elif self.paused:
            self._last_event = self._last_written = now
        elif self._judged and now - self._last_event > self.terms.stall_timeout:
            self.finish(errors.EngineStalledError())
        elif now - self._last_written > KEEP_ALIVE_AFTER and not self._refused:
            # Also before the first event: a proxy in between would give up during a long prefill.
            self._last_written = now
            if not self.sink.started:
                self.sink.start(200, [*self.terms.headers(), *EVENT_STREAM], None)
            self.sink.write(sse.KEEP_ALIVE)


def relay(call: Call, model: str, sink: Sink, terms: Terms, resumed: Meter | None = None) -> WholeRelay | StreamRelay:
    if call.stream:
        return StreamRelay(call, model, sink, terms, resumed)
    return WholeRelay(call, model, sink, terms)


class Ticker:
    """Wakes all open relays about once a second: one timer for all, none for each token."""

    def __init__(self, interval: float = 1.0) -> None:
        self.relays: set[WholeRelay | StreamRelay] = set()
        self._interval = interval
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._handle = asyncio.get_running_loop().call_later(self._interval, self._tick)

    def _tick(self) -> None:
        self.start()
        now = time.monotonic()
        for one in list(self.relays):
            one.tick(now)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
