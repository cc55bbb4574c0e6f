"""A look-alike of vLLM 0.32's OpenAI server: a process of its own on real loopback sockets, whose every fault is scripted.

    python tests/fake_engine.py --port 0 --model tiny [--port 0 …] [--model other …] [--api-key K] [--pooling]

Each --port is a replica with its own script and counts; `LISTENING <port>` on stdout tells that it is up. Fields, their
order, null values, framing and error texts are those recorded from a real engine. Tests use the class `FakeEngine`.

An answer is " t0 t1 t2 …", `max_tokens` long (16 by default), unless told otherwise: by a `Behaviour` in the request's
own field "fake", else by the next one of the queue that `POST /fake/script` fills. A prompt is counted in words.
A scripted `text` is made of the bytes of its characters, some ids inside of them, and is streamed as vLLM does it: see
`Detokenizer`.

Control: POST /fake/script [behaviour, …] · GET /fake/stats · POST /fake/reset, /fake/release, /fake/release-all
(at all replicas of the process), /fake/close-idle,
/fake/health {"status": 503}, /fake/load {"running": 3, "waiting": 0, "kv_cache_usage": 0.5}, /fake/wait {"running": 1},
/fake/exit {"code": 1}.
"""

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import functools
import http.client
import itertools
import json
import os
import re
import secrets
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from email.utils import formatdate
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import urlsplit

VERSION = "0.32.0"
FINGERPRINT = f"vllm-{VERSION}-8a9e6f05"
END_OF_TEXT = 2  # the token that ends an answer by itself
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
KEPT = 100  # requests that /fake/stats shows
GUARDED = ("/v1", "/v2", "/inference", "/cohere")  # paths that want the API key, as in vLLM

JSON = dict[str, Any]


# ---- scripted behaviour


@dataclasses.dataclass(slots=True, kw_only=True)
class Behaviour:
    """How one inference request is answered. Counts are tokens: after 5 means before the event that carries the sixth."""

    # what
    tokens: list[str] | None = None  # instead of " t0 t1 …"; if they end before max_tokens, the model has stopped
    text: str | None = None  # the same, for a text whose ids are pieces of its bytes
    usage: JSON | Literal["real"] | None = "real"  # another usage object; None: no usage at all
    ids_per_event: int = 1  # tokens in an event (vLLM's --stream-interval)
    # when
    first_delay: float = 0  # seconds before the first event (a stream's headers are out by then), or the whole answer
    delay: float = 0  # seconds between tokens
    hold: bool = False  # wait for POST /fake/release before the first event
    hold_after: int | None = None  # wait for it in mid-stream
    # how it fails
    accept_then_close: bool = False  # read the request, close without a byte
    cut_after: int | None = None  # close in the middle of the next event; -1: of the very first
    cut_between: bool = False  # … or right before it
    close: Literal["fin", "rst"] = "fin"  # how cuts look to the peer; a killed process sends a FIN
    hang_after: int | None = None  # never another byte; the connection stays
    fates: list[JSON] | None = None  # fields for each attempt at this very answer, in turn: how a request fares that is
    name: str = ""  # … sent to one replica of this process after the other; counted by name
    error_event_after: int | None = None  # vLLM's error event, then [DONE] and a clean end
    error_first: bool = False  # the error event is the first
    status: int | None = None  # answer with this status …
    body: str | None = None  # … and body (default: vLLM's error object)
    content_type: str = "application/json"
    headers: dict[str, str] = dataclasses.field(default_factory=dict)  # further reply headers
    garbage: bool = False  # what should be JSON is none
    raw: str | None = None  # written instead of an HTTP reply, then the connection closes
    no_done: bool = False  # no [DONE] (nor message_stop, nor response.completed)
    no_finish: bool = False  # no finish reason
    # how it looks on the wire
    split: int | None = None  # write so many bytes at a time
    crlf: bool = False  # events end their lines with CRLF
    comments: bool = False  # a comment before each event
    many_per_chunk: int = 1  # events in an HTTP chunk

    @classmethod
    def of(cls, fields: Any) -> "Behaviour":
        """Raises `Refusal` on a misspelt field: a test that scripts nothing would pass for the wrong reason."""
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or (unknown := fields.keys() - names):
            raise Refusal(
                400, f"fake: not an object of known fields: {unknown if isinstance(fields, dict) else fields}"
            )
        return cls(**fields)


class Refusal(Exception):  # noqa: N818 - a verdict, not a fault
    """An answer other than 200, in vLLM's shape."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body: JSON = {"error": {"message": message, "type": kind, "param": param, "code": status}}


def engine_error() -> JSON:
    return Refusal(500, DEAD, "InternalServerError").body


# ---- tokens: a word is a token


class Vocabulary:
    """Words to ids, the same in every process; ids to words for the words that this process has met."""

    def __init__(self) -> None:
        self._words: dict[int, str] = {END_OF_TEXT: ""}

    def id(self, word: str) -> int:
        numbered = re.fullmatch(r" t(\d{1,5})", word)
        made = 10_000 + int(numbered[1]) if numbered else 200_000 + zlib.crc32(word.encode()) % 800_000
        self._words[made] = word
        return made

    def encode(self, text: str) -> list[int]:
        return [self.id(word) for word in re.findall(r"\s*\S+", text)]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self._bytes, ids)).decode(errors="replace")

    def _bytes(self, token: int) -> bytes:
        if token >= PIECES:
            size, value = divmod(token - PIECES, 1 << 24)
            return value.to_bytes(size, "big")
        return (f" t{token - 10_000}" if 10_000 <= token < 110_000 else self._words.get(token, "\ufffd")).encode()


PIECES = 1 << 25  # ids from here on are one to three bytes, of whatever characters


def pieces(text: str) -> list[int]:
    """The ids of a scripted text: as in a byte-level vocabulary, an id may end inside a character or begin there."""
    data, ids, at = text.encode(), [], 0
    while at < len(data):
        size = min(zlib.crc32(data[: at + 3]) % 3 + 1, len(data) - at)
        ids.append(PIECES + (size << 24) + int.from_bytes(data[at : at + size], "big"))
        at += size
    return ids


class Detokenizer:
    """What vLLM's does, its habits included (v1/engine/detokenizer.py): text comes when its last character is whole; a
    prompt that ends inside a character is repeated in the first text; of an answer with stop strings the last characters
    are held back, unless those strings are shown; and no stop string counts that ends within `min_tokens`."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: list[int], asked: JSON) -> None:
        stop = asked.get("stop") or []
        self._decode = decode
        self._stop = [stop] if isinstance(stop, str) else stop
        self._shown = bool(asked.get("include_stop_str_in_output"))
        self._min_tokens = asked.get("min_tokens") or 0
        self._hold = max(map(len, self._stop)) - 1 if self._stop and not self._shown else 0
        self._pending = prompt if decode(prompt).endswith("\ufffd") else []
        self._count = self._sent = 0
        self._text = ""
        self.stopped: str | None = None  # the stop string that was met

    def step(self, token: int) -> None:
        before = len(self._text)
        self._count += 1
        self._pending = [*self._pending, token]
        text = self._decode(self._pending)
        if not text.endswith("\ufffd"):
            self._pending = []
            self._text += text
        if self._count <= self._min_tokens:
            return
        for stop in self._stop:
            at = self._text.find(stop, max(0, before + 1 - len(stop)))
            if at >= 0 and len(self._text) > before:
                self.stopped = stop
                self._text = self._text[: at + len(stop) if self._shown else at]
                return

    def text(self, *, last: bool) -> str:
        """What is new for the client."""
        end = max(self._sent, len(self._text) - (0 if last else self._hold))
        new, self._sent = self._text[self._sent : end], end
        return new


