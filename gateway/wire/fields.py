"""OpenAI's requests, field by field: what each may hold. Tables of rules, and the rules that only one field has."""

import base64
import binascii
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

import orjson

from gateway.errors import GatewayError
from gateway.wire.rules import (
    Rule,
    all_within,
    array,
    boolean,
    bounded,
    decimal,
    either,
    fail,
    integer,
    integers,
    invalid,
    mapping,
    missing,
    one_of,
    refused,
    shown,
    small_json,
    string,
    too_deep,
    too_long,
    type_name,
    wrong_type,
)

MAX_TOKENS: Final = 10_000_000  # far above any model; the engine knows its own bound
MAX_PROMPTS: Final = 1024  # vLLM's VLLM_MAX_COMPLETION_PROMPTS
MAX_TOKEN_ID: Final = 10_000_000
MAX_TEXT: Final = 32 * 1024 * 1024
MAX_DATA_URL: Final = 20 * 1024 * 1024
MAX_MEDIA_PARTS: Final = 64
MAX_PIXELS: Final = 100_000_000  # of one picture; decoded it takes three bytes for each
MAX_FRAMES: Final = 256  # of a video that is a list of pictures
DATA_URLS: Final = {"image_url": "data:image/", "video_url": "data:video/", "audio_url": "data:audio/"}


# ---- messages


def _no_address(where: str, allowed: str) -> NoReturn:
    """No address is opened for a client, by us or by the engine (SSRF: CVE-2025-6242, CVE-2026-24779)."""
    raise GatewayError(
        400,
        "invalid_image_url",
        f"Invalid '{where}': only {allowed}… URLs are accepted; send the content itself, base64-encoded.",
        param="messages" if where.startswith("messages") else where.partition("[")[0],
    )


def _data_url(url: object, where: str, allowed: str) -> None:
    if not isinstance(url, str):
        wrong_type(url, where, "a string")
    if not url.startswith(allowed):
        _no_address(where, allowed)
    field = where.partition("[")[0]
    if len(url) > MAX_DATA_URL:
        too_long(field, MAX_DATA_URL, len(url))
    if url.startswith("data:image/png") and _png_pixels(url) > MAX_PIXELS:
        invalid(field, f"the picture at '{where}' is too large: at most {MAX_PIXELS} pixels are accepted.")
    if url.startswith("data:video/jpeg") and url.count(",") > MAX_FRAMES:
        invalid(field, f"the video at '{where}' is too long: at most {MAX_FRAMES} frames are accepted.")


def _png_pixels(url: str) -> int:
    """What a PNG's head says of its size: a few bytes can ask for gigabytes."""
    try:
        head = base64.b64decode(url.partition(",")[2][:32])
    except (binascii.Error, ValueError):
        return 0
    return int.from_bytes(head[16:20], "big") * int.from_bytes(head[20:24], "big")


def _media(part: Mapping[str, Any], kind: str, path: str) -> None:
    holder = part.get(kind)
    if holder is None:
        missing(f"{path}.{kind}")
    where = f"{path}.{kind}.url"
    url = holder.get("url") if isinstance(holder, dict) else holder
    if url is None:
        missing(where)
    _data_url(url, where, DATA_URLS[kind])


def _part(part: object, path: str) -> bool:
    """Judges one content part; True if it is media."""
    if isinstance(part, str):
        return False
    if not isinstance(part, dict):
        wrong_type(part, path, "an object")
    kind = part.get("type")
    if kind is None:
        missing(f"{path}.type")
    if not isinstance(kind, str):
        wrong_type(kind, f"{path}.type", "a string")
    if kind in ("text", "input_text", "output_text", "refusal", "thinking"):
        field = kind if kind in ("refusal", "thinking") else "text"
        text = part.get(field)
        if text is None:
            missing(f"{path}.{field}")
        if not isinstance(text, str):
            wrong_type(text, f"{path}.{field}", "a string")
        return False
    if kind in DATA_URLS:
        _media(part, kind, path)
        return True
    if kind == "input_image":
        _data_url(part.get("image_url"), f"{path}.image_url", DATA_URLS["image_url"])
        return True
    if kind in ("input_audio", "file"):
        return True
    invalid(
        f"{path}.type",
        f"expected one of 'text', 'image_url', 'input_audio', 'audio_url', 'video_url', 'file', but got '{shown(kind)}' instead.",
    )


