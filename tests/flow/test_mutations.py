"""Good requests, spoilt by chance and malice on the socket: what comes back, and what the engine is told.

What a connection's bytes mean is asked of a second parser, h11. Where two parsers of one proxy disagree, requests are
smuggled: so an engine may only ever see bodies that h11 finds too, in the same order, and under a good key.
"""

import asyncio
import base64
import itertools
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import h11
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from tests.fake_engine import FakeEngine
from tests.flow.talk import CHAT, Served, parse
from tests.served import KEY, Answer, Penstock, chat_body

QUIET = 0.05  # seconds without an answer after which the client says that it has nothing more to send
PATIENCE = 10.0  # seconds that an answer, or the connection's end, may take
AUTHORIZATION = f"authorization: Bearer {KEY}".encode()


# ---- requests


def body(tag: str, text: str = "hi") -> bytes:
    return json.dumps(chat_body(text, max_tokens=1, user=tag)).encode()


SMUGGLED = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n%b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
    % (AUTHORIZATION, len(body("smuggled")), body("smuggled"))
)

# Lines that have fooled some parser or other.
LINES = st.sampled_from(
    [
        *(b"transfer-encoding: " + value for value in (b"chunked", b"xchunked", b"chunked, identity", b"identity")),
        *(b"transfer-encoding" + rest for rest in (b" : chunked", b":\x0bchunked", b": chunked\x00", b":\tchunked")),
        *(b"Transfer-Encoding: " + value for value in (b"CHUNKED", b"\r\n chunked", b'"chunked"', b"")),
        *(
            b"content-length: " + value
            for value in (b"0", b"5", b"+5", b"5, 5", b"-1", b"0x5", b"", b"99999999999999999999")
        ),
        *(b"host: " + value for value in (b"y", b"a b", b"x/../y", b"")),
        *(b"expect: " + value for value in (b"100-continue", b"200-ok")),
        *(
            b"connection: " + value
            for value in (b"close", b"keep-alive", b"upgrade", b"content-length", b"host, close")
        ),
        *(b"upgrade: " + value for value in (b"h2c", b"websocket")),
        *(b"authorization: " + value for value in (b"Bearer sk-wrong", b"Basic eA==", b"")),
        *(b"content-encoding: " + value for value in (b"gzip", b"identity")),
        *(b"content-type: " + value for value in (b"text/plain", b"application/json; charset=x")),
        *(b": no name", b"no colon", b" folded", b"x y: z", b"x:\x00", b"x: \x7f\xff", b"x: a\rb", b"x: a\nb: c"),
        *(b"x-request-id: " + value for value in (b"a b", b"..", b"\xe4")),
        b"x: " + b"y" * 5000,
    ]
)
CHUNK_ENDS = st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b"", b"\r\n\r\n", b" \r\n", b"x\r\n"])
SIZES = st.sampled_from(
    ["%x", "%x", "%x", "%X", "0%x", "000000000%x", "%x;a=b", "%x ", "+%x", "0x%x", "%x\t", " %x", "%d"]
)


class Shape(NamedTuple):
    """A request, before it is written down."""

    line: bytes
    lines: list[bytes]
    body: bytes


