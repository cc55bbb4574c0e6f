"""What a request's head may be. Pure: bytes in, a verdict out (facts: http-edge.md §1, §4).

llhttp's strict framing refuses the smuggling of lengths and codings; what it lets pass is judged here.
"""

import re
from typing import Final

from gateway.errors import GatewayError

MAX_HEAD: Final = 64 * 1024  # bytes of request line and headers; OpenAI documents the same
MAX_FIELDS: Final = 100  # header fields; Envoy's default
MAX_URL: Final = 8 * 1024  # bytes

# Letters, digits and what else a reg-name or an address holds; userinfo, paths and spaces do not belong here.
HOST: Final = re.compile(rb"(?:[A-Za-z0-9._~%!$&'()*+,;=-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
UPGRADE: Final = re.compile(rb"(?im)^upgrade(?=[ \t]*:)")
REQUEST_LINE: Final = re.compile(rb"[!-~]{1,32} [^\r\n ]+ HTTP/1\.[01]\r$")
CONTENT_LENGTH: Final = re.compile(rb"(?i)(\r\ncontent-length:[ \t]*)([0-9]{1,15})[ \t]*(?=\r\n)")
EMPTY_LINES: Final = re.compile(rb"(?:\r\n)*")


def bad(message: str, status: int = 400, code: str | None = None) -> GatewayError:
    return GatewayError(status, code, message)


def headers_too_large() -> GatewayError:
    return bad(
        f"The request's headers are too large: at most {MAX_HEAD} bytes and {MAX_FIELDS} fields are accepted.",
        431,
        "headers_too_large",
    )


def uri_too_long() -> GatewayError:
    return bad(f"The URL is too long: at most {MAX_URL} bytes are accepted.", 414, "uri_too_long")


def no_connect() -> GatewayError:
    return GatewayError(
        405, "method_not_allowed", "CONNECT and upgrades are not offered.", headers=(("allow", "GET, HEAD, POST"),)
    )


def oversized(head: bytes) -> GatewayError:
    """Which limit a head that has outgrown `MAX_HEAD` has broken: its URL's, or that of all."""
    return uri_too_long() if len(head.partition(b"\n")[0]) > MAX_URL else headers_too_large()


def request_line(head: bytes) -> GatewayError | None:
    """Judges the request line of a complete head, before the parser sees it."""
    line = head[: head.index(b"\n")]
    if len(line) > MAX_URL + 64 and b" " in line[:32]:
        return uri_too_long()
    if not REQUEST_LINE.match(line):
        return bad("Malformed request line: expected 'METHOD /path HTTP/1.1'.")
    return None


def without_empty_lines(data: bytes) -> bytes:
    """What follows the empty lines that bytes begin with. A lone CR or LF is none: not every parser sees one in it."""
    found = EMPTY_LINES.match(data)
    return data[found.end() :] if found else data


def without_upgrade(head: bytes) -> bytes:
    """The head with `Upgrade` renamed: no upgrade is offered, and the parser would drop the body after one."""
    return UPGRADE.sub(b"x-grade", head) if b"pgrade" in head or b"PGRADE" in head else head


def headers(found: list[tuple[bytes, bytes]], fields: dict[bytes, bytes], version: str) -> GatewayError | None:
    """Judges a head's fields, names in lower case. `fields` holds the last of each name."""
    if len(found) > MAX_FIELDS:
        return headers_too_large()
    host = fields.get(b"host")
    if host is None:
        if version == "1.1":
            return bad("Exactly one Host header is needed.")
    elif not HOST.fullmatch(host):
        return bad("The Host header is malformed.")
    elif len(fields) != len(found) and sum(name == b"host" for name, _ in found) > 1:
        return bad("Exactly one Host header is needed.")
    coding = fields.get(b"transfer-encoding")
    if coding is not None:
        if version == "1.0":
            return bad("HTTP/1.0 has no Transfer-Encoding.")
        # llhttp looks at the last coding alone; another parser on the way may have looked at the first one.
        if coding.lower() != b"chunked" or sum(name == b"transfer-encoding" for name, _ in found) > 1:
            return bad("Only one 'Transfer-Encoding: chunked' is understood.")
    expect = fields.get(b"expect")
    if expect is not None and expect.lower() != b"100-continue":
        return bad("Only 'Expect: 100-continue' is understood.", 417, "expectation_failed")
    return None
