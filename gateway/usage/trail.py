"""What a stream leaves behind so that another engine can continue it: the ids sent so far, and their text. Pure.

The engine is asked for the ids (`return_token_ids`); they are taken out of each event again, byte for byte, so that the
client gets what the engine would have sent without being asked (facts: failover.md §2, vllm.md §3).
"""

from collections.abc import Mapping
from typing import Any, Final

import orjson

from gateway.wire.sse import LF

IDS: Final = b'"token_ids":['
NO_IDS: Final = b'"token_ids":null'
PROMPT_IDS: Final = b'"prompt_token_ids":['
NO_PROMPT_IDS: Final = b'"prompt_token_ids":null'
# Where an event's text stands, in the order of vLLM's fields. Inside a JSON string a quote is escaped, so neither of
# these can be a part of the text itself.
TEXT: Final[Mapping[str, tuple[bytes, bytes]]] = {
    "/v1/chat/completions": (b'"delta":{"content":"', b'"},"logprobs"'),
    "/v1/completions": (b'"text":"', b'","logprobs"'),
}
# From the end of the text to the ids, in an event that is a token and nothing else; and the same without its ids.
PLAIN: Final[Mapping[str, bytes]] = {
    "/v1/chat/completions": b'"},"logprobs":null,"finish_reason":null,"token_ids":[',
    "/v1/completions": b'","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":[',
}
EMPTY: Final = b'"delta":{}'
PLAIN_END: Final = b"]}]}"
FOLD: Final = 32  # events whose ids and text are kept one by one: 110 bytes each, folded together a tenth of that


def ids_at(event: bytes, last: int) -> int:
    """Where the ids begin whose last byte is at `last`. Byte by byte: there are few, and compiled it is quicker than one
    call of `bytes.rfind`."""
    while last >= 0 and event[last] != 91:
        last -= 1
    return last + 1


class Lane:
    """The quickest way for a token, if it comes alone."""

    __slots__ = ()

    def lone(self, chunk: bytes) -> bytes:
        """What one read brought, as the client gets it, if that is one token and nothing else. Empty if it must be read the
        long way; nothing has changed then."""
        raise NotImplementedError


class Passing(Lane):
    """The quick way of a stream's tokens where no trail of them is kept: an engine that was not asked for ids."""

    __slots__ = ("_end", "_prefix", "_start", "count")

    def __init__(self, path: str) -> None:
        self._start = TEXT[path][0]
        self._end = PLAIN[path][:-1] + b"null}]}\n\n"
        self._prefix = b"\n"
        self.count = 0  # tokens that went this way

    def learn(self, event: bytes) -> None:
        """From the first token: what all begin with, up to the text."""
        at = event.find(self._start)
        if at >= 0:
            self._prefix = event[: at + len(self._start)]

    def lone(self, chunk: bytes) -> bytes:
        """As it came."""
        if not chunk.startswith(self._prefix) or not chunk.endswith(self._end) or LF in chunk[:-2]:
            return b""
        self.count += 1
        return chunk


