"""Reads along with an answer: what it used, whether it is whole, and which of its events are for the client. Pure.

A stream's meter is asked about every event; most cost it a few byte searches and no parsing. A search for a JSON key
with its quotes cannot be fooled by text: inside a JSON string a quote is escaped.
"""

from enum import IntEnum
from typing import Final, Protocol

import orjson

from gateway.types import Call, Usage
from gateway.usage.trail import EMPTY, Lane, Passing, Trail
from gateway.wire import sse

_new: Final = tuple.__new__  # a NamedTuple's own constructor takes several times as long


class Verdict(IntEnum):
    """What to do with an event."""

    TOKEN = 0  # for the client, and it carries part of the answer
    OTHER = 1  # for the client
    DROP = 2  # not for the client
    DONE = 3  # the stream's end
    ERROR = 4  # the engine says that it failed
    NONSENSE = 5  # not what an engine sends


class Meter(Protocol):
    usage: Usage | None  # as the engine counted; None until it has said so
    forward: bytes  # the event that was read last, as the client gets it

    @property
    def tokens(self) -> int:
        """What was delivered, where the engine's own count is missing: ids if they were asked for, else events."""
        ...

    @property
    def complete(self) -> bool:
        """Every choice has a finish reason (named events: the last one has come)."""
        ...

    def read(self, event: bytes) -> Verdict:
        """Judges one event as `sse.Splitter` gives it."""
        ...

    def plain(self, events: list[bytes], at: int, out: list[bytes]) -> int:
        """The quick way for a run of tokens: puts as many as follow each other from `at` on into `out`, as the client
        gets them. Returns the index of the first event that must be read."""
        ...

    @property
    def lane(self) -> Lane | None: ...

    def release(self) -> bytes:
        """An event that is still held back; empty if there is none."""
        ...

    def owed(self) -> bytes:
        """Of a complete answer whose engine has gone: the usage chunk that the client asked for, if it has not come and can
        be told without the engine; else empty."""
        ...


