"""From an engine's bytes to a client's, by a clock that the test holds."""

import asyncio
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given, strategies as st

from gateway import errors
from gateway.errors import GatewayError
from gateway.observe.counters import Histogram
from gateway.relay import (
    DOUBTFUL_AFTER,
    KEEP_ALIVE_AFTER,
    MAX_ERROR_BODY,
    ClientGone,
    StreamRelay,
    Ticker,
    WholeRelay,
    relay,
)
from gateway.types import Call, Usage, Watcher
from gateway.upstream.client import StaleConnectionError
from gateway.usage.trail import Trail
from gateway.wire.openai import ENDPOINTS
from gateway.wire.sse import DONE_EVENT, KEEP_ALIVE, MAX_EVENT

BY_PATH = {endpoint.path: endpoint for endpoint in ENDPOINTS}
CHAT = "/v1/chat/completions"
STALL = 60.0


class Client:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.gone = False
        self.started = False
        self.finished = False
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.length: int | None = None
        self.written: list[bytes] = []

    def start(self, status: int, headers: bytes, length: int | None) -> None:
        assert not self.started
        assert headers.endswith(b"\r\n")
        self.started, self.status, self.length = True, status, length
        for line in headers.split(b"\r\n")[:-1]:
            name, _, value = line.partition(b": ")
            self.headers.append((name, value))

    def write(self, data: bytes) -> None:
        assert self.started
        assert not self.finished
        self.written.append(data)

    def finish(self, last: bytes = b"") -> None:
        if last:
            self.write(last)
        self.finished = True

    def abort(self) -> None:
        raise AssertionError

    def close_after(self) -> None:
        raise AssertionError

    def watch(self, watcher: Watcher | None) -> None:
        raise AssertionError

    @property
    def body(self) -> bytes:
        return b"".join(self.written)