def _anthropic_part(part: object, path: str) -> bool:
    """The same for a content block of Anthropic's Messages."""
    if not isinstance(part, dict):
        wrong_type(part, path, "an object")
    kind = part.get("type")
    if kind in ("image", "document"):
        source = part.get("source")
        if not isinstance(source, dict):
            wrong_type(source, f"{path}.source", "an object")
        if source.get("type") == "url" or "url" in source:
            _no_address(f"{path}.source", "data:")
        return True
    if kind == "tool_result":
        content = part.get("content")
        if not isinstance(content, list):
            return False
        return sum(_anthropic_part(inner, f"{path}.content[{i}]") for i, inner in enumerate(content)) > 0
    if kind in ("tool_use", "thinking", "redacted_thinking", "tool_reference"):
        return False
    if kind is not None and kind != "text":
        invalid(
            f"{path}.type",
            f"expected one of 'text', 'image', 'document', 'tool_use', 'tool_result', but got '{shown(kind)}' instead.",
        )
    return _part(part, path)


def _is_text(part: object, *kinds: str) -> bool:
    """What nearly all parts are: no path has to be written for them."""
    return isinstance(part, dict) and part.get("type") in kinds and isinstance(part.get("text"), str)


def _message(message: object, path: str, part_rule: Callable[[object, str], bool] = _part) -> None:
    if not isinstance(message, dict):
        wrong_type(message, path, "an object")
    role = message.get("role")
    if role is None:
        missing(f"{path}.role")
    if not isinstance(role, str):
        wrong_type(role, f"{path}.role", "a string")
    if len(role) > 64:
        too_long(f"{path}.role", 64, len(role))
    content = message.get("content")
    if isinstance(content, str):
        return
    if content is None:
        if role not in ("assistant", "tool", "function"):
            missing(f"{path}.content")
    elif isinstance(content, list):
        media = 0
        for i, part in enumerate(content):
            if not _is_text(part, "text"):
                media += part_rule(part, f"{path}.content[{i}]")
        if media > MAX_MEDIA_PARTS:
            bounded(content, f"{path}.content", MAX_MEDIA_PARTS)
    else:
        wrong_type(content, f"{path}.content", "a string or an array of content parts")


def _anthropic_message(message: object, path: str) -> None:
    _message(message, path, _anthropic_part)


_every_message: Final = array(_message, 100_000, minimum=1, null=False)


def _messages(value: object, path: str) -> None:
    if not isinstance(value, list) or not 0 < len(value) <= 100_000 or not all(map(_is_plain, value)):
        _every_message(value, path)


def _is_plain(message: object) -> bool:
    """What nearly all messages are: a role and a text."""
    return (
        isinstance(message, dict)
        and isinstance(message.get("content"), str)
        and isinstance(role := message.get("role"), str)
        and len(role) <= 64
    )


# ---- tools and structured output


def _tool_name(value: object, path: str) -> None:
    string(64, minimum=1, null=False)(value, path)
    assert isinstance(value, str)
    if not all(c.isascii() and (c.isalnum() or c in "_-.") for c in value):
        invalid(path, "a function's name may hold letters, digits, '_', '-' and '.' only.")


def _tool(tool: object, path: str) -> None:
    mapping({"type": string(64)}, null=False)(tool, path)
    assert isinstance(tool, dict)
    function = tool.get("function")
    if function is None:
        if tool.get("type", "function") == "function":
            missing(f"{path}.function")
        return
    mapping(
        {
            "name": _tool_name,
            "description": string(100_000),
            "parameters": either("an object", dict=small_json(20_000)),
            "strict": boolean,
        },
        required=("name",),
    )(function, f"{path}.function")


def _schema(value: object, path: str) -> None:
    small_json(5_000)(value, "response_format")
    try:
        size = len(orjson.dumps(value))
    except TypeError:
        too_deep()
    if size > 512 * 1024:
        invalid("response_format", f"the schema has {size} bytes; at most {512 * 1024} are accepted.")


def _response_format(value: object, path: str) -> None:
    mapping(
        {
            "type": one_of("text", "json_object", "json_schema", "structural_tag"),
            "json_schema": mapping({"name": string(256), "schema": either("an object", dict=_schema, bool=boolean)}),
        },
        required=("type",),
    )(value, path)
    if isinstance(value, dict) and value.get("type") == "json_schema":
        holder = value.get("json_schema")
        if not isinstance(holder, dict) or holder.get("schema") is None:
            fail(
                "missing_required_parameter",
                path,
                f"Missing required parameter: '{path}.json_schema.schema'.",
            )


