"""Clients that ask greedy questions over and over, and judge each answer by the one that an undisturbed engine gave."""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

from tests.flow.talk import parse
from tests.served import Penstock, close, http_post

CHAT = "/v1/chat/completions"


class Question(NamedTuple):
    path: str
    body: dict[str, Any]


class Told(NamedTuple):
    """What an answer says."""

    text: str
    finish: tuple[Any, Any]  # reason and stop reason
    usage: tuple[int, int] | None  # tokens of prompt and answer, where asked for


class FailedError(Exception):
    """No whole answer came."""


def read(question: Question, data: bytes) -> Told:
    """Raises `FailedError`."""
    try:
        answers, rest = parse(data)
    except (AssertionError, ValueError) as error:
        raise FailedError(f"not an answer: {error}") from None
    if len(answers) != 1 or rest:
        raise FailedError("the answer does not end")
    [answer] = answers
    if answer.status != 200:
        raise FailedError(f"{answer.status} {answer.body[:200].decode(errors='replace')}")
    if not question.body.get("stream"):
        whole = answer.json
        choice, counted = whole["choices"][0], whole["usage"]
        text = choice["message"]["content"] if question.path == CHAT else choice["text"]
        return Told(text, (choice["finish_reason"], choice["stop_reason"]), usage(counted))
    *events, end = answer.body.decode().split("\n\n")
    events = [event for event in events if event != ": keep-alive"]
    if end or events[-1] != "data: [DONE]":
        raise FailedError(f"the stream ends with {events[-1][:200]}")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    if len({(c["id"], c["created"]) for c in chunks}) != 1:
        raise FailedError("more than one stream in one")
    choices = [c["choices"][0] for c in chunks if c["choices"]]
    text = "".join((c["delta"].get("content") or "") if question.path == CHAT else c["text"] for c in choices)
    told = [usage(c["usage"]) for c in chunks if not c["choices"]]
    return Told(text, (choices[-1]["finish_reason"], choices[-1].get("stop_reason")), told[0] if told else None)


def usage(counted: dict[str, int]) -> tuple[int, int]:
    return counted["prompt_tokens"], counted["completion_tokens"]


@dataclass
class Verdicts:
    """What came of all requests."""

    requests: int = 0
    failures: list[str] = field(default_factory=list)
    tokens: int = 0  # lost or duplicated ones: by what the answers say and by what was booked
    unequal: list[str] = field(default_factory=list)
    asked: dict[str, int] = field(default_factory=dict)  # question by request id


class Load:
    def __init__(
        self, gateway: Penstock, questions: Sequence[Question], clients: int, seed: int, patience: float
    ) -> None:
        self.verdicts = Verdicts()
        self.open: Counter[str] = Counter()
        self._gateway = gateway
        self._questions = questions
        self._clients = clients
        self._seed = seed
        self._patience = patience  # seconds that an answer may take
        self._expected: list[Told] = []
        self._booked: list[int] = []
        self._stopping = False

    async def learn(self) -> None:
        """Asks each question once, undisturbed."""
        for number, question in enumerate(self._questions):
            self._expected.append(read(question, await self._ask(question, f"learn-{number}")))
        log = await self._gateway.access_log(len(self._questions))
        booked = {line["request_id"]: line["completion_tokens"] for line in log}
        self._booked = [booked[f"learn-{number}"] for number in range(len(self._questions))]

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for client in range(self._clients):
                group.create_task(self._client(client))

    def stop(self) -> None:
        """Each client ends what it has begun."""
        self._stopping = True

    async def _client(self, client: int) -> None:
        chance, number = Random(f"{self._seed}/{client}"), 0
        while not self._stopping:
            which, number = chance.randrange(len(self._questions)), number + 1
            await self._judge(which, f"chaos-{client}-{number}")

    async def _judge(self, which: int, request_id: str) -> None:
        question, expected, verdicts = self._questions[which], self._expected[which], self.verdicts
        verdicts.asked[request_id] = which
        try:
            told = read(question, await self._ask(question, request_id))
        except (FailedError, OSError, TimeoutError) as error:
            verdicts.failures.append(f"{request_id}: {error!r}")
        else:
            if told[:2] != expected[:2]:
                verdicts.unequal.append(f"{request_id}: {told} instead of {expected}")
            if told.usage is not None and expected.usage is not None:
                verdicts.tokens += abs(told.usage[1] - expected.usage[1]) + abs(told.usage[0] - expected.usage[0])
        verdicts.requests += 1

    async def _ask(self, question: Question, request_id: str) -> bytes:
        more = f"connection: close\r\nx-request-id: {request_id}\r\n"
        async with asyncio.timeout(self._patience):
            reader, writer = await self._gateway.connect()
            try:
                writer.write(http_post(question.path, question.body, more=more))
                return await reader.read(-1)
            finally:
                await close(writer)

    async def audit(self) -> None:
        """Compares what was booked: each token once. To be called at the end."""
        verdicts = self.verdicts
        log = await self._gateway.access_log(len(self._questions) + verdicts.requests)
        for line in log:
            which = verdicts.asked.get(line["request_id"])
            if which is not None and line["outcome"] == "completed":
                verdicts.tokens += abs((line["completion_tokens"] or 0) - self._booked[which])