class Engine:
    """A connection that remembers what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def pause(self) -> None:
        self.asked.append("pause")

    def resume(self) -> None:
        self.asked.append("resume")


def histogram() -> Histogram:
    return Histogram((0.001, 1000.0))


@dataclass
class Request:
    """What a relay asks of a request."""

    arrived: float
    deadline: float
    stall_timeout: float
    ttft: Histogram
    inter_token: Histogram
    trail: Trail | None

    healthier: bool = False  # another engine is, than the one at work

    def headers(self) -> bytes:
        return b"x-request-id: r\r\n"

    def better_elsewhere(self) -> bool:
        return self.healthier


def made(
    path: str = CHAT, *, stream: bool = True, trail: Trail | None = None, include_usage: bool = False, **body: Any
) -> tuple[Any, Client, float]:
    """A relay, its client, and now."""
    now, client = time.monotonic(), Client()
    terms = Request(now, now + 600, STALL, histogram(), histogram(), trail)
    call = Call(BY_PATH[path], "tiny", {"model": "tiny", **body}, 10, stream, include_usage, None)
    return relay(call, "tiny", client, terms), client, now


def token(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return b"data: %b\n\n" % orjson.dumps({"choices": [choice]})


USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
SSE = b"text/event-stream; charset=utf-8"


def failure(one: Any) -> Any:
    """Why the attempt ended."""
    assert one.happened
    return one.error


async def test_which_relay() -> None:
    assert isinstance(made()[0], StreamRelay)
    assert isinstance(made(stream=False)[0], WholeRelay)


# ---- streams


async def test_a_stream() -> None:
    one, client, _ = made()
    one.head(200, SSE)
    assert not client.started
    one.data(token("a")[:10])
    assert client.status == 0
    one.data(token("a")[10:])
    assert client.status == 200
    assert client.length is None
    assert dict(client.headers) == {
        b"x-request-id": b"r",
        b"content-type": SSE,
        b"cache-control": b"no-cache",
        b"x-accel-buffering": b"no",
    }
    assert client.written == [token("a")]  # at once
    one.data(token("b") + token("c") + token("d")[:5])
    assert client.written[-1] == token("b") + token("c")  # in one piece
    one.data(token("d")[5:] + token("", "stop") + USAGE)
    one.data(DONE_EVENT)
    assert client.body == b"".join(map(token, "abcd")) + token("", "stop") + DONE_EVENT
    assert client.finished
    assert failure(one) is None
    assert one.usage == Usage(3, 2)
    one.data(token("late"))
    one.end()
    assert b"late" not in client.body
    assert sum(one.terms.ttft.counts) == 1
    assert sum(one.terms.inter_token.counts) == 4


async def test_silence_is_filled_with_comments() -> None:
    """Also before the first event: proxies do not give up during a long prefill."""
    one, client, now = made()
    one.head(200, SSE)
    one.tick(now + KEEP_ALIVE_AFTER - 1)
    assert not client.started
    one.tick(now + KEEP_ALIVE_AFTER + 1)
    assert (client.status, client.written) == (200, [KEEP_ALIVE])
    one.tick(now + KEEP_ALIVE_AFTER + 2)
    assert len(client.written) == 1
    one.tick(now + 2 * KEEP_ALIVE_AFTER + 2)
    assert len(client.written) == 2
    assert not one.first_byte  # no answer yet: another engine may still be asked
    one.data(token("a"))
    assert one.first_byte is not None
    one.tick(time.monotonic() + KEEP_ALIVE_AFTER + 1)
    assert client.written[2:] == [token("a"), KEEP_ALIVE]


async def test_an_engines_comments_are_no_sign_of_life() -> None:
    one, client, now = made()
    one.head(200, SSE)
    one.data(b": keep-alive\n\n")
    assert not client.started
    one.data(token("a"))
    now = time.monotonic()
    one.data(b": keep-alive\n\n")
    assert client.written == [token("a")]
    one.tick(now + STALL + 1)
    assert isinstance(failure(one), errors.EngineStalledError)


async def test_before_the_first_event_nothing_stalls() -> None:
    one, _, now = made()
    one.head(200, SSE)
    one.tick(now + STALL + 1)
    assert not one.happened


async def test_before_the_first_event_an_engine_that_looks_dead_is_left_for_a_better_one() -> None:
    for one, _, now in (made(), made(stream=False)):
        one.tick(now)
        one.tick(now + DOUBTFUL_AFTER + 1)
        assert not one.happened
        one.terms.healthier = True
        one.tick(now + DOUBTFUL_AFTER + 1)
        assert isinstance(failure(one), errors.EngineStalledError)


async def test_in_mid_stream_only_what_can_go_on_elsewhere_is_taken_from_an_engine_that_looks_dead() -> None:
    for trail, moved in ((None, False), (Trail(CHAT), True)):
        one, _, now = made(trail=trail)
        one.terms.healthier = True
        if trail is not None:
            trail.prompt, trail.opened = b"1", True
        one.head(200, SSE)
        choice = {"index": 0, "delta": {"content": "a"}, "logprobs": None, "finish_reason": None, "token_ids": [5]}
        one.data(b"data: %b\n\n" % orjson.dumps({"choices": [choice]}))
        one.tick(now + 1)
        assert not one.happened
        one.tick(now + DOUBTFUL_AFTER + 2)
        assert one.happened is moved


GOODBYES = {
    "gone": lambda one, now: one.lost(errors.engine_failed()),
    "error event": lambda one, now: one.data(b'data: {"error": {"message": "x"}}\n\n'),
    "nonsense": lambda one, now: one.data(b"data: nonsense\n\n"),
    "silence": lambda one, now: one.tick(now + STALL + 2),
}


@pytest.mark.parametrize("how", GOODBYES)
@pytest.mark.parametrize("usage", [True, False])
async def test_after_the_finish_reason_nothing_that_an_engine_does_spoils_the_answer(how: str, usage: bool) -> None:
    trail = Trail(CHAT)
    one, client, now = made(trail=trail, include_usage=usage)
    one.head(200, SSE)
    head = {"id": "i", "object": "o", "created": 1, "model": "m"}
    for piece, finish in (("a", None), ("b", "stop")):
        choice = {"index": 0, "delta": {"content": piece}, "logprobs": None, "finish_reason": finish, "token_ids": [7]}
        told = {} if trail.prompt_ids else {"prompt_token_ids": [1, 2, 3]}
        one.data(b"data: %b\n\n" % orjson.dumps({**head, "choices": [choice], **told}))
    GOODBYES[how](one, now)
    assert one.happened
    assert one.error is None
    *events, done, rest = client.body.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    chunks = [orjson.loads(event[6:]) for event in events]
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] == "stop"
    counted = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
    assert [c["usage"] for c in chunks if not c["choices"]] == ([counted] if usage else [])


async def test_an_error_status_is_not_kept_alive() -> None:
    one, client, now = made()
    one.head(400, b"application/json")
    one.data(b'{"error":{"message":"No.",')
    one.tick(now + KEEP_ALIVE_AFTER + 1)
    assert not client.started
    one.data(b'"type":"BadRequestError","param":"n","code":400}}')
    one.end()
    assert (failure(one).status, failure(one).message, failure(one).param) == (400, "No.", "n")


async def test_the_deadline() -> None:
    for stream in (True, False):
        one, _, now = made(stream=stream)
        one.head(200, SSE)
        one.tick(now + 599)
        assert not one.happened
        one.tick(now + 601)
        assert failure(one).code == "timeout"


async def test_a_client_that_does_not_read_does_not_make_the_engine_stall() -> None:
    one, client, _ = made()
    one.connection = engine = Engine()
    one.head(200, SSE)
    one.data(token("a"))
    now = time.monotonic()
    one.pause()
    assert engine.asked == ["pause"]
    for seconds in (20, 40, 80):
        one.tick(now + seconds)
    assert client.written == [token("a")]  # what waits does not grow either
    one.resume()
    assert engine.asked == ["pause", "resume"]
    one.tick(now + 81 + STALL - 2)
    assert not one.happened
    one.tick(now + 81 + STALL + 1)
    assert isinstance(failure(one), errors.EngineStalledError)


async def test_the_client_leaves() -> None:
    for stream in (True, False):
        one, _, _ = made(stream=stream)
        one.client_gone()
        assert isinstance(failure(one), ClientGone)
        one.lost(errors.engine_failed())
        assert isinstance(failure(one), ClientGone)


@pytest.mark.parametrize(
    ("data", "sent", "code"),
    [
        (b"data: [DONE]\n\n", b"", "engine_failed"),
        (token("a") + b"data: [DONE]\n\n", token("a"), "engine_failed"),
        (token("a") + b'data: {"error":{"message":"x","code":500}}\n\ndata: [DONE]\n\n', token("a"), "engine_failed"),
        (b'data: {"error":{"message":"Odd.","param":"stop","code":400}}\n\n', b"", "invalid_value"),
        (b"data: nonsense\n\n", b"", "upstream_error"),
        (token("a") + b"data: nonsense\n\n" + token("b"), token("a"), "upstream_error"),
        (b"data: " + b"x" * MAX_EVENT, b"", "upstream_error"),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_streams_that_fail(data: bytes, sent: bytes, code: str) -> None:
    one, client, _ = made()
    one.head(200, SSE)
    one.data(data)
    assert client.body == sent
    assert client.started is bool(sent)  # else the status line still waits
    assert not client.finished
    assert failure(one).code == code


@pytest.mark.parametrize("how", ["end", "lost"])
async def test_streams_that_break_off(how: str) -> None:
    for data, whole in (
        (b"", False),
        (token("a"), False),
        (token("a") + token("b", "stop")[:-1], False),
        (token("a") + token("b", "stop"), True),
        (token("a") + token("b", "stop") + USAGE, True),
    ):
        one, client, _ = made()
        one.head(200, SSE)
        one.data(data)
        if how == "end":
            one.end()
        else:
            one.lost(errors.engine_failed())
        if whole:
            assert failure(one) is None
            assert client.body == token("a") + token("b", "stop") + DONE_EVENT
        else:
            assert failure(one).code == "engine_failed"
            assert not client.finished


async def test_a_stale_connection_is_told_apart() -> None:
    for stream in (True, False):
        one, _, _ = made(stream=stream)
        one.lost(StaleConnectionError())
        assert isinstance(failure(one), StaleConnectionError)


async def test_json_in_place_of_a_stream() -> None:
    one, client, _ = made()
    one.head(200, b"application/json")
    one.data(b"{}")
    assert failure(one).code == "upstream_error"
    assert not client.started


async def test_what_was_delivered_counts_where_the_engine_says_nothing() -> None:
    one, _, _ = made()
    assert not one.usage
    one.head(200, SSE)
    assert not one.usage
    one.data(token("a") + token("b"))
    assert one.usage == Usage(0, 2)
    one.data(token("c", "stop") + USAGE + DONE_EVENT)
    assert one.usage == Usage(3, 2)  # the engine's own count, once it is all there


async def test_named_events_need_no_done() -> None:
    one, client, _ = made("/v1/messages")
    stream = b'event: content_block_delta\ndata: {}\n\nevent: message_stop\ndata: {"type":"message_stop"}\n\n'
    one.head(200, SSE)
    one.data(stream)
    one.end()
    assert failure(one) is None
    assert client.body == stream
    assert client.finished


@given(cuts=st.none() | st.lists(st.integers(1, 3000), max_size=8), tokens=st.integers(1, 8), usage=st.booleans())
def test_the_networks_pieces_do_not_matter(cuts: list[int] | None, tokens: int, usage: bool) -> None:
    """Nor that the engine was asked for ids: the client gets what it would have got without."""

    def chunk(number: int, *, ids: bool) -> bytes:
        last = number == tokens - 1
        choice = {
            "index": 0,
            "delta": {"content": f" t{number}"},
            "logprobs": None,
            "finish_reason": "stop" if last else None,
        }
        choice |= {"stop_reason": None} if last else {}
        choice["token_ids"] = [number] if ids else None
        return b"data: %b\n\n" % orjson.dumps({"id": "x", "choices": [choice]})

    def stream(*, ids: bool) -> bytes:
        role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        first = {"id": "x", "choices": [role], "prompt_token_ids": [1, 2] if ids else None}
        return b"data: %b\n\n" % orjson.dumps(first) + b"".join(chunk(i, ids=ids) for i in range(tokens))

    async def relayed() -> tuple[bytes, Any]:
        one, client, _ = made(trail=Trail(CHAT))
        one.head(200, SSE)
        data = stream(ids=True) + (USAGE if usage else b"") + DONE_EVENT
        if cuts is None:  # as an engine writes: each event by itself
            pieces = [event + b"\n\n" for event in data.split(b"\n\n")[:-1]]
        else:
            edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
            pieces = [data[begin:end] for begin, end in pairwise(edges)]
        for piece in pieces:
            one.data(piece)
        assert one.happened
        assert one.error is None
        return client.body, one

    body, one = asyncio.run(relayed())
    assert body == stream(ids=False) + DONE_EVENT
    assert one.usage == (Usage(3, 2) if usage else Usage(0, tokens))
    assert one.terms.trail.token_ids() == list(range(tokens))
    assert sum(one.terms.ttft.counts) == 1


# ---- whole answers


async def test_a_whole_answer() -> None:
    one, client, _ = made(stream=False)
    body = b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}'
    one.head(200, b"application/json")
    one.data(body[:10])
    assert not client.started
    one.data(body[10:])
    one.end()
    one.end()
    assert failure(one) is None
    assert (client.status, client.length, client.body) == (200, len(body), body)
    assert dict(client.headers) == {b"x-request-id": b"r", b"content-type": b"application/json"}
    assert one.usage == Usage(3, 2)
    assert one.first_byte is not None


@pytest.mark.parametrize(("body", "usage"), [(b'{"count":3}', Usage()), (b"[1]", None)])
async def test_answers_without_usage(body: bytes, usage: Usage | None) -> None:
    one, client, _ = made("/tokenize", stream=False)
    one.head(200, b"application/json")
    one.data(body)
    one.end()
    assert client.body == body
    assert one.usage == usage


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (200, b"<html>", (502, "upstream_error")),
        (200, b"", (502, "upstream_error")),
        (200, b'"x"', (502, "upstream_error")),
        (204, b"", (502, "upstream_error")),
        (400, b'{"error":{"message":"No."}}', (400, "invalid_value")),
        (500, b"x" * (MAX_ERROR_BODY + 1), (502, "upstream_error")),
    ],
    ids=lambda value: repr(value)[:30],
)
async def test_whole_answers_that_fail(status: int, body: bytes, expected: tuple[int, str]) -> None:
    one, client, _ = made(stream=False)
    one.head(status, b"application/json")
    one.data(body)
    one.end()
    error = failure(one)
    assert isinstance(error, GatewayError)
    assert (error.status, error.code) == expected
    assert not client.started


async def test_a_whole_answer_is_paused_too() -> None:
    one, _, _ = made(stream=False)
    one.pause()
    one.connection = engine = Engine()
    one.pause()
    one.resume()
    assert engine.asked == ["pause", "resume"]


# ---- the clock


async def test_the_ticker_wakes_all_until_it_is_stopped() -> None:
    woken = asyncio.Event()

    class Woken:
        def tick(self, now: float) -> None:
            assert now <= time.monotonic()
            woken.set()

    ticker = Ticker(interval=0.001)
    ticker.stop()
    ticker.relays.add(Woken())
    ticker.start()
    for _ in range(2):
        await asyncio.wait_for(woken.wait(), 10)
        woken.clear()
    ticker.stop()
    await asyncio.sleep(0.01)
    assert not woken.is_set()