def usage_of(answer: object) -> Usage | None:
    """The usage in a whole answer (or a last event), in OpenAI's, the Responses API's or Anthropic's words."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return None
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    completion = usage.get("completion_tokens", usage.get("output_tokens"))
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    if cached is None:
        cached = usage.get("cache_read_input_tokens")
    return Usage(_count(prompt), _count(completion), _count(cached))


PROMPT: Final = b'"usage":{"prompt_tokens":'
TOTAL: Final = b',"total_tokens":'
COMPLETION: Final = b',"completion_tokens":'
DETAILS: Final = b',"prompt_tokens_details":'


def usage_in(answer: bytes) -> Usage | None:
    """The usage in the text of a whole answer, without parsing all of it; None if it is not written as vLLM writes it.

    Inside a string a quote is escaped, so what looks like usage is usage.
    """
    at = answer.rfind(PROMPT)
    if at < 0 or not (answer.startswith(b"{") and answer.endswith(b"}")):
        return None
    prompt, at = _number(answer, at, PROMPT)
    _, at = _number(answer, at, TOTAL)
    completion, at = _number(answer, at, COMPLETION)
    if at < 0 or answer[at : at + len(DETAILS)] != DETAILS:
        return None
    at += len(DETAILS)
    cached = 0
    if answer[at : at + 4] != b"null":
        try:
            cached = _count(orjson.loads(answer[at : answer.find(b"}", at) + 1]).get("cached_tokens"))
        except (orjson.JSONDecodeError, AttributeError):
            return None
    return _new(Usage, (prompt, completion, cached))


def _number(text: bytes, at: int, name: bytes) -> tuple[int, int]:
    """The number after `name` at `at`, and what follows it; -1 for the place if it is not there."""
    if at < 0 or text[at : at + len(name)] != name:
        return 0, -1
    number, start = 0, at + len(name)
    at = start
    while at - start < 16 and 48 <= text[at] <= 57:  # the text ends with a brace
        number = number * 10 + text[at] - 48
        at += 1
    return number, at if 0 < at - start < 16 else -1


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def choices_of(call: Call) -> int:
    """How many finish reasons a whole answer has."""
    n = call.body.get("n") or 1
    prompt = call.body.get("prompt") if "prompt" in call.endpoint.rules else None  # else it may be anything
    several = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
    return n * len(prompt) if several and isinstance(prompt, list) else n


def opens(event: bytes) -> bool:
    """Whether this is what a chat begins with: a role and no text."""
    return event.find(b'"role":"') >= 0 and event.find(b'"content":""') >= 0


class OpenAIMeter:
    """Chat and text completions: anonymous events, a usage chunk that was always asked for, `[DONE]`.

    What the gateway alone asked for is taken out again. An engine that is asked for usage puts its fingerprint into the
    usage chunk instead of the last one with a finish reason; so that one waits for it (they come together).
    """

    __slots__ = (
        "_choices",
        "_events",
        "_finished",
        "_held",
        "_keep_usage",
        "_passing",
        "_told",
        "forward",
        "trail",
        "usage",
    )

    def __init__(self, call: Call, trail: Trail | None) -> None:
        self._keep_usage = call.include_usage
        self._choices = choices_of(call)
        self._finished = 0
        self._events = 0
        self._held = b""
        self._told = False  # the client has its usage chunk
        self.trail = trail
        self._passing = Passing(call.endpoint.path) if trail is None else None
        self.usage: Usage | None = None
        self.forward = b""

    @property
    def complete(self) -> bool:
        return self._finished >= self._choices

    @property
    def tokens(self) -> int:
        trail = self.trail
        if trail is None:
            return self._events + (self._passing.count if self._passing is not None else 0)
        return max(self._events, trail.events) if trail.broken else trail.tokens

    def read(self, event: bytes) -> Verdict:
        trail = self.trail
        if sse.LF in event or not event.startswith(b"data: "):
            data = sse.payload(event)
            if data is None:
                return Verdict.DROP
            event = b"data: " + data
        if trail is not None and trail.prompt is None and not trail.opened:
            event = trail.take_prompt(event)
        if event.find(b'"usage":{') >= 0:
            return self._with_usage(event)
        finishes = event.find(b'"finish_reason":"') >= 0
        if (not finishes and event.find(b'"choices":[{') < 0) or sse.LF in event or not event.endswith(b"}"):
            return self._unusual(event)
        if trail is not None:
            if not trail.opened:
                try:
                    event = trail.first(event)
                except ValueError:
                    return Verdict.NONSENSE
            else:
                event = trail.note(event)
                if not finishes and event.find(EMPTY) >= 0:
                    return Verdict.DROP  # sent for its ids alone
        self.forward = event
        if finishes:
            self._finished += event.count(b'"finish_reason":"')
            if not self._keep_usage and self._finished >= self._choices:
                self._held = event
                return Verdict.DROP
        elif not self._events and not (trail and trail.events) and opens(event):
            return Verdict.OTHER  # a chat's first chunk: no token yet
        return self._token()

    def _token(self) -> Verdict:
        if self._passing is not None:
            if not self._events:
                self._passing.learn(self.forward)
            self._events += 1
        elif self.trail is not None and self.trail.broken:  # until then the trail has counted
            self._events = max(self._events + 1, self.trail.events)
        return Verdict.TOKEN

    def plain(self, events: list[bytes], at: int, out: list[bytes]) -> int:
        return at if self.trail is None else self.trail.plain(events, at, out)

    def _with_usage(self, event: bytes) -> Verdict:
        try:
            chunk = orjson.loads(event[6:])
        except orjson.JSONDecodeError:
            return Verdict.NONSENSE
        if not isinstance(chunk, dict):
            return Verdict.NONSENSE
        self.usage = usage_of(chunk)
        self.forward = event
        if chunk.get("choices"):  # continuous_usage_stats, which only a client can have asked for
            self._finished += event.count(b'"finish_reason":"')
            if self.trail is not None:
                self.forward = self.trail.note(event) if self.trail.opened else self.trail.first(event)
            return self._token()
        if self._keep_usage:
            self._told = True
            return Verdict.OTHER
        fingerprint = chunk.get("system_fingerprint")
        last = self.release()
        if not last:
            return Verdict.DROP
        if fingerprint is not None and b'"system_fingerprint"' not in last:
            last = b'%b,"system_fingerprint":%b}' % (last[:-1], orjson.dumps(fingerprint))
        self.forward = last
        return self._token()

    @property
    def lane(self) -> Lane | None:
        return self.trail if self.trail is not None else self._passing

    def release(self) -> bytes:
        held, self._held = self._held, b""
        return held

    def owed(self) -> bytes:
        return self.trail.usage_event() if self.trail is not None and self._keep_usage and not self._told else b""

    def _unusual(self, event: bytes) -> Verdict:
        self.forward = event
        data = event[6:]
        if data == sse.DONE:
            return Verdict.DONE
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            return Verdict.NONSENSE
        if not isinstance(chunk, dict):
            return Verdict.NONSENSE
        if "error" in chunk:
            return Verdict.ERROR
        # Another engine may write blanks between its words, and line ends: then it is read as vLLM would have written it.
        compact = b"data: " + orjson.dumps(chunk)
        return Verdict.OTHER if compact == event else self.read(compact)


class NamedEventMeter:
    """Anthropic's Messages and OpenAI's Responses: events with names, the last of which says that all is there."""

    __slots__ = ("complete", "forward", "tokens", "usage")

    LAST: Final = frozenset({b"message_stop", b"response.completed", b"response.incomplete", b"response.failed"})
    USAGE: Final = frozenset({b"message_start", b"message_delta"}) | LAST

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self.tokens = 0
        self.complete = False
        self.forward = b""

    def release(self) -> bytes:
        return b""

    def owed(self) -> bytes:
        return b""

    def plain(self, events: list[bytes], at: int, out: list[bytes]) -> int:
        return at

    @property
    def lane(self) -> None:
        return None

    def read(self, event: bytes) -> Verdict:
        name, data = sse.name(event), sse.payload(event)
        if data is None:
            return Verdict.DROP
        self.forward = (
            event if event.startswith((b"event: ", b"data: ")) else sse.event(data, name).removesuffix(b"\n\n")
        )
        if data == sse.DONE:  # not a part of these protocols; some versions of vLLM send it
            return Verdict.DROP
        if name == b"error" or data.startswith(b'{"error"'):
            return Verdict.ERROR
        if name in self.USAGE:
            self._learn(data)
        if name in self.LAST:
            self.complete = True
            return Verdict.OTHER
        if name is not None and name.endswith(b"delta"):
            self.tokens += 1
            return Verdict.TOKEN
        return Verdict.OTHER

    def _learn(self, data: bytes) -> None:
        try:
            found = orjson.loads(data)
        except orjson.JSONDecodeError:
            return
        if not isinstance(found, dict):
            return
        usage = usage_of(found.get("message") or found.get("response") or found)
        if usage is not None:
            before = self.usage or Usage()
            self.usage = Usage(*map(max, before, usage))  # the prompt is told first, the answer last


def meter(call: Call, trail: Trail | None) -> Meter:
    return OpenAIMeter(call, trail) if call.endpoint.dialect == "openai" else NamedEventMeter()