def _bounded_pattern(value: object, path: str) -> None:
    if isinstance(value, str):
        if len(value) > 10_000:
            invalid("structured_outputs", f"a pattern of {len(value)} characters; at most 10000 are accepted.")
        if _nested_repeats(value):
            invalid("structured_outputs", "the pattern repeats a group that repeats: it could take forever to compile.")


def _nested_repeats(pattern: str) -> bool:
    """Whether a group that contains + or * is itself repeated by + or *: the classic exponential pattern."""
    repeats: list[bool] = [False]
    in_class = escaped = False
    for i, c in enumerate(pattern):
        following = pattern[i + 1 : i + 2]
        if escaped:
            escaped = False
        elif c == "\\":
            escaped = True
        elif in_class:
            in_class = c != "]"
        elif c == "[":
            in_class = True
        elif c == "(":
            repeats.append(False)
        elif c == "|" and len(repeats) > 1:
            repeats[-1] = True
        elif c == ")" and len(repeats) > 1:
            inner = repeats.pop()
            if inner and following in ("+", "*", "{"):
                return True
            repeats[-1] = repeats[-1] or inner
        elif c in "+*":
            repeats[-1] = True
    return False


_structured: Final = mapping(
    {
        "regex": _bounded_pattern,
        "grammar": _bounded_pattern,
        "choice": array(string(10_000), 5_000, minimum=1),
        "json": either("an object or a string", dict=_schema, str=string(512 * 1024)),
    }
)


# ---- single fields with rules of their own


def _logit_bias(value: object, path: str) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        wrong_type(value, path, "an object")
    if len(value) > 1024:
        invalid(path, f"expected at most 1024 entries, but got {len(value)} instead.")
    for token, bias in value.items():
        if not token.isascii() or not token.isdigit():
            invalid(path, f"its keys are token ids, not '{shown(token)}'.")
        if not isinstance(bias, int | float) or isinstance(bias, bool) or not -100 <= bias <= 100:
            invalid(path, f"its values are numbers from -100 to 100, not {shown(bias)}.")


def _metadata(value: object, path: str) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        wrong_type(value, path, "an object")
    if len(value) > 16:
        invalid(path, f"expected at most 16 entries, but got {len(value)} instead.")
    for name, text in value.items():
        if not isinstance(text, str):
            wrong_type(text, path, "an object whose values are strings")
        if len(text) > 512:
            too_long(f"{path}.{shown(name)}", 512, len(text))


def _modalities(value: object, path: str) -> None:
    array(string(32, null=False), 8)(value, path)
    if isinstance(value, list) and value not in (["text"], []):
        invalid(path, "only ['text'] is supported.")


def _prompt_ids(value: list[Any], path: str) -> None:
    if all_within(value, 0, MAX_TOKEN_ID):
        return
    _plain(value, path, (int, float))
    token = integer(0, MAX_TOKEN_ID, null=False)
    for i, one in enumerate(value):
        token(one, f"{path}[{i}]" if i < 8 else path)


def _prompt(value: object, path: str) -> None:
    """A string, an array of strings, of token ids, or of arrays of token ids."""
    if value is None:
        missing(path)
    if isinstance(value, str):
        return
    if not isinstance(value, list):
        wrong_type(value, path, "a string or an array")
    bounded(value, path, MAX_TOKENS, 1)
    first = value[0]
    if isinstance(first, int | float) and not isinstance(first, bool):
        _prompt_ids(value, path)
        return
    bounded(value, path, MAX_PROMPTS)
    if isinstance(first, str):
        _plain(value, path, (str,))
        return
    if isinstance(first, list):
        _plain(value, path, (list,))
        for i, ids in enumerate(value):
            bounded(ids, path if not i else f"{path}[{i}]", MAX_TOKENS, 1)
            _prompt_ids(ids, f"{path}[{i}]")
        return
    wrong_type(first, path, "strings or token ids")


def _plain(value: list[Any], path: str, types: tuple[type, ...]) -> None:
    for one in value:
        if type(one) not in types:
            wrong_type(one, path, f"an array of one kind: {' or '.join(type_name[t] for t in types)} in each place")


def _input(value: object, path: str) -> None:
    """The input of an embedding: as a prompt, but nothing empty, and whole token ids."""
    if isinstance(value, str) and not value:
        invalid(path, "it must not be empty.")
    if isinstance(value, list) and value and isinstance(value[0], float):
        wrong_type(value[0], path, "strings or token ids")
    _prompt(value, path)