@st.composite
def good(draw: st.DrawFn, tag: str) -> Shape:
    kind = draw(st.sampled_from(["chat", "chat", "chat", "stream", "models", "live"]))
    if kind in ("models", "live"):
        path = {"models": b"/v1/models", "live": b"/health/live"}[kind]
        return Shape(b"GET %b HTTP/1.1" % path, [b"host: x", AUTHORIZATION], b"")
    key = draw(
        st.sampled_from(
            [AUTHORIZATION, AUTHORIZATION, b"authorization: Bearer sk-wrong", b"x-api-key: " + KEY.encode()]
        )
    )
    data = json.dumps(chat_body(tag, max_tokens=1, user=tag, stream=kind == "stream")).encode()
    lines = [b"host: x", key, b"content-type: application/json"]
    if draw(st.booleans()):
        data += draw(st.sampled_from([b"", b" ", b"\r\n"]))
        return Shape(b"POST /v1/chat/completions HTTP/1.1", [*lines, b"content-length: %d" % len(data)], data)
    cuts = sorted({0, len(data), *draw(st.lists(st.integers(1, len(data) - 1), max_size=2))})
    chunks = [data[a:b] for a, b in itertools.pairwise(cuts)]
    written = b"".join(
        (draw(SIZES) % len(piece)).encode() + b"\r\n" + piece + (draw(CHUNK_ENDS) if spoilt else b"\r\n")
        for spoilt, piece in ((draw(st.integers(0, 9)) == 0, piece) for piece in chunks)
    )
    end = draw(
        st.sampled_from(
            [
                b"0\r\n\r\n",
                b"0\r\n\r\n",
                b"00;x\r\n\r\n",
                b"0\r\nx: y\r\n\r\n",
                b"0\n\n",
                b"0\r\n",
                b"0\r\ncontent-length: 5\r\n\r\n",
            ]
        )
    )
    return Shape(b"POST /v1/chat/completions HTTP/1.1", [*lines, b"transfer-encoding: chunked"], written + end)


@st.composite
def spoilt(draw: st.DrawFn, tag: str) -> bytes:
    line, lines, data = draw(good(tag))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(lines)))
        match draw(st.sampled_from(["insert", "insert", "drop", "twice", "case"])):
            case "insert":
                lines.insert(at, draw(LINES))
            case "drop":
                lines = lines[:at] + lines[at + 1 :]
            case "twice":
                lines.append(lines[at % len(lines)] if lines else b"")
            case "case":
                lines = [one.title() if i == at else one for i, one in enumerate(lines)]
    if draw(st.integers(0, 5)) == 0:
        line = draw(
            st.sampled_from(
                [
                    line.replace(b"HTTP/1.1", version)
                    for version in (
                        b"HTTP/1.0",
                        b"HTTP/2.0",
                        b"HTTP/1.9",
                        b"HTTP/1.1 ",
                        b"",
                        b"http/1.1",
                        b"HTTP/1.1\r",
                    )
                ]
                + [line.replace(b"POST", b"post"), line.replace(b" /", b"  /"), line.replace(b"/v1", b"http://x/v1")]
                + [
                    line.replace(b"/v1", path)
                    for path in (b"/v1/.", b"//v1", b"/%76%31", b"/v1?a=b", b"/v1#", b"/a/../v1", b"/v1;x")
                ]
            )
        )
    raw = b"\r\n".join([line, *lines, b"", b""]) + data
    if draw(st.integers(0, 4)) == 0:
        raw += SMUGGLED
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, len(raw)))
        raw = (
            raw[:at]
            + draw(st.sampled_from([b"", b"\r", b"\n", b"\r\n", b"\x00", b" ", b":", b"0", b"\xff"]))
            + raw[at + draw(st.integers(0, 2)) :]
        )
    return raw


@st.composite
def connections(draw: st.DrawFn) -> list[bytes]:
    """What is sent on one connection, in the pieces in which it is sent."""
    raw = b"".join(draw(spoilt(f"tag-{i}")) for i in range(draw(st.integers(1, 3))))
    if draw(st.integers(0, 9)) == 0:
        raw = raw[: draw(st.integers(0, len(raw)))]
    cuts = sorted({0, len(raw), *draw(st.lists(st.integers(0, len(raw)), max_size=4))})
    return [raw[a:b] for a, b in itertools.pairwise(cuts)]


AGAIN = body("again")
PRIMER = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n%b\r\ncontent-length: %d\r\ncontent-type: application/json\r\n\r\n%b"
    % (AUTHORIZATION, len(AGAIN), AGAIN)
)


