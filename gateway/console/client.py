"""The terminal's side of the admin API: one call, one answer, and its refusals in words that say what to do."""

import contextlib
import http.client
import json
import re
import ssl
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from gateway.console.problem import Problem

_BASE: Final = "/admin/api"
_TIMEOUT: Final = 30.0  # seconds for a call; an event stream has a line at least every 15
_LONGEST_LINE: Final = 64 << 20  # bytes of one event

Json = Any


class Address(NamedTuple):
    """Where a gateway listens."""

    secure: bool
    host: str
    port: int
    prefix: str  # of the path, if a proxy in front has one

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Takes the OpenAI client's base URL too (`…/v1`). Raises ValueError."""
        parts = urlsplit(text if "://" in text else f"http://{text}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{text!r} is no URL of a gateway; expected one like http://127.0.0.1:8080")
        if parts.username or parts.query or parts.fragment:
            raise ValueError(f"{parts.scheme}://{parts.hostname} is enough: no credentials, query or fragment")
        secure = parts.scheme == "https"
        prefix = re.sub(r"/(v1|admin|admin/api)?/*$", "", parts.path)
        return cls(secure, parts.hostname, parts.port or (443 if secure else 80), prefix)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' * self.secure}://{host}:{self.port}{self.prefix}"


class Refused(Problem):
    """The gateway said no."""

    def __init__(self, message: str, status: int, code: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Event(NamedTuple):
    name: str
    data: Json
    raw: bytes  # the data as it came


class Client:
    """Blocks. Every method raises `Problem`: nobody there, the wrong key, or whatever the gateway refused."""

    def __init__(self, address: Address, key: str, timeout: float = _TIMEOUT) -> None:
        self.address = address
        self._headers = {"authorization": f"Bearer {key}", "accept": "application/json, text/event-stream, text/csv"}
        self._timeout = timeout

    def get(self, path: str, **query: object) -> bytes:
        """The answer's body. Query fields that are None are left out."""
        return self.call("GET", path, query)

    def call(self, method: str, path: str, query: Mapping[str, object] | None = None, body: Json = None) -> bytes:
        with self._understood(), contextlib.closing(self._connect()) as connection:
            return self._ask(connection, method, path, query or {}, body).read()

    def events(self) -> Iterator[Event]:
        """The live figures, until the gateway ends the stream."""
        with self._understood(), contextlib.closing(self._connect()) as connection:
            reply = self._ask(connection, "GET", "/events", {}, None)
            yield from parse_events(iter(lambda: reply.readline(_LONGEST_LINE), b""))

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self.address.host, self.address.port
        if self.address.secure:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(host, port, timeout=self._timeout, context=context)
        return http.client.HTTPConnection(host, port, timeout=self._timeout)

    def _ask(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        query: Mapping[str, object],
        body: Json,
    ) -> http.client.HTTPResponse:
        fields = urlencode({name: value for name, value in query.items() if value is not None})
        url = f"{self.address.prefix}{_BASE}{path}{'?' if fields else ''}{fields}"
        headers, data = self._headers, None
        if body is not None:
            headers, data = {**headers, "content-type": "application/json"}, json.dumps(body).encode()
        connection.request(method, url, data, headers)
        reply = connection.getresponse()
        if reply.status >= 300:
            raise self._refusal(reply.status, reply.read())
        return reply

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        where = "--url or PENSTOCK_URL says where it listens (or server.admin_listen, if its config has that)"
        try:
            yield
        except TimeoutError:
            raise Problem(
                f"{self.address} does not answer within {self._timeout:.0f} s; is the gateway stuck?"
            ) from None
        except ssl.SSLError as error:
            raise Problem(f"{self.address}: TLS failed: {error.reason or error}") from None
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise Problem(f"nobody answers at {self.address} ({why}); is the gateway running? {where}") from None
        except http.client.HTTPException:
            raise Problem(f"{self.address} does not speak HTTP as a gateway does; {where}") from None

    def _refusal(self, status: int, body: bytes) -> Refused:
        try:
            error = json.loads(body)["error"]
            code, message = error["code"], str(error["message"])
        except (ValueError, KeyError, TypeError):
            message = f"{self.address} answers with {status}, and not as Penstock does; is it the right address?"
            return Refused(message, status, None)
        if status == HTTPStatus.UNAUTHORIZED:
            message = (
                f"{self.address} does not know this admin key; "
                "it is the admin_key of the gateway's config: set PENSTOCK_ADMIN_KEY, or give --admin-key-file FILE"
            )
        elif status == HTTPStatus.FORBIDDEN:
            message = "this is a client's key; the admin API takes the gateway's admin_key alone"
        elif code == "unknown_url":
            message = (
                f"there is no admin API at {self.address}: set admin_key in the gateway's config and restart it, "
                "or give the address of server.admin_listen as --url"
            )
        return Refused(message, status, code)


def decoded(answer: bytes) -> Json:
    """Raises `Problem`."""
    try:
        return json.loads(answer)
    except ValueError:
        raise Problem("the answer is no JSON, as a gateway's would be; is it the right address?") from None


def escaped(part: str) -> str:
    """As a part of a path."""
    return quote(part, safe="/:")


def parse_events(lines: Iterator[bytes]) -> Iterator[Event]:
    """Server-sent events with JSON as data; comments and what has no data are left out."""
    name, data = "message", b""
    for line in lines:
        field, _, value = line.rstrip(b"\r\n").partition(b":")
        if field == b"event":
            name = value.strip().decode()
        elif field == b"data":
            data += value.removeprefix(b" ")
        elif not field and not value:
            if data:
                yield Event(name, decoded(data), data)
            name, data = "message", b""
