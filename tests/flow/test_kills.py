"""An engine dies at every token of many answers, and each one ends as if nothing had happened.

The engines speak ids that end inside characters, hold back what may become a stop string, and repeat the prompt when asked
to go on from inside a character, as vLLM does (tests/fake_engine.py). Each request bears its own fates, so that
hundreds of them die side by side.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any, NamedTuple

import pytest_asyncio

from tests.fake_engine import FakeEngine, pieces
from tests.flow.conftest import Start
from tests.flow.talk import chunks, exchange, post
from tests.served import Answer, Penstock, simple_config, until

AT_ONCE = 64  # requests
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USAGE = {"include_usage": True}
WHOLE = 1000  # tokens; more than any answer here has


class Case(NamedTuple):
    """One answer."""

    name: str
    text: str
    fields: dict[str, Any] = {}  # noqa: RUF012 - never changed
    path: str = CHAT
    ids_per_event: int = 1


CASES = [
    Case("words", "The quick brown fox jumps over the lazy dog, twice."),
    Case("emoji", "🦊 fox, 🐼 panda, 👩‍🚀 astronaut 👍🏽 and 🏳️‍🌈 flag 🌍", {"stream_options": USAGE}),
    Case("CJK", "海は広く、波は静かだ。大海无边，波涛汹涌。바다는 넓다.", {"max_tokens": WHOLE}),
    Case("marks", "Ame\u0301lie nai\u0308ve Å\u030a हिन्दी ภาษาไทย e\u0301\u0323\u0302 עִבְרִית", {"stream_options": USAGE}, TEXT),
    Case("text completion", "São Paulo, 東京 and 🌍: \"quoted\" \\n\n\tend", {}, TEXT),
    Case("bound inside a character", "🌍🌎🌏 and 東京 again", {"max_tokens": 14, "stream_options": USAGE}),
    Case("stop", "one two three four five END six", {"stop": ["END", "never in it"], "stream_options": USAGE}),
    Case("stop in text", "数える：一、二、三、四、五、六、七", {"stop": "五、六"}, TEXT),
    Case("stop that is shown", "alpha beta 🎈 gamma DELTA epsilon", {"stop": ["DELTA", "x"], "include_stop_str_in_output": True}),
    Case("stop after min_tokens", "no. no. no. no. yes. no.", {"stop": ["no."], "min_tokens": 9, "stream_options": USAGE}),
    Case("shown after min_tokens", "ab🙂 ab🙂 ab🙂 ab🙂", {"stop": ["b🙂 a"], "min_tokens": 7, "include_stop_str_in_output": True}),
    Case("almost a stop", "ENENENENE EN END", {"stop": ["ENEND"], "stream_options": USAGE}),
    Case("several ids an event", "🦊 狐 fox and 🐼 熊猫 panda walk to the sea 海", {"stream_options": USAGE}, CHAT, 3),
    Case("several ids and a stop", "🦊 狐 fox and 🐼 熊猫 panda walk", {"stop": ["panda w"]}, TEXT, 2),
    Case("usage in every chunk", "Ein kurzer Satz. 🙂 短い文。", {"stream_options": {**USAGE, "continuous_usage_stats": True}}),
    Case("ids as the prompt", "from ids 🌍 to 文字", {"prompt": [200_001, 200_002], "stream_options": USAGE}, TEXT),
    Case("long", "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 🥊 いろはにほへと、散りぬるを。"
         " Ça alors! 𝒻𝓪𝓷𝓬𝔂 👨‍👩‍👧‍👦 family, ∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, 1⃣ 2⃣, τρία, четыре, خمسة", {"stream_options": USAGE}),
    Case("one prompt in a list", "from a list 🌍", {"prompt": ["one text"]}, TEXT),
]  # fmt: skip

DEATHS: list[dict[str, Any]] = [
    {"cut_between": True},  # the process is killed
    {},  # in the middle of an event
    {"close": "rst"},
    {"error": True},  # EngineCore died; the API server says so, then [DONE]
]


def fate(position: int, kind: int) -> dict[str, Any]:
    """Death before the event after `position` tokens; -1: before any event."""
    how = DEATHS[kind % len(DEATHS)]
    if "error" not in how:
        return {"cut_after": position, **how}
    return {"error_event_after": position} if position >= 0 else {"error_first": True}


def request(case: Case, name: str, fates: Iterable[dict[str, Any]]) -> bytes:
    fake = {"text": case.text, "ids_per_event": case.ids_per_event, "name": name, "fates": list(fates)}
    prompt = {"messages": [{"role": "user", "content": "say it"}]} if case.path == CHAT else {"prompt": "say it now"}
    body = {"model": "tiny", "stream": True, "temperature": 0, "max_tokens": WHOLE, **prompt, **case.fields}
    return post(case.path, {**body, "fake": fake}, more=f"x-request-id: {name}\r\n")


class Told(NamedTuple):
    """What a client learns from a stream."""

    text: str
    finish: list[Any]  # reasons and stop reasons
    usage: list[Any]  # of the last chunk, or none
    ids: int  # of the stream itself: one
    after: int  # events with choices that came after the finish reason


def told(case: Case, answer: Answer) -> Told:
    assert answer.status == 200, answer.body
    found = chunks(answer.body)
    choices = [c["choices"][0] for c in found if c["choices"]]
    text = "".join(c["delta"].get("content", "") if case.path == CHAT else c["text"] for c in choices)
    finish = [(c["finish_reason"], c["stop_reason"]) for c in choices if c["finish_reason"]]
    after = len(choices) - 1 - next(i for i, c in enumerate(choices) if c["finish_reason"])
    usage = [(c["usage"]["prompt_tokens"], c["usage"]["completion_tokens"]) for c in found[-1:] if not c["choices"]]
    assert all(c.get("token_ids") is None and c.get("prompt_token_ids") is None for c in choices)
    return Told(text, finish, usage, len({(c["id"], c["created"], c["model"]) for c in found}), after)


async def ask(
    gateway: Penstock, case: Case, name: str, fates: Iterable[dict[str, Any]], gate: asyncio.Semaphore
) -> Told:
    answer = None
    try:
        async with gate:
            [answer] = await exchange(gateway, request(case, name, fates))
        return told(case, answer)
    except (AssertionError, StopIteration, TimeoutError) as error:
        error.add_note(f"{name}, {case.name}: {answer and answer.body[-1500:]!r}")
        raise


async def charged(gateway: Penstock, lines: int) -> dict[str, tuple[int, int]]:
    """Tokens of prompt and answer by request."""
    log = await gateway.access_log(lines)
    return {line["request_id"]: (line["prompt_tokens"], line["completion_tokens"]) for line in log}


@pytest_asyncio.fixture(loop_scope="session")
async def engine() -> AsyncIterator[FakeEngine]:
    """One process, so that it can count the attempts at an answer; eight replicas of it."""
    async with FakeEngine(replicas=8) as running:
        yield running


async def ready(start: Start, engine: FakeEngine, settings: str = "failover_wait: 10") -> Penstock:
    config = simple_config(*engine.urls).replace("aliases:", f"{settings}\n    aliases:")
    gateway = await start(config=config)
    for number in range(len(engine.urls)):

        async def up(replica: str = f"tiny/{number}") -> bool:
            return await gateway.metric("penstock_engine_up", replica=replica) == 1

        await until(up)
    return gateway


async def unfaulted(gateway: Penstock, gate: asyncio.Semaphore) -> dict[str, Told]:
    answers = await asyncio.gather(*(ask(gateway, c, f"whole-{n}", [], gate) for n, c in enumerate(CASES)))
    whole = {case.name: answer for case, answer in zip(CASES, answers, strict=True)}
    assert whole["emoji"].text == CASES[1].text
    assert whole["stop"].text == "one two three four five "
    assert whole["stop"].finish == [("stop", "END")]
    assert whole["stop that is shown"].text.endswith("DELTA")
    assert whole["bound inside a character"].finish == [("length", None)]
    assert whole["stop after min_tokens"].text == "no. no. no. no. yes. "[: len(whole["stop after min_tokens"].text)]
    assert all(answer.ids == 1 and not answer.after for answer in answers)
    return whole


async def test_killed_at_every_token(start: Start, engine: FakeEngine) -> None:
    gateway, gate = await ready(start, engine), asyncio.Semaphore(AT_ONCE)
    whole = await unfaulted(gateway, gate)
    kills = [
        (case, f"kill-{number}-{position}", position, number + position)
        for number, case in enumerate(CASES)
        for position in range(-1, min(len(pieces(case.text)), case.fields.get("max_tokens", WHOLE)) + 2)
    ]
    answers = await asyncio.gather(
        *(ask(gateway, case, name, [fate(position, kind)], gate) for case, name, position, kind in kills)
    )
    equal = [answer == whole[case.name] for (case, *_), answer in zip(kills, answers, strict=True)]
    unequal = [(kill[1], answer) for kill, answer, same in zip(kills, answers, equal, strict=True) if not same]
    assert unequal == []
    assert sum(equal) >= 500

    # and each answer was charged as the unfaulted one
    count = await charged(gateway, len(CASES) + len(kills))
    for number, _ in enumerate(CASES):
        mine = {count[name] for _, name, *_ in kills if name.startswith(f"kill-{number}-")}
        assert mine == {count[f"whole-{number}"]}, CASES[number].name


async def test_killed_twice_and_three_times(start: Start, engine: FakeEngine) -> None:
    gateway, gate = await ready(start, engine), asyncio.Semaphore(AT_ONCE)
    whole = await unfaulted(gateway, gate)
    kills = [
        (case, f"kill-{number}-{first}-{second}", [fate(first, number), fate(second, first), *third])
        for number, case in enumerate(CASES)
        for first in range(0, 20, 3)
        for second, third in ((0, []), (1, [fate(2, 0)]), (5, []), (9, [fate(0, 1)]))
    ]
    answers = await asyncio.gather(*(ask(gateway, case, name, fates, gate) for case, name, fates in kills))
    unequal = [
        (name, answer) for (case, name, _), answer in zip(kills, answers, strict=True) if answer != whole[case.name]
    ]
    assert unequal == []


async def test_hangs_and_deaths_mixed(start: Start, engine: FakeEngine) -> None:
    gateway, gate = await ready(start, engine, "failover_wait: 10\n    stall_timeout: 1"), asyncio.Semaphore(200)
    whole = await unfaulted(gateway, gate)
    hangs = [
        (case, f"hang-{number}-{position}", [{"hang_after": position}, *then])
        for number, case in enumerate(CASES)
        # After the first event, because before it no clock can tell a hang from a queue. The last: all has come but the end.
        for position in (case.ids_per_event if case.path == TEXT else 0, 4, 9, WHOLE + 2)
        for then in ([], [fate(2, number)])
    ]
    answers = await asyncio.gather(*(ask(gateway, case, name, fates, gate) for case, name, fates in hangs))
    unequal = [
        (name, answer) for (case, name, _), answer in zip(hangs, answers, strict=True) if answer != whole[case.name]
    ]
    assert unequal == []


async def test_what_is_not_exact_without_ids_still_ends_once_it_is_complete(start: Start, engine: FakeEngine) -> None:
    """Where nothing is missing but the engine's goodbye, no stream fails, whatever its failover could do."""
    gateway = await ready(start, engine)
    for n, death in enumerate([{"cut_after": WHOLE}, {"error_event_after": WHOLE}]):
        case = Case("two", "two of them", {"n": 2, "stream_options": USAGE})
        [answer] = await exchange(gateway, request(case, f"two-{n}", [death]))
        choices = [c["choices"][0] for c in chunks(answer.body) if c["choices"]]
        assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["stop", "stop"]
        assert b"error" not in answer.body
        assert json.dumps("usage") not in answer.body.decode()  # nobody has counted both
