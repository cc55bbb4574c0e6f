"""One attempt at one engine: an HTTP/1.1 client on httptools that hands bytes on as they come.

Why our own: the relay is what this project exists for. A general client costs two to three times as much per request
(facts: libraries.md §1) and would hand over each token through a coroutine of its own.

What is written is written afresh: our own request line and headers, one Content-Length, nothing of the client's.
"""

import asyncio
import ssl
from collections.abc import Callable
from time import monotonic
from typing import Final, NamedTuple, Protocol, cast
from urllib.parse import urlsplit

import httptools

from engines.types import Replica
from gateway import errors
from gateway.cork import Cork
from gateway.wire.chunked import Chunks, size_at

CONNECT_TIMEOUT: Final = 5.0  # seconds
MAX_HEAD: Final = 64 * 1024  # bytes
KNOWN_HEADS: Final = 256
UNTIL_CLOSED: Final = 1 << 62  # bytes: no length is given
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


class ReplyHead(NamedTuple):
    """What the head of an engine's answer says."""

    status: int
    content_type: bytes
    keep_alive: bool
    length: int | None  # bytes of the body; None: chunked, or until the connection's end
    chunked: bool


class _HeadReader:
    """Judges one head by llhttp, which is strict about what could be read in two ways."""

    def __init__(self) -> None:
        self._fields: dict[bytes, bytes] = {}
        self._parser = httptools.HttpResponseParser(self)
        self.found: ReplyHead | None = None

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields[name.lower()] = value

    def on_headers_complete(self) -> None:
        status, fields = self._parser.get_status_code(), self._fields
        length = 0 if status in (204, 304) else int(fields[b"content-length"]) if b"content-length" in fields else None
        chunked = length is None and fields.get(b"transfer-encoding", b"").lower() == b"chunked"
        # Whether the connection stays is known only now: llhttp forgets it at the message's end.
        keep_alive = self._parser.should_keep_alive()
        self.found = ReplyHead(status, fields.get(b"content-type", b""), keep_alive, length, chunked)

    def read(self, head: bytes) -> ReplyHead:
        """Raises `ValueError`."""
        try:
            self._parser.feed_data(head)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            raise ValueError from None
        if self.found is None:
            raise ValueError
        return self.found


class Connection:
    """A connection to one engine: idle in its pool, or busy with one exchange. The event loop's protocol for it."""

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._receiver: Receiver | None = None
        self._reused = False  # this exchange is not the connection's first
        self._touched = False  # bytes of this exchange's answer have come
        self._whole = False  # this exchange's answer has ended
        self._keep_alive = False
        self._paused = False
        self._head = b""  # the head, as far as it has come
        self._left: int | None = None  # bytes of the body to come
        self._chunks: Chunks | None = None
        self._between = False  # the next byte begins a chunk
        self.idle_since = 0.0

    # ---- what the gateway does

    def send(self, request: bytes, receiver: Receiver) -> None:
        assert self._transport is not None
        self._receiver = receiver
        self._touched = self._whole = self._between = False
        self._left = self._chunks = None
        self._head = b""
        self._pool.cork.write(self._transport, request)

    def release(self, *, answered: bool = False) -> None:
        """The exchange is over for the gateway: back into the pool, or closed if its answer has not ended.

        Closing is what makes the engine stop working on it. `answered`: nothing is missing but the end of the HTTP
        message, which an engine writes apart from a stream's last event.
        """
        self._receiver = None
        pool = self._pool
        pool.open -= 1
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if (self._whole or answered) and self._keep_alive and not pool.closed:
            if self._paused:  # the client of the last exchange was slow
                self.resume()
            self._reused = True
            self.idle_since = monotonic()
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
    def connected(self) -> bool:
        return self._transport is not None

    @property
    def usable(self) -> bool:
        """An idle connection whose last answer has ended."""
        return self._whole and self._transport is not None and not self._transport.is_closing()

    # ---- what the event loop tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass

    def pause_writing(self) -> None:
        """A request is one write, and what is next waits for its answer."""

    def resume_writing(self) -> None:
        pass

    def data_received(self, data: bytes) -> None:
        if self._between:
            # An engine sends each event as a chunk of its own, and as a rule it comes alone.
            size, start = size_at(data, 0)
            if size > 0 and start + size + 2 == len(data) and data.endswith(b"\r\n"):
                if self._receiver is not None:
                    self._receiver.data(data[start:-2])
                return
        self._touched = True
        try:
            self._read(data)
        except ValueError:
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

    # ---- reading an answer

    def _read(self, data: bytes) -> None:
        """Raises `ValueError` for what is no answer, or more than one: it could be taken for another request's."""
        if self._whole:
            raise ValueError
        chunks = self._chunks
        if self._left is None and chunks is None:
            read = self._read_head(data)
            if read is None:
                return
            data, chunks = read, self._chunks
        surplus = b""
        if chunks is not None:
            data = chunks.feed(data)
            self._between = chunks.between
            if chunks.whole:
                self._whole, surplus = True, chunks.rest
        elif self._left is not None:
            data, surplus = data[: self._left], data[self._left :]
            self._left -= len(data)
            self._whole = self._left == 0
        receiver = self._receiver
        if receiver is not None:
            # What came in one read goes on in one piece.
            if data:
                receiver.data(data)
            if self._whole:
                receiver.end()
        if surplus:
            raise ValueError

    def _read_head(self, data: bytes) -> bytes | None:
        """What follows the answer's head; None while that is not whole. Raises `ValueError`."""
        if self._head:
            data = self._head + data
        while True:
            end = data.find(b"\r\n\r\n") + 4
            if end < 4:
                if len(data) > MAX_HEAD or not data.startswith(b"HTTP/1."[: len(data)]):
                    raise ValueError
                self._head = data
                return None
            head = self._pool.judge(data[:end])
            data = data[end:]
            if head.status >= 200:
                break
        self._head = b""
        self._keep_alive = head.keep_alive
        self._left = head.length
        if head.chunked:
            self._chunks = Chunks()
            self._between = not data
        elif head.length is None:
            self._left = UNTIL_CLOSED
        if self._receiver is not None:
            self._receiver.head(head.status, head.content_type)
        return data