@st.composite
def variations(draw: st.DrawFn) -> bytes:
    """Of a request that the connection has seen before."""
    data = body("again", "x" * draw(st.integers(0, 200)))
    lengths = [b"%d" % len(data), b"0%d" % len(data), b"%d " % len(data), b"+%d" % len(data), b"%d" % (len(data) + 5)]
    lengths += [b"", b"5, %d" % len(data), b"%020d" % len(data), b"0x%x" % len(data), b"%d\r\nx: y" % len(data)]
    lengths += [
        b"%d\r\ncontent-length: 5" % len(data),
        b"%d\r\ntransfer-encoding: chunked" % len(data),
        b"\t%d" % len(data),
    ]
    length = draw(st.sampled_from(lengths) | st.just(lengths[0]))
    raw = PRIMER.replace(b"content-length: %d" % len(AGAIN), b"content-length: " + length).replace(AGAIN, data)
    if draw(st.booleans()):
        at = draw(st.integers(0, len(raw)))
        piece = draw(
            st.sampled_from([b"", b"\r", b"\n", b"\r\n", b"\x00", b" ", b":", b"0", b"x: content-length: 5\r\n"])
        )
        raw = raw[:at] + piece + raw[at + draw(st.integers(0, 2)) :]
    return raw + draw(st.sampled_from([b"", b"", SMUGGLED, b"\r\n", b"GET / HTTP/1.1\r\n"]))


# ---- a client, in a thread: Hypothesis does not await


@contextmanager
def connected(gateway: Penstock) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", gateway.port), PATIENCE) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield sock


def exchange(gateway: Penstock, pieces: list[bytes], quiet: float, primed: int = 0) -> bytes:
    """Everything that comes back until the gateway closes, which it does at the latest when there is nothing more to wait
    for: after `quiet` seconds the client says so. Raises TimeoutError: that is a hang. `primed`: so many pieces are each
    answered before the next is sent."""
    came = b""
    with connected(gateway) as sock:
        for number, piece in enumerate(pieces[:primed], 1):
            sock.sendall(piece)
            while len(parse(came)[0]) < number:
                came += sock.recv(1 << 16)
        pieces = pieces[primed:]
        try:
            for piece in pieces:
                sock.sendall(piece)
            sock.settimeout(quiet)
            while piece := sock.recv(1 << 16):
                came += piece
            return came
        except TimeoutError:
            sock.settimeout(PATIENCE)
            sock.shutdown(socket.SHUT_WR)
        except ConnectionError:  # it has answered and closed before all was sent
            sock.settimeout(PATIENCE)
        try:
            while piece := sock.recv(1 << 16):
                came += piece
        except ConnectionError:
            pass
    return came


# ---- what it means


class Asked(NamedTuple):
    method: bytes
    target: bytes
    keys: set[bytes]
    body: bytes


def as_h11_reads(raw: bytes) -> list[Asked]:
    """The whole requests in these bytes, up to what h11 takes for an error."""
    found: list[Asked] = []
    while True:
        while raw.startswith(b"\r\n"):  # RFC 9112 §2.2, which h11 does not follow: an empty line is to be ignored
            raw = raw[2:]
        reader = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        reader.receive_data(raw)
        asked: h11.Request | None = None
        data = b""
        try:
            while not isinstance(event := reader.next_event(), h11.EndOfMessage):
                if isinstance(event, h11.Request):
                    asked = event
                elif isinstance(event, h11.Data):
                    data += event.data
                else:
                    return found
            assert asked is not None
            keys = {value for name, value in asked.headers if name in (b"authorization", b"x-api-key")}
            found.append(Asked(asked.method, asked.target, keys, data))
            raw = reader.trailing_data[0]
            reader.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            reader.send(h11.EndOfMessage())
        except h11.RemoteProtocolError:
            return found
        if reader.our_state is not h11.DONE:
            return found


