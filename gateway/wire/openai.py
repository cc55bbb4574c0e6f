"""OpenAI's requests: which endpoints there are, and a body's way in (judged) and out to the engine (encoded afresh)."""

import json
from collections.abc import Mapping
from typing import Any, Final

import orjson

from gateway.errors import GatewayError
from gateway.types import Call, Endpoint
from gateway.wire import fields
from gateway.wire.rules import Rule, invalid, missing, too_deep, type_name, wrong_type

MAX_FIELDS: Final = 256
MAX_FIELD_NAME: Final = 256
MEDIA_SIZE: Final = 4096  # bytes of a body below which it cannot hold media worth looking for

ENDPOINTS: Final[tuple[Endpoint, ...]] = (
    Endpoint(
        "/v1/chat/completions",
        "/v1/chat/completions",
        "openai",
        fields.CHAT,
        ("messages",),
        "messages",
        streams=True,
        generates=True,
    ),
    Endpoint(
        "/v1/completions",
        "/v1/completions",
        "openai",
        fields.COMPLETIONS,
        ("prompt",),
        "prompt",
        streams=True,
        generates=True,
    ),
    Endpoint("/v1/embeddings", "/v1/embeddings", "openai", fields.EMBEDDINGS, (), "input"),
    Endpoint("/v1/rerank", "/v1/rerank", "openai", fields.RERANK, ("query", "documents"), "documents"),
    Endpoint("/v1/score", "/v1/score", "openai", fields.SCORE, (), "text_1"),
    Endpoint("/v1/classify", "/classify", "openai", fields.CLASSIFY, (), "input"),
    Endpoint(
        "/v1/responses",
        "/v1/responses",
        "responses",
        fields.RESPONSES,
        ("input",),
        "input",
        streams=True,
        generates=True,
    ),
    Endpoint(
        "/v1/messages",
        "/v1/messages",
        "anthropic",
        fields.MESSAGES,
        ("messages", "max_tokens"),
        "messages",
        streams=True,
        generates=True,
    ),
    Endpoint(
        "/v1/messages/count_tokens",
        "/v1/messages/count_tokens",
        "anthropic",
        fields.MESSAGES,
        ("messages",),
        "messages",
    ),
    Endpoint("/tokenize", "/tokenize", "openai", fields.TOKENIZE, (), "prompt"),
    Endpoint("/detokenize", "/detokenize", "openai", fields.DETOKENIZE, ("tokens",), "tokens"),
)


def parse(raw: bytes | bytearray) -> tuple[dict[str, Any], bool]:
    """The body as a JSON object, and whether it is exact (False: it holds a number that no double can).

    Raises `GatewayError` invalid_json.
    """
    exact = True
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as e:
        if "infinity" not in e.msg:
            raise not_json(f"{e.msg[:1].upper()}{e.msg[1:]}") from None
        body, exact = _huge_numbers(raw), False
    if not isinstance(body, dict):
        raise not_json(f"Expected an object, but got {type_name.get(type(body), 'something else')} instead")
    return body, exact


def not_json(why: str) -> GatewayError:
    return GatewayError(400, "invalid_json", f"We could not parse the JSON body of your request. {why}.")


def _huge_numbers(raw: bytes | bytearray) -> object:
    """Reads what orjson will not: numbers beyond a double. Slow, and only for telling the client which field it is."""
    try:
        return json.loads(
            raw.decode(),
            parse_int=lambda text: int(text) if len(text) < 20 else (-(10**20) if text[0] == "-" else 10**20),
        )
    except (ValueError, RecursionError):
        raise not_json("A number is out of range") from None


