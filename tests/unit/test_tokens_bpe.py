"""Byte-level BPE: what is accepted counts as the model's own tokenizer does, and the rest is refused."""

import unicodedata
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from gateway.usage import bpe

Spec = dict[str, Any]

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
SPLIT_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def written(text: str | bytes) -> str:
    """A token's bytes as tokenizer.json writes them."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    data = text.encode() if isinstance(text, str) else text
    return "".join(chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in data)


def split(pattern: str) -> list[Spec]:
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, SPLIT_ONLY]


def sequence(*steps: Spec) -> Spec:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def added(content: str, **flags: bool) -> Spec:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False} | flags


def spec(*merges: str | tuple[str, str], **parts: Any) -> Spec:
    """tokenizer.json for merges such as "a b"; `model` adds to the model, anything else replaces a part."""
    pairs = [[written(part) for part in (merge.split(" ") if isinstance(merge, str) else merge)] for merge in merges]
    tokens = [written(bytes([byte])) for byte in range(256)] + ["".join(pair) for pair in pairs]
    model = {"type": "BPE", "vocab": {token: n for n, token in enumerate(tokens)}, "merges": pairs}
    return {
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "post_processor": None,
        "added_tokens": [],
        **parts,
        "model": model | parts.get("model", {}),
    }


def load(tokenizer: Spec, **config: Any) -> bpe.Tokenizer:
    return bpe.load(tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", **config})


# --- merging ---------------------------------------------------------------------------------------------------------


def merged(text: str, merges: list[tuple[str, str]]) -> list[str]:
    """BPE as it is defined: again and again the first pair of the list that there is, the leftmost of them."""
    word = list(text)
    while True:
        pairs = list(pairwise(word))
        found = [(merges.index(pair), at) for at, pair in enumerate(pairs) if pair in merges]
        if not found:
            return word
        _, at = min(found)
        word[at : at + 2] = [word[at] + word[at + 1]]


@st.composite
def merge_lists(draw: st.DrawFn) -> list[tuple[str, str]]:
    tokens = ["a", "b", "c"]
    merges: list[tuple[str, str]] = []
    for left, right in draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=12)):
        pair = tokens[left % len(tokens)], tokens[right % len(tokens)]
        if "".join(pair) not in tokens:
            merges.append(pair)
            tokens.append("".join(pair))
    return merges


@settings(max_examples=150, deadline=None)
@given(merge_lists(), st.lists(st.text("abc", max_size=30), min_size=5, max_size=5))
def test_what_is_accepted_merges_as_the_list_of_merges_says(merges: list[tuple[str, str]], texts: list[str]) -> None:
    try:
        tokenizer = load(spec(*map(" ".join, merges)))
    except bpe.Unsupported:
        return
    assert [tokenizer.count(text) for text in texts] == [len(merged(text, merges)) for text in texts]


@st.composite
def vocabularies(draw: st.DrawFn) -> list[str]:
    return draw(st.lists(st.text("ab", min_size=2, max_size=5), unique=True, max_size=8))


def all_cuts(vocabulary: list[str]) -> list[tuple[str, str]]:
    """The merges of a vocabulary that came without: each token, in order, from any two parts that are tokens."""
    known = {"a", "b", *vocabulary}
    cuts = [(token[:n], token[n:]) for token in vocabulary for n in range(1, len(token))]
    return [cut for cut in cuts if known.issuperset(cut)]


@settings(max_examples=150, deadline=None)
@given(vocabularies(), st.lists(st.text("ab", max_size=14), min_size=5, max_size=5))
def test_a_vocabulary_of_which_pieces_are_looked_up_whole_first_counts_so(
    vocabulary: list[str], texts: list[str]
) -> None:
    merges = all_cuts(vocabulary)
    tokenizer = spec(*map(" ".join, merges), model={"ignore_merges": True})
    tokenizer["model"]["vocab"] |= dict.fromkeys([*vocabulary, "not→bytes"], 9999)
    try:
        counted = load(tokenizer)
    except bpe.Unsupported:
        return
    assert [counted.count(text) for text in texts] == [
        1 if text in vocabulary else len(merged(text, merges)) for text in texts
    ]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_list_that_was_learned_from_texts_is_accepted(data: st.DataObject) -> None:
    learned: list[tuple[str, str]] = []
    for text in data.draw(st.lists(st.text("abc", min_size=2, max_size=8), max_size=12)):
        word = merged(text, learned)
        if len(word) == 2:  # then the new token is what its own bytes come to
            learned.append((word[0], word[1]))
    load(spec(*map(" ".join, learned)))


@pytest.mark.parametrize(
    ("merges", "whole_first"),
    [
        (["b c", "a b", "ab c"], False),  # alone, abc comes to a + bc, which tiktoken would merge
        (["b c", "a b", "ab c"], True),
        (["b a", "a b", "ab ab"], False),  # alone, abab comes to a + ba + b, but tiktoken looks up whole pieces first
    ],
)
def test_merges_that_the_tokens_do_not_tell_are_refused(merges: list[str], whole_first: bool) -> None:
    with pytest.raises(bpe.Unsupported, match="cannot be told"):
        load(spec(*merges, model={"ignore_merges": whole_first}))


def test_a_token_with_parts_that_overlap_is_refused() -> None:
    tokenizer = spec("a aaa", "aaa a", model={"ignore_merges": True})  # in a + aaa + a, which two?
    tokenizer["model"]["vocab"]["aaa"] = 9999
    with pytest.raises(bpe.Unsupported, match="cannot be told"):
        load(tokenizer)


def test_merges_may_be_written_as_strings() -> None:
    assert load(spec(model={"merges": ["a b", "ab c"]})).count("abcab") == 2


@pytest.mark.parametrize(
    ("tokenizer", "why"),
    [
        (spec(model={"type": "Unigram"}), "plain BPE"),
        (spec(model={"dropout": 0.1}), "plain BPE"),
        (spec(model={"byte_fallback": True}), "plain BPE"),
        (spec(model={"continuing_subword_prefix": "##"}), "plain BPE"),
        (spec(model={"end_of_word_suffix": "</w>"}), "plain BPE"),
        (spec(model={"merges": ["▁ a"]}), "not byte-level"),
        (spec("a b", "b c", "a b"), "order"),
        (spec(normalizer={"type": "Lowercase"}), "Lowercase"),
        (spec(pre_tokenizer=None), "pre-tokenizer"),
        (spec(pre_tokenizer=SPLIT_ONLY), "pre-tokenizer"),
        (spec(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}), "pre-tokenizer"),
        (spec(pre_tokenizer=sequence(BYTE_LEVEL, {"type": "Digits", "individual_digits": True})), "pre-tokenizer"),
        (spec(pre_tokenizer=sequence(*split("a"), *split("b"))), "pre-tokenizer"),
        (spec(post_processor={"type": "RobertaProcessing"}), "RobertaProcessing"),
        (spec(added_tokens=[added("<x>", lstrip=True)]), "<x>"),
        (spec(added_tokens=[added("<x>", rstrip=True)]), "<x>"),
        (spec(added_tokens=[added("<x>", single_word=True)]), "<x>"),
        (spec(added_tokens=[added("<x>"), added("<x>", normalized=True)]), "twice"),
    ],
)
def test_what_cannot_be_reproduced_exactly_is_refused_with_the_reason(tokenizer: Spec, why: str) -> None:
    with pytest.raises(bpe.Unsupported, match=why):
        load(tokenizer)


# --- pieces ----------------------------------------------------------------------------------------------------------


DIGITS = sequence({"type": "Digits", "individual_digits": True}, BYTE_LEVEL)
NUMBERS = sequence({"type": "Digits", "individual_digits": False}, BYTE_LEVEL)
QWEN = sequence(*split(QWEN2))


@pytest.mark.parametrize(
    ("pre_tokenizer", "merge", "text", "tokens"),
    [
        (BYTE_LEVEL, ("1", "2"), "12", 1),
        (NUMBERS, ("1", "2"), "12", 1),
        (DIGITS, ("1", "2"), "12", 2),
        (QWEN, ("1", "2"), "12", 2),
        (BYTE_LEVEL, (" ", "1"), " 1", 1),
        (NUMBERS, (" ", "1"), " 1", 2),
        (BYTE_LEVEL, (" ", "a"), "  a", 2),
        (BYTE_LEVEL, (" ", " "), "  a", 3),  # the last space belongs to the word
        (DIGITS, (" ", " "), "  a", 3),
        (BYTE_LEVEL, (" ", " "), "  1", 3),
        (DIGITS, (" ", " "), "  1", 2),  # but not to a number that was split off before
        (BYTE_LEVEL, (" ", " "), "  ", 1),
        (DIGITS, (" ", " "), "1  ", 2),
        (BYTE_LEVEL, ("a", "!"), "a!", 2),
        (QWEN, ("!", "a"), "!a", 1),
        (BYTE_LEVEL, ("!", "a"), "!a", 2),
        (QWEN, ("!", "\n"), "!\n", 1),
        (BYTE_LEVEL, ("'", "S"), "a'S", 3),
        (QWEN, ("'", "S"), "a'S", 2),
        (sequence(*split("b")), ("a", "c"), "acbac", 3),  # what a pattern does not match are pieces too
        (sequence(*split("b")), ("b", "a"), "ba", 2),
    ],
)
def test_texts_are_cut_into_pieces_as_the_pre_tokenizer_says(
    pre_tokenizer: Spec, merge: tuple[str, str], text: str, tokens: int
) -> None:
    assert load(spec(merge, pre_tokenizer=pre_tokenizer)).count(text) == tokens


@pytest.mark.parametrize(
    "pattern",
    [
        "^a",
        "a$",
        r"\w+",
        r"\bx",
        r"\p{N}{1,3}+",
        "[[:alpha:]]",
        "[a&&b]",
        "[a--b]",
        "(?<=a)b",
        "(?>a)",
        "(?s:.)",
        r"(a)\1",
    ],
)
def test_a_pattern_that_may_mean_something_else_in_rust_is_refused(pattern: str) -> None:
    with pytest.raises(bpe.Unsupported):
        load(spec(pre_tokenizer=sequence(*split(pattern))))


# --- around the pieces -----------------------------------------------------------------------------------------------


def test_added_tokens_count_as_one_the_longest_first() -> None:
    tokenizer = load(spec(added_tokens=[added("<s>"), added("<s>x"), added("")]))
    assert [tokenizer.count(text) for text in ("<s>", "<s>x", "a<s>b<s>x", "<s", "")] == [1, 1, 4, 2, 0]


def test_tokens_with_a_role_are_added_tokens_too() -> None:
    tokenizer = load(
        spec(),
        bos_token="<b>",
        eos_token={"content": "<e>"},
        pad_token=None,
        add_prefix_space=False,
        additional_special_tokens=["<m>"],
        added_tokens_decoder={"7": added("<n>")},
    )
    assert tokenizer.count("<b><e><m><n>") == 4


def test_texts_are_normalized_but_for_the_added_tokens_in_them() -> None:
    decomposed, composed = unicodedata.normalize("NFD", "é"), "é"
    tokenizer = load(spec(normalizer={"type": "NFC"}, added_tokens=[added("<s>"), added(composed, normalized=True)]))
    assert tokenizer.count(decomposed) == 1
    assert tokenizer.count("<s>\u0338") == 3  # would be another character together with the >
    assert load(spec()).count(decomposed) == 3


@pytest.mark.parametrize(
    ("post_processor", "around"),
    [
        (None, 0),
        ({"type": "ByteLevel"}, 0),
        (
            {
                "type": "Sequence",
                "processors": [
                    {"type": "ByteLevel"},
                    {
                        "type": "TemplateProcessing",
                        "single": [{"SpecialToken": {"id": "<b>"}}, {"Sequence": {"id": "A"}}],
                        "special_tokens": {"<b>": {"ids": [1]}},
                    },
                ],
            },
            1,
        ),
    ],
)
def test_special_tokens_around_a_text(post_processor: Spec | None, around: int) -> None:
    tokenizer = spec(post_processor=post_processor)
    assert load(tokenizer).around == around
    assert load(tokenizer, add_bos_token=bool(around), add_eos_token=False).around == around
    with pytest.raises(bpe.Unsupported, match="around"):
        load(tokenizer, add_bos_token=not around)


@pytest.mark.parametrize(
    ("config", "parts", "accepted"),
    [
        ({"tokenizer_class": "TokenizersBackend"}, {"pre_tokenizer": DIGITS}, True),
        ({"tokenizer_class": "TokenizersBackend", "auto_map": {}}, {}, False),
        ({"tokenizer_class": "GPT2TokenizerFast"}, {}, True),
        ({"tokenizer_class": "GPT2Tokenizer"}, {"pre_tokenizer": DIGITS}, False),
        ({"tokenizer_class": "Qwen2Tokenizer"}, {"pre_tokenizer": QWEN, "normalizer": {"type": "NFC"}}, True),
        ({"tokenizer_class": "Qwen2TokenizerFast"}, {"pre_tokenizer": QWEN}, False),
        ({"tokenizer_class": "LlamaTokenizerFast"}, {}, False),
        ({"tokenizer_class": None}, {}, False),
    ],
)
def test_a_class_that_does_not_go_by_the_file_must_agree_with_it(config: Spec, parts: Spec, accepted: bool) -> None:
    if accepted:
        load(spec(**parts), **config)
    else:
        with pytest.raises(bpe.Unsupported, match="class"):
            load(spec(**parts), **config)


# --- texts that cannot be counted ------------------------------------------------------------------------------------


def test_bytes_that_are_no_tokens_cannot_be_counted() -> None:
    tokenizer = spec()
    del tokenizer["model"]["vocab"][written("\x06")]
    counter = load(tokenizer)
    assert counter.count("a\x07b") == 3
    with pytest.raises(bpe.Uncountable):
        counter.count("a\x06b")


def test_a_text_on_which_the_regex_engine_could_fail_is_not_tried() -> None:
    tokenizer = load(spec((" ", " "), added_tokens=[added("<s>")]))
    with pytest.raises(bpe.Uncountable):
        tokenizer.count(" " * 600_000)
    assert tokenizer.count(" " * 400_000 + "<s>" + " " * 400_000) == 400_001


def test_a_panic_of_the_regex_engine_is_no_count() -> None:
    tokenizer = load(spec(pre_tokenizer=sequence(*split("(?:a|a)+(?!a)b"))))
    with pytest.raises(bpe.Uncountable):
        tokenizer.count("a" * 40)


def test_any_other_failure_is_not_swallowed() -> None:
    def interrupted(_: str) -> list[int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bpe.Tokenizer(interrupted, frozenset(), None, None, nfc=False, around=0).count("a")
