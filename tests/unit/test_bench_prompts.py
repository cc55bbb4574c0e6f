"""Prompts of a load test: lengths, datasets, shared beginnings. The same seed gives the same requests."""

import json
import random
from typing import Any

import pytest
from hypothesis import given, strategies as st

from gateway.bench.prompts import (
    Calibration,
    Dataset,
    Item,
    Lengths,
    Synthetic,
    Turn,
    parse_dataset,
    plain_text,
    slice_round,
    user_turns,
    with_prefix,
)

FIVE = Lengths.parse("5")


def words(turn: Turn) -> int:
    return len(plain_text(turn.messages).split())


@pytest.mark.parametrize(
    ("text", "low", "high", "mean"),
    [
        ("128", 128, 128, 128),
        ("64..256", 64, 256, 160),
        ("mean=512,std=64", 100, 1200, 512),
        ("mean=50,std=0", 50, 50, 50),
    ],
)
def test_lengths(text: str, low: int, high: int, mean: int) -> None:
    rng = random.Random(1)
    drawn = [Lengths.parse(text).draw(rng) for _ in range(4000)]
    assert low <= min(drawn) <= max(drawn) <= high
    assert sum(drawn) / len(drawn) == pytest.approx(mean, rel=0.02)


def test_a_normal_length_is_cut_off() -> None:
    rng = random.Random(1)
    drawn = {Lengths.parse("mean=10, std=20, min=5, max=12").draw(rng) for _ in range(1000)}
    assert drawn == set(range(5, 13))


@pytest.mark.parametrize(
    "text",
    ["", "x", "0", "-4", "9..3", "1..", "1..2..3", "mean=5", "std=5", "mean=5,std=-1", "mean=5,std=1,more=2", "mean=inf,std=1",
     "mean=5,std=1,min=0", "mean=nan,std=1", "1.5"],
)  # fmt: skip
def test_bad_lengths(text: str) -> None:
    with pytest.raises(ValueError, match=r"use 128, 64\.\.256"):
        Lengths.parse(text)


@given(st.floats(-5, 200), st.floats(0.2, 4), st.integers(300, 5000))
def test_calibration_finds_how_an_engine_counts(overhead: float, per_word: float, tokens: int) -> None:
    def counted(n: int) -> int:
        return round(overhead + per_word * n)

    calibration = Calibration.fit((16, counted(16)), (272, counted(272)))
    assert counted(calibration.words(tokens)) == pytest.approx(tokens, rel=0.06)
    assert calibration.plain_words(tokens) * per_word == pytest.approx(tokens, rel=0.06)


def test_an_engine_that_counts_nonsense_does_not_calibrate() -> None:
    assert Calibration.fit((16, 50), (272, 50)) == Calibration()
    assert Calibration(overhead=50).words(20) == 1


def test_synthetic_prompts_have_their_length_and_share_no_beginning() -> None:
    source = Synthetic(Lengths.parse("40"), Lengths.parse("7"))
    talks = [source.conversation(i) for i in range(300)]
    assert {len(talk) for talk in talks} == {1}
    assert {words(talk[0]) for talk in talks} == {40}
    assert {talk[0].max_tokens for talk in talks} == {7}
    assert len({plain_text(talk[0].messages)[:25] for talk in talks}) == 300


def test_the_seed_decides() -> None:
    def prompts(seed: int) -> list[Any]:
        source = Synthetic(Lengths.parse("4..30"), Lengths.parse("1..9"), seed=seed, turns=2)
        return [source.conversation(i) for i in range(10)]

    assert prompts(1) == prompts(1) != prompts(2)


def test_a_prompt_may_be_longer_than_the_pool_of_words() -> None:
    assert words(Synthetic(Lengths.parse("150000"), FIVE).conversation(3)[0]) == 150_000
    assert slice_round("abcd", 3, 10) == list("dabcdabcda")


