"""What is asked: prompts of given lengths, or from a file. Pure and deterministic: the same seed gives the same requests.

A conversation is a tuple of turns; what the model answered goes between them (`load.py`).
"""
# ruff: noqa: S311 - random, not secret

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple, Protocol

import orjson

Message = dict[str, Any]  # role and content, as the chat API takes it


class Turn(NamedTuple):
    messages: tuple[Message, ...]  # what is said before the next answer
    max_tokens: int | None  # None: as many as the server likes


Conversation = tuple[Turn, ...]


class Source(Protocol):
    def conversation(self, index: int) -> Conversation:
        """The same for the same index, never empty."""
        ...


class Lengths(NamedTuple):
    """How many tokens: fixed, evenly spread, or normal and cut off at `low` and `high`."""

    low: int
    high: int
    mean: float = 0
    std: float | None = None  # None: evenly from low to high

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """`128`, `64..256`, or `mean=512,std=64[,min=…][,max=…]`. Raises `ValueError` with what is allowed."""
        try:
            if "=" in text:
                given = {name.strip(): float(value) for name, _, value in (p.partition("=") for p in text.split(","))}
                mean, std = given.pop("mean"), given.pop("std")
                low, high = int(given.pop("min", 1)), int(given.pop("max", mean + 10 * std))
                lengths = cls(low, high, mean, std)
            else:
                low_text, dots, high_text = text.partition("..")
                lengths = cls(int(low_text), int(high_text if dots else low_text))
                given = {}
        except (KeyError, ValueError, OverflowError):
            given = {"": 0}
            lengths = cls(0, 0)
        if given or not 1 <= lengths.low <= lengths.high or (lengths.std or 0) < 0:
            raise ValueError(
                f"'{text}' is no length: use 128, 64..256 or mean=512,std=64[,min=1][,max=1024], each at least 1"
            )
        return lengths

    def draw(self, rng: random.Random) -> int:
        if self.std is None:
            return rng.randint(self.low, self.high)
        return min(max(round(rng.gauss(self.mean, self.std)), self.low), self.high)


class Calibration(NamedTuple):
    """How many tokens the engine counts for words of ours: `overhead + per_word * words`."""

    overhead: float = 0.0  # chat template and the like
    per_word: float = 1.0

    @classmethod
    def fit(cls, few: tuple[int, int], many: tuple[int, int]) -> "Calibration":
        """From two (words, tokens as counted)."""
        per_word = (many[1] - few[1]) / (many[0] - few[0])
        if per_word <= 0:
            return cls()
        return cls(few[1] - per_word * few[0], per_word)

    def words(self, tokens: int) -> int:
        """Words for a prompt of so many tokens in all."""
        return max(1, round((tokens - self.overhead) / self.per_word))

    def plain_words(self, tokens: int) -> int:
        """Words for so many tokens within a prompt."""
        return max(1, round(tokens / self.per_word))


_AS_IT_IS: Final = Calibration()

# Short and common: one token each in most vocabularies, so that calibration only has to trim.
_TEXT: Final = (
    "time year people way day man thing woman life child world school state family student group country problem hand part "
    "place case week company system program question work number night point home water room mother area money story fact "
    "month lot right study book eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city name president team minute idea body information back parent face others level office door "
    "health person art war history party result change morning reason research girl guy moment air teacher force education "
    "good new first last long great little own other old big high different small large next early young important few "
    "public bad same able have say get make go know take see come think look want give use find tell ask seem feel try leave "
    "call keep let begin show hear play run move like live believe hold bring happen write provide sit stand lose pay meet "
    "include continue set learn lead understand watch follow stop create speak read allow add spend grow open walk win offer"
)
_WORDS: Final = _TEXT.split()
_POOL: Final = 1 << 16  # words of random text; a prompt is a slice of it


@dataclass(frozen=True)
class Synthetic:
    """Random words. Two conversations share no beginning but the `prefix_tokens` they are meant to share."""

    prompt: Lengths  # of each user message, with the chat template, without the prefix
    output: Lengths
    seed: int = 0
    turns: int = 1
    prefix_tokens: int = 0
    prefixes: int = 1  # how many different ones, taken in turn
    calibration: Calibration = _AS_IT_IS

    @cached_property
    def _pool(self) -> Sequence[str]:
        return random.Random(f"{self.seed}/pool").choices(_WORDS, k=_POOL)

    def conversation(self, index: int) -> Conversation:
        rng = random.Random(f"{self.seed}/{index}")
        turns = [
            Turn(({"role": "user", "content": self._text(rng)},), self.output.draw(rng)) for _ in range(self.turns)
        ]
        return with_prefix(tuple(turns), shared_prefix(self, index))

    def _text(self, rng: random.Random) -> str:
        words = self.calibration.words(self.prompt.draw(rng))
        unique = rng.choices(_WORDS, k=min(words, 6))  # slices may begin at the same place, these will not
        return " ".join([*unique, *slice_round(self._pool, rng.randrange(_POOL), words - len(unique))])


