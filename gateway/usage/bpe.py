"""A model's byte-level BPE tokenizer, built from its tokenizer.json for counting with tiktoken.

tiktoken merges two neighbours whenever their bytes together are a token, in the order of the tokens; the model's own
tokenizer merges only the pairs of its list, in the order of that list. `load` proves that both come to the same for
every text, or refuses.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, Final

from tiktoken import Encoding

_MAX_PART: Final = 500_000  # characters; tiktoken's regex engine panics at a run of 990 000 spaces


class Unsupported(Exception):  # noqa: N818 - a finding, not a fault
    """This tokenizer cannot be reproduced exactly; the message says why."""


class Uncountable(Exception):  # noqa: N818 - a finding about a text
    """A text that a tokenizer which is supported may still split otherwise."""


class Tokenizer:
    """Counts the tokens of a text, added tokens within it as one each. Thread-safe; lets other threads run meanwhile."""

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        unknown: frozenset[int],
        added: re.Pattern[str] | None,
        added_normalized: re.Pattern[str] | None,
        *,
        nfc: bool,
        around: int,
    ) -> None:
        self._encode = encode
        self._unknown = unknown  # bytes that are no tokens: the model's own tokenizer drops them
        self._added = added
        self._added_normalized = added_normalized
        self._nfc = nfc
        self.around = around  # special tokens that are put before and behind a prompt

    def count(self, text: str) -> int:
        """Raises Uncountable."""
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
                raise Uncountable("too long")
            try:
                tokens = self._encode(part)
            except BaseException as error:
                if type(error).__name__ != "PanicException":
                    raise
                # tiktoken's regex engine gives up by a panic, which is no Exception and has no class to import.
                raise Uncountable("too hard for the regular expression") from error
            if not self._unknown.isdisjoint(tokens):
                raise Uncountable("holds bytes that the model does not know")
            total += len(tokens)
        return total


def load(tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> Tokenizer:
    """From the contents of tokenizer.json and tokenizer_config.json. Takes up to a second for a large vocabulary.

    Raises Unsupported; KeyError, TypeError and the like for files that are not what they are called.
    """
    nfc = _normalizes(tokenizer["normalizer"])
    pattern = _pattern(tokenizer["pre_tokenizer"])
    _check_class(config, nfc, pattern)
    around = _around(tokenizer["post_processor"])
    if around != _around_by_config(config, around):
        raise Unsupported(
            "tokenizer.json and tokenizer_config.json differ in the special tokens they put around a text"
        )
    added, added_normalized = _added_tokens(tokenizer["added_tokens"], config)
    ranks = _ranks(tokenizer["model"])
    encoding = Encoding("penstock", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    ranks.clear()  # Encoding keeps it for decoding only: some megabytes
    unknown = frozenset(b for character, b in _alphabet().items() if character not in tokenizer["model"]["vocab"])
    return Tokenizer(encoding.encode_ordinary, unknown, added, added_normalized, nfc=nfc, around=around)


# --- around the merging: normalizer, pre-tokenizer, special tokens ---------------------------------------------------

# `++` and the second alternative for spaces spare the regex engine its backtracking; they match the same.
_GPT2: Final = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# What comes of GPT-2's pattern on the pieces between numbers: for it, they are the end of the text.
_GPT2_BETWEEN_NUMBERS: Final = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?![^\s\p{N}])|\s"
_QWEN2: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What means the same in Oniguruma's regular expressions (tokenizer.json) and in Rust's (tiktoken).
_PORTABLE: Final = re.compile(
    r"""(?:
        \\[pP]\{\w+\} | \\[sSdrnt] | \\[^\w\s]
        | \[ \^? (?: \\[pP]\{\w+\} | \\[sSdrnt] | \\[^\w\s] | -(?!-) | [^\\\[\]^&~-] )+ \]
        | \( (?: \?(?:i?:|[!=]) | (?!\?) )
        | \} (?!\+)
        | [^\\\[\](}^$]
    )*""",
    re.VERBOSE,
)


def _normalizes(normalizer: Mapping[str, Any] | None) -> bool:
    """Whether texts are brought to NFC."""
    match normalizer:
        case None:
            return False
        case {"type": "NFC"}:
            return True
    raise Unsupported(f"its normalizer is {normalizer['type']}")


def _pattern(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """The regular expression whose matches are the pieces of a text."""
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": steps}:
            pass
        case _:
            steps = [pre_tokenizer]
    match steps:
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return _GPT2
        case [
            {"type": "Digits", "individual_digits": bool(single)},
            {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False},
        ]:
            return (r"\p{N}|" if single else r"\p{N}++|") + _GPT2_BETWEEN_NUMBERS
        case [
            {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ] if _PORTABLE.fullmatch(pattern):
            return _with_gaps(pattern)
    raise Unsupported("its pre-tokenizer has no equal in one regular expression")


def _with_gaps(pattern: str) -> str:
    """Also matches what lies between the matches of `pattern`: pieces too, where tiktoken would drop them."""
    return rf"{pattern}|(?:(?!{pattern})[\s\S])+"


def _check_class(config: Mapping[str, Any], nfc: bool, pattern: str) -> None:
    """transformers takes some classes' normalizer and pre-tokenizer from its own code, whatever the file says."""
    name = config.get("tokenizer_class")
    match name:
        case "TokenizersBackend" | "PreTrainedTokenizerFast":
            same = True
        case "GPT2Tokenizer" | "GPT2TokenizerFast":
            same = (nfc, pattern) == (False, _GPT2)
        case "Qwen2Tokenizer" | "Qwen2TokenizerFast":
            same = (nfc, pattern) == (True, _with_gaps(_QWEN2))
        case _:
            same = False
    if not same or "auto_map" in config:
        raise Unsupported(f"its class, {name}, may do otherwise than its tokenizer.json says")