def test_prefixes_are_shared_in_turn() -> None:
    source = Synthetic(FIVE, FIVE, prefix_tokens=20, prefixes=2, calibration=Calibration(100, 2))
    texts = [plain_text(source.conversation(i)[0].messages) for i in range(4)]
    beginnings = [text.partition("\n\n")[0] for text in texts]
    assert beginnings[0] == beginnings[2] != beginnings[1] == beginnings[3]
    assert len(beginnings[0].split()) == 10
    assert len(set(texts)) == 4


def test_a_prefix_goes_before_content_of_parts_too() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    talk = (Turn(({"role": "user", "content": parts},), None),)
    assert with_prefix(talk, "so")[0].messages[0]["content"] == [{"type": "text", "text": "so"}, *parts]
    assert with_prefix(talk, "") is talk


def lines(*entries: object) -> bytes:
    return b"\n".join(json.dumps(entry).encode() for entry in entries)


SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}
SHAREGPT = [
    {"id": "1", "conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "x"}, {"from": "human", "value": "two"}]},
    {"id": "2", "conversations": [{"from": "gpt", "value": "left out"}, {"from": "human", "value": "x"}]},
    {"id": "3", "conversations": []},
    {"id": "4", "conversations": [{"from": "system", "value": "no human"}]},
]  # fmt: skip


def test_json_lines_and_sharegpt() -> None:
    data = lines({"prompt": "p", "max_tokens": 3}, {"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]}) + b"\n\n"
    assert parse_dataset(data) == [
        Item(({"role": "user", "content": "p"},), 3, whole=True),
        Item((SYSTEM, USER, ANSWER, USER), None, whole=True),
    ]
    (item,) = parse_dataset(b" \n" + json.dumps(SHAREGPT).encode())
    assert [message["content"] for message in item.messages] == ["one", "x", "two"]
    assert not item.whole


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no prompt"),
        (b"[]", "no prompt"),
        (b"{", "line 1 is not JSON"),
        (lines({"prompt": "p"}, {"text": "x"}), 'line 2: expected an object with "prompt"'),
        (lines(7), "line 1: expected"),
        (lines({"prompt": "p", "max_tokens": 0}), "max_tokens"),
        (lines({"messages": [ANSWER]}), "messages"),
        (lines({"messages": [{"role": "user"}]}), "messages"),
        (b"[1", "the file is not JSON"),
        (json.dumps([{"conversations": [{"value": 1}]}]).encode(), "entry 1: .conversations"),
    ],
)
def test_bad_datasets_say_where(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_dataset(data)


def test_a_dataset_is_gone_through_in_an_order_of_the_seed_and_begun_again() -> None:
    items = parse_dataset(lines(*({"prompt": str(n)} for n in range(20))))
    source = Dataset(items, FIVE, seed=1)
    texts = [plain_text(source.conversation(i)[0].messages) for i in range(40)]
    assert texts[:20] == texts[20:]
    assert sorted(texts[:20], key=int) == [str(n) for n in range(20)] != texts[:20]
    assert source.conversation(0)[0].max_tokens == 5
    assert texts != [plain_text(Dataset(items, FIVE, seed=2).conversation(i)[0].messages) for i in range(40)]


def test_one_turn_keeps_a_history_that_was_given_and_several_ask_anew() -> None:
    items = parse_dataset(lines({"messages": [SYSTEM, USER, ANSWER, USER, ANSWER, USER], "max_tokens": 2}))
    assert Dataset(items, None).conversation(0) == (Turn((SYSTEM, USER, ANSWER, USER, ANSWER, USER), 2),)
    assert Dataset(items, None, turns=2).conversation(0) == (Turn((SYSTEM, USER), 2), Turn((USER,), 2))
    assert len(Dataset(items, None, turns=9).conversation(0)) == 3
    sharegpt = parse_dataset(json.dumps(SHAREGPT).encode())
    assert [m["content"] for turn in Dataset(sharegpt, None).conversation(0) for m in turn.messages] == ["one"]
    assert Dataset(sharegpt, None).conversation(0)[0].max_tokens is None
    assert user_turns([ANSWER, SYSTEM]) == []