class Item(NamedTuple):
    """One entry of a dataset."""

    messages: tuple[Message, ...]  # up to the last one of the user
    max_tokens: int | None
    whole: bool  # the messages belong together even when one answer only is asked for


@dataclass(frozen=True)
class Dataset:
    """Entries of a file, in an order that the seed decides, again from the start when they are used up."""

    items: Sequence[Item]
    output: Lengths | None  # for entries that do not say it themselves
    seed: int = 0
    turns: int = 1
    prefix_tokens: int = 0
    prefixes: int = 1
    calibration: Calibration = _AS_IT_IS

    @cached_property
    def _order(self) -> Sequence[int]:
        return random.Random(f"{self.seed}/order").sample(range(len(self.items)), len(self.items))

    def conversation(self, index: int) -> Conversation:
        item = self.items[self._order[index % len(self._order)]]
        rng = random.Random(f"{self.seed}/{index}")
        max_tokens = item.max_tokens or (self.output.draw(rng) if self.output else None)
        alone = self.turns == 1 and item.whole
        groups = [item.messages] if alone else user_turns(item.messages)[: self.turns]
        return with_prefix(tuple(Turn(group, max_tokens) for group in groups), shared_prefix(self, index))


def user_turns(messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    """Cut after each user message; answers are left out, for the model gives its own."""
    turns: list[tuple[Message, ...]] = []
    group: list[Message] = []
    for message in messages:
        if message["role"] == "assistant":
            continue
        group.append(message)
        if message["role"] == "user":
            turns.append(tuple(group))
            group = []
    return turns


def shared_prefix(source: Synthetic | Dataset, index: int) -> str:
    if not source.prefix_tokens:
        return ""
    rng = random.Random(f"{source.seed}/prefix/{index % source.prefixes}")
    return random_words(rng, source.calibration.plain_words(source.prefix_tokens))


def with_prefix(conversation: Conversation, prefix: str) -> Conversation:
    """Puts text in front of the first message, where a prefix cache can find it."""
    if not prefix:
        return conversation
    first, *turns = conversation
    message, *messages = first.messages
    content = message["content"]
    texted = f"{prefix}\n\n{content}" if isinstance(content, str) else [{"type": "text", "text": prefix}, *content]
    return (first._replace(messages=({**message, "content": texted}, *messages)), *turns)


def random_words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(_WORDS, k=count))


def slice_round(pool: Sequence[str], start: int, count: int) -> list[str]:
    """`count` words from `start` on, going round at the end."""
    words: list[str] = []
    while count > 0:
        words += pool[start : start + count]
        count -= len(pool) - start
        start = 0
    return words


def plain_text(messages: Sequence[Message]) -> str:
    """For the completions endpoint, which knows no roles."""
    return "\n\n".join(str(message["content"]) for message in messages)


def parse_dataset(data: bytes) -> list[Item]:
    """JSON lines of `{"prompt": …}` or `{"messages": […]}`, or a ShareGPT-shaped JSON list. Raises `ValueError`.

    `max_tokens` of an entry, where given, bounds its answer. ShareGPT entries that no human begins are left out.
    """
    if data.lstrip()[:1] == b"[":
        entries = list(enumerate(_json(data, "the file"), 1))
        place = "entry"
    else:
        lines = ((n, line) for n, line in enumerate(data.split(b"\n"), 1) if line.strip())
        entries = [(n, _json(line, f"line {n}")) for n, line in lines]
        place = "line"
    items = [item for n, entry in entries if (item := _item(entry, f"{place} {n}")) is not None]
    if not items:
        raise ValueError("there is no prompt in it")
    return items


def _json(data: bytes, where: str) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


_SHAREGPT_ROLES: Final = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}


def _item(entry: Any, where: str) -> Item | None:
    fault = ValueError(f'{where}: expected an object with "prompt", "messages" or "conversations"')
    if not isinstance(entry, dict):
        raise fault
    limit = entry.get("max_tokens")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f'{where}: "max_tokens" must be a whole number of at least 1')
    if isinstance(prompt := entry.get("prompt"), str):
        return Item(({"role": "user", "content": prompt},), limit, whole=True)
    if isinstance(said := entry.get("conversations"), list):
        talk = [_sharegpt_message(message, where) for message in said]
        asked = up_to_user(talk)
        return Item(asked, limit, whole=False) if asked and asked[0]["role"] != "assistant" else None
    if isinstance(given := entry.get("messages"), list):
        good = all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in given)
        if good and (asked := up_to_user(given)):
            return Item(asked, limit, whole=True)
        raise ValueError(f'{where}: "messages" must hold objects with "role" and "content", one of them the user\'s')
    raise fault


def _sharegpt_message(message: Any, where: str) -> Message:
    if isinstance(message, dict) and isinstance(message.get("value"), str):
        return {"role": _SHAREGPT_ROLES.get(str(message.get("from")), "user"), "content": message["value"]}
    raise ValueError(f'{where}: "conversations" must hold objects with "from" and "value"')


def up_to_user(messages: Sequence[Message]) -> tuple[Message, ...]:
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    return tuple(messages[: last + 1])
