"""The inference endpoints under any ASGI server."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from gateway.errors import GatewayError
from gateway.head import make_head, too_large
from gateway.policy import Gateway
from gateway.relay import ClientGone
from gateway.serve import serve
from gateway.types import Endpoint, Watcher

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

HIGH_WATER: Final = 256 * 1024  # bytes that may wait for a client before its engine is no longer read from
LOW_WATER: Final = 64 * 1024
GRACE_PER_BYTE: Final = 1 / 100_000  # seconds of body_timeout for each byte that has come


class AsgiSink:
    """A sink that ASGI's `send`, a coroutine, empties. `start`, `write` and `finish` only put down what is to be sent."""

    def __init__(self) -> None:
        self.gone = False
        self.started = False
        self._messages: list[Message] = []
        self._body: list[bytes] = []
        self._waiting = 0  # bytes put down and not sent
        self._ended = False
        self._watcher: Watcher | None = None
        self._paused = False
        self._wake = asyncio.Event()

    def start(self, status: int, headers: bytes, length: int | None) -> None:
        self.started = True
        fields = [tuple(line.split(b": ", 1)) for line in headers.split(b"\r\n")[:-1]]
        if length is not None:
            fields.append((b"content-length", b"%d" % length))
        self._messages.append({"type": "http.response.start", "status": status, "headers": fields})
        self._wake.set()

    def write(self, data: bytes) -> None:
        if self.gone:
            return
        self._body.append(data)
        self._waiting += len(data)
        if self._waiting > HIGH_WATER and not self._paused and self._watcher is not None:
            self._paused = True
            self._watcher.pause()
        self._wake.set()

    def finish(self, last: bytes = b"") -> None:
        if last and not self._ended:
            self.write(last)
        self._ended = True
        self._wake.set()

    def close_after(self) -> None:
        """ASGI knows no way to say it once the headers are out."""

    def abort(self) -> None:
        self._ended = True
        self._wake.set()

    def watch(self, watcher: Watcher | None) -> None:
        self._watcher = watcher
        if watcher is not None and self.gone:
            watcher.client_gone()

    def client_left(self) -> None:
        self.gone = self._ended = True
        if self._watcher is not None:
            self._watcher.client_gone()
        self._wake.set()

    async def send_all(self, send: Send) -> None:
        """Sends what is put down, until the end."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            messages, self._messages = self._messages, []
            for message in messages:
                await send(message)
            while self._body:
                body, self._body = b"".join(self._body), []
                await send({"type": "http.response.body", "body": body, "more_body": True})
                self._waiting -= len(body)
                if self._paused and self._waiting < LOW_WATER and self._watcher is not None:
                    self._paused = False
                    self._watcher.resume()
            if self._ended and not self._messages:
                if not self.gone:
                    await send({"type": "http.response.body", "body": b""})
                return


class BodyReader:
    """Reads a request's body, and then waits for the client to leave."""

    def __init__(self, receive: Receive, most: int, timeout: float) -> None:
        self._receive = receive
        self._most = most
        self._timeout = timeout  # seconds

    async def read(self) -> bytes:
        """The whole body. Raises `GatewayError` request_too_large or request_timeout, `ClientGone`."""
        loop = asyncio.get_running_loop()
        began, parts, size = loop.time(), [], 0
        try:
            async with asyncio.timeout(self._timeout) as limit:
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    part = message.get("body", b"")
                    size += len(part)
                    if size > self._most:
                        raise too_large(self._most)
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts) if len(parts) > 1 else part
                    limit.reschedule(began + self._timeout + size * GRACE_PER_BYTE)
        except TimeoutError:
            raise GatewayError(408, "request_timeout", "The request's body took too long to come.") from None

    async def disconnect(self) -> None:
        """Returns when the client has left. Must not be called before `read` has returned."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


class InferenceEndpoint:
    """The ASGI application of one endpoint of the table."""

    def __init__(self, gateway: Gateway, endpoint: Endpoint) -> None:
        self._gateway = gateway
        self._endpoint = endpoint

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        client = scope.get("client")
        head = make_head(self._endpoint, scope["headers"], client[0] if client else "")
        policy, sink = self._gateway.policy, AsgiSink()
        body = BodyReader(receive, policy.max_body_bytes, policy.body_timeout)
        listening: asyncio.Task[None] | None = None

        async def listen() -> None:
            await body.disconnect()
            sink.client_left()

        async def read() -> bytes:
            nonlocal listening
            data = await body.read()
            listening = asyncio.create_task(listen())
            return data

        serving = asyncio.create_task(serve(self._gateway, head, read, sink))
        serving.add_done_callback(lambda _: sink.finish())
        try:
            await sink.send_all(send)
            await asyncio.wait({serving})  # it ends by itself, whoever cancelled it
        finally:
            serving.cancel()
            if listening is not None:
                listening.cancel()
