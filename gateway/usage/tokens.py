"""Prompt tokens counted without the engine, with the model's own vocabulary and chat template."""

import ctypes
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from gateway.usage import bpe
from gateway.usage.prompt import CannotCount
from gateway.usage.template import CannotRender, ChatTemplate

_log = logging.getLogger(__name__)

# Models whose chats, or tokens, vLLM makes with code of its own.
_OWN_CODE: Final = frozenset(
    [
        "DeepseekV32ForCausalLM",
        "DeepseekV41ForCausalLM",
        "DeepseekV4ForCausalLM",
        "DeepseekV4ForConditionalGeneration",
        "GptOssForCausalLM",
        "InklingForCausalLM",
        "InklingForConditionalGeneration",
        "KimiK3ForConditionalGeneration",
        "MoonshotKimiaForCausalLM",
    ]
)

# What transformers' own tokenizer classes take where tokenizer_config.json says nothing.
_CLASS_DEFAULTS: Final[Mapping[str, Mapping[str, str]]] = {
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
}


class TokenCounter:
    """Counts as vLLM does. Thread-safe; CPU-bound, and lets other threads run while it counts (not while it renders).

    Every method raises CannotCount, and nothing else, whatever the client sent.
    """

    def __init__(self, tokenizer: bpe.Tokenizer, template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._template = template

    def count_chat(self, body: Mapping[str, Any]) -> int:
        """The tokens of a chat request's prompt."""
        if self._template is None:
            raise CannotCount("the model has no chat template")
        try:
            text = self._template.render(body)
        except CannotRender as error:
            raise CannotCount(str(error)) from error
        return self.count_text(text) + (self._tokenizer.around if body.get("add_special_tokens") else 0)

    def count_prompt(self, prompt: object, *, add_special_tokens: bool = True) -> int:
        """The tokens of a completion request's prompt: a text, token ids, or a list of either."""
        match prompt:
            case str() | [int(), *_]:
                prompts: Sequence[object] = [prompt]
            case [_, *_]:
                prompts = prompt
            case _:
                raise CannotCount("neither texts nor token ids")
        around = self._tokenizer.around if add_special_tokens else 0
        total = 0
        for one in prompts:
            match one:
                case str():
                    total += self.count_text(one) + around
                case list():
                    total += len(one)
                case _:
                    raise CannotCount("neither texts nor token ids")
        return total

    def count_text(self, text: str) -> int:
        """The tokens of a text, without those that are put around it."""
        try:
            return self._tokenizer.count(text)
        except bpe.Uncountable as error:
            raise CannotCount(str(error)) from error


def load_counter(model_dir: Path) -> TokenCounter | None:
    """The counter of a local model; None, with the reason logged, where it might ever count otherwise than the engine.

    Reads files and computes for a second or more: not for an event loop that serves.
    """
    try:
        if _has_own_code(model_dir):
            raise bpe.Unsupported("vLLM has code of its own for it")
        config = _config(model_dir)
        tokenizer = bpe.load(orjson.loads((model_dir / "tokenizer.json").read_bytes()), config)
        return TokenCounter(tokenizer, _template(model_dir, config))
    except bpe.Unsupported as unsupported:
        _log.info("%s: prompts are estimated, not counted: %s", model_dir.name, unsupported)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        _log.warning("%s: prompts are estimated, not counted: its tokenizer cannot be read: %r", model_dir.name, error)
    finally:
        # Reading a vocabulary takes far more memory than keeping it, and glibc would not give it back by itself.
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
    return None


def _has_own_code(model_dir: Path) -> bool:
    architectures = _read(model_dir / "config.json").get("architectures") or ()
    return not _OWN_CODE.isdisjoint(architectures) or any(
        path.name == "tekken.json" or path.name.startswith("tokenizer.model.v") for path in model_dir.iterdir()
    )


def _config(model_dir: Path) -> dict[str, Any]:
    """tokenizer_config.json, with what it leaves to older files and to its class."""
    config = _read(model_dir / "tokenizer_config.json")
    defaults = _CLASS_DEFAULTS.get(str(config.get("tokenizer_class")).removesuffix("Fast"), {})
    return {**defaults, **_read(model_dir / "special_tokens_map.json"), **config}


def _template(model_dir: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """None where there is none, or where a multimodal processor may bring another."""
    if (model_dir / "chat_template.json").exists():
        return None
    sources = _template_files(model_dir)
    if not sources:
        match config.get("chat_template"):
            case str(source):
                sources = {"default": source}
            case list(several):
                sources = {one["name"]: one["template"] for one in several}
    if "default" not in sources:
        return None
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    contents = {name: value["content"] if isinstance(value, dict) else value for name, value in named.items()}
    try:
        return ChatTemplate(sources, {name: token for name, token in contents.items() if isinstance(token, str)})
    except CannotRender as error:
        _log.warning("%s: chats are estimated, not counted: %s", model_dir.name, error)
        return None


def _template_files(model_dir: Path) -> dict[str, str]:
    files = {path.stem: path for path in sorted((model_dir / "additional_chat_templates").glob("*.jinja"))}
    files["default"] = model_dir / "chat_template.jinja"
    return {name: path.read_text("utf-8") for name, path in files.items() if path.is_file()}


def _read(path: Path) -> dict[str, Any]:
    return dict(orjson.loads(path.read_bytes())) if path.is_file() else {}
