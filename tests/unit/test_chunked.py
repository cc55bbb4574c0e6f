"""The chunked coding, whatever pieces the network hands over."""

import pytest
from hypothesis import given, strategies as st

from gateway.wire.chunked import MAX_LINE, SIZE, ChunkedError, Chunks

BODY = st.binary(min_size=1, max_size=60)
TRAILER = st.sampled_from([b"", b"x-checksum: 1\r\n", b"a: b\r\nc: d\r\n"])


def coded(chunks: list[bytes], trailer: bytes = b"", style: str = "%x") -> bytes:
    return b"".join(b"%b\r\n%b\r\n" % ((style % len(c)).encode(), c) for c in chunks) + b"0\r\n" + trailer + b"\r\n"


@given(st.lists(BODY, max_size=8), TRAILER, st.sampled_from(["%x", "%X", "%04x", "%x;name=value"]), st.data())
def test_any_cut_gives_the_same(chunks: list[bytes], trailer: bytes, style: str, data: st.DataObject) -> None:
    wire = coded(chunks, trailer, style)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=6)))
    reader, found = Chunks(), b""
    for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        assert not reader.whole or start == len(wire)
        found += reader.feed(wire[start:end])
    assert found == b"".join(chunks)
    assert reader.whole
    assert reader.rest == b""


@given(st.lists(BODY, min_size=1, max_size=4))
def test_what_follows_the_body_is_left(chunks: list[bytes]) -> None:
    reader = Chunks()
    assert reader.feed(coded(chunks) + b"HTTP/1.1 200 OK\r\n") == b"".join(chunks)
    assert reader.whole
    assert reader.rest == b"HTTP/1.1 200 OK\r\n"


@given(st.lists(BODY, min_size=1, max_size=4), st.data())
def test_between_chunks_is_told(chunks: list[bytes], data: st.DataObject) -> None:
    wire = coded(chunks)
    ends = {0}
    for chunk in chunks:
        ends.add(max(ends) + len(b"%x" % len(chunk)) + 4 + len(chunk))
    cut = data.draw(st.integers(0, max(ends)))
    reader = Chunks()
    reader.feed(wire[:cut])
    assert reader.between is (cut in ends)


@pytest.mark.parametrize(
    "wire",
    [
        b"x\r\n",
        b"-1\r\n",
        b"+1\r\na\r\n",
        b"0x1\r\na\r\n",
        b"1_0\r\n" + b"a" * 16 + b"\r\n",
        b"\r\n",
        b" 1\r\na\r\n",
        b"1\r\nab\r\n",
        b"2\r\na\r\n0\r\n\r\n",
        b"1" * 16 + b"\r\n",
        b"1;" + b"x" * MAX_LINE + b"\r\n",
        b"1" * (MAX_LINE + 1),
    ],
)
def test_what_is_no_chunk_is_refused(wire: bytes) -> None:
    with pytest.raises(ChunkedError):
        Chunks().feed(wire)


@pytest.mark.parametrize(
    ("line", "digits"),
    [
        (b"0", b"0"),
        (b"00aF", b"00aF"),
        (b"5;x=y", b"5"),
        (b"5 ; x", b"5"),
        (b"5\t", b"5"),
        (b"fffffffffffffff", b"fffffffffffffff"),
        (b"ffffffffffffffff", None),
        (b"", None),
        (b"+5", None),
        (b"-5", None),
        (b"0x5", None),
        (b"5_0", None),
        (b" 5", None),
        (b"5\n", None),
        (b"g", None),
    ],
)
def test_chunk_size(line: bytes, digits: bytes | None) -> None:
    found = SIZE.match(line)
    assert (found[0] if found else None) == digits