def path_of(target: bytes) -> bytes:
    """A server must take a target with scheme and host, too (RFC 9112 §3.2.2)."""
    return target.removeprefix(b"http://x").partition(b"?")[0]


GOOD_KEYS = {f"Bearer {KEY}".encode(), KEY.encode()}


def judge_engine(seen: list[dict[str, Any]], raw: bytes) -> None:
    expected = iter(as_h11_reads(raw))
    for told in seen:
        sent = json.loads(base64.b64decode(told["body"]))
        sent.pop("stream_options", None)
        sent.pop("return_token_ids", None)
        for asked in expected:
            if path_of(asked.target) == CHAT.encode() and asked.keys <= GOOD_KEYS and asked.body.strip()[:1] == b"{":
                try:
                    meant = json.loads(asked.body)
                except ValueError:
                    continue
                if meant == sent:
                    assert asked.method == b"POST"
                    assert asked.keys
                    break
        else:
            raise AssertionError(f"the engine was told what another parser does not find: {sent} in {raw!r}")


def judge_answers(came: bytes) -> list[Answer]:
    answers, rest = parse(came)
    assert rest == b"", rest[:200]
    for answer in answers:
        assert answer.status < 500, answer
        if answer.status >= 400:
            assert answer.error.keys() == {"message", "type", "param", "code"}
            assert answer.error["type"] == "invalid_request_error"
            assert KEY.encode() not in answer.body
    return answers


def judge(
    gateway: Penstock, engine: FakeEngine, pieces: list[bytes], quiet: float = QUIET, primed: int = 0
) -> list[Answer]:
    engine._call("POST", "/fake/reset", None, 0)
    answers = judge_answers(exchange(gateway, pieces, quiet, primed))
    seen = engine._call("GET", "/fake/stats", None, 0)["last"]
    judge_engine(seen, b"".join(pieces))
    assert len(seen) >= sum(answer.status == 200 and b"chatcmpl-" in answer.body for answer in answers)
    return answers


def faults(gateway: Penstock) -> list[Any]:
    return [line for line in gateway.log if line.get("level") in ("error", "critical") or "Traceback" in str(line)]


@pytest.fixture
def edge_only(door: str) -> None:
    if door != "edge":
        pytest.skip("what uvicorn makes of it is not ours")


@pytest.mark.usefixtures("edge_only")
async def test_spoilt_requests(served: Served) -> None:
    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
    @given(connections())
    def check(pieces: list[bytes]) -> None:
        judge(served.gateway, served.engine, pieces)

    await asyncio.to_thread(check)
    assert (await served.gateway.chat(max_tokens=1)).status == 200
    assert faults(served.gateway) == []


@pytest.mark.usefixtures("edge_only")
async def test_spoilt_after_good_ones(served: Served) -> None:
    """A head that a connection has seen before is not read again: it must be the same one indeed."""

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
    @given(st.lists(variations(), min_size=1, max_size=2))
    def check(raw: list[bytes]) -> None:
        judge(served.gateway, served.engine, [PRIMER, PRIMER, *raw], primed=2)

    await asyncio.to_thread(check)
    assert faults(served.gateway) == []


@pytest.mark.usefixtures("edge_only")
async def test_cut_at_every_byte(served: Served) -> None:
    """Two requests in one connection, whichever way they come: in two pieces cut anywhere, the answers are the same."""
    chunks = b"".join(b"%x;a=b\r\n%b\r\n" % (len(p), p) for p in (body("one")[:7], body("one")[7:]))
    first = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n%b\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\n\r\n%b0\r\nx: y\r\n\r\n" % (AUTHORIZATION, chunks)
    )
    raw = first + SMUGGLED.replace(b"host: x", b"host: x\r\nconnection: close")

    def check() -> None:
        for at in range(1, len(raw)):
            answers = judge(served.gateway, served.engine, [raw[:at], raw[at:]], PATIENCE)
            assert [answer.status for answer in answers] == [200, 200], at

    await asyncio.to_thread(check)