def _content(value: object, path: str) -> None:
    """A text, or an object whose `content` holds parts as a message does: what pooling models compare."""
    if not isinstance(value, dict | str | list):
        wrong_type(value, path, "a string or an object")
    parts = value.get("content") if isinstance(value, dict) else value
    if isinstance(parts, list):
        for i, part in enumerate(parts):
            if isinstance(part, dict):  # else it is a text or a token's id
                _part(part, f"{path}.content[{i}]")


_documents: Final = either(
    "an array of strings or objects",
    list=array(_content, MAX_PROMPTS, minimum=1),
    dict=_content,
    str=string(MAX_TEXT),
)


def _responses_input(value: object, path: str) -> None:
    if value is None:
        missing(path)
    if isinstance(value, str):
        return
    array(None, 100_000, minimum=1)(value, path)
    assert isinstance(value, list)
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            wrong_type(item, f"{path}[{i}]", "an object")
        for field in ("content", "output"):  # of a message, of a function call
            parts = item.get(field)
            if isinstance(parts, list):
                for j, part in enumerate(parts):
                    if not _is_text(part, "input_text", "output_text"):
                        _responses_part(part, f"{path}[{i}].{field}[{j}]")


def _responses_part(part: object, path: str) -> None:
    if isinstance(part, dict) and part.get("type") in ("reasoning_text", "summary_text"):
        return
    if isinstance(part, dict) and part.get("type") == "input_file":
        if part.get("file_url") is not None:
            _data_url(part["file_url"], f"{path}.file_url", "data:")
        return
    _part(part, path)


def _no_stored_response(value: object, path: str) -> None:
    """Stored answers would have to be kept apart by key; none are stored, so no id can be another's (OWASP API1)."""
    if value is not None:
        raise GatewayError(404, None, "No response with this id was found: responses are not stored here.", param=path)


def _no_background(value: object, path: str) -> None:
    boolean(value, path)
    if value:
        invalid(path, "background responses are not supported.")


def _no_suffix(value: object, path: str) -> None:
    if value is not None:
        invalid(path, "a suffix is not supported by the engine.")


def _stream_options(value: object, path: str) -> None:
    mapping({"include_usage": boolean, "continuous_usage_stats": boolean})(value, path)


# ---- the tables

REFUSED: Final[Mapping[str, Rule]] = dict.fromkeys(
    (
        "kv_transfer_params",
        "ec_transfer_params",
        "prompt_embeds",
        "chat_template",
        "request_id",
        "priority",
        "cache_salt",
        "vllm_xargs",
        "mm_processor_kwargs",
        "media_io_kwargs",
        "use_beam_search",
        "best_of",
        "prompt_logprobs",
        "api_base",
        "base_url",
        "api_key",
        "extra_headers",
    ),
    refused,
)

_COMMON: Final[Mapping[str, Rule]] = {
    **REFUSED,
    "user": string(1024),
    "metadata": _metadata,
    "safety_identifier": string(1024),
    "service_tier": one_of("auto", "default", "flex", "priority", "scale"),
    "stream": boolean,
    "stream_options": _stream_options,
    "chat_template_kwargs": mapping({}),  # which of them a model allows is its config's matter: routing.models
}

_SAMPLING: Final[Mapping[str, Rule]] = {
    **_COMMON,
    "temperature": decimal(0, 2),
    "top_p": decimal(0, 1, above=0),
    "min_p": decimal(0, 1),
    "top_k": integer(-1, MAX_TOKEN_ID),
    "frequency_penalty": decimal(-2, 2),
    "presence_penalty": decimal(-2, 2),
    "repetition_penalty": decimal(0, 100, above=0),
    "length_penalty": decimal(-100, 100),
    "n": integer(1, 128),
    "seed": integer(-(2**63), 2**63 - 1),
    "max_tokens": integer(1, MAX_TOKENS),
    "min_tokens": integer(0, MAX_TOKENS),
    "stop": either(
        "a string or an array of strings", str=string(256), list=array(string(256, minimum=1, null=False), 4)
    ),
    "stop_token_ids": integers(0, MAX_TOKEN_ID, 128),
    "bad_words": array(string(256, null=False), 128),
    "allowed_token_ids": integers(0, MAX_TOKEN_ID, 65_536),
    "logit_bias": _logit_bias,
    "ignore_eos": boolean,
    "skip_special_tokens": boolean,
    "spaces_between_special_tokens": boolean,
    "include_stop_str_in_output": boolean,
    "return_token_ids": boolean,
    "return_tokens_as_token_ids": boolean,
    "truncate_prompt_tokens": integer(-1, MAX_TOKENS),
    "echo": boolean,
    "add_special_tokens": boolean,
    "response_format": _response_format,
    "structured_outputs": _structured,
}

