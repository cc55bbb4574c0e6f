"""One attempt at one engine: an HTTP/1.1 client on httptools that hands bytes on as they come.

Why our own: the relay is what this project exists for. A general client costs two to three times as much per request
(facts: libraries.md §1) and would hand over each token through a coroutine of its own.

What is written is written afresh: our own request line and headers, one Content-Length, nothing of the client's.
"""

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import Final, Protocol, cast
from urllib.parse import urlsplit

import httptools

from engines.types import Replica
from gateway import errors

CONNECT_TIMEOUT: Final = 5.0  # seconds
IDLE_MAX: Final = 4.0  # seconds; vLLM closes idle connections after 5 (VLLM_HTTP_TIMEOUT_KEEP_ALIVE)


class StaleConnectionError(Exception):
    """A pooled connection that the engine had closed before it read the request: send it again on a fresh one."""


class Unreachable(Exception):  # noqa: N818 - names the state of the engine
    """No connection to the engine came about."""


class Receiver(Protocol):
    """Who gets an engine's answer. Called from the event loop, in the order head, data…, then end or lost, once."""

    def head(self, status: int, content_type: bytes) -> None: ...
    def data(self, chunk: bytes) -> None: ...
    def end(self) -> None: ...
    def lost(self, why: Exception) -> None:
        """The connection broke before the answer's end: `StaleConnectionError` or `GatewayError` engine_failed."""


