"""Continuing a stream on another engine: what to ask it, and how its events become a part of the first one's stream. Pure.

From the prompt's ids and those of the answer so far (`Trail`), never from text: re-tokenised text differs (facts:
failover.md §4). Greedy requests so end in the bytes that the first engine would have sent.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from gateway.types import Call, Usage
from gateway.usage.meter import Verdict, choices_of, usage_of
from gateway.usage.trail import TEXT, Trail
from gateway.wire import sse

MAX_DEATHS: Final = 3  # continuations of one request
MAX_ROLL_BACK: Final = 64  # ids; a character's torn bytes need 3, a stop string's held text its own length
REPLACEMENT: Final = "\ufffd"  # what torn bytes decode to

BOUNDS: Final = ("max_completion_tokens", "max_tokens")


def obstacle(call: Call) -> str | None:
    """Why this stream could not be continued exactly by another engine; None if nothing is in the way.

    The rows are those of facts/failover.md §4 and §9 that a request alone decides.
    """
    body = call.body
    if call.endpoint.path not in TEXT or not call.stream:
        return "only streams of chat and text completions are continued"
    if choices_of(call) > 1:
        return "more than one choice or prompt"
    for field, why in _IN_THE_WAY.items():
        if body.get(field):
            return why
    if (logprobs := body.get("logprobs")) is not None and logprobs is not False:
        return "log-probabilities"  # 0 too: those of the tokens themselves
    format_ = body.get("response_format")
    if isinstance(format_, dict) and format_.get("type") != "text":
        return "structured output"
    if body.get("thinking_token_budget") is not None:
        return "a budget that counts output"
    if body.get("tool_choice") not in (None, "none", "auto"):
        return "a required tool"
    if body.get("return_token_ids"):
        return "the client wants the ids itself"
    if body.get("include_reasoning") is False:
        return "hidden reasoning has no ids"
    # A text completion may bear anything under that name: the table judges it for chats alone.
    messages = body.get("messages") or () if call.endpoint.path == "/v1/chat/completions" else ()
    if any(isinstance(m.get("content"), list) and _media(m["content"]) for m in messages):
        return "media"
    return None


_IN_THE_WAY: Final = {
    "echo": "echo",
    "logprob_token_ids": "log-probabilities",
    "structured_outputs": "structured output",
    "frequency_penalty": "a penalty that counts output",
    "presence_penalty": "a penalty that counts output",
    "bad_words": "bad_words look at output only",
    "repetition_detection": "repetitions are looked for in output only",
    "watermarking": "a watermark that counts output",
    "truncate_prompt_tokens": "a truncated prompt",
}


def _media(parts: list[Any]) -> bool:
    return any(isinstance(part, dict) and part.get("type") not in ("text", "refusal") for part in parts)


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the first engine's answer is taken up again."""

    prompt_ids: list[int]
    ids: list[int]  # of the answer, those that are kept
    overlap: str  # text that was sent and that the kept ids do not cover: the next engine will say it again
    again: int = 0  # ids that were sent and are not kept: the next engine will make them again


def straddle(call: Call) -> int:
    """Characters of what was sent that may be the beginning of a stop string: the next engine has to say them again, or it
    would not know that string by its end. None where the engine holds such text back itself."""
    stop = call.body.get("stop")
    if not stop or not call.body.get("include_stop_str_in_output"):
        return 0
    return max(map(len, [stop] if isinstance(stop, str) else stop)) - 1


def fits(prompt_text: str, decoded: str, sent: str, straddle: int = 0) -> str | None:
    """Judges ids kept: `decoded` is the text of prompt and ids. The overlap if they may be kept, None if one more must go.

    Kept ids end with a whole character, and say no more than the client has seen: an engine that looks for stop strings
    holds text back that its ids have already. `straddle`: so much of what was sent must not be covered.
    """
    if not decoded.startswith(prompt_text):
        return None
    text = decoded[len(prompt_text) :]
    if text.endswith(REPLACEMENT) or not sent.startswith(text):
        return None
    overlap = sent[len(text) :]
    return overlap if len(overlap) >= straddle or not text else None


def finished(call: Call, cut: Cut) -> bool:
    """Whether nothing is left to generate: the answer had reached its bound."""
    bounds = [call.body[name] for name in bounded_by(call)]
    return bool(bounds) and len(cut.ids) >= min(bounds)


def bounded_by(call: Call) -> list[str]:
    """The fields that bound the answer. One that the endpoint does not know has not been judged, and bounds nothing."""
    return [name for name in BOUNDS if name in call.endpoint.rules and call.body.get(name) is not None]


def continuation(call: Call, cut: Cut) -> dict[str, Any]:
    """The body that makes another engine go on."""
    kept, ids = len(cut.ids), cut.prompt_ids + cut.ids
    body = dict(call.body)
    for name in bounded_by(call):
        body[name] -= kept
    if body.get("min_tokens"):
        body["min_tokens"] = max(0, body["min_tokens"] - kept)
    if call.endpoint.path == "/v1/completions":
        return {**body, "prompt": ids}
    return {**body, "kv_transfer_params": {"prompt_token_ids": ids}}