def text_of(content: Any) -> str:
    """The text in a message's content, an Anthropic system prompt, or a Responses input."""
    match content:
        case str():
            return content
        case {"content": inner}:
            return text_of(inner)
        case {"text": str(text)}:
            return text
        case list():
            return " ".join(filter(None, map(text_of, content)))
        case _:
            return ""


# ---- answers: what vLLM writes


class Event(NamedTuple):
    position: float  # tokens sent once this event is out; infinite for what follows the last token
    kind: Literal["open", "token", "usage", "close", "done"]
    data: JSON | str
    name: str | None = None  # of a named event


END = float("inf")


@dataclasses.dataclass(slots=True)
class Answer:
    """One answer to be, whatever the endpoint."""

    model: str
    request: JSON
    prompts: list[list[int]]  # token ids of each prompt; chats have one
    pieces: list[tuple[str, list[int]]]  # text and token ids of each event
    finish: Literal["stop", "length"] | None
    behaviour: Behaviour
    stop_reason: str | None = None
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)

    @property
    def ids(self) -> list[int]:
        return [i for _, ids in self.pieces for i in ids]

    @property
    def choices(self) -> int:
        return len(self.prompts) * int(self.request.get("n") or 1)

    @property
    def wants_ids(self) -> bool:
        return self.request.get("return_token_ids") is True

    def option(self, name: str) -> bool:
        return (self.request.get("stream_options") or {}).get(name) is True

    def counts(self, completion: int) -> tuple[int, int]:
        return sum(map(len, self.prompts)), completion

    def usage(self, completion: int, **details: None) -> JSON | None:
        if self.behaviour.usage != "real":
            return self.behaviour.usage
        prompt, completion = self.counts(completion)
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            "completion_tokens": completion,
            **details,
        }

    def final_usage(self, **details: None) -> JSON | None:
        return self.usage(len(self.ids) * self.choices, **details)


def openai_events(a: Answer, *, chat: bool) -> Iterator[Event]:
    """A stream of /v1/chat/completions or /v1/completions."""
    include, continuous = a.option("include_usage"), a.option("include_usage") and a.option("continuous_usage_stats")
    head = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{a.id}",
        "object": "chat.completion.chunk" if chat else "text_completion",
        "created": a.created,
        "model": a.model,
    }

    def so_far(completion: int) -> JSON:
        usage = a.usage(completion, **({"completion_tokens_details": None} if chat else {}))
        return {"usage": usage} if continuous and usage is not None else {}

    if chat:
        ids = {"prompt_token_ids": a.prompts[0] if a.wants_ids else None, "prompt_text": None}
        for index in range(a.choices):
            delta = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            yield Event(0, "open", {**head, "choices": [choice], **so_far(0), **ids})
    position = 0
    for number, (text, token_ids) in enumerate(a.pieces):
        position += len(token_ids)
        finish = a.finish if number == len(a.pieces) - 1 else None
        for index in range(a.choices):
            ids_of_prompt = a.prompts[index % len(a.prompts)] if a.wants_ids and number == 0 else None
            choice = {
                "index": index,
                **({"delta": {"content": text}} if chat else {"text": text}),
                "logprobs": None,
                "finish_reason": finish,
                **({} if chat and finish is None else {"stop_reason": a.stop_reason if finish else None}),
                **({} if chat else {"prompt_token_ids": ids_of_prompt}),
                "token_ids": token_ids if a.wants_ids else None,
            }
            last = {"system_fingerprint": FINGERPRINT} if finish is not None and not include else {}
            yield Event(position, "token", {**head, "choices": [choice], **so_far(position), **last})
    usage = a.final_usage()
    if include and usage is not None:
        yield Event(END, "usage", {**head, "choices": [], "usage": usage, "system_fingerprint": FINGERPRINT})
    yield Event(END, "done", "[DONE]")


def openai_whole(a: Answer, *, chat: bool) -> JSON:
    def choice(index: int) -> JSON:
        rest = {
            "logprobs": None,
            "finish_reason": a.finish,
            "stop_reason": a.stop_reason,
            "token_ids": a.ids if a.wants_ids else None,
        }
        if chat:
            nothing = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning"))
            message = {"role": "assistant", "content": a.text, **nothing}
            return {"index": index, "message": message, **rest, "routed_experts": None}
        prompt = a.prompts[index % len(a.prompts)] if a.wants_ids else None
        return {
            "index": index,
            "text": a.text,
            **rest,
            "prompt_logprobs": None,
            "prompt_token_ids": prompt,
            "routed_experts": None,
        }

    usage = a.final_usage(prompt_tokens_details=None, completion_tokens_details=None)
    prompt_ids = a.prompts[0] if a.wants_ids else None
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{a.id}",
        "object": "chat.completion" if chat else "text_completion",
        "created": a.created,
        "model": a.model,
        "choices": [choice(index) for index in range(a.choices)],
        "service_tier": None,
        "system_fingerprint": FINGERPRINT,
        "usage": usage,
        **({"prompt_logprobs": None, "prompt_token_ids": prompt_ids, "prompt_text": None} if chat else {}),
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def _anthropic_usage(a: Answer, completion: int) -> JSON:
    if a.behaviour.usage != "real":
        return {} if a.behaviour.usage is None else {"usage": a.behaviour.usage}
    prompt, completion = a.counts(completion)
    return {"usage": {"input_tokens": prompt, "output_tokens": completion}}


_STOP_REASON = {"stop": "end_turn", "length": "max_tokens", None: None}


