"""A model's byte-level BPE tokenizer, built from its tokenizer.json for counting with tiktoken.

tiktoken merges two neighbours whenever their bytes together are a token, in the order of the tokens; the model's own
tokenizer merges only the pairs of its list, in the order of that list. `load` proves that both come to the same for
every text, or refuses.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, Final

from tiktoken import Encoding

_MAX_PART: Final = 500_000  # characters; tiktoken's regex engine panics at a run of 990 000 spaces


class Unsupported(Exception):  # noqa: N818 - a finding, not a fault
    """This tokenizer cannot be reproduced exactly; the message says why."""


class TooLong(Exception):  # noqa: N818 - a finding about a text
    """A text that tiktoken could fail on."""


class Tokenizer:
    """Counts the tokens of a text, added tokens within it as one each. Thread-safe; lets other threads run meanwhile."""

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        added: re.Pattern[str] | None,
        added_normalized: re.Pattern[str] | None,
        *,
        nfc: bool,
        around: int,
    ) -> None:
        self._encode = encode
        self._added = added
        self._added_normalized = added_normalized
        self._nfc = nfc
        self.around = around  # special tokens that are put before and behind a prompt

    def count(self, text: str) -> int:
        """Raises TooLong, and UnicodeEncodeError on lone surrogates."""
        parts = self._added.split(text) if self._added else [text]
        total = len(parts) - 1
        for part in parts:
            if part:
                total += self._count_part(unicodedata.normalize("NFC", part) if self._nfc else part)
        return total

    def _count_part(self, text: str) -> int:
        parts = self._added_normalized.split(text) if self._added_normalized else [text]
        total = len(parts) - 1
        for part in parts:
            if len(part) > _MAX_PART:
                raise TooLong(f"a part of {len(part)} characters")
            total += len(self._encode(part))
        return total


def load(tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> Tokenizer:
    """From the contents of tokenizer.json and tokenizer_config.json. Takes up to a second for a large vocabulary.

    Raises Unsupported; KeyError, TypeError and the like for a file that is no tokenizer.json.
    """
    nfc = _normalizer(tokenizer.get("normalizer"))
    pattern = _pattern(tokenizer.get("pre_tokenizer"))
    _check_class(config, nfc=nfc, pattern=pattern)
    around = _around(tokenizer.get("post_processor"))
    if ("add_bos_token" in config or "add_eos_token" in config) and around != sum(
        bool(config.get(f"add_{name}_token")) and config.get(f"{name}_token") is not None for name in ("bos", "eos")
    ):
        raise Unsupported("tokenizer_config.json and tokenizer.json differ in the special tokens they add")
    raw, normalized = _added_tokens(tokenizer.get("added_tokens") or [], config)
    ranks = _ranks(tokenizer["model"])
    encoding = Encoding("penstock", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    ranks.clear()  # Encoding keeps it for decoding only: some megabytes
    return Tokenizer(encoding.encode_ordinary, raw, normalized, nfc=nfc, around=around)


# --- the text before it is merged: normalizer, added tokens, pre-tokenizer -------------------------------------------


def _normalizer(spec: Mapping[str, Any] | None) -> bool:
    """Whether texts are brought to NFC."""
    match spec:
        case None | {"type": "Sequence", "normalizers": []}:
            return False
        case {"type": "NFC"} | {"type": "Sequence", "normalizers": [{"type": "NFC"}]}:
            return True
    raise Unsupported(f"normalizer {spec.get('type')}")


def _added_tokens(
    tokens: list[Mapping[str, Any]], config: Mapping[str, Any]
) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
    """The added tokens that are looked for in a text as it comes, and those looked for in the normalized one."""
    flags: dict[str, tuple[bool, ...]] = {}
    for token in chain(tokens, (config.get("added_tokens_decoder") or {}).values()):
        found = tuple(bool(token.get(flag)) for flag in ("lstrip", "rstrip", "single_word", "normalized"))
        if any(found[:3]):
            raise Unsupported(f"added token {token['content']} takes in what stands around it")
        if flags.setdefault(token["content"], found) != found:
            raise Unsupported(f"added token {token['content']} is described twice, and differently")
    for value in config.values():
        named = [value] if isinstance(value, str | dict) else value if isinstance(value, list) else []
        del named
    return (
        _any_of(content for content, found in flags.items() if not found[3]),
        _any_of(content for content, found in flags.items() if found[3]),
    )
