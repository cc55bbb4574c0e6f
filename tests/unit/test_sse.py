"""Event streams: cut anywhere, they give the same events."""

from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from gateway.wire import sse

STREAM = (
    'data: {"a":"é🌍\u2028\u0085"}\n\n'
    ": a comment\n\n"
    "event: message_start\ndata: {}\n\n\n\n"
    "data: [DONE]\n\n"
    "data:no blank\nid: 5\nretry: 1\n\n"
    "data: two\ndata: lines\n\n"
).encode()
EVENTS = [
    'data: {"a":"é🌍\u2028\u0085"}'.encode(),
    b": a comment",
    b"event: message_start\ndata: {}",
    b"data: [DONE]",
    b"data:no blank\nid: 5\nretry: 1",
    b"data: two\ndata: lines",
]


def split(*pieces: bytes) -> tuple[list[bytes], bytes]:
    splitter = sse.Splitter()
    found = [event for piece in pieces for event in splitter.feed(piece)]
    return found, splitter.rest


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"], ids=repr)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
def test_cut_at_every_byte(line_end: bytes, mark: bytes) -> None:
    data = mark + STREAM.replace(b"\n", line_end)
    # A last CR could be the first half of a CRLF: only what follows tells that the event has ended.
    data += b":" if line_end == b"\r" else b""
    rest = b":" if line_end == b"\r" else b""
    assert split(data) == (EVENTS, rest)
    assert split(*(data[i : i + 1] for i in range(len(data)))) == (EVENTS, rest)
    for at in range(len(data) + 1):
        assert split(data[:at], data[at:]) == (EVENTS, rest), at


@given(st.lists(st.integers(0, len(STREAM) * 2)), st.sampled_from([b"\n", b"\r\n"]))
def test_cut_at_random(cuts: list[int], line_end: bytes) -> None:
    data = STREAM.replace(b"\n", line_end)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    assert split(*(data[a:b] for a, b in pairwise(edges))) == (EVENTS, b"")


@given(st.lists(st.binary(max_size=8), max_size=12))
def test_any_bytes_in_any_pieces(pieces: list[bytes]) -> None:
    """Whatever comes: what a stream gives does not depend on how it was cut."""
    assert split(*pieces) == split(b"".join(pieces))


@given(
    st.sampled_from([-3, -1, 0, 1, 2, 3 * sse.LONG_LINE]),
    st.sampled_from([b"\n", b"\r\n"]),
    st.lists(st.integers(0, 12 * sse.LONG_LINE), max_size=4),
)
def test_long_lines(more: int, line_end: bytes, cuts: list[int]) -> None:
    long = b"data: " + b"5," * (sse.LONG_LINE // 2) + b"x" * max(more, 0)
    long = long[: sse.LONG_LINE + more]
    wanted = [long, *EVENTS, b"id: 1\n" + long, long + b"\ndata: more", long]
    data = (b"\n\n".join([*wanted, long]) + b"\n").replace(b"\n", line_end)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    assert split(*(data[a:b] for a, b in pairwise(edges))) == (wanted, long + b"\n")


def test_an_event_without_its_end_is_none() -> None:
    assert split(b"data: a\n\ndata: b\n") == ([b"data: a"], b"data: b\n")


def test_an_event_has_a_bound() -> None:
    splitter = sse.Splitter()
    half = b"x" * (sse.MAX_EVENT // 2)
    assert splitter.feed(half) == []
    assert splitter.feed(half) == []
    with pytest.raises(sse.EventTooLargeError):
        splitter.feed(b"x")


@pytest.mark.parametrize(
    ("event", "payload", "name"),
    [
        (b"data: {}", b"{}", None),
        (b"data:{}", b"{}", None),
        (b"data:  {}", b" {}", None),
        (b"data", b"", None),
        (b"data:", b"", None),
        (b"data: a\ndata: b", b"a\nb", None),
        (b"data: a\nevent: x", b"a", None),  # vLLM writes the name first
        (b"event: x\ndata: a", b"a", b"x"),
        (b"event:x\ndata: a", b"a", b"x"),
        (b"id: 1\ndata: a\nretry: 5", b"a", None),
        (b": comment", None, None),
        (b": comment\ndata: a", b"a", None),
        (b"event: ping", None, b"ping"),
        (b"datax: a", None, None),
        (b" data: a", None, None),
        (b"", None, None),
    ],
)
def test_fields(event: bytes, payload: bytes | None, name: bytes | None) -> None:
    assert sse.payload(event) == payload
    assert sse.name(event) == name


def test_what_is_written_is_read_again() -> None:
    written = sse.event(b"{}") + sse.KEEP_ALIVE + sse.event(b"[]", b"ping") + sse.DONE_EVENT
    assert written == b"data: {}\n\n: keep-alive\n\nevent: ping\ndata: []\n\ndata: [DONE]\n\n"
    events, rest = split(written)
    assert rest == b""
    assert [(sse.name(event), sse.payload(event)) for event in events] == [
        (None, b"{}"),
        (None, None),
        (b"ping", b"[]"),
        (None, sse.DONE),
    ]