def decode(endpoint: Endpoint, raw: bytes | bytearray) -> Call:
    """Stage 2: judges what routes, bounds or endangers, and keeps the rest as it is. Raises `GatewayError`."""
    body, exact = parse(raw)
    model = body.get("model")
    if model is None:
        raise GatewayError(400, "missing_required_parameter", "You must provide a model parameter.", param="model")
    if not isinstance(model, str):
        wrong_type(model, "model", "a string")
    if len(body) > MAX_FIELDS:
        raise GatewayError(400, None, f"The body has {len(body)} fields; at most {MAX_FIELDS} are accepted.")
    rules = endpoint.rules
    for name, value in body.items():
        rule = rules.get(name)
        if rule is not None:
            rule(value, name)
        elif len(name) > MAX_FIELD_NAME:
            raise GatewayError(
                400, None, f"A field's name has {len(name)} characters; at most {MAX_FIELD_NAME} are accepted."
            )
    if not exact:
        raise not_json("A number is out of range")
    for name in endpoint.required:
        if body.get(name) is None:
            missing(name)
    _together(endpoint, body)
    stream = body.get("stream") is True
    options = body.get("stream_options")
    return Call(
        endpoint,
        model,
        body,
        len(raw),
        stream and endpoint.streams,
        bool(stream and options and options.get("include_usage")),
        _answer_bound(rules, body) if endpoint.generates else 0,
        len(raw) > MEDIA_SIZE and b"data:" in raw,
    )


def _together(endpoint: Endpoint, body: Mapping[str, Any]) -> None:
    """Fields that must agree with one another."""
    get = body.get
    if get("stream") is True:
        if not endpoint.streams:
            invalid("stream", "this endpoint does not stream.")
    elif get("stream_options") is not None:
        invalid("stream_options", "it is only allowed when 'stream' is true.")
    if endpoint.rules is not fields.CHAT:
        if endpoint.rules is fields.EMBEDDINGS and get("input") is None and get("messages") is None:
            missing("input")
        return
    new = get("max_completion_tokens")
    if new is not None and (old := get("max_tokens")) is not None and old != new:
        invalid("max_tokens", "'max_tokens' and 'max_completion_tokens' are both set and differ; set one of them.")
    if get("top_logprobs") and not get("logprobs"):
        invalid("top_logprobs", "it is only allowed when 'logprobs' is true.")
    choice = get("tool_choice")
    if choice is not None and choice != "none":
        tools = body.get("tools")
        if not tools:
            invalid("tool_choice", "it is only allowed when 'tools' are given.")
        if isinstance(choice, dict) and choice.get("type", "function") == "function":
            wanted = choice.get("function", {}).get("name") if isinstance(choice.get("function"), dict) else None
            if wanted is None or wanted not in [
                tool.get("function", {}).get("name") for tool in tools if isinstance(tool.get("function", {}), dict)
            ]:
                invalid("tool_choice", "it names a function that is not among 'tools'.")


def _answer_bound(rules: Mapping[str, Rule], body: Mapping[str, Any]) -> int | None:
    # A field that this endpoint does not know has not been judged: it may hold anything, and bounds nothing.
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        value = body.get(name)
        if value is not None and name in rules:
            choices = body.get("n") if "n" in rules else None
            return int(value) * int(choices or 1) * (_prompts(body.get("prompt")) if "prompt" in rules else 1)
    return None


def _prompts(prompt: object) -> int:
    """How many prompts a text completion has: each one gets an answer."""
    return len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else 1


def encode(call: Call, served_name: str, *, with_ids: bool = False) -> bytes:
    """The engine's body: what was judged, the engine's own name for the model, and the usage that we always ask for.

    `with_ids` asks for the ids of prompt and answer too. Raises `GatewayError` invalid_json.
    """
    body = {**call.body, "model": served_name}
    if call.stream and call.endpoint.dialect == "openai":
        # Without include_usage of the client's own, per-chunk usage would change every chunk: it is left out.
        client_options = call.body.get("stream_options") or {}
        body["stream_options"] = (
            {**client_options, "include_usage": True} if call.include_usage else {"include_usage": True}
        )
        if with_ids:
            body["return_token_ids"] = True
    try:
        return orjson.dumps(body)
    except TypeError:
        too_deep()