def _around(post_processor: Mapping[str, Any] | None) -> int:
    """Special tokens put before and behind a text."""
    match post_processor:
        case None | {"type": "ByteLevel"}:
            return 0
        case {"type": "TemplateProcessing", "single": list(items), "special_tokens": dict(special)}:
            return sum(len(special[item["SpecialToken"]["id"]]["ids"]) for item in items if "SpecialToken" in item)
        case {"type": "Sequence", "processors": list(processors)}:
            return sum(map(_around, processors))
    raise Unsupported(f"its post-processor is {post_processor['type']}")


def _around_by_config(config: Mapping[str, Any], default: int) -> int:
    flags = [config.get("add_bos_token"), config.get("add_eos_token")]
    return default if flags == [None, None] else sum(map(bool, flags))


def _added_tokens(
    tokens: Iterable[Mapping[str, Any]], config: Mapping[str, Any]
) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
    """The added tokens to be looked for in a text as it comes, and those for the normalized one."""
    found: dict[str, tuple[bool, ...]] = {}
    for token in chain(tokens, config.get("added_tokens_decoder", {}).values(), _named(config)):
        flags = tuple(bool(token.get(flag)) for flag in ("normalized", "lstrip", "rstrip", "single_word"))
        if any(flags[1:]):
            raise Unsupported(f"its token {token['content']} depends on what stands around it")
        if found.setdefault(token["content"], flags) != flags and "normalized" in token:
            raise Unsupported(f"its token {token['content']} is defined twice, differently")
    return (
        _any_of(content for content, (normalized, *_) in found.items() if not normalized),
        _any_of(content for content, (normalized, *_) in found.items() if normalized),
    )


def _named(config: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """The tokens that a configuration gives a role: they are added too where they are not yet."""
    for key, value in config.items():
        if key.endswith("_token") or key in ("additional_special_tokens", "extra_special_tokens"):
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, str):
                    yield {"content": one}
                elif isinstance(one, Mapping):
                    yield one


