"""From raw headers to a head."""

import pytest

from gateway.errors import GatewayError
from gateway.head import fresh_id, judge_head, make_head, request_id
from gateway.types import Head
from gateway.wire.openai import ENDPOINTS


def head(*headers: tuple[bytes, bytes]) -> Head:
    return make_head(ENDPOINTS[0], headers, "10.0.0.1")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (b"abc", True),
        (b"A-z_0.9", True),
        (b"x" * 128, True),
        (b"x" * 129, False),
        (b"", False),
        (b"a b", False),
        (b"a\n", False),
        (b"\xff", False),
        (None, False),
    ],
)
def test_request_id(given: bytes | None, kept: bool) -> None:
    made = request_id(given)
    assert (made is not None and made.encode() == given) is kept
    assert kept or made is None


def test_fresh_ids_are_all_different_and_would_be_taken() -> None:
    made = [fresh_id() for _ in range(1000)]
    assert len(set(made)) == 1000
    assert all(request_id(one.encode()) == one and one.startswith("req_") for one in made)


def test_nothing() -> None:
    made = head()
    assert (made.authorization, made.api_key, made.content_type, made.content_encoding) == ((), (), b"", b"")
    assert (made.content_length, made.retry_count, made.client) == (None, None, "10.0.0.1")


def test_everything() -> None:
    made = head(
        (b"authorization", b"Bearer a"),
        (b"authorization", b"Bearer b"),
        (b"x-api-key", b"c"),
        (b"content-type", b"application/json"),
        (b"content-encoding", b" GZIP "),
        (b"content-length", b"12"),
        (b"x-request-id", b"mine"),
        (b"x-stainless-retry-count", b"2"),
    )
    assert made.authorization == (b"Bearer a", b"Bearer b")
    assert made.api_key == (b"c",)
    assert made.content_encoding == b"gzip"
    assert (made.content_length, made.retry_count, made.request_id) == (12, 2, "mine")


@pytest.mark.parametrize("value", [b"x", b"-1", b"+1", b"1" * 17, b"\xb2", b""])
def test_odd_numbers(value: bytes) -> None:
    assert head((b"x-stainless-retry-count", value)).retry_count is None


@pytest.mark.parametrize(
    ("media", "encoding", "length", "code"),
    [
        (b"application/json", b"", b"10", None),
        (b"application/json; charset=utf-8", b"identity", b"100", None),
        (b"APPLICATION/JSON", b"", None, None),
        (b"application/json", b"", b"101", "request_too_large"),
        (b"application/json", b"gzip", b"10", "unsupported_media_type"),
        (b"application/json", b"identity, gzip", b"10", "unsupported_media_type"),
        (b"application/jsonp", b"", b"10", "unsupported_media_type"),
        (b"text/plain", b"", b"101", "unsupported_media_type"),
        (None, b"", b"10", "unsupported_media_type"),
    ],
)
def test_judge_head(media: bytes | None, encoding: bytes, length: bytes | None, code: str | None) -> None:
    fields = {b"content-type": media, b"content-encoding": encoding, b"content-length": length}
    made = head(*[(name, value) for name, value in fields.items() if value is not None])
    if code is None:
        judge_head(made, 100)
        return
    with pytest.raises(GatewayError) as refused:
        judge_head(made, 100)
    assert refused.value.code == code
