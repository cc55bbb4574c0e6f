"""The guard of the socket: what a head may be."""

import pytest

from gateway.edge import guard
from gateway.errors import GatewayError


def code(refusal: GatewayError | None) -> int | None:
    return None if refusal is None else refusal.status


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET / HTTP/1.1\r\n", None),
        (b"GET / HTTP/1.0\r\n", None),
        (b"M-SEARCH * HTTP/1.1\r\n", None),
        (b"GET /a?b=c HTTP/1.1\r\nhost: x\r\n\r\n", None),
        (b"GET  / HTTP/1.1\r\n", 400),
        (b"GET /  HTTP/1.1\r\n", 400),
        (b"GET /a b HTTP/1.1\r\n", 400),
        (b"GET /\tb HTTP/1.1\r\n", None),  # the parser refuses it
        (b"GET / HTTP/1.1\n", 400),
        (b"GET /\r\n", 400),
        (b"GET / HTTP/2.0\r\n", 400),
        (b"GET / HTTP/1.9\r\n", 400),
        (b"GET / HTTP/1.1 \r\n", 400),
        (b"GET / http/1.1\r\n", 400),
        (b" GET / HTTP/1.1\r\n", 400),
        (b"\x16\x03\x01\r\n", 400),
        (b"GET /" + b"x" * guard.MAX_URL + b"x" * 64 + b" HTTP/1.1\r\n", 414),
        (b"X" * 10_000 + b" / HTTP/1.1\r\n", 400),
    ],
)
def test_request_line(line: bytes, status: int | None) -> None:
    assert code(guard.request_line(line)) == status


def fields(*found: tuple[bytes, bytes]) -> tuple[list[tuple[bytes, bytes]], dict[bytes, bytes]]:
    return list(found), dict(found)


HOST = (b"host", b"x")


@pytest.mark.parametrize(
    ("found", "version", "status"),
    [
        ([HOST], "1.1", None),
        ([], "1.1", 400),
        ([], "1.0", None),
        ([HOST, HOST], "1.1", 400),
        ([HOST, HOST], "1.0", 400),
        ([HOST, (b"x", b"1"), (b"x", b"2")], "1.1", None),
        ([HOST, (b"transfer-encoding", b"chunked")], "1.1", None),
        ([HOST, (b"transfer-encoding", b"Chunked")], "1.1", None),
        ([HOST, (b"transfer-encoding", b"chunked")], "1.0", 400),
        ([HOST, (b"transfer-encoding", b"xchunked"), (b"transfer-encoding", b"chunked")], "1.1", 400),
        ([HOST, (b"transfer-encoding", b"chunked"), (b"transfer-encoding", b"chunked")], "1.1", 400),
        ([HOST, (b"transfer-encoding", b"gzip, chunked")], "1.1", 400),
        ([HOST, (b"expect", b"100-Continue")], "1.1", None),
        ([HOST, (b"expect", b"foo")], "1.1", 417),
        ([HOST, *[(b"x%d" % i, b"") for i in range(guard.MAX_FIELDS - 1)]], "1.1", None),
        ([HOST, *[(b"x%d" % i, b"") for i in range(guard.MAX_FIELDS)]], "1.1", 431),
    ],
)
def test_headers(found: list[tuple[bytes, bytes]], version: str, status: int | None) -> None:
    assert code(guard.headers(*fields(*found), version)) == status


@pytest.mark.parametrize(
    ("host", "good"),
    [
        (b"example.org", True),
        (b"example.org:8080", True),
        (b"127.0.0.1:1", True),
        (b"[::1]:8080", True),
        (b"[::1]", True),
        (b"my_host", True),
        (b"", True),  # RFC 9112 §3.2: allowed where the target has no authority
        (b"example.org:", True),
        (b"a b", False),
        (b"a/b", False),
        (b"user@host", False),
        (b"host?x", False),
        (b"host#x", False),
        (b"[::1", False),
        (b"host:port", False),
        (b"host:123456", False),
        (b"a\\b", False),
        (b"a:1:2", False),
        ("ä".encode(), False),
    ],
)
def test_host(host: bytes, good: bool) -> None:
    assert (guard.headers(*fields((b"host", host)), "1.1") is None) is good


def test_what_has_outgrown_its_bounds() -> None:
    assert code(guard.oversized(b"GET / HTTP/1.1\r\nx: " + b"y" * guard.MAX_HEAD)) == 431
    assert code(guard.oversized(b"GET /" + b"y" * guard.MAX_HEAD)) == 414
    assert guard.headers_too_large().code == "headers_too_large"
    assert guard.uri_too_long().code == "uri_too_long"
    assert guard.no_connect().headers == (("allow", "GET, HEAD, POST"),)


@pytest.mark.parametrize("name", [b"Upgrade", b"upgrade", b"UPGRADE"])
def test_upgrade_is_not_offered(name: bytes) -> None:
    head = b"POST / HTTP/1.1\r\nhost: upgrade\r\n%b: h2c\r\nx-upgrade: y\r\n\r\n" % name
    assert guard.without_upgrade(head) == b"POST / HTTP/1.1\r\nhost: upgrade\r\nx-grade: h2c\r\nx-upgrade: y\r\n\r\n"
    untouched = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    assert guard.without_upgrade(untouched) is untouched


@pytest.mark.parametrize(
    ("data", "rest"),
    [
        (b"\r\n\r\nGET /", b"GET /"),
        (b"\r\n" * 100_000, b""),
        (b"\r\n\r", b"\r"),
        (b"\rGET /", b"\rGET /"),
        (b"\r\n\nGET /", b"\nGET /"),
        (b"GET /\r\n", b"GET /\r\n"),
    ],
)
def test_empty_lines_before_a_request(data: bytes, rest: bytes) -> None:
    assert guard.without_empty_lines(data) == rest
