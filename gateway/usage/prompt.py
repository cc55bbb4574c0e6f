"""How many tokens a prompt has, before an engine has seen it: counted where the model's tokenizer is known, else estimated."""

from collections.abc import Mapping
from typing import Any, Final, Protocol

from gateway.types import Call
from gateway.usage.estimate import PromptEstimator

BIG: Final = 16_384  # bytes of a request from which on counting is better done in a thread
MEDIA_TOKENS: Final = 1000  # what a picture is taken for; its bytes say nothing about its tokens


class CannotCount(Exception):  # noqa: N818 - a finding about a request
    """This prompt cannot be counted exactly: media, a template's refusal, no template, an odd text."""


class Counter(Protocol):
    """Counts as the engine does (`usage.tokens`). Every method raises `CannotCount`, and nothing else."""

    def count_chat(self, body: Mapping[str, Any]) -> int: ...
    def count_prompt(self, prompt: object) -> int: ...


def count(counter: Counter | None, estimator: PromptEstimator, call: Call) -> int:
    """Tokens of the prompt. CPU-bound, and long for a big prompt: then call it in a thread. Never raises."""
    if counter is not None:
        try:
            body = call.body
            if call.endpoint.path == "/v1/chat/completions":
                return counter.count_chat(body)
            if call.endpoint.path == "/v1/completions":
                return counter.count_prompt(body["prompt"])
            if isinstance(body.get("input"), str):
                return counter.count_prompt(body["input"])
        except CannotCount:
            pass
    return estimator.estimate(text_size(call.body) if call.media else call.size)


def text_size(body: Mapping[str, Any]) -> int:
    """Bytes of a body that count as text: media parts are replaced by what they are taken for."""
    size, todo = 0, list(body.values())
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            size += 4 * MEDIA_TOKENS if value.startswith("data:") else len(value) + 2
        elif isinstance(value, dict):
            todo.extend(value.values())
            size += 8 * len(value)
        elif isinstance(value, list):
            todo.extend(value)
        else:
            size += 4
    return size