def message_events(a: Answer) -> Iterator[Event]:
    """A stream of /v1/messages."""

    def event(
        position: float, kind: Literal["open", "token", "usage", "close", "done"], name: str, **data: Any
    ) -> Event:
        return Event(position, kind, {"type": name, **data}, name)

    message = {
        "id": f"chatcmpl-{a.id}",
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": a.model,
        "stop_reason": None,
        "stop_sequence": None,
        **_anthropic_usage(a, 0),
    }
    yield event(0, "open", "message_start", message=message)
    yield event(0, "open", "content_block_start", content_block={"type": "text", "text": ""}, index=0)
    position = 0
    for text, ids in a.pieces:
        position += len(ids)
        if text:
            delta = {"type": "text_delta", "text": text}
            yield event(position, "token", "content_block_delta", delta=delta, index=0)
    yield event(END, "close", "content_block_stop", index=0)
    stop = {"stop_reason": _STOP_REASON[a.finish], "stop_sequence": None}
    yield event(END, "usage", "message_delta", delta=stop, **_anthropic_usage(a, len(a.ids)))
    yield event(END, "done", "message_stop")


def message_whole(a: Answer) -> JSON:
    return {
        "id": f"chatcmpl-{a.id}",
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": a.text}],
        "model": a.model,
        "stop_reason": _STOP_REASON[a.finish],
        **_anthropic_usage(a, len(a.ids)),
    }


def _response(a: Answer, status: str, output: list[JSON], usage: JSON | None) -> JSON:
    asked = a.request
    return {
        "id": f"resp_{a.id}",
        "created_at": a.created,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": asked.get("instructions"),
        "metadata": asked.get("metadata"),
        "model": a.model,
        "object": "response",
        "output": output,
        "parallel_tool_calls": True,
        "temperature": float(asked.get("temperature") or 0),
        "tool_choice": "none",
        "tools": [],
        "top_p": 1.0,
        "background": False,
        "max_output_tokens": asked.get("max_output_tokens"),
        "max_tool_calls": None,
        "previous_response_id": None,
        "prompt": None,
        "reasoning": None,
        "service_tier": "auto",
        "status": status,
        "text": None,
        "top_logprobs": None,
        "truncation": "disabled",
        "usage": usage,
        "user": asked.get("user"),
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "input_messages": None,
        "output_messages": None,
    }


def _message_item(a: Answer) -> JSON:
    part: JSON = {"annotations": [], "text": a.text, "type": "output_text", "logprobs": None}
    return {
        "id": f"msg_{a.id}",
        "content": [part],
        "role": "assistant",
        "status": "completed",
        "type": "message",
        "phase": None,
    }


def response_whole(a: Answer) -> JSON:
    if a.behaviour.usage != "real":
        usage = a.behaviour.usage
    else:
        prompt, completion = a.counts(len(a.ids))
        usage = {
            "input_tokens": prompt,
            "input_tokens_details": {
                "cached_tokens": 0,
                "cache_write_tokens": 0,
                "input_tokens_per_turn": [],
                "cached_tokens_per_turn": [],
            },
            "output_tokens": completion,
            "output_tokens_details": {
                "reasoning_tokens": 0,
                "tool_output_tokens": 0,
                "output_tokens_per_turn": [],
                "tool_output_tokens_per_turn": [],
            },
            "total_tokens": prompt + completion,
        }
    status = {"length": "incomplete", "stop": "completed", None: "in_progress"}[a.finish]
    return _response(a, status, [_message_item(a)], usage)


def response_events(a: Answer) -> Iterator[Event]:
    """A stream of /v1/responses."""
    numbers = itertools.count()
    item_id = f"msg_{a.id}"
    kinds: dict[str, Literal["open", "token", "done"]] = {
        "response.output_text.delta": "token",
        "response.completed": "done",
    }

    def event(position: float, name: str, **data: Any) -> Event:
        fields = dict(sorted({**data, "sequence_number": next(numbers), "type": name}.items()))
        return Event(position, kinds.get(name, "open" if position == 0 else "close"), fields, name)

    for name in ("response.created", "response.in_progress"):
        yield event(0, name, response=_response(a, "in_progress", [], None))
    item: JSON = {
        "id": item_id,
        "content": [],
        "role": "assistant",
        "status": "in_progress",
        "type": "message",
        "phase": None,
    }
    yield event(0, "response.output_item.added", item=item, output_index=0)
    at: JSON = {"content_index": 0, "item_id": item_id, "output_index": 0}
    empty = {"annotations": [], "text": "", "type": "output_text", "logprobs": []}
    yield event(0, "response.content_part.added", **at, part=empty)
    position = 0
    for text, ids in a.pieces:
        position += len(ids)
        if text:
            yield event(position, "response.output_text.delta", **at, delta=text, logprobs=[])
    yield event(END, "response.output_text.done", **at, text=a.text, logprobs=[])
    whole = _message_item(a)
    yield event(END, "response.content_part.done", **at, part=whole["content"][0])
    yield event(END, "response.output_item.done", item=whole, output_index=0)
    yield event(END, "response.completed", response=response_whole(a))


def vector(text: str, size: int) -> list[float]:
    """A unit-like embedding that depends on the text only; its numbers are float32, as an engine's."""
    raw = (zlib.crc32(f"{i}:{text}".encode()) / 2**32 - 0.5 for i in range(size))
    return list(struct.unpack(f"<{size}f", struct.pack(f"<{size}f", *raw)))


def similarity(a: str, b: str) -> float:
    return zlib.crc32(f"{a}\0{b}".encode()) / 2**32


def dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def sse(event: Event, b: Behaviour) -> bytes:
    # vLLM writes its error events with json.dumps' own blanks
    if isinstance(event.data, dict) and event.name is None and "error" in event.data:
        data = json.dumps(event.data).encode()
    else:
        data = event.data.encode() if isinstance(event.data, str) else dumps(event.data)
    if b.garbage and isinstance(event.data, dict):
        data = b'{"choices":[{"index":0,"delta":{"content":'
    lines = (f"event: {event.name}\n".encode() if event.name else b"") + b"data: " + data + b"\n\n"
    if b.comments:
        lines = b": keep-alive\n\n" + lines
    return lines.replace(b"\n", b"\r\n") if b.crlf else lines


# ---- HTTP


class Request(NamedTuple):
    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name), None)