class Connection(asyncio.Protocol):
    """A connection to one engine: idle in its pool, or busy with one exchange."""

    __slots__ = (
        "_content_type",
        "_head",
        "_keep_alive",
        "_parser",
        "_paused",
        "_pieces",
        "_pool",
        "_receiver",
        "_reused",
        "_touched",
        "_transport",
        "_whole",
        "idle_since",
    )

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._receiver: Receiver | None = None
        self._reused = False  # this exchange is not the connection's first
        self._touched = False  # bytes of this exchange's answer have come
        self._whole = False  # this exchange's answer has ended
        self._head = False
        self._keep_alive = False
        self._paused = False
        self._content_type = b""
        self._pieces: list[bytes] = []  # of the body, out of one read
        self.idle_since = 0.0

    # ---- what the gateway does

    def send(self, request: bytes, receiver: Receiver) -> None:
        assert self._transport is not None
        self._receiver = receiver
        self._touched = self._whole = self._head = False
        self._content_type = b""
        self._transport.write(request)

    def release(self, *, answered: bool = False) -> None:
        """The exchange is over for the gateway: back into the pool, or closed if its answer has not ended.

        Closing is what makes the engine stop working on it. `answered`: nothing is missing but the end of the HTTP
        message, which an engine writes apart from a stream's last event.
        """
        self._receiver = None
        pool = self._pool
        pool.open -= 1
        if not self.alive:
            return
        if (self._whole or answered) and self._keep_alive and not pool.closed:
            self.resume()  # the client of the last exchange may have been slow
            self._reused = True
            self.idle_since = time.monotonic()
            pool.idle.append(self)
        else:
            self.close()

    def pause(self) -> None:
        if self._transport is not None and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and self._paused:
            self._paused = False
            self._transport.resume_reading()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    @property
    def alive(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def usable(self) -> bool:
        """An idle connection whose last answer has ended."""
        return self._whole and self.alive

    # ---- what the event loop tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass

    def data_received(self, data: bytes) -> None:
        broken = self._whole  # bytes that nobody asked for: the next answer could be taken for another's
        if not broken:
            self._touched = True
            try:
                self._parser.feed_data(data)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade):
                broken = True
        # An engine sends each event as a chunk of its own; what came in one read goes on in one piece.
        receiver, pieces = self._receiver, self._pieces
        if pieces:
            self._pieces = []
            if receiver is not None:
                receiver.data(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if receiver is not None and self._whole:
            receiver.end()
        if broken:
            self._lose(errors.upstream_error())
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._receiver is None:
            self._pool.forget(self)
        elif self._reused and not self._touched:
            self._lose(StaleConnectionError())
        else:
            self._lose(errors.engine_failed())

    def _lose(self, why: Exception) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is not None and not self._whole:
            receiver.lost(why)

    # ---- what the parser tells

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(name) == 12 and name.lower() == b"content-type":
            self._content_type = value

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._receiver is not None and status >= 200:
            self._head = True
            self._keep_alive = self._parser.should_keep_alive()  # known only now; at the end it is forgotten
            self._receiver.head(status, self._content_type)

    def on_body(self, chunk: bytes) -> None:
        self._pieces.append(chunk)

    def on_message_complete(self) -> None:
        if self._head:  # an interim answer (100, 103) has none
            self._whole = True


class Pool:
    """The connections to one engine."""

    __slots__ = ("_connect", "_head", "closed", "idle", "open")

    def __init__(self, url: str, api_key: str | None, tls: ssl.SSLContext | None) -> None:
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        host, port = parts.hostname or "", parts.port or (443 if secure else 80)
        loop = asyncio.get_running_loop()
        self._connect: Callable[[], object] = lambda: loop.create_connection(
            lambda: Connection(self), host, port, ssl=tls if secure else None
        )
        authority = f"[{host}]" if ":" in host else host
        lines = [f"host: {authority}:{port}", "content-type: application/json", "accept-encoding: identity"]
        if api_key is not None:
            lines.append(f"authorization: Bearer {api_key}")
        self._head = "\r\n".join([" HTTP/1.1", *lines, "content-length: "]).encode()
        self.idle: list[Connection] = []
        self.open = 0  # exchanges that have not been released: this gateway's load on the engine
        self.closed = False

    def request(self, path: str, body: bytes) -> bytes:
        return b"POST %b%b%d\r\n\r\n%b" % (path.encode(), self._head, len(body), body)

    async def acquire(self, *, fresh: bool) -> Connection:
        """An idle connection or a new one; counts as open from now on, until `Connection.release`.

        Raises `Unreachable`. May be cancelled.
        """
        self.open += 1
        if not fresh:
            idle, horizon = self.idle, time.monotonic() - IDLE_MAX
            for i in reversed(range(len(idle))):
                if idle[i].idle_since < horizon:
                    break
                if idle[i].usable:
                    return idle.pop(i)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                _, made = await self._connect()  # type: ignore[misc]
        except (OSError, TimeoutError) as e:
            self.open -= 1
            raise Unreachable(str(e) or "timed out") from None
        except BaseException:
            self.open -= 1
            raise
        return cast(Connection, made)

    def forget(self, connection: Connection) -> None:
        if connection in self.idle:
            self.idle.remove(connection)

    def sweep(self, horizon: float) -> None:
        """Closes the connections that have been idle since before `horizon`."""
        while self.idle and self.idle[0].idle_since < horizon:
            self.idle.pop(0).close()

    def close(self) -> None:
        self.closed = True
        while self.idle:
            self.idle.pop().close()


class _Collected:
    """A receiver that waits for the whole answer."""

    def __init__(self) -> None:
        self.done: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._status = 0
        self._body = b""

    def head(self, status: int, content_type: bytes) -> None:
        self._status = status

    def data(self, chunk: bytes) -> None:
        self._body += chunk

    def end(self) -> None:
        if not self.done.done():
            self.done.set_result((self._status, self._body))

    def lost(self, why: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(why)


class EngineClient:
    """Pools by engine: one for each address and key, so that a restarted engine gets a new one."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._pools: dict[tuple[str, str | None], Pool] = {}
        self._tls = tls

    def pool(self, replica: Replica) -> Pool:
        key = (replica.url, replica.api_key)
        found = self._pools.get(key)
        if found is None:
            if self._tls is None and replica.url.startswith("https:"):
                self._tls = ssl.create_default_context()
            found = self._pools[key] = Pool(replica.url, replica.api_key, self._tls)
        return found

    def open(self, replica: Replica) -> int:
        """Requests that this gateway has open on the replica now."""
        found = self._pools.get((replica.url, replica.api_key))
        return found.open if found is not None else 0

    async def send(self, replica: Replica, path: str, body: bytes, receiver: Receiver, *, fresh: bool) -> Connection:
        """Sends one request; its answer goes to `receiver`. The caller must `release` the connection, whatever happens.

        `fresh`: not on a pooled connection. Raises `Unreachable`. May be cancelled while it connects.
        """
        pool = self.pool(replica)
        connection = await pool.acquire(fresh=fresh)
        connection.send(pool.request(path, body), receiver)
        return connection

    async def ask(self, replica: Replica, path: str, body: bytes) -> tuple[int, bytes]:
        """A small question of the gateway's own: status and whole answer. Raises `Unreachable`, `GatewayError`."""
        for fresh in (False, True):
            collected = _Collected()
            connection = await self.send(replica, path, body, collected, fresh=fresh)
            try:
                return await collected.done
            except StaleConnectionError:
                continue
            finally:
                connection.release()
        raise Unreachable("a fresh connection was closed at once")

    def sweep(self, now: float) -> None:
        """Closes what has been idle for too long, and forgets the pools of engines that are no more in use."""
        for key, pool in list(self._pools.items()):
            pool.sweep(now - IDLE_MAX)
            if not pool.idle and not pool.open:
                del self._pools[key]

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