class ResumedMeter:
    """Reads the next engine's stream and makes it the first one's: its id, its creation time, its counts. The trail goes on.

    Every event is parsed and written again; only streams that have been cut pay for that.
    """

    def __init__(self, call: Call, trail: Trail, cut: Cut, head: Mapping[str, Any]) -> None:
        self._trail = trail
        self._cut = cut
        self._head = head  # of the first engine's events: id, created, model …
        self._keep_usage = call.include_usage
        self._chat = call.endpoint.path == "/v1/chat/completions"
        self._again = cut.again
        self._first = True
        self._held = b""
        self._told = False  # the client has its usage chunk
        self.complete = False
        self.usage: Usage | None = None
        self.forward = b""
        trail.cut(cut.ids, cut.overlap)

    @property
    def tokens(self) -> int:
        return self._trail.tokens

    def plain(self, events: list[bytes], at: int, out: list[bytes]) -> int:
        return at

    @property
    def lane(self) -> None:
        return None

    def release(self) -> bytes:
        held, self._held = self._held, b""
        return held

    def owed(self) -> bytes:
        return self._trail.usage_event() if self._keep_usage and not self._told else b""

    def read(self, event: bytes) -> Verdict:
        """As `Meter.read`; NONSENSE where the continuation turns out not to be one."""
        data = sse.payload(event)
        if data is None:
            return Verdict.DROP
        if data == sse.DONE:
            return Verdict.DONE
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            return Verdict.NONSENSE
        if not isinstance(chunk, dict) or "choices" not in chunk:
            return Verdict.ERROR if isinstance(chunk, dict) and "error" in chunk else Verdict.NONSENSE
        if "usage" in chunk and chunk["usage"] is not None:
            self._rebase(chunk)
        if not chunk["choices"]:
            return self._usage_chunk(chunk)
        return self._choice(chunk, chunk["choices"][0])

    def _rebase(self, chunk: dict[str, Any]) -> None:
        """Counts as if there had been one engine."""
        counted, prompt, usage = usage_of(chunk) or Usage(), len(self._cut.prompt_ids), chunk["usage"]
        completion = len(self._cut.ids) + counted.completion
        self.usage = Usage(prompt, completion, min(counted.cached, prompt))
        usage |= {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        if isinstance(usage.get("prompt_tokens_details"), dict):
            usage["prompt_tokens_details"]["cached_tokens"] = self.usage.cached

    def _usage_chunk(self, chunk: dict[str, Any]) -> Verdict:
        if self._keep_usage:
            self._told = True
            self.forward = self._written(chunk)
            return Verdict.OTHER
        last = self.release()
        if not last:
            return Verdict.DROP
        if (fingerprint := chunk.get("system_fingerprint")) is not None:
            last = b'%b,"system_fingerprint":%b}' % (last[:-1], orjson.dumps(fingerprint))
        self.forward = last
        return Verdict.TOKEN

    def _choice(self, chunk: dict[str, Any], choice: dict[str, Any]) -> Verdict:
        if self._first:
            self._first = False
            told = (chunk if self._chat else choice).get("prompt_token_ids")
            if told is not None and told != self._cut.prompt_ids + self._cut.ids:
                return Verdict.NONSENSE  # it has not continued, but begun anew
        holder, field = (choice.get("delta") or {}, "content") if self._chat else (choice, "text")
        if self._chat and holder.keys() - {"content", "role"}:
            return Verdict.NONSENSE  # a tool call, reasoning: a parser that began in the middle
        text = holder.get(field) or ""
        overlap = self._trail.overlap
        said = min(len(overlap), len(text))
        if text[:said] != overlap[:said]:
            return Verdict.NONSENSE  # other text than was sent already
        ids = choice.get("token_ids") or []
        self._trail.add(ids, text)
        finish = choice.get("finish_reason")
        if finish is None and not text[said:]:
            # An id inside a character has no text of its own; the client has had its event, or gets it now.
            seen, self._again = self._again > 0 or not ids, self._again - len(ids)
            if seen:
                return Verdict.DROP
        if self._chat:
            choice["delta"] = {"content": text[said:]}
        else:
            choice["text"] = text[said:]
        if "prompt_token_ids" in choice:
            choice["prompt_token_ids"] = None
        choice["token_ids"] = None
        chunk.pop("prompt_token_ids", None)
        chunk.pop("prompt_text", None)
        self.forward = self._written(chunk)
        if finish is None:
            return Verdict.TOKEN
        self.complete = True
        if self._keep_usage:
            return Verdict.TOKEN
        self._held = self.forward
        return Verdict.DROP

    def _written(self, chunk: dict[str, Any]) -> bytes:
        return b"data: " + orjson.dumps({**chunk, **self._head})


def ending(call: Call, cut: Cut, head: Mapping[str, Any]) -> bytes:
    """What an engine would say that may not say another token: for a stream whose last token was the last one allowed."""
    chat = call.endpoint.path == "/v1/chat/completions"
    said: dict[str, Any] = {"delta": {"content": ""}} if chat else {"text": ""}
    last: dict[str, Any] = {"index": 0, **said, "logprobs": None, "finish_reason": "length", "stop_reason": None}
    last |= {"token_ids": None} if chat else {"prompt_token_ids": None, "token_ids": None}
    counted = len(cut.prompt_ids) + len(cut.ids)
    usage = {"prompt_tokens": counted, "total_tokens": counted, "completion_tokens": 0}
    chunks = [{**head, "choices": [last]}, {**head, "choices": [], "usage": usage}]
    return b"".join(sse.event(orjson.dumps(chunk)) for chunk in chunks) + sse.DONE_EVENT
