"""Clients that do not stop asking, and what went wrong for any of them."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator

from tests.served import DEADLINE, close, http_post

TOKENS = 12
_PIECE = re.compile(rb'"content":"( t\d+)"')
WHOLE = b"".join(b" t%d" % i for i in range(TOKENS))


class Load:
    """Streams over new connections, streams and plain answers over kept ones, from `clients` of each at a time."""

    def __init__(self, port: int, clients: int, delay: float = 0.01) -> None:
        self.port = port
        self.failures: list[str] = []
        self.finished = 0
        self._stream = self._request(stream=True, delay=delay)
        self._plain = self._request(stream=False, delay=delay)
        self._clients = clients
        self._stopping = asyncio.Event()
        self._progress = asyncio.Event()

    @staticmethod
    def _request(*, stream: bool, delay: float) -> dict[str, object]:
        return {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": TOKENS,
            "stream": stream,
            "fake": {"delay": delay},
        }

    async def more(self, requests: int) -> None:
        """Waits until so many requests more have been finished."""
        wanted = self.finished + requests
        async with asyncio.timeout(DEADLINE):
            while self.finished < wanted and not self.failures:
                self._progress.clear()
                await self._progress.wait()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Load"]:
        async with asyncio.TaskGroup() as group:
            for _ in range(self._clients):
                group.create_task(self._one_by_one())
                group.create_task(self._over_one_connection(self._stream))
                group.create_task(self._over_one_connection(self._plain))
            try:
                yield self
            finally:
                self._stopping.set()

    async def _one_by_one(self) -> None:
        request = http_post("/v1/chat/completions", self._stream, more="connection: close\r\n")
        while not self._stopping.is_set():
            try:
                async with asyncio.timeout(DEADLINE):
                    reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    writer.write(request)
                    answer = await reader.read(-1)
                    await close(writer)
            except (OSError, TimeoutError) as error:
                self._judge(f"new connection: {error!r}".encode())
            else:
                self._judge(answer)

    async def _over_one_connection(self, body: dict[str, object]) -> None:
        """Kept as long as the gateway keeps it, as it says in its answers."""
        request = http_post("/v1/chat/completions", body)
        while not self._stopping.is_set():
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            kept = True
            while kept and not self._stopping.is_set():
                try:
                    async with asyncio.timeout(DEADLINE):
                        writer.write(request)
                        answer = await self._answer(reader)
                except (OSError, EOFError, TimeoutError) as error:
                    self._judge(f"kept connection: {error!r}".encode())
                    break
                self._judge(answer)
                kept = b"\r\nconnection: close" not in answer and not reader.at_eof()
            await close(writer)

    @staticmethod
    async def _answer(reader: asyncio.StreamReader) -> bytes:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if length:
            return head + await reader.readexactly(int(length[1]))
        if b"transfer-encoding: chunked" in head:
            return head + await reader.readuntil(b"\r\n0\r\n\r\n")
        return head + await reader.read(-1)

    def _judge(self, answer: bytes) -> None:
        head, _, body = answer.partition(b"\r\n\r\n")
        streamed = b"text/event-stream" in head
        text = b"".join(_PIECE.findall(body)) if streamed else body
        good = head.startswith(b"HTTP/1.1 200 ") and WHOLE in text and (not streamed or b"data: [DONE]" in body)
        if not good:
            self.failures.append(answer.decode(errors="replace"))
        self.finished += 1
        self._progress.set()