def parse(data: bytearray) -> tuple[Request, int] | None:
    """The first request in `data` and its length, if it is whole."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    first, *lines = data[:end].decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    request = Request(method, target.partition("?")[0], headers, b"")
    if "chunked" in (request.header("transfer-encoding") or ""):
        body, taken = _dechunk(data, end + 4)
        return (request._replace(body=body), taken) if taken else None
    taken = end + 4 + int(request.header("content-length") or 0)
    return (request._replace(body=bytes(data[end + 4 : taken])), taken) if taken <= len(data) else None


def _dechunk(data: bytearray, at: int) -> tuple[bytes, int]:
    """The body and where it ends; (…, 0) while it is not all there."""
    body = bytearray()
    while (line_end := data.find(b"\r\n", at)) >= 0:
        size = int(data[at:line_end].partition(b";")[0], 16)
        at = line_end + 2 + size + 2
        if at > len(data):
            break
        body += data[line_end + 2 : at - 2]
        if size == 0:
            return bytes(body), at
    return b"", 0


class Connection(asyncio.Protocol):
    """One request at a time, in a task that is cancelled the moment the client leaves."""

    def __init__(self, replica: "Replica") -> None:
        self.replica = replica
        self.task: asyncio.Task[None] | None = None
        self._data = bytearray()
        self._close_after = False
        self._writable = asyncio.Event()
        self._writable.set()
        self._idle: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.replica.connections.add(self)
        self._wait_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        self.replica.connections.discard(self)
        self._writable.set()
        if self._idle is not None:
            self._idle.cancel()
        if self.task is not None:
            self.task.cancel()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        self._data += data
        self._next()

    def _next(self) -> None:
        if self.task is not None or self.transport.is_closing() or (found := parse(self._data)) is None:
            return
        request, taken = found
        del self._data[:taken]
        self._close_after = (request.header("connection") or "").lower() == "close"
        if self._idle is not None:
            self._idle.cancel()
        self.task = asyncio.create_task(self.replica.serve(self, request))
        self.task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self.task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            traceback.print_exception(error)
            self.transport.abort()
        if self.transport.is_closing():
            return
        if self._close_after:
            self.transport.close()
        else:
            self._wait_idle()
            self._next()

    def _wait_idle(self) -> None:
        if (seconds := self.replica.settings.close_idle) is not None:
            self._idle = asyncio.get_running_loop().call_later(seconds, self.transport.close)

    async def write(self, data: bytes, split: int | None = None) -> None:
        """Never suspends after the last byte, unless the peer does not read: who has all of it may leave at once."""
        pieces = [data[at : at + split] for at in range(0, len(data), split)] if split else [data]
        for number, piece in enumerate(pieces):
            if number:
                await asyncio.sleep(0)
            self.transport.write(piece)
        if self.transport.is_closing():
            await asyncio.sleep(0)  # the loop has not yet had its turn to tell that the peer is gone
        if not self._writable.is_set():
            await self._writable.wait()

    def head(self, status: int, *headers: tuple[str, str], vary: bool = True, chunked: bool = False) -> bytes:
        """As uvicorn writes it, down to the order."""
        lines = [
            f"HTTP/1.1 {status} {http.client.responses.get(status, 'Unknown')}",
            f"date: {formatdate(usegmt=True)}",
            "server: uvicorn",
            *(f"{name}: {value}" for name, value in headers),
            *(["vary: Origin"] if vary else []),
            *(["connection: close"] if self._close_after else []),
            *(["transfer-encoding: chunked"] if chunked else []),
        ]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"

    async def reply(self, status: int, body: Any = None, *headers: tuple[str, str], **how: Any) -> None:
        """A whole reply; `body` is JSON unless bytes (with their content-type among `headers`)."""
        kind = () if body is None or isinstance(body, bytes) else (("content-type", "application/json"),)
        data = b"" if body is None else body if isinstance(body, bytes) else dumps(body)
        await self.write(self.head(status, ("content-length", str(len(data))), *kind, *headers, **how) + data)

    def cut(self, how: Literal["fin", "rst"]) -> None:
        if how == "fin":
            self.transport.close()
            return
        sock = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


# ---- endpoints: requests to answers


def generation_limit(asked: JSON, limit: str, max_model_len: int) -> int:
    """How many tokens are asked for, judged as vLLM judges it."""
    value = asked.get("max_completion_tokens") if limit == "max_tokens" else None
    value = asked.get(limit) if value is None else value
    if value is None:
        return 16
    if not isinstance(value, int) or isinstance(value, bool):
        raise invalid(
            "int_parsing", limit, "Input should be a valid integer, unable to parse string as an integer", value
        )
    if value < 1:
        text = f"{limit} must be at least 1, got {value}. (parameter={limit}, value={value})"
        raise Refusal(400, text, param=limit)
    if value > max_model_len:
        text = (
            f"{limit}={value} cannot be greater than max_model_len={max_model_len}. Please request fewer output tokens."
        )
        raise Refusal(400, f"{text} (parameter={limit}, value={value})", param=limit)
    return value


def invalid(kind: str, field: str, message: str, value: Any) -> Refusal:
    """A pydantic fault, as vLLM passes it on."""
    shown = f"<dict of {len(value)} items>" if isinstance(value, dict) else value
    fault = {"type": kind, "loc": f"body.{field}", "msg": message, "input": shown}
    return Refusal(400, f"1 validation error:\n  {fault}", "Bad Request", f"body.{field}")


def required(asked: JSON, field: str) -> Any:
    if field not in asked:
        raise invalid("missing", field, "Field required", asked)
    return asked[field]


class Generation(NamedTuple):
    """An endpoint that generates text."""

    events: Callable[[Answer], Iterator[Event]]
    whole: Callable[[Answer], JSON]
    limit: str  # the field that bounds the answer
    prompts: Callable[[JSON], list[Any]]  # each a text or a list of ids


def completion_prompts(asked: JSON) -> list[Any]:
    prompt = asked.get("prompt")
    if not prompt:
        text = "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)"
        raise Refusal(400, text, param="prompt")
    return list(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def chat_prompts(asked: JSON) -> list[Any]:
    return [text_of([asked.get("system"), *required(asked, "messages")])]


GENERATION = {
    "/v1/chat/completions": Generation(
        lambda a: openai_events(a, chat=True), lambda a: openai_whole(a, chat=True), "max_tokens", chat_prompts
    ),
    "/v1/completions": Generation(
        lambda a: openai_events(a, chat=False), lambda a: openai_whole(a, chat=False), "max_tokens", completion_prompts
    ),
    "/v1/messages": Generation(message_events, message_whole, "max_tokens", chat_prompts),
    "/v1/responses": Generation(
        response_events, response_whole, "max_output_tokens", lambda asked: [text_of(required(asked, "input"))]
    ),
}


class Texts:
    """The endpoints that answer at once: pooling, tokens."""

    def __init__(self, vocabulary: Vocabulary, max_model_len: int) -> None:
        self._vocabulary = vocabulary
        self._max_model_len = max_model_len

    def _ids(self, prompt: Any) -> list[int]:
        return prompt if isinstance(prompt, list) else self._vocabulary.encode(prompt)

    def _usage(self, *prompts: Any) -> JSON:
        count = sum(len(self._ids(prompt)) for prompt in prompts)
        nothing = {"completion_tokens": 0, "prompt_tokens_details": None, "completion_tokens_details": None}
        return {"prompt_tokens": count, "total_tokens": count, **nothing}

    def _list(self, kind: str, model: str, data: list[JSON], usage: JSON) -> JSON:
        head = {"id": f"{kind}-{secrets.token_hex(8)}", "object": "list", "created": int(time.time()), "model": model}
        return {**head, "data": data, "usage": usage}

    def embeddings(self, model: str, asked: JSON) -> JSON:
        given = required(asked, "input")
        inputs = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        data: list[JSON] = []
        for index, text in enumerate(inputs):
            numbers = vector(str(text), asked.get("dimensions") or 8)
            packed = base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
            embedding = packed if asked.get("encoding_format") == "base64" else numbers
            data.append({"index": index, "object": "embedding", "embedding": embedding})
        return self._list("embd", model, data, self._usage(*inputs))

    def rerank(self, model: str, asked: JSON) -> JSON:
        query = required(asked, "query")
        texts = [text_of(document) for document in required(asked, "documents")]
        ranked = sorted(((similarity(query, text), index) for index, text in enumerate(texts)), reverse=True)
        usage = self._usage(*(word for text in texts for word in (query, text)))
        return {
            "id": f"score-{secrets.token_hex(8)}",
            "model": model,
            "usage": {name: usage[name] for name in ("prompt_tokens", "total_tokens")},
            "results": [
                {"index": index, "document": {"text": texts[index], "multi_modal": None}, "relevance_score": score}
                for score, index in ranked[: asked.get("top_n") or None]
            ],
        }

    def score(self, model: str, asked: JSON) -> JSON:
        first, second = asked.get("text_1", asked.get("queries")), asked.get("text_2", asked.get("documents"))
        rights = second if isinstance(second, list) else [second]
        lefts = first if isinstance(first, list) else [first] * len(rights)
        pairs = [(text_of(a), text_of(b)) for a, b in zip(lefts, rights, strict=True)]
        data = [{"index": i, "object": "score", "score": similarity(*pair)} for i, pair in enumerate(pairs)]
        return self._list("score", model, data, self._usage(*(text for pair in pairs for text in pair)))

    def classify(self, model: str, asked: JSON) -> JSON:
        given = required(asked, "input")
        inputs = given if isinstance(given, list) else [given]
        data: list[JSON] = []
        for index, text in enumerate(inputs):
            yes = similarity(text, "yes")
            label = "yes" if yes > 0.5 else "no"
            data.append({"index": index, "label": label, "probs": [1 - yes, yes], "num_classes": 2})
        return self._list("classify", model, data, self._usage(*inputs))

    def count_tokens(self, _model: str, asked: JSON) -> JSON:
        count = len(self._ids(chat_prompts(asked)[0]))
        return {"input_tokens": count, "context_management": {"original_input_tokens": count}}

    def tokenize(self, _model: str, asked: JSON) -> JSON:
        tokens = self._ids(chat_prompts(asked)[0] if "messages" in asked else required(asked, "prompt"))
        words = [self._vocabulary.decode([token]) for token in tokens] if asked.get("return_token_strs") else None
        return {"count": len(tokens), "max_model_len": self._max_model_len, "tokens": tokens, "token_strs": words}

    def detokenize(self, _model: str, asked: JSON) -> JSON:
        return {"prompt": self._vocabulary.decode(required(asked, "tokens"))}


# ---- the server


def said_already(prompt: list[int], ids: list[int]) -> int:
    """How many of an answer's ids a prompt of ids ends with: it goes on from there, as a greedy model would."""
    return next((n for n in range(min(len(ids), len(prompt)), 0, -1) if prompt[-n:] == ids[:n]), 0)