def _any_of(contents: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(filter(None, contents), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


# --- the merging -----------------------------------------------------------------------------------------------------


def _alphabet() -> dict[str, int]:
    """GPT-2's way to write each byte as a printable character, read backwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _ranks(model: Mapping[str, Any]) -> dict[bytes, int]:
    """Every token's bytes, and when it is merged. Raises Unsupported where that alone would not give the same tokens."""
    if (
        model["type"] != "BPE"
        or model.get("dropout")
        or model.get("byte_fallback")
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
    ):
        raise Unsupported("it is no plain BPE")
    alphabet = _alphabet()
    vocab, whole_first = model["vocab"], bool(model.get("ignore_merges"))
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    try:
        pairs = [(bytes(map(alphabet.__getitem__, a)), bytes(map(alphabet.__getitem__, b))) for a, b in merges]
    except KeyError:
        raise Unsupported("it is not byte-level") from None

    ranks = {bytes([byte]): byte for byte in range(256)}
    for left, right in pairs:
        if ranks.setdefault(left + right, len(ranks)) != len(ranks) - 1:
            raise Unsupported("its merges do not stand in the order of its tokens")
    if whole_first:
        for token in vocab:
            if all(character in alphabet for character in token):
                ranks.setdefault(bytes(map(alphabet.__getitem__, token)), len(ranks))
    _check_merges(ranks, pairs, whole_first=whole_first)
    return ranks


def _check_merges(ranks: Mapping[bytes, int], pairs: Iterable[tuple[bytes, bytes]], *, whole_first: bool) -> None:
    """Raises Unsupported unless merging by `ranks` alone does what merging by `pairs` does.

    A token is safe if its own bytes, alone, are merged to it: wherever two neighbours have those bytes and nothing
    earlier is left to merge, they are the pair that the list names; for were they others, the token's bytes alone would
    have come to those others too. It is also safe if the list names every pair that has its bytes, and a piece that
    equals it is not merged at all (`whole_first`).
    """
    merged: dict[tuple[int, int], int] = {}
    named: dict[int, list[tuple[int, int]]] = {}
    for left, right in pairs:
        pair, rank = (ranks[left], ranks[right]), ranks[left + right]
        merged[pair] = rank
        named.setdefault(rank, []).append(pair)
    made = {byte: (byte, byte) for byte in range(256)}  # token made of its own bytes alone → its last pair
    for token, rank in ranks.items():
        if rank in made:
            continue
        for pair in named.get(rank, ()):
            if pair[0] in made and pair[1] in made and _meet(*pair, rank, merged, made):
                made[rank] = pair
                break
        else:
            if not whole_first or not _named_wholly(token, named.get(rank, []), ranks):
                raise Unsupported("its merges cannot be told from its tokens")


def _meet(
    left: int, right: int, before: int, merged: Mapping[tuple[int, int], int], made: Mapping[int, tuple[int, int]]
) -> bool:
    """Whether the bytes of two tokens, side by side, come to just these two if merged by what ranks lower than `before`.

    Goes back in time: undoes the later of the two that meet in the middle, and looks whether what then met there would
    have been merged before. Of equals, the one on the left is merged first.
    """
    while merged.get((left, right), before) >= before:
        if max(left, right) < 256:
            return True
        if left > right:
            before, left = left, made[left][1]
        else:
            before, right = right + 1, made[right][0]
    return False


def _named_wholly(token: bytes, pairs: list[tuple[int, int]], ranks: Mapping[bytes, int]) -> bool:
    """Whether `pairs` are all there are for a token, and never two of them overlap, so that their order matters."""
    halves = ((ranks.get(token[:n]), ranks.get(token[n:])) for n in range(1, len(token)))
    possible = {(left, right) for left, right in halves if left is not None and right is not None}
    overlapping = {left for left, _ in pairs} & {right for _, right in pairs}
    return possible == set(pairs) and not (overlapping and len(pairs) > 1)
