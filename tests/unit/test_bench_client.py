"""Reading answers: every chunk once, whatever pieces the network hands over, and a cause for all that is no answer."""

import itertools
from typing import Any

import orjson
import pytest
from hypothesis import given, strategies as st

from gateway.bench.client import Reader, Target, Usage, error_message, has_output, judge, status_cause
from gateway.bench.results import Cause


def chunk(delta: dict[str, Any], finish: str | None = None, **fields: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return b"data: " + orjson.dumps({"id": "x", "choices": [choice], **fields}) + b"\n\n"


ROLE = chunk({"role": "assistant", "content": ""})
USAGE = b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":7,"total_tokens":11,"completion_tokens":4}}\n\n'
DONE = b"data: [DONE]\n\n"
# Text that looks like what is searched for, and characters that are more than one byte.
TEXTS = ["He", 'said "finish_reason":"stop"', '"error"', "\n\ndata: [DONE]\n\n", "é\u2028", "."]
STREAM = b"".join([ROLE, *(chunk({"content": text}) for text in TEXTS), chunk({"content": ""}, "stop"), USAGE, DONE])
ERROR = b'data: {"error":{"message":"The engine\\nfailed.","type":"server_error","code":500}}\n\n'


def read(*pieces: bytes, keep: bool = False) -> Reader:
    reader = Reader(keep)
    for i, piece in enumerate(pieces):
        reader.feed(piece, float(i))
    return reader


def state(reader: Reader) -> tuple[object, ...]:
    return (
        len(reader.times),
        reader.finished,
        reader.done,
        reader.error,
        reader.malformed,
        reader.usage,
        reader.text(),
    )


WHOLE = (len(TEXTS) + 1, True, True, None, None, Usage(7, 4), "".join(TEXTS))


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_a_stream_cut_in_two_anywhere_reads_the_same(newline: bytes) -> None:
    stream = STREAM.replace(b"\n", newline)
    for at in range(len(stream) + 1):
        assert state(read(stream[:at], stream[at:], keep=True)) == WHOLE


@given(st.lists(st.integers(0, len(STREAM)), max_size=30))
def test_a_stream_in_any_pieces_reads_the_same(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[a:b] for a, b in itertools.pairwise(edges)]
    assert state(read(*pieces, keep=True)) == WHOLE


def test_each_chunk_has_the_time_it_came_at_and_the_role_is_none() -> None:
    reader = read(
        ROLE, b": keep-alive\n\n", chunk({"content": "a"}), chunk({"content": "b"}), chunk({"content": ""}), USAGE
    )
    assert list(reader.times) == [2.0, 3.0, 4.0]


def test_events_in_one_piece_have_one_time() -> None:
    assert list(read(ROLE, chunk({"content": "a"}) * 3).times) == [1.0] * 3


def test_text_completions() -> None:
    event = b'data: {"choices":[{"index":0,"text":"%b","finish_reason":%b}]}\n\n'
    reader = read(event % (b"", b"null"), event % (b"a", b"null"), event % (b"b", b'"length"'), DONE, keep=True)
    assert (list(reader.times), reader.finished, reader.text()) == ([1.0, 2.0], True, "ab")


def test_nothing_counts_after_the_end() -> None:
    assert state(read(STREAM, chunk({"content": "more"}), keep=True)) == WHOLE


@pytest.mark.parametrize("spaced", [True, False])
def test_a_server_that_writes_its_json_with_spaces(spaced: bool) -> None:
    stream = STREAM.replace(b'"finish_reason":null', b'"finish_reason": null') if spaced else STREAM
    assert state(read(*(event + b"\n\n" for event in stream.split(b"\n\n")[:-1]), keep=True)) == WHOLE


@pytest.mark.parametrize(
    ("delta", "output"),
    [
        ({"role": "assistant", "content": ""}, False),
        ({"role": "assistant", "content": None}, False),
        ({}, False),
        ({"content": "x"}, True),
        ({"reasoning": "x"}, True),
        ({"reasoning_content": "x"}, True),
        ({"tool_calls": [{}]}, True),
    ],
)
def test_output(delta: dict[str, Any], output: bool) -> None:
    assert has_output({"delta": delta, "finish_reason": None}) is output
    assert has_output({"delta": delta, "finish_reason": "stop"})


@pytest.mark.parametrize(
    ("stream", "cause", "detail"),
    [
        (STREAM, None, ""),
        (STREAM.removesuffix(DONE), Cause.CUT, "[DONE]"),
        (ROLE + chunk({"content": "a"}), Cause.CUT, "after 1 chunks, without a finish reason"),
        (ROLE + chunk({"content": "a"}) + DONE, Cause.CUT, "a finish reason"),
        (STREAM[: -len(DONE) + 3], Cause.CUT, "[DONE]"),
        (b"", Cause.CUT, "after 0 chunks"),
        (ROLE + ERROR + DONE, Cause.ERROR_EVENT, "The engine failed."),
        (b'data: {"object":"error","message":"old shape"}\n\n', Cause.ERROR_EVENT, "old shape"),
        (b"data: {broken\n\n", Cause.MALFORMED, "{broken"),
        (b"data: []\n\n", Cause.MALFORMED, "[]"),
        (b'data: {"choices":[7]}\n\n', Cause.MALFORMED, "choices"),
        (b'data: {"id":"x"}\n\n', Cause.MALFORMED, "id"),
        (b"data: \xff\n\n", Cause.MALFORMED, ""),
        (ROLE + b'data: {"choices":[],"usage":{"completion_tokens":1}}\n\n', Cause.MALFORMED, "usage"),
    ],
)
def test_verdicts_on_streams(stream: bytes, cause: Cause | None, detail: str) -> None:
    found, said = judge(200, b"", read(stream))
    assert found == cause
    assert detail in said


def test_an_event_without_end_is_malformed() -> None:
    assert judge(200, b"", read(b"data: " + b"x" * (17 << 20)))[0] is Cause.MALFORMED


@pytest.mark.parametrize(
    ("status", "cause"),
    [
        (204, Cause.MALFORMED), (302, Cause.MALFORMED), (400, Cause.REJECTED), (401, Cause.UNAUTHORIZED), (403, Cause.REJECTED),
        (404, Cause.NOT_FOUND), (422, Cause.REJECTED), (429, Cause.RATE_LIMITED), (500, Cause.SERVER_ERROR),
        (502, Cause.SERVER_ERROR), (503, Cause.UNAVAILABLE), (504, Cause.SERVER_ERROR),
    ],
)  # fmt: skip
def test_statuses(status: int, cause: Cause) -> None:
    assert status_cause(status) is cause
    assert judge(status, b'{"error":{"message":"No."}}', Reader()) == (cause, f"HTTP {status}: No.")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error":{"message":"a  b\\nc"}}', "a b c"),
        (b'{"error":"text"}', "text"),
        (b'{"detail":"Not Found"}', "Not Found"),
        (b'{"object":"error","message":"m"}', "m"),
        (b"<html>Bad Gateway</html>", "<html>Bad Gateway</html>"),
        (b"\xff", "\ufffd"),
        (b"[]", "[]"),
        (b"", ""),
    ],
)
def test_what_servers_say(body: bytes, said: str) -> None:
    assert judge(500, body, Reader())[1] == f"HTTP 500: {said}"
    assert len(error_message("x" * 5000)) == 300