_CHAT_TEMPLATE: Final[Mapping[str, Rule]] = {
    "add_generation_prompt": boolean,
    "continue_final_message": boolean,
    "documents": array(mapping({}, null=False), 1024),
}

CHAT: Final[Mapping[str, Rule]] = {
    **_SAMPLING,
    **_CHAT_TEMPLATE,
    "messages": _messages,
    "max_completion_tokens": integer(1, MAX_TOKENS),
    "logprobs": boolean,
    "top_logprobs": integer(0, 20),
    "tools": array(_tool, 1000, minimum=1),
    "tool_choice": either("a string or an object", str=one_of("none", "auto", "required"), dict=mapping({})),
    "parallel_tool_calls": boolean,
    "reasoning_effort": string(32),
    "include_reasoning": boolean,
    "modalities": _modalities,
}

COMPLETIONS: Final[Mapping[str, Rule]] = {
    **_SAMPLING,
    "prompt": _prompt,
    "logprobs": integer(0, 5),
    "suffix": _no_suffix,
}

_POOLING: Final[Mapping[str, Rule]] = {
    **_COMMON,
    "truncate_prompt_tokens": integer(-1, MAX_TOKENS),
    "encoding_format": one_of("float", "base64", "bytes", "bytes_only"),
    "dimensions": integer(1, 1_000_000),
    "add_special_tokens": boolean,
    "normalize": boolean,
    "use_activation": boolean,
    "top_n": integer(0, 1_000_000),
}

EMBEDDINGS: Final[Mapping[str, Rule]] = {**_POOLING, **_CHAT_TEMPLATE, "input": _input, "messages": _messages}
RERANK: Final[Mapping[str, Rule]] = {
    **_POOLING,
    "query": either("a string or an object", str=string(MAX_TEXT), dict=_content),
    "documents": _documents,
}
_texts: Final = either(
    "a string, an array or an object", str=string(MAX_TEXT), list=array(_content, MAX_PROMPTS, minimum=1), dict=_content
)
SCORE: Final[Mapping[str, Rule]] = {
    **_POOLING,
    **dict.fromkeys(("text_1", "text_2", "queries", "documents", "items", "data_1", "data_2"), _texts),
}
CLASSIFY: Final[Mapping[str, Rule]] = {**_POOLING, **_CHAT_TEMPLATE, "input": _input, "messages": _messages}

RESPONSES: Final[Mapping[str, Rule]] = {
    **_COMMON,
    "input": _responses_input,
    "instructions": string(MAX_TEXT),
    "max_output_tokens": integer(1, MAX_TOKENS),
    "temperature": decimal(0, 2),
    "top_p": decimal(0, 1, above=0),
    "top_logprobs": integer(0, 20),
    "tools": array(mapping({}, null=False), 1000),
    "parallel_tool_calls": boolean,
    "background": _no_background,
    "previous_response_id": _no_stored_response,
}

MESSAGES: Final[Mapping[str, Rule]] = {
    **_COMMON,
    "messages": array(_anthropic_message, 100_000, minimum=1, null=False),
    "system": either("a string or an array", str=string(MAX_TEXT), list=array(mapping({}, null=False), 1024)),
    "max_tokens": integer(1, MAX_TOKENS),
    "temperature": decimal(0, 2),
    "top_p": decimal(0, 1),
    "top_k": integer(-1, MAX_TOKEN_ID),
    "stop_sequences": array(string(256, minimum=1, null=False), 4),
    "tools": array(mapping({}, null=False), 1000),
}

TOKENIZE: Final[Mapping[str, Rule]] = {
    **_COMMON,
    **_CHAT_TEMPLATE,
    "prompt": string(MAX_TEXT),
    "messages": _messages,
    "add_special_tokens": boolean,
    "return_token_strs": boolean,
}
DETOKENIZE: Final[Mapping[str, Rule]] = {
    **_COMMON,
    "tokens": integers(0, MAX_TOKEN_ID, MAX_TOKENS, null=False),
}