class Settings(NamedTuple):
    models: list[str]
    api_key: str | None
    pooling: bool
    max_model_len: int
    close_idle: float | None
    slots: int | None = None


class Gone(Exception):  # noqa: N818 - a turn of the script, not a fault
    """The script has had the connection closed before the answer's end."""


class Replica:
    """What listens on one port."""

    def __init__(
        self, settings: Settings, vocabulary: Vocabulary, attempts: Counter[str], replicas: "list[Replica]"
    ) -> None:
        self.settings = settings
        self._replicas = replicas  # of the process
        self._attempts = attempts  # by name, at any replica of the process
        self.connections: set[Connection] = set()
        self._vocabulary = vocabulary
        self._changed = asyncio.Event()
        self._released = asyncio.Event()
        texts = Texts(vocabulary, settings.max_model_len)
        self._texts: dict[str, Callable[[str, JSON], JSON]] = {
            "/tokenize": texts.tokenize,
            "/detokenize": texts.detokenize,
        }
        self._generation: dict[str, Generation] = {}
        if settings.pooling:
            self._texts |= {
                "/v1/embeddings": texts.embeddings,
                "/v1/rerank": texts.rerank,
                "/v2/rerank": texts.rerank,
                "/rerank": texts.rerank,
                "/v1/score": texts.score,
                "/score": texts.score,
                "/classify": texts.classify,
            }
        else:
            self._texts["/v1/messages/count_tokens"] = texts.count_tokens
            self._generation = GENERATION
        self._pages: dict[str, Callable[[Connection], Any]] = {
            "/health": lambda c: c.reply(self._health),
            "/ping": lambda c: c.reply(self._health),
            "/version": lambda c: c.reply(200, {"version": VERSION}),
            "/v1/models": lambda c: c.reply(200, self._models()),
            "/metrics": self._metrics,
            "/fake/stats": lambda c: c.reply(200, self._stats()),
        }
        self._control: dict[str, Callable[[Any], Any]] = {
            "/fake/script": lambda script: self._script.extend(map(Behaviour.of, script)),
            "/fake/reset": lambda _: self._reset(),
            "/fake/release": lambda _: self._release(),
            "/fake/release-all": lambda _: self._release_all(),
            "/fake/health": lambda wanted: setattr(self, "_health", wanted["status"]),
            "/fake/load": lambda load: setattr(self, "_load", load or {}),
            "/fake/close-idle": lambda _: self._close_idle(),
            "/fake/exit": lambda wanted: os._exit((wanted or {}).get("code", 0)),
        }
        self._slots = asyncio.Semaphore(settings.slots) if settings.slots else contextlib.nullcontext()
        self.counts = {"running": 0, "holding": 0}
        self._reset()

    def _reset(self) -> None:
        """Forgets everything but the requests that are running."""
        counted = ("requests", "streams", "finished", "cut", "disconnects", "prompt_tokens", "completion_tokens")
        self.counts |= dict.fromkeys(counted, 0)
        self._departures: list[JSON] = []
        self._last: deque[JSON] = deque(maxlen=KEPT)
        self._script: deque[Behaviour] = deque()
        self._health = 200
        self._load: JSON = {}  # what /metrics shall say instead of the truth

    def _count(self, **more: int) -> None:
        for name, n in more.items():
            self.counts[name] += n
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait(self, wanted: dict[str, int]) -> None:
        """Until `running` and `holding` are what is wanted, and all other counts at least that."""
        while not all(
            self.counts[name] == n if name in ("running", "holding") else self.counts[name] >= n
            for name, n in wanted.items()
        ):
            await self._changed.wait()

    async def _hold(self) -> None:
        self._count(holding=1)
        try:
            await self._released.wait()
        finally:
            self._count(holding=-1)

    def _release(self) -> None:
        self._released.set()
        self._released = asyncio.Event()

    def _release_all(self) -> None:
        for replica in self._replicas:
            replica._release()

    def _close_idle(self) -> None:
        for connection in list(self.connections):
            if connection.task is None:
                connection.transport.close()

    # -- pages

    def _models(self) -> JSON:
        def card(model: str) -> JSON:
            permission = {
                "id": f"modelperm-{secrets.token_hex(8)}",
                "object": "model_permission",
                "created": int(time.time()),
                "allow_create_engine": False,
                "allow_sampling": True,
                "allow_logprobs": True,
                "allow_search_indices": False,
                "allow_view": True,
                "allow_fine_tuning": False,
                "organization": "*",
                "group": None,
                "is_blocking": False,
            }
            return {
                "id": model,
                "object": "model",
                "created": int(time.time()),
                "owned_by": "vllm",
                "root": f"models/{model}",
                "parent": None,
                "max_model_len": self.settings.max_model_len,
                "permission": [permission],
            }

        return {"object": "list", "data": [card(model) for model in self.settings.models]}

    async def _metrics(self, connection: "Connection") -> None:
        truth = {
            "running": self.counts["running"] - self.counts["holding"],
            "waiting": self.counts["holding"],
            "kv_cache_usage": self.counts["running"] / 256,
        }
        load = {**truth, **self._load}
        lines: list[str] = []
        for name, kind, value in (
            ("num_requests_running", "gauge", load["running"]),
            ("num_requests_waiting", "gauge", load["waiting"]),
            ("kv_cache_usage_perc", "gauge", load["kv_cache_usage"]),
            ("prefix_cache_queries_total", "counter", self.counts["prompt_tokens"]),
            ("prefix_cache_hits_total", "counter", 0),
            ("num_preemptions_total", "counter", 0),
            ("prompt_tokens_total", "counter", self.counts["prompt_tokens"]),
            ("generation_tokens_total", "counter", self.counts["completion_tokens"]),
        ):
            lines += [f"# HELP vllm:{name} As vLLM has it.", f"# TYPE vllm:{name} {kind}"]
            lines += [f'vllm:{name}{{engine="0",model_name="{self.settings.models[0]}"}} {float(value)}']
        body = "\n".join([*lines, ""]).encode()
        await connection.reply(200, body, ("content-type", "text/plain; version=1.0.0; charset=utf-8"))

    def _stats(self) -> JSON:
        idle = sum(c.task is None for c in self.connections)
        return {
            **self.counts,
            "connections": len(self.connections) - 1,  # but for the one that asks
            "idle_connections": idle,
            "scripted": len(self._script),
            "departures": self._departures,
            "last": list(self._last),
        }

    # -- requests

    async def serve(self, connection: "Connection", request: Request) -> None:
        path = request.path
        if self.settings.api_key is not None and path.startswith(GUARDED):
            scheme, _, key = (request.header("authorization") or "").partition(" ")
            if scheme.lower() != "bearer" or key != self.settings.api_key:
                await connection.reply(401, {"error": "Unauthorized"}, vary=False)
                return
        if path in self._pages:
            await self._only("GET", connection, request, lambda: self._pages[path](connection))
        elif path.startswith("/fake/"):
            await self._serve_control(connection, request)
        elif path in self._texts or path in self._generation:
            await self._only("POST", connection, request, lambda: self._infer(connection, request))
        else:
            await connection.reply(404, {"detail": "Not Found"})

    async def _only(self, method: str, connection: "Connection", request: Request, answer: Callable[[], Any]) -> None:
        if request.method == method:
            await answer()
        else:
            await connection.reply(405, {"detail": "Method Not Allowed"}, ("allow", method))

    async def _serve_control(self, connection: "Connection", request: Request) -> None:
        asked = json.loads(request.body or b"null")
        try:
            if request.path == "/fake/wait":
                await self._wait(asked)
            else:
                self._control[request.path](asked)
        except (KeyError, Refusal) as error:
            await connection.reply(400, {"detail": repr(error)})
        else:
            await connection.reply(200, {})

    async def _infer(self, connection: "Connection", request: Request) -> None:
        progress: JSON = {"path": request.path, "tokens": 0}
        begun = time.monotonic()
        self._count(requests=1, running=1)
        try:
            await self._answer(connection, request, progress)
            self._count(finished=1)
        except Refusal as refusal:
            error = refusal.body["error"]
            if request.path.startswith("/v1/messages") and error["type"] != "Bad Request":
                inner = {"type": error["type"], "message": error["message"]}
                await connection.reply(refusal.status, {"type": "error", "error": inner})
            else:
                await connection.reply(refusal.status, refusal.body)
        except Gone:
            self._count(cut=1)
        except asyncio.CancelledError:
            now = time.monotonic()
            self._departures.append({**progress, "noticed": now, "after": now - begun})
            self._count(disconnects=1)
            raise
        finally:
            self._count(running=-1)

    async def _answer(self, connection: "Connection", request: Request, progress: JSON) -> None:
        asked = self._record(request)
        progress["user"] = asked.get("user")
        # A gateway that takes up a stream asks what ids say; that is not the request that was scripted.
        scripted = self._script.popleft() if self._script and request.path != "/detokenize" else Behaviour()
        b = self._behaviour(asked["fake"]) if "fake" in asked else scripted
        if b.accept_then_close:
            connection.cut(b.close)
            raise Gone
        if b.raw is not None:
            await connection.write(b.raw.encode(), b.split)
            connection.cut(b.close)
            raise Gone
        if b.status is not None:
            await self._begin(b)
            body = b.body.encode() if b.body is not None else dumps(Refusal(b.status, "scripted").body)
            await connection.reply(b.status, body, ("content-type", b.content_type), *b.headers.items())
            return
        model = self._model(asked, request.path)
        if (text := self._texts.get(request.path)) is not None:
            await self._whole(connection, text(model, asked), b)
            return
        endpoint = self._generation[request.path]
        answer = self._plan(endpoint, model, asked, b)
        self._count(prompt_tokens=sum(map(len, answer.prompts)))
        if asked.get("stream") is True:
            self._count(streams=1)
            async with self._slots:
                await self._stream(connection, endpoint.events(answer), b, progress, request.path)
        else:
            async with self._slots:
                await self._whole(connection, endpoint.whole(answer), b, len(answer.ids))
            self._count(completion_tokens=len(answer.ids))

    def _behaviour(self, fields: Any) -> Behaviour:
        b = Behaviour.of(fields)
        if b.fates is None:
            return b
        self._attempts[b.name] += 1
        fate = b.fates[self._attempts[b.name] - 1] if self._attempts[b.name] <= len(b.fates) else {}
        return Behaviour.of({**fields, **fate})

    def _record(self, request: Request) -> JSON:
        """The body as JSON; it is kept for /fake/stats, good or bad."""
        seen: JSON = {
            "path": request.path,
            "headers": request.headers,
            "body": base64.b64encode(request.body).decode(),
            "json": None,
        }
        self._last.append(seen)
        try:
            asked = json.loads(request.body.decode())
        except ValueError:
            fault = {"type": "json_invalid", "loc": "body.0", "msg": "JSON decode error", "input": "<dict of 0 items>"}
            raise Refusal(400, f"1 validation error:\n  {fault}", "Bad Request", "body.0") from None
        if not isinstance(asked, dict):
            text = "Input should be a valid dictionary or object to extract fields from"
            fault = {
                "type": "model_attributes_type",
                "loc": "body",
                "msg": text,
                "input": f"<list of {len(asked)} items>",
            }
            raise Refusal(400, f"1 validation error:\n  {fault}", "Bad Request", "body")
        seen["json"] = asked
        return asked

    def _model(self, asked: JSON, path: str) -> str:
        models = self.settings.models
        model = asked.get("model", models[0])
        if model in models:
            return str(model)
        if self.settings.pooling and path != "/tokenize":
            raise Refusal(404, f"The model `{model}` does not exist.", "NotFoundError")
        text = f"The model `{model}` does not exist. Valid aliases: {', '.join(models)}."
        raise Refusal(404, text, "NotFoundError", "model")

    def _plan(self, endpoint: Generation, model: str, asked: JSON, b: Behaviour) -> Answer:
        most = generation_limit(asked, endpoint.limit, self.settings.max_model_len)
        given = (asked.get("kv_transfer_params") or {}).get("prompt_token_ids")
        asked_for = [given] if given is not None else endpoint.prompts(asked)
        prompts = [p if isinstance(p, list) else self._vocabulary.encode(p) for p in asked_for]
        room = self.settings.max_model_len - max(map(len, prompts))
        if room < 1:
            count = self.settings.max_model_len + 1
            text = (
                f"This model's maximum context length is {count - 1} tokens. However, your prompt contains at least {count} "
                "input tokens, which exceeds this limit even without any output tokens. Please reduce the length of the "
                f"input prompt. (parameter=input_tokens, value={count})"
            )
            raise Refusal(400, text, param="input_tokens")
        if b.text is not None:
            return self._spoken(b.text, model, asked, prompts, min(most, room), b)
        words = b.tokens if b.tokens is not None else [f" t{i}" for i in range(most + len(prompts[0]))]
        if isinstance(asked_for[0], list):
            words = words[said_already(prompts[0], [self._vocabulary.id(word) for word in words]) :]
        ended = b.tokens is not None and len(words) < min(most, room)
        words = words[: min(most, room)]
        size = b.ids_per_event
        groups = [words[at : at + size] for at in range(0, len(words), size)]
        said = [("".join(group), [self._vocabulary.id(word) for word in group]) for group in groups]
        if ended:
            said.append(("", [END_OF_TEXT]))
        finish: Literal["stop", "length"] | None = None if b.no_finish else "stop" if ended else "length"
        return Answer(model, asked, prompts, said, finish, b)

    def _spoken(self, text: str, model: str, asked: JSON, prompts: list[list[int]], most: int, b: Behaviour) -> Answer:
        """An answer that says `text`, from where a prompt of ids ends."""
        ids = [*pieces(text), END_OF_TEXT]
        ids = ids[said_already(prompts[0], ids) :][:most]
        detokenizer = Detokenizer(self._vocabulary.decode, prompts[0], asked)
        said: list[tuple[str, list[int]]] = []
        group: list[int] = []
        for number, token in enumerate(ids, start=1):
            group.append(token)
            if token != END_OF_TEXT:
                detokenizer.step(token)
            last = number == len(ids) or detokenizer.stopped is not None
            if last or len(group) == b.ids_per_event:
                said.append((detokenizer.text(last=last), group))
                group = []
            if last:
                break
        ended = detokenizer.stopped is not None or ids[-1] == END_OF_TEXT
        finish: Literal["stop", "length"] | None = None if b.no_finish else "stop" if ended else "length"
        return Answer(model, asked, prompts, said, finish, b, detokenizer.stopped)

    async def _begin(self, b: Behaviour) -> None:
        if b.hold:
            await self._hold()
        await asyncio.sleep(b.first_delay)

    async def _whole(self, connection: "Connection", answer: JSON, b: Behaviour, tokens: int = 0) -> None:
        await self._begin(b)
        await asyncio.sleep(b.delay * tokens)
        if b.hold_after is not None:
            await self._hold()
        if b.hang_after is not None:
            await asyncio.Future()
        if b.error_first or b.error_event_after is not None:
            raise Refusal(500, DEAD, "InternalServerError")
        body = b'{"id": "broken' if b.garbage else dumps(answer)
        head = connection.head(
            200, ("content-length", str(len(body))), ("content-type", b.content_type), *b.headers.items()
        )
        if b.cut_after is not None:
            await connection.write(head + (b"" if b.cut_between else body[: len(body) // 2]), b.split)
            connection.cut(b.close)
            raise Gone
        await connection.write(head + body, b.split)

    async def _stream(
        self, connection: "Connection", events: Iterator[Event], b: Behaviour, progress: JSON, path: str
    ) -> None:
        kind = ("content-type", "text/event-stream; charset=utf-8")
        await connection.write(connection.head(200, kind, *b.headers.items(), chunked=True), b.split)
        await self._begin(b)
        pending: list[bytes] = []

        async def flush() -> None:
            if pending:
                data = chunk(b"".join(pending))
                pending.clear()
                await connection.write(data, b.split)

        def due(after: int | None, event: Event) -> bool:
            return after is not None and event.position > after

        held = False
        for event in events:
            if event.kind == "done" and b.no_done:
                continue
            data = sse(event, b)
            if due(b.hold_after, event) and not held:
                held = True
                await flush()
                await self._hold()
            if due(b.hang_after, event):
                await flush()
                await asyncio.Future()
            if due(b.cut_after, event):
                await flush()
                whole = chunk(data)
                await connection.write(b"" if b.cut_between else whole[: len(whole) // 2], b.split)
                connection.cut(b.close)
                raise Gone
            if b.error_first or due(b.error_event_after, event):
                await flush()
                await self._fail(connection, b, path)
                return
            if event.kind == "token":
                if b.delay and progress["tokens"]:
                    await flush()
                    await asyncio.sleep(b.delay)
                self._count(completion_tokens=int(event.position) - progress["tokens"])
                progress["tokens"] = int(event.position)
            pending.append(data)
            if len(pending) >= b.many_per_chunk:
                await flush()
        await flush()
        await connection.write(b"0\r\n\r\n", b.split)

    async def _fail(self, connection: "Connection", b: Behaviour, path: str) -> None:
        """The end of a stream whose engine has failed inside."""
        if path == "/v1/responses":  # nothing catches it there: uvicorn drops the connection
            connection.cut(b.close)
            raise Gone
        if path == "/v1/messages":
            inner = {"type": "internal_error", "message": DEAD}
            events = [Event(END, "close", {"type": "error", "error": inner}, "error")]
        else:
            events = [Event(END, "close", engine_error()), Event(END, "done", "[DONE]")]
        for event in events:
            if event.kind != "done" or not b.no_done:
                await connection.write(chunk(sse(event, b)), b.split)
        await connection.write(b"0\r\n\r\n", b.split)


async def run(ports: list[int], settings: Settings, host: str, watch_stdin: bool) -> None:
    loop = asyncio.get_running_loop()
    if watch_stdin:  # its end is the parent's: no fake outlives a test run that was killed
        loop.add_reader(0, lambda: os._exit(0) if not os.read(0, 1024) else None)
    vocabulary, attempts = Vocabulary(), Counter[str]()
    servers: list[asyncio.Server] = []
    replicas: list[Replica] = []
    for port in ports:
        replica = Replica(settings, vocabulary, attempts, replicas)
        replicas.append(replica)
        servers.append(await loop.create_server(functools.partial(Connection, replica), host, port, backlog=1024))
        print("LISTENING", servers[-1].sockets[0].getsockname()[1], flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, action="append", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--served-model-name", action="append", help="as vLLM has it: instead of --model")
    parser.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY"))
    parser.add_argument("--pooling", action="store_true")
    parser.add_argument("--max-model-len", type=int, default=131072)
    parser.add_argument("--close-idle", type=float, metavar="S", help="close connections that idle for S seconds")
    parser.add_argument(
        "--slots", type=int, metavar="N", help="answer N requests at a time; more wait (vLLM: max-num-seqs)"
    )
    parser.add_argument("--watch-stdin", action="store_true", help="exit at the end of stdin")
    args, _ = parser.parse_known_args()  # a supervisor starts it like a real engine, with flags that mean nothing here
    models = args.served_model_name or args.model
    settings = Settings(models, args.api_key, args.pooling, args.max_model_len, args.close_idle, args.slots)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run(args.port, settings, args.host, args.watch_stdin))


# ---- for tests


class FakeEngine:
    """A fake engine's process, for the length of an `async with`. One model "tiny" and one replica unless told otherwise.

    `replica` is an index into `urls`. Extra `flags` go to the command line as they are.
    """

    def __init__(
        self, *flags: str, models: Sequence[str] = ("tiny",), replicas: int = 1, api_key: str | None = None
    ) -> None:
        self._argv = [sys.executable, str(Path(__file__).resolve()), "--watch-stdin", *flags]
        self._argv += ["--port", "0"] * replicas
        self._argv += [word for model in models for word in ("--model", model)]
        self._argv += ["--api-key", api_key] if api_key is not None else []
        self._replicas = replicas
        self.urls: list[str] = []

    @property
    def url(self) -> str:
        return self.urls[0]

    @property
    def pid(self) -> int:
        return self._process.pid

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._start)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self._end)

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdout is not None
        for _ in range(self._replicas):
            word, _, port = self._process.stdout.readline().decode().partition(" ")
            if word != "LISTENING":
                self._end()
                raise RuntimeError("the fake engine did not start: see its stderr")
            self.urls.append(f"http://127.0.0.1:{int(port)}")

    def _end(self) -> None:
        self.kill()
        with self._process:  # closes its pipes and waits for it
            pass

    # -- signals, to the whole process group

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def cont(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:  # not waited for yet, so the id is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    # -- control

    async def script(self, behaviours: Sequence[JSON], replica: int = 0) -> None:
        """Appends to the queue of behaviours, one for each inference request to come."""
        await self._ask("POST", "/fake/script", list(behaviours), replica)

    async def stats(self, replica: int = 0) -> Any:
        """Counts; "last" requests with exact body (base64), headers and JSON; "departures" of clients in mid-answer.

        A departure's "user" is the request's field of that name; its "noticed" is on the clock of time.monotonic(), which all processes of a machine share.
        """
        return await self._ask("GET", "/fake/stats", None, replica)

    async def until(self, replica: int = 0, **wanted: int) -> Any:
        """Waits until "running" and "holding" are, and the other counts have reached, what is wanted. Returns the stats."""
        await self._ask("POST", "/fake/wait", wanted, replica)
        return await self.stats(replica)

    async def release(self, replica: int = 0) -> None:
        """Lets every request go on that holds now."""
        await self._ask("POST", "/fake/release", None, replica)

    async def release_all(self) -> None:
        """Lets every request go on that holds now, at all replicas at once: what follows from it is held again."""
        await self._ask("POST", "/fake/release-all", None, 0)

    async def reset(self, replica: int = 0) -> None:
        await self._ask("POST", "/fake/reset", None, replica)

    async def health(self, status: int, replica: int = 0) -> None:
        await self._ask("POST", "/fake/health", {"status": status}, replica)

    async def load(self, replica: int = 0, **load: float) -> None:
        """What /metrics says from now on of `running`, `waiting`, `kv_cache_usage`; without any: the truth."""
        await self._ask("POST", "/fake/load", load, replica)

    async def close_idle(self, replica: int = 0) -> None:
        """Closes all kept-alive connections that have no request open."""
        await self._ask("POST", "/fake/close-idle", None, replica)

    async def exit(self, code: int = 0) -> None:
        """Ends the process from inside."""
        with contextlib.suppress(http.client.HTTPException, ConnectionError):
            await self._ask("POST", "/fake/exit", {"code": code}, 0)
        await asyncio.to_thread(self._process.wait)

    async def _ask(self, method: str, path: str, body: Any, replica: int) -> Any:
        return await asyncio.to_thread(self._call, method, path, body, replica)

    def _call(self, method: str, path: str, body: Any, replica: int) -> Any:
        address = urlsplit(self.urls[replica])
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=20)
        try:
            connection.request(method, path, dumps(body), {"connection": "close"})
            reply = connection.getresponse()
            data = reply.read()
        finally:
            connection.close()
        if reply.status != 200:
            raise ValueError(f"{path}: {data.decode()}")
        return json.loads(data)


if __name__ == "__main__":
    main()
