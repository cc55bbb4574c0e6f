"""Ways of talking to a gateway that no HTTP library offers."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from tests.fake_engine import FakeEngine
from tests.served import DEADLINE, KEY, Answer, Penstock, chat_body, close, http_post, until

CHAT = "/v1/chat/completions"


class Served(NamedTuple):
    """A gateway, and the engines behind it."""

    gateway: Penstock
    engine: FakeEngine
    pooling: FakeEngine


def parse(data: bytes) -> tuple[list[Answer], bytes]:
    """The whole answers in a connection's bytes, and what is left. Interim ones (100) are answers too."""
    answers = []
    while (end := data.find(b"\r\n\r\n")) >= 0:
        first, *lines = data[:end].decode("latin-1").split("\r\n")
        assert first.startswith("HTTP/1.1 "), first
        status = int(first.split(" ")[1])
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        assert len(headers) == len(lines), f"a header stands twice: {lines}"
        rest = data[end + 4 :]
        if status == 100:
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            whole = dechunk(rest)
            if whole is None:
                break
            body, rest = whole
        elif "content-length" in headers:
            length = int(headers["content-length"])
            if len(rest) < length:
                break
            body, rest = rest[:length], rest[length:]
        else:
            body, rest = rest, b""
        answers.append(Answer(status, headers, body))
        data = rest
    return answers, data


def dechunk(data: bytes) -> tuple[bytes, bytes] | None:
    """A chunked body and what follows it; None if it does not end."""
    body = b""
    while True:
        size, found, data = data.partition(b"\r\n")
        if not found:
            return None
        length = int(size, 16)
        if len(data) < length + 2:
            return None
        assert data[length : length + 2] == b"\r\n"
        body += data[:length]
        data = data[length + 2 :]
        if not length:
            return body, data


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))


class Client:
    """One connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._rest = b""

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> Answer:
        """The next whole answer."""
        async with asyncio.timeout(DEADLINE):
            while True:
                answers, _ = parse(self._rest)
                if answers:
                    first = answers[0]
                    # What follows it: everything but the bytes of the first answer.
                    self._rest = self._after_first()
                    return first
                self._rest += await self._more()

    def _after_first(self) -> bytes:
        low, high = 1, len(self._rest)
        while low < high:  # the shortest beginning that holds an answer
            middle = (low + high) // 2
            if parse(self._rest[:middle])[0]:
                high = middle
            else:
                low = middle + 1
        return self._rest[low:]

    async def until(self, wanted: bytes) -> bytes:
        """Everything that has come, once `wanted` is in it."""
        async with asyncio.timeout(DEADLINE):
            while wanted not in self._rest:
                self._rest += await self._more()
        return self._rest

    async def to_end(self) -> bytes:
        """Everything that comes, until the gateway closes."""
        async with asyncio.timeout(DEADLINE):
            while piece := await self.reader.read(1 << 16):
                self._rest += piece
        return self._rest

    def forget(self) -> None:
        """What has come so far was not an answer with a body."""
        self._rest = b""

    async def _more(self) -> bytes:
        piece = await self.reader.read(1 << 16)
        if not piece:
            raise AssertionError(f"closed after {self._rest[:2000]!r}")
        return piece

    async def leave(self) -> None:
        await close(self.writer)


@contextlib.asynccontextmanager
async def connect(gateway: Penstock, *, limit: int = 1 << 24) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=limit)
    client = Client(reader, writer)
    try:
        yield client
    finally:
        await client.leave()


async def exchange(gateway: Penstock, data: bytes) -> list[Answer]:
    """The answers to these bytes, until the gateway closes."""
    async with connect(gateway) as client:
        with contextlib.suppress(ConnectionError):  # the gateway need not read all of it
            await client.send(data)
        with contextlib.suppress(ConnectionResetError):
            await client.to_end()
        answers, rest = parse(client._rest)
        assert not rest, rest[:200]
        return answers


def post(path: str = CHAT, body: object = None, key: str | None = KEY, more: str = "", **fields: Any) -> bytes:
    """A request's bytes; by default a chat's, with these fields, after which the connection is closed."""
    return http_post(path, chat_body(**fields) if body is None else body, key, f"connection: close\r\n{more}")


def plain(data: bytes) -> str:
    """An engine's answer without what differs from one to the next."""
    text = re.sub(r'"(id|item_id)":"([a-z]+)[-_][0-9a-f]+"', r'"\1":"\2-ID"', data.decode())
    return re.sub(r'"(created|created_at)":\d+', r'"\1":0', text)


def events(data: bytes) -> list[bytes]:
    *whole, rest = data.split(b"\n\n")
    assert rest == b"", rest
    return whole


def chunks(data: bytes) -> list[Any]:
    """The JSON of a stream's events; the last one must be [DONE]."""
    *found, last = events(data)
    assert last == b"data: [DONE]", last
    return [json.loads(event.removeprefix(b"data: ")) for event in found]


def text_of(data: bytes) -> str:
    return "".join(
        choice.get("text") or choice.get("delta", {}).get("content") or ""
        for chunk in chunks(data)
        for choice in chunk["choices"]
    )


async def logged(gateway: Penstock, request_id: str) -> dict[str, Any]:
    """The access log's line for a request."""
    found: list[dict[str, Any]] = []
    path = gateway.folder / "access.log"

    async def there() -> bool:
        lines = path.read_bytes().splitlines(keepends=True)
        found[:] = [
            entry
            for line in lines
            if request_id.encode() in line and line.endswith(b"\n") and (entry := json.loads(line))
        ]
        return bool(found)

    await until(there)
    [entry] = found
    return entry
