"""What an engine says of itself over HTTP: health, model card, load, and whether it can generate.

Each function is one question, bounded in time and size, and safe to cancel. What goes wrong is a `ProbeError` with one
line for operators.
"""

import asyncio
import json
import re
import ssl
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from engines.types import Load

CONNECT_TIMEOUT: Final = 2.0
ANSWER_TIMEOUT: Final = 5.0
_LARGEST_BODY: Final = 8 << 20  # /metrics is about 60 KB


class ProbeError(Exception):
    """The engine did not answer, or not as an engine should."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status  # None: no HTTP answer at all


class Address(NamedTuple):
    """Where an engine is asked, and with which key."""

    url: str  # scheme and authority only
    api_key: str | None = None


class Reply(NamedTuple):
    """An HTTP answer."""

    status: int
    body: bytes
    kept: bool  # another question may follow on the same connection


class Gauges(NamedTuple):
    """What is read of an engine's metrics."""

    load: Load
    tokens: float  # prompt + generated tokens since its start: moves while it works


@cache
def _trust() -> ssl.SSLContext:
    """One for all engines: it takes 25 ms to make, and close to a megabyte."""
    return ssl.create_default_context()


class Line:
    """A connection to one engine, kept from one question to the next: to connect costs more than to ask. For one question
    at a time; close it in the end."""

    def __init__(self, at: Address) -> None:
        parts = urlsplit(at.url)
        secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port or (443 if secure else 80)
        self._tls = _trust() if secure else None
        self._head = [f"Host: {parts.netloc}"]
        if at.api_key is not None:
            self._head.append(f"Authorization: Bearer {at.api_key}")
        self._open: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def close(self) -> None:
        """Never blocks; the next question opens it again."""
        if self._open is not None:
            self._open[1].transport.abort()
            self._open = None

    async def ask(
        self, method: str, path: str, *, body: Mapping[str, Any] | None = None, timeout: float = ANSWER_TIMEOUT
    ) -> Reply:
        """Raises `ProbeError`."""
        content = b"" if body is None else json.dumps(body).encode()
        head = [f"{method} {path} HTTP/1.1", *self._head, f"Content-Length: {len(content)}"]
        if body is not None:
            head.append("Content-Type: application/json")
        request = "\r\n".join([*head, "", ""]).encode() + content
        whole = False
        try:
            async with asyncio.timeout(timeout):
                reply = await self._on_kept(request) or await self._on_fresh(request)
            whole = True
        except TimeoutError as error:
            raise ProbeError(f"{'no answer' if self._open else 'no connection'} in time") from error
        except OSError as error:
            raise ProbeError(f"no connection: {error.strerror or error}") from error
        except (EOFError, ValueError, asyncio.LimitOverrunError) as error:
            raise ProbeError("it closed the connection or does not speak HTTP") from error
        finally:
            if not whole:
                self.close()
        if not reply.kept:
            self.close()
        return reply

    async def _on_kept(self, request: bytes) -> Reply | None:
        """None: there is no connection, or the engine had closed it before it read this."""
        if self._open is None:
            return None
        reader, writer = self._open
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
        except (OSError, asyncio.IncompleteReadError) as error:
            if getattr(error, "partial", b""):
                raise
            self.close()
            return None
        return await _read_reply(head, reader)

    async def _on_fresh(self, request: bytes) -> Reply:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            reader, writer = self._open = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        writer.write(request)
        return await _read_reply(await reader.readuntil(b"\r\n\r\n"), reader)


async def health(engine: Line) -> None:
    """Return if the engine says that it is well. Engines without /health are well when they list their models."""
    reply = await engine.ask("GET", "/health")
    if reply.status == 404:
        reply = await engine.ask("GET", "/v1/models")
    if reply.status != 200:
        raise ProbeError(f"its health check says HTTP {reply.status}", reply.status)


async def cards(engine: Line) -> list[Mapping[str, Any]]:
    """The entries of the engine's /v1/models that have a name."""
    reply = await engine.ask("GET", "/v1/models")
    if reply.status != 200:
        raise ProbeError(f"/v1/models says HTTP {reply.status}", reply.status)
    try:
        data = json.loads(reply.body)["data"]
        return [card for card in data if isinstance(card["id"], str)]
    except (ValueError, LookupError, TypeError) as error:
        raise ProbeError("/v1/models is not a list of models", reply.status) from error