def test_no_answer_at_all_is_a_cut() -> None:
    assert judge(0, b"", Reader())[0] is Cause.CUT


@pytest.mark.parametrize(
    ("url", "host", "port", "first_line"),
    [
        ("http://h", "h", 80, b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\n"),
        ("http://h:8000/", "h", 8000, b"POST /v1/chat/completions HTTP/1.1\r\nHost: h:8000\r\n"),
        ("http://h:8000/v1/", "h", 8000, b"POST /v1/chat/completions HTTP/1.1\r\nHost: h:8000\r\n"),
        ("https://[::1]/a/v1", "::1", 443, b"POST /a/v1/chat/completions HTTP/1.1\r\nHost: [::1]\r\n"),
    ],
)
def test_targets(url: str, host: str, port: int, first_line: bytes) -> None:
    target = Target.parse(url, "chat/completions", "sk-1")
    assert (target.host, target.port, target.tls is not None) == (host, port, url.startswith("https"))
    assert target.head.startswith(first_line)
    assert b"\r\nAuthorization: Bearer sk-1\r\n" in target.head
    assert b"Authorization" not in Target.parse(url, "completions", None).head


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("ftp://h", None),
        ("h:80", None),
        ("http://", None),
        ("http://h:99999", None),
        ("http://h/ü", None),
        ("http://h", "a\r\nb"),
    ],
)
def test_bad_targets(url: str, key: str | None) -> None:
    with pytest.raises(ValueError, match=r"URL|[Pp]ort"):
        Target.parse(url, "chat/completions", key)