class Trail(Lane):
    """Kept while a stream runs. `broken` once something was seen that the ids do not tell: a tool call, reasoning."""

    __slots__ = (
        "_chat",
        "_end",
        "_first",
        "_ids",
        "_lone_end",
        "_older_ids",
        "_older_text",
        "_pieces",
        "_plain",
        "_prefix",
        "_start",
        "_without",
        "broken",
        "opened",
        "overlap",
        "prompt",
    )

    def __init__(self, path: str) -> None:
        self._chat = path == "/v1/chat/completions"
        self._start, self._end = TEXT[path]
        self._plain = PLAIN[path]
        self._without = self._plain[:-1] + b"null}]}"
        self._lone_end = self._without + b"\n\n"
        self._prefix = b"\n"  # what all of a stream's tokens begin with, up to the text; nothing begins with this
        self._first = b""
        self.overlap = ""  # after a cut: text that was sent and that the ids do not cover yet
        self.prompt: bytes | None = None  # its ids, as JSON: b"1,2,3"
        self.opened = False  # the first event has come
        self.broken = False
        self._ids: list[bytes] = []  # of each event, as JSON: b"1,2"
        self._pieces: list[bytes] = []  # of text, as in a JSON string
        self._older_ids: list[bytes] = []  # the same, of FOLD events each
        self._older_text: list[bytes] = []

    def take_prompt(self, event: bytes) -> bytes:
        """The prompt's ids, which may be long, are cut out as text before anybody else looks through the event."""
        at = event.find(PROMPT_IDS)
        end = event.find(b"]", at)
        if at < 0 or end < 0:
            return event
        self.prompt = event[at + len(PROMPT_IDS) : end]
        return b"%b%b%b" % (event[:at], NO_PROMPT_IDS, event[end + 1 :])

    def first(self, event: bytes) -> bytes:
        """The stream's first event, without the ids of its prompt. Raises ValueError if it had none and is not even JSON."""
        self.opened = True
        if self.prompt is None:
            orjson.loads(event[6:])
            self.broken = True  # an engine that does not know the field
            return event
        self._first = event
        return event if self._chat else self.note(event)

    def plain(self, events: list[bytes], at: int, out: list[bytes]) -> int:
        """The quick way for what nearly all events are, a token and nothing else: as `note` for as many as follow each
        other from `at` on, put into `out`. Returns the index of the first that is something else."""
        prefix, plain, without = self._prefix, self._plain, self._without
        skip, length = len(prefix), len(plain)
        for at in range(at, len(events)):  # noqa: B020, PLR1704 - where it stops is what is asked for
            event = events[at]
            if not event.startswith(prefix) or not event.endswith(PLAIN_END):
                return at
            ids = ids_at(event, len(event) - 5)
            end = ids - length
            if end < skip or event[end:ids] != plain:
                return at
            self._keep(event[ids:-4], event[skip:end])
            out.append(event[:end] + without)
        return len(events)

    def lone(self, chunk: bytes) -> bytes:
        """As `plain`."""
        prefix, plain = self._prefix, self._plain
        if not chunk.startswith(prefix) or not chunk.endswith(b"]}]}\n\n"):
            return b""
        start = len(prefix)
        at = ids_at(chunk, len(chunk) - 7)
        end = at - len(plain)
        if end < start or chunk[end:at] != plain:
            return b""
        text = chunk[start:end]
        if LF in text:  # more than one event
            return b""
        self._keep(chunk[at:-6], text)
        return chunk[:end] + self._lone_end

    def note(self, event: bytes) -> bytes:
        """Remembers what an event adds, and returns it without its ids."""
        at = event.rfind(IDS)
        if at < 0:
            self.broken = True
            return event
        end = event.find(b"]", at)
        text = b""
        start = event.find(self._start)
        stop = event.find(self._end, start)
        if 0 <= start < stop:
            start += len(self._start)
            self._prefix = event[:start]
            text = event[start:stop]
        elif event.find(EMPTY) < 0:
            self.broken = True
        self._keep(event[at + 13 : end], text)
        return event[:at] + NO_IDS + event[end + 1 :]

    def _keep(self, ids: bytes, text: bytes) -> None:
        if len(self._ids) >= FOLD:
            self._older_ids.append(b",".join([one for one in self._ids if one]))
            self._older_text.append(b"".join(self._pieces))
            self._ids.clear()
            self._pieces.clear()
        self._ids.append(ids)
        self._pieces.append(text)

    def add(self, ids: list[int], text: str) -> None:
        """What a later engine's event adds."""
        if ids or text:
            self._keep(",".join(map(str, ids)).encode(), orjson.dumps(text)[1:-1])
            self.overlap = self.overlap[len(text) :]

    def cut(self, ids: list[int], overlap: str) -> None:
        """Goes back to these ids of the answer, and to the text without `overlap`, its end."""
        text = self.text()
        self._ids, self._pieces, self._older_ids, self._older_text, self.overlap = [], [], [], [], ""
        self.add(ids, text[: len(text) - len(overlap)])
        self.overlap = overlap

    def head(self) -> dict[str, Any]:
        """What all of the stream's events have in common: id, object, created, model."""
        chunk = orjson.loads(self._first[6:])
        return {name: chunk[name] for name in ("id", "object", "created", "model") if name in chunk}

    def usage_event(self) -> bytes:
        """The chunk with the usage of a finished answer, for an engine that did not come to write it; empty if the ids do
        not tell."""
        if not self.whole:
            return b""
        prompt, completion = self.prompt_tokens, self.tokens
        usage = {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}
        return b"data: " + orjson.dumps({**self.head(), "choices": [], "usage": usage})

    @property
    def whole(self) -> bool:
        """Another engine could go on from here."""
        return self.opened and not self.broken

    @property
    def prompt_ids(self) -> list[int]:
        """Raises ValueError if the engine did not send numbers."""
        found: list[int] = orjson.loads(b"[%b]" % (self.prompt or b""))
        return found

    @property
    def prompt_tokens(self) -> int:
        """How many ids the prompt has; 0 while that is not known."""
        return self.prompt.count(b",") + 1 if self.prompt else 0

    @property
    def tokens(self) -> int:
        """How many ids have come."""
        return sum(ids.count(b",") + 1 for ids in [*self._older_ids, *self._ids] if ids)

    @property
    def events(self) -> int:
        """How many events with ids have come; after a cut, those before it count as one."""
        return len(self._older_ids) * FOLD + len(self._ids)

    def text(self) -> str:
        """The text that has been sent."""
        return "".join(orjson.loads(b'"%b"' % piece) for piece in [*self._older_text, *self._pieces]) + self.overlap

    def token_ids(self) -> list[int]:
        return [int(one) for ids in [*self._older_ids, *self._ids] for one in ids.split(b",") if one]