class Pool:
    """The connections to one engine."""

    __slots__ = ("_connect", "_heads", "api_key", "closed", "cork", "head", "idle", "open")

    def __init__(self, url: str, api_key: str | None, tls: ssl.SSLContext | None, cork: Cork) -> None:
        self.cork = cork
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        host, port = parts.hostname or "", parts.port or (443 if secure else 80)
        loop = asyncio.get_running_loop()
        self._connect: Callable[[], object] = lambda: loop.create_connection(
            lambda: cast(asyncio.Protocol, Connection(self)), host, port, ssl=tls if secure else None
        )
        authority = f"[{host}]" if ":" in host else host
        lines = [f"host: {authority}:{port}", "content-type: application/json", "accept-encoding: identity"]
        if api_key is not None:
            lines.append(f"authorization: Bearer {api_key}")
        self.head = "\r\n".join([" HTTP/1.1", *lines, "content-length: "]).encode()
        self._heads: dict[bytes, ReplyHead] = {}
        self.api_key = api_key
        self.idle: list[Connection] = []
        self.open = 0  # exchanges that have not been released: this gateway's load on the engine
        self.closed = False

    def judge(self, head: bytes) -> ReplyHead:
        """What an answer's head says: within a second an engine's heads are much alike. Raises `ValueError`."""
        found = self._heads.get(head)
        if found is None:
            if len(self._heads) > KNOWN_HEADS:
                self._heads.clear()
            found = self._heads[head] = _HeadReader().read(head)
        return found

    def at_hand(self) -> Connection | None:
        """An idle connection, if there is one. It counts as open from now on, until `Connection.release`."""
        idle = self.idle
        horizon = monotonic() - IDLE_MAX
        for i in range(len(idle) - 1, -1, -1):
            one = idle[i]
            if one.idle_since < horizon:
                break
            if one.usable:
                self.open += 1
                del idle[i]
                return one
        return None

    async def connect(self) -> Connection:
        """A new connection; counts as open from now on, until `Connection.release`.

        Raises `Unreachable`. May be cancelled.
        """
        self.open += 1
        try:
            # A task of its own, because `asyncio.timeout` needs one.
            made = await asyncio.get_running_loop().create_task(self._dial())
            if not made.connected:  # an engine that dies closes what it has just accepted
                raise ConnectionResetError("closed at once")
            return made
        except (OSError, TimeoutError) as e:
            self.open -= 1
            raise Unreachable(str(e) or "timed out") from None
        except BaseException:
            self.open -= 1
            raise

    async def _dial(self) -> Connection:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            _, made = await self._connect()  # type: ignore[misc]
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

    def __init__(self, cork: Cork | None = None, tls: ssl.SSLContext | None = None) -> None:
        self._cork = cork or Cork()
        self._pools: dict[str, Pool] = {}  # by URL
        self._tls = tls

    def pool(self, replica: Replica) -> Pool:
        found = self._pools.get(replica.url)
        if found is None or found.api_key != replica.api_key:
            if found is not None:
                found.close()
            if self._tls is None and replica.url.startswith("https:"):
                self._tls = ssl.create_default_context()
            found = self._pools[replica.url] = Pool(replica.url, replica.api_key, self._tls, self._cork)
        return found

    def open(self, replica: Replica) -> int:
        """Requests that this gateway has open on the replica now."""
        found = self._pools.get(replica.url)
        return found.open if found is not None else 0

    async def send(
        self, replica: Replica, path: str, body: bytes, receiver: Receiver, *, fresh: bool = False
    ) -> Connection:
        """Sends one request; its answer goes to `receiver`. The caller must `release` the connection, whatever happens.

        `fresh`: not on a pooled connection. Raises `Unreachable`. May be cancelled while it connects.
        """
        pool = self._pools.get(replica.url)
        if pool is None or pool.api_key != replica.api_key:
            pool = self.pool(replica)
        connection = (None if fresh else pool.at_hand()) or await pool.connect()
        connection.send(b"POST %b%b%d\r\n\r\n%b" % (path.encode(), pool.head, len(body), body), receiver)
        return connection

    async def ask(self, replica: Replica, path: str, body: bytes) -> tuple[int, bytes]:
        """A small question of the gateway's own: status and whole answer. Raises `Unreachable`, `GatewayError`."""
        for fresh in (False, True):
            collected = _Collected()
            connection = await self.send(replica, path, body, collected, fresh=fresh)
            try:
                return await collected.done
            except StaleConnectionError:
                pass
            finally:
                connection.release()
        raise Unreachable("a fresh connection was closed at once")

    def sweep(self, now: float) -> None:
        """Closes what has been idle for too long, and forgets the pools of engines that are no more in use."""
        for url, pool in list(self._pools.items()):
            pool.sweep(now - IDLE_MAX)
            if not pool.idle and not pool.open:
                del self._pools[url]

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
