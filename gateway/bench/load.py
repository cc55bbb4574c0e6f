"""Drives load at targets, in callbacks: arrivals, closed loops, when to stop, and how this side itself fares."""
# ruff: noqa: S311 - random, not secret

import asyncio
import gc
import math
import random
import resource
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import orjson

from gateway.bench.client import Client, Exchange, Target, now
from gateway.bench.prompts import (
    Calibration,
    Conversation,
    Dataset,
    Message,
    Source,
    Synthetic,
    Turn,
    plain_text,
    random_words,
)
from gateway.bench.results import (
    Cause,
    Health,
    Histogram,
    Record,
    Run,
    Sample,
    Slo,
    TargetResult,
    summarise,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

TICK: Final = 0.05  # seconds between looks at the clock, the deadlines and this side's own lag
_SAMPLE_EVERY: Final = 10  # ticks
_SLACK: Final = 0.0005  # seconds; timers are whole milliseconds, so one may come so much too early
_STAGGER: Final = TICK / 2
_LOT: Final = 32  # conversations that a closed loop begins at once
_FIRST_PAUSE: Final = 0.05  # seconds that a closed loop's slot waits after a failure, doubled by each further one …
_LONGEST_PAUSE: Final = 1.0  # … up to this


class Plan(NamedTuple):
    """One run. Either `rate` or `concurrency`, and either `duration` or `requests`."""

    rate: float | None = None  # conversations per second, whether or not earlier ones are answered (open loop)
    poisson: bool = True  # else evenly spaced
    concurrency: int | None = None  # conversations at a time, each followed by the next (closed loop)
    duration: float | None = None  # seconds in which requests are sent
    requests: int | None = None  # per target, of all turns; conversations that have begun are finished

    @property
    def label(self) -> str:
        return f"rate {self.rate:g}/s" if self.rate else f"concurrency {self.concurrency}"


def parse_sweep(text: str) -> list[dict[str, float | int]]:
    """`rate=1,2,4` → what each run has in place of its `Plan`'s own. Raises `ValueError` with what is allowed."""
    name, _, values = text.partition("=")
    try:
        loads: list[dict[str, float | int]] = [
            {name: float(value) if name == "rate" else int(value)} for value in values.split(",")
        ]
    except ValueError:
        loads = []
    if name not in ("rate", "concurrency") or not loads or not all(0 < load[name] <= 1e6 for load in loads):
        raise ValueError(f"'{text}': expected rate=1,2,4 or concurrency=1,2,4,8")
    return loads


def arrivals(plan: Plan, rng: random.Random, turns: int = 1) -> list[float]:
    """When each conversation is due, in seconds from the start."""
    rate = plan.rate or 0.0
    most = math.ceil(plan.requests / turns) if plan.requests else math.inf
    until = plan.duration if plan.duration is not None else math.inf
    times: list[float] = []
    at = rng.expovariate(rate) if plan.poisson else 0.0
    while len(times) < most and at < until:
        times.append(at)
        at = at + rng.expovariate(rate) if plan.poisson else len(times) / rate
    return times


def interleave(times: Sequence[float], lane: int, lanes: int, rate: float) -> list[tuple[float, int]]:
    """(when, which) for one of `lanes` targets that get the same conversations, half an interval apart, the first in turn.

    Neither target is always the second to ask, and so the one that finds a shared engine's cache warm.
    """
    return sorted((at + ((i + lane) % lanes) / lanes / rate, i) for i, at in enumerate(times))


# What the next request would meet too; anything else may be one bad prompt, or a server that is still warming up.
_FINAL: Final = frozenset((Cause.REFUSED, Cause.UNREACHABLE, Cause.UNAUTHORIZED, Cause.NOT_FOUND))


class Patience:
    """Decides that going on is pointless: the first requests all fail in one way, or the server has been gone for long."""

    FIRST: Final = 10  # requests
    GONE: Final = 5.0  # seconds

    def __init__(self) -> None:
        self._any_good = False
        self._streak: list[float] = []  # when each of the last failures came, all of one cause
        self._cause: Cause | None = None

    def observe(self, cause: Cause | None, at: float) -> str | None:
        """Takes in one ended request. Returns why to stop, or None to go on."""
        if cause is None:
            self._any_good = True
        if cause is not self._cause:
            self._cause = cause
            self._streak.clear()
        if cause is None or cause is Cause.ABANDONED:
            return None
        if len(self._streak) < self.FIRST:
            self._streak.append(at)
        if not self._any_good:
            enough = 1 if cause in _FINAL else self.FIRST
            if len(self._streak) >= enough:
                return f"every request so far failed: {cause}"
        elif (
            cause in (Cause.REFUSED, Cause.UNREACHABLE)
            and len(self._streak) >= self.FIRST
            and at - self._streak[0] >= self.GONE
        ):
            return f"the server has been gone for {self.GONE:g} s: {cause}"
        return None


@dataclass(frozen=True)
class Body:
    """Makes request bodies. `extra` goes over all other fields; its nulls take fields away."""

    model: str
    chat: bool = True
    ignore_eos: bool = False
    temperature: float | None = None
    extra: Mapping[str, Any] | None = None

    def encode(self, history: Sequence[Message], max_tokens: int | None) -> bytes:
        extra = self.extra or {}
        body = {
            "model": self.model,
            **({"messages": history} if self.chat else {"prompt": plain_text(history)}),
            "stream": True,
            "stream_options": {"include_usage": True},
            **({} if max_tokens is None else {"max_tokens": max_tokens}),
            **({"ignore_eos": True} if self.ignore_eos else {}),
            **({} if self.temperature is None else {"temperature": self.temperature}),
            **extra,
        }
        return orjson.dumps({name: value for name, value in body.items() if name not in extra or value is not None})


class Lane:
    """One target under load. `on_idle` is called once, when all that was to be sent has been answered."""

    def __init__(
        self,
        client: Client,
        body: Body,
        source: Source,
        plan: Plan,
        *,
        turns: int = 1,
        first_index: int = 0,
        schedule: Sequence[tuple[float, int]] = (),
        keep_times: bool = False,
    ) -> None:
        self.client = client
        self.records: list[Record] = []
        self.samples: list[Sample] = []
        self.gaps = Histogram()
        self.ok = 0
        self.failed = 0
        self.chunks = 0  # of ended requests
        self.stopped: str | None = None
        self.idle = asyncio.Event()
        self._body = body
        self._source = source
        self._plan = plan
        self._turns = turns
        self._schedule = schedule
        self._begun = 0
        self._most_running = 0  # since the last sample
        self._first_index = first_index
        self._most = math.ceil(plan.requests / turns) if plan.requests else None
        self._until = math.inf  # when nothing more is begun
        self._waiting = 0  # slots that pause after a failure
        self._keep_times = keep_times
        self._patience = Patience()
        self._failures_in_a_row = 0
        self._start = 0.0
        self._closed = False

    def start(self, at: float) -> None:
        """Begins at that time."""
        self._start = at
        if self._plan.duration is not None:
            self._until = at + self._plan.duration
        loop = asyncio.get_running_loop()
        if self._plan.rate:
            loop.call_soon(self._arrive)
        else:
            loop.call_later(max(at - now(), 0.0), self._launch, self._plan.concurrency or 1)

    def stop(self, why: str) -> None:
        """Sends nothing more and gives up what runs."""
        if self._closed:
            return
        self._closed = True
        self.stopped = why
        self.client.abandon()
        self._check_idle()

    def close_on_time(self, at: float) -> None:
        """To be called now and then: a slot that pauses would not notice the end of the run."""
        if at >= self._until:
            self._closed = True
            self._check_idle()

    def sample(self, at: float) -> Sample:
        chunks = self.chunks + sum(len(exchange.reader.times) for exchange in self.client.running)
        self.samples.append(Sample(max(at - self._start, 0.0), chunks, self._most_running, self.ok, self.failed))
        self._most_running = len(self.client.running)
        return self.samples[-1]

    @property
    def begun(self) -> int:
        return self._begun

    @property
    def share(self) -> float:
        """Of the run that is over, from 0 to 1."""
        if self._most is not None:
            return min(1.0, (self.ok + self.failed) / (self._most * self._turns))
        return min(max((now() - self._start) / (self._plan.duration or 1), 0.0), 1.0)

    def _arrive(self) -> None:
        at = now()
        while not self._closed and self._begun < len(self._schedule):
            due, which = self._schedule[self._begun]
            due += self._start
            if due > at + _SLACK:
                asyncio.get_running_loop().call_later(max(due - at, 0.001), self._arrive)
                return
            self._begun += 1
            self._converse(which, due)
        self._closed = True
        self._check_idle()

    def _launch(self, slots: int) -> None:
        """Begins in small lots, so that the first answers are not read late because the last requests are still written."""
        for _ in range(min(slots, _LOT)):
            self._next(now())
        if slots > _LOT:
            asyncio.get_running_loop().call_soon(self._launch, slots - _LOT)

    def _next(self, at: float) -> None:
        if self._closed or at >= self._until or (self._most is not None and self._begun >= self._most):
            self._closed = True
            return
        self._begun += 1
        self._converse(self._begun - 1, at)

    def _converse(self, which: int, due: float) -> None:
        index = self._first_index + which
        _Talk(self, index, self._source.conversation(index)).ask(due)

    def send(self, talk: "_Talk", turn: Turn, due: float) -> None:
        body = self._body.encode(talk.history, turn.max_tokens)
        exchange = Exchange(body, talk.ended, due=due, index=talk.index, turn=talk.turn, keep_events=self._turns > 1)
        self.client.send(exchange)
        self._most_running = max(self._most_running, len(self.client.running))

    def answered(self, talk: "_Talk", exchange: Exchange) -> None:
        self._take(exchange)
        # A clock that ran out ends a conversation between two turns, a count of requests does not.
        going_on = exchange.cause is None and not self.stopped and now() < self._until
        if not (going_on and talk.go_on(exchange)) and self._plan.rate is None:
            self._follow(exchange.cause)
        self._check_idle()

    def _follow(self, cause: Cause | None) -> None:
        """A closed loop's next conversation: at once after an answer, after a pause when there was none."""
        if cause is None:
            self._next(now())
        elif not self._closed:
            self._waiting += 1
            pause = min(_FIRST_PAUSE * 2 ** min(self._failures_in_a_row - 1, 10), _LONGEST_PAUSE)
            asyncio.get_running_loop().call_later(pause, self._resume)

    def _resume(self) -> None:
        self._waiting -= 1
        self._next(now())
        self._check_idle()

    def _take(self, exchange: Exchange) -> None:
        at = now()
        good = exchange.cause is None
        self.ok += good
        self.failed += not good and exchange.cause is not Cause.ABANDONED
        self._failures_in_a_row = 0 if good else self._failures_in_a_row + 1
        self.chunks += len(exchange.reader.times)
        longest = self.gaps.add(exchange.reader.times) if good else 0.0
        self.records.append(as_record(exchange, self._start, longest, keep_times=self._keep_times))
        if why := self._patience.observe(exchange.cause, at):
            self.stop(why)

    def _check_idle(self) -> None:
        if self._closed and not self.client.running:
            self.idle.set()


class _Talk:
    """One conversation under way. An object and no closure, so that nothing refers to itself: see `_no_collection`."""

    __slots__ = ("_lane", "_turns", "history", "index", "turn")

    def __init__(self, lane: Lane, index: int, conversation: Conversation) -> None:
        self.index = index
        self.turn = 0
        self.history: list[Message] = []
        self._lane = lane
        self._turns = conversation

    def ask(self, due: float) -> None:
        turn = self._turns[self.turn]
        self.history.extend(turn.messages)
        self._lane.send(self, turn, due)

    def ended(self, exchange: Exchange) -> None:
        self._lane.answered(self, exchange)

    def go_on(self, exchange: Exchange) -> bool:
        """Feeds the answer back and asks the next question. False if there is none."""
        if self.turn + 1 == len(self._turns):
            return False
        self.turn += 1
        self.history.append({"role": "assistant", "content": exchange.reader.text()})
        self.ask(now())
        return True


def as_record(exchange: Exchange, start: float, longest_gap: float, *, keep_times: bool = False) -> Record:
    times, usage = exchange.reader.times, exchange.reader.usage
    return Record(
        conversation=exchange.index,
        turn=exchange.turn,
        due=exchange.due - start,
        sent=exchange.sent - start,
        first=times[0] - start if times else 0.0,
        last=times[-1] - start if times else 0.0,
        chunks=len(times),
        longest_gap=longest_gap,
        prompt_tokens=usage.prompt_tokens if usage else 0,
        output_tokens=usage.completion_tokens if usage else len(times),
        counted=usage is not None,
        cause=exchange.cause,
        detail=exchange.detail,
        times=times if keep_times else None,
    )


async def drive(
    lanes: Sequence[Lane],
    plan: Plan,
    slo: Slo | None,
    on_sample: Callable[[Sequence[Lane]], None],
    label: str | None = None,
) -> Run:
    """Runs the lanes beside each other to their end. SIGINT ends them early, with what there is by then."""
    loop = asyncio.get_running_loop()
    lag = Histogram()
    ticks = loop.create_task(_tick(lanes, lag, on_sample))
    end = loop.create_task(_all_idle(lanes))
    loop.add_signal_handler(signal.SIGINT, _stop_all, lanes, "interrupted")
    try:
        with _no_collection():
            cpu, began = time.process_time(), now()
            for i, lane in enumerate(lanes):
                lane.start(began + i * _STAGGER)  # else one of two equal targets would always be read after the other
            await asyncio.wait([ticks, end], return_when=asyncio.FIRST_COMPLETED)
            if ticks.done():  # by a fault, since it has no end
                ticks.result()
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        ticks.cancel()
        end.cancel()
    ended = now()
    cpu = (time.process_time() - cpu) / max(ended - began, 1e-9)
    for lane in lanes:
        lane.sample(ended)
    return Run(
        label=label or plan.label,
        load=plan._asdict(),
        targets=tuple(
            TargetResult(
                lane.client.target.name,
                summarise(lane.records, lane.gaps, lane.samples, slo),
                tuple(lane.records),
                lane.gaps,
                tuple(lane.samples),
            )
            for lane in lanes
        ),
        health=Health(cpu, lag.spread()),
        stopped=next((lane.stopped for lane in lanes if lane.stopped), None),
    )


async def _all_idle(lanes: Sequence[Lane]) -> None:
    for lane in lanes:
        await lane.idle.wait()


def _stop_all(lanes: Sequence[Lane], why: str) -> None:
    for lane in lanes:
        lane.stop(why)


async def _tick(lanes: Sequence[Lane], lag: Histogram, on_sample: Callable[[Sequence[Lane]], None]) -> None:
    for n in count():
        due = now() + TICK
        if n % _SAMPLE_EVERY == 0:
            for lane in lanes:
                lane.sample(now())
            on_sample(lanes)
        await asyncio.sleep(max(due - now(), 0.0))
        at = now()
        lag.add((min(due, at), at))
        for lane in lanes:
            lane.client.sweep(at)
            lane.close_on_time(at)
        if why := next((lane.stopped for lane in lanes if lane.stopped), None):
            _stop_all(lanes, why)  # half a comparison is none


@contextmanager
def _no_collection() -> "Iterator[None]":
    """Without the cycle collector, whose pauses would look like the server's. What a run makes, it frees by itself."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def lift_file_limit() -> None:
    """One open file per stream: takes as many as the system lets this process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Spec(NamedTuple):
    """A whole load test."""

    targets: Sequence[tuple[Target, Body]]  # one, or two to compare
    source: Synthetic | Dataset
    plans: Sequence[Plan]  # one run each, one after the other
    warmup: int = 0  # requests per target before the first run, in no result
    timeout: float = 600.0  # seconds for one request
    slo: Slo | None = None
    keep_times: bool = False  # the time of every chunk, in the records


class Watcher(Protocol):
    """Is shown how a run goes, twice a second."""

    def begin(self, label: str) -> None: ...

    def look(self, lanes: Sequence[Lane]) -> None: ...


async def bench(spec: Spec, watcher: Watcher) -> list[Run]:
    """Calibrates, warms up, and runs each plan. Stops at the first run that had to be stopped.

    Where nothing works from the start, the one run returned is the calibration or warm-up that shows it.
    """
    clients = [Client(target, spec.timeout) for target, _ in spec.targets]
    bodies = [body for _, body in spec.targets]
    runs: list[Run] = []
    source, index = spec.source, 0
    try:
        if isinstance(source, Synthetic) or source.prefix_tokens:
            watcher.begin("calibration")
            plan = Plan(concurrency=1, requests=len(Probe.WORDS))
            lane = Lane(clients[0], bodies[0], Probe(), plan)
            run = await drive([lane], plan, None, watcher.look, label="calibration")
            if not lane.ok:
                return [run]
            source = replace(source, calibration=Probe.calibration(lane.records))
        if spec.warmup:
            watcher.begin("warm-up")
            plan = Plan(concurrency=min(spec.warmup, spec.plans[0].concurrency or 8), requests=spec.warmup)
            lanes = [
                Lane(client, body, source, plan, turns=source.turns)
                for client, body in zip(clients, bodies, strict=True)
            ]
            run = await drive(lanes, plan, None, watcher.look, label="warm-up")
            if run.stopped or not all(lane.ok for lane in lanes):
                return [run]
            index += max(lane.begun for lane in lanes)
        for number, plan in enumerate(spec.plans):
            watcher.begin(plan.label)
            times = arrivals(plan, random.Random(f"{source.seed}/arrivals/{number}"), source.turns) if plan.rate else []
            lanes = [
                Lane(
                    client, body, source, plan, turns=source.turns, first_index=index, keep_times=spec.keep_times,
                    schedule=interleave(times, i, len(clients), plan.rate or 1),
                )
                for i, (client, body) in enumerate(zip(clients, bodies, strict=True))
            ]  # fmt: skip
            runs.append(await drive(lanes, plan, spec.slo, watcher.look))
            if runs[-1].stopped:
                break
            index += max(lane.begun for lane in lanes)
    finally:
        for client in clients:
            client.close()
        await asyncio.sleep(0)  # lets the connections say good-bye
    return runs


class Probe:
    """Two prompts of known size, to learn how the engine counts."""

    WORDS: Final = (16, 272)

    def conversation(self, index: int) -> Conversation:
        return (Turn(({"role": "user", "content": random_words(random.Random(index), self.WORDS[index])},), 1),)

    @classmethod
    def calibration(cls, records: Sequence[Record]) -> Calibration:
        tokens = {
            record.conversation: record.prompt_tokens for record in records if record.counted and record.cause is None
        }
        if len(tokens) < len(cls.WORDS):
            return Calibration()
        return Calibration.fit((cls.WORDS[0], tokens[0]), (cls.WORDS[1], tokens[1]))