class Pick(NamedTuple):
    """Which of an engine's models stands for ours."""

    name: str  # what to ask the engine for
    card: Mapping[str, Any]
    note: str | None  # something an operator should know


def pick_card(cards: Sequence[Mapping[str, Any]], *, model: str, served_model_name: str | None) -> Pick:
    """The card by the configured name, else by the model's own, else the first one. Pure."""
    by_name = {card["id"]: card for card in cards}
    wanted = served_model_name or model
    if wanted in by_name or not by_name:
        return Pick(wanted, by_name.get(wanted, {}), None)
    first = cards[0]
    serves = ", ".join(map(repr, by_name))
    if served_model_name is not None:
        note = f"the engine does not serve {served_model_name!r} (served_model_name), only {serves}"
        return Pick(served_model_name, by_name.get(model, first), note)
    note = f"the engine does not serve {model!r} but {serves}; asking it for {first['id']!r} (see served_model_name)"
    return Pick(first["id"], first, note)


async def gauges(engine: Line) -> Gauges | None:
    """The engine's load, or None when it has no such metrics."""
    reply = await engine.ask("GET", "/metrics")
    return read_gauges(reply.body.decode(errors="replace")) if reply.status == 200 else None


_SAMPLE = re.compile(
    r"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc|prompt_tokens_total|generation_tokens_total)"
    r"(?:\{[^\n]*\})? (\S+)",
    re.MULTILINE,
)


def read_gauges(text: str) -> Gauges | None:
    """Read a Prometheus exposition of vLLM: requests and tokens summed over its engines, cache usage the highest one.
    Pure."""
    values: dict[str, list[float]] = {}
    for name, value in _SAMPLE.findall(text):
        try:
            number = float(value)
        except ValueError:
            continue
        if number == number:  # noqa: PLR0124  NaN is what an unset gauge shows
            values.setdefault(name, []).append(number)
    if "num_requests_running" not in values:
        return None
    return Gauges(
        Load(
            running=int(sum(values["num_requests_running"])),
            waiting=int(sum(values.get("num_requests_waiting", []))),
            kv_cache_usage=max(values.get("kv_cache_usage_perc", [0.0])),
        ),
        tokens=sum(values.get("prompt_tokens_total", [])) + sum(values.get("generation_tokens_total", [])),
    )


# The cheapest request of every kind of engine. Which kind an engine is shows when it has the endpoint.
_TRIALS: Final[Sequence[tuple[str, Mapping[str, Any]]]] = (
    ("/v1/completions", {"prompt": "1", "max_tokens": 1, "temperature": 0}),
    ("/v1/embeddings", {"input": "1"}),
    ("/pooling", {"input": "1"}),
    ("/classify", {"input": "1"}),
    ("/score", {"text_1": "1", "text_2": "1"}),
)


async def trial(engine: Line, model: str, timeout: float) -> str | None:
    """Have the engine do the least work it can: one token, or one short vector. Returns the endpoint that did it, or
    None for an engine that has none of those tried (one for speech, say)."""
    async with asyncio.timeout(timeout):
        for path, body in _TRIALS:
            reply = await engine.ask("POST", path, body={"model": model, **body}, timeout=timeout)
            if reply.status == 200:
                return path
            if reply.status not in {400, 404, 405, 501}:
                raise ProbeError(f"a trial request to {path} got HTTP {reply.status}", reply.status)
    return None


async def _read_reply(head: bytes, reader: asyncio.StreamReader) -> Reply:
    status_line, *lines = head.decode("latin-1").split("\r\n")
    protocol, _, rest = status_line.partition(" ")
    if protocol not in {"HTTP/1.0", "HTTP/1.1"}:
        raise ValueError(protocol)
    status = int(rest[:3])
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    kept = protocol == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
    if "chunked" in headers.get("transfer-encoding", "").lower():
        return Reply(status, await _read_chunks(reader), kept)
    if "content-length" in headers:
        return Reply(status, await reader.readexactly(_bounded(int(headers["content-length"]))), kept)
    return Reply(status, await _read_to_end(reader), kept=False)


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        _bounded(len(body) + size)
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    return bytes(body)


async def _read_to_end(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while data := await reader.read(65536):
        body += data
        _bounded(len(body))
    return bytes(body)


def _bounded(size: int) -> int:
    if not 0 <= size <= _LARGEST_BODY:
        raise ValueError(size)
    return size
