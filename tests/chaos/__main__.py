"""scripts/chaos: see HELP."""

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import signal
import stat
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil

from tests.chaos.load import CHAT, Load, Question
from tests.chaos.plan import DOWN, GATEWAY, Fault, Target, schedule
from tests.chaos.proxy import BadNetwork
from tests.fake_engine import FakeEngine
from tests.process.world import marked
from tests.served import KEY, ROOT, Penstock

HELP = """\
Starts Penstock with engines, keeps clients asking, and meanwhile does to the engines and to their network what goes wrong
in the world. At the end: five figures, each of which must be 0. Exit code 1 if one is not, 2 if it could not begin.

  unanswered requests        of all that were asked: streams and whole answers, chats and text completions, all of them greedy
  failures                   answers that were refused, cut, ended with an error or came too late; a gateway that ends badly
  lost or duplicated tokens  by the usage that was told, and by what the gateway has booked, against an undisturbed answer
  unequal greedy answers     text, finish reason or stop reason are not those of an undisturbed answer
  orphan processes           of engines, once the gateway has been told to stop

What it does, at random:
  kill    SIGKILL to an engine; it comes back later        stop   SIGSTOP to an engine, SIGCONT later
  reset   every connection to an engine breaks             slow   each piece of an answer is late
  mute    a network that passes nothing                    reload SIGHUP to the gateway
  With --vllm, on two real replicas: kill of the API server, of EngineCore and of a worker; stop of EngineCore; reload.

What it does not do, because no gateway could answer then: take down more than half of a model's replicas at once (the last
one least of all; a fault that would is skipped and counted), kill an engine so often that it is given up as a crash loop,
kill the gateway itself. Streams that cannot be continued exactly (README: failover) are not asked for. The model is
served with `failover: exact` and a `failover_wait`, as it must be if an engine's death is to cost nothing.

The schedule follows from the seed, the minutes and --vllm. How a fault meets a request is a matter of microseconds,
and does not.
"""


class Settings(NamedTuple):
    """What differs between fake engines and real ones."""

    clients: int
    pause: float  # seconds between faults, about
    longest: float  # seconds that a fault lasts
    patience: float  # seconds that an answer may take
    start: float  # seconds that engines may take to be ready


FAKE = Settings(clients=12, pause=0.8, longest=6.0, patience=90.0, start=60.0)
REAL = Settings(clients=4, pause=15.0, longest=20.0, patience=300.0, start=400.0)

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and does so twice.",
    "🦊 fox, 🐼 panda, 👩‍🚀 astronaut 👍🏽 and 🏳️‍🌈 flag 🌍",
    "海は広く、波は静かだ。大海无边，波涛汹涌。바다는 넓다.",
    "Ame\u0301lie nai\u0308ve हिन्दी ภาษาไทย e\u0301\u0323\u0302 עִבְרִית",
    "one two three four five END six seven",
)
FIELDS: tuple[dict[str, Any], ...] = (
    {"stream": True, "stream_options": {"include_usage": True}},
    {"stream": True},
    {"stream": True, "stop": ["END", "波涛"], "stream_options": {"include_usage": True}},
    {"stream": True, "stop": ["END", "🏳️‍🌈"], "include_stop_str_in_output": True},
    {"stream": True, "max_tokens": 17, "stream_options": {"include_usage": True}},
    {},
)
PROMPTS = (
    "List ten animals, each with its emoji.",
    "Write a long sentence in Japanese and in Chinese about the sea.",
    "Count from one to forty in words.",
    "Repeat this line five times: 🦊 狐 🌍 世界 café",
)


def questions(model: str, *, real: bool) -> list[Question]:
    common = {"model": model, "temperature": 0, "max_tokens": 48 if real else 500}
    if real:
        return [
            Question(CHAT, {**common, **fields, "messages": [{"role": "user", "content": prompt}]})
            for prompt in PROMPTS
            for fields in (FIELDS[0], {**FIELDS[1], "stop": ["twelve"]}, FIELDS[5])
        ]
    found = []
    for text in TEXTS:
        for fields in FIELDS:
            rest = {**common, **fields, "fake": {"text": text, "delay": 0.01}}
            found.append(Question(CHAT, {**rest, "messages": [{"role": "user", "content": "say it"}]}))
            found.append(Question("/v1/completions", {**rest, "prompt": "say it"}))
    return found


class Replica(Protocol):
    """What faults can be done to."""

    async def do(self, fault: Fault) -> None:
        """Returns when it is over, as far as the engine itself is concerned."""
        ...


class Elsewhere:
    """A fake engine that somebody else runs, behind a network of its own."""

    def __init__(self, stack: contextlib.AsyncExitStack) -> None:
        self._stack = stack

    async def start(self) -> str:
        """Returns the address that the gateway is told."""
        self._engine = await self._stack.enter_async_context(FakeEngine())
        self._network = await self._stack.enter_async_context(BadNetwork(self._port))
        return self._network.url

    @property
    def _port(self) -> int:
        return int(self._engine.url.rpartition(":")[2])

    async def do(self, fault: Fault) -> None:
        network, engine = self._network, self._engine
        match fault.kind:
            case "kill":
                engine.kill()
                await asyncio.sleep(fault.seconds)
                self._engine = await self._stack.enter_async_context(FakeEngine())
                network.port = self._port
            case "stop":
                engine.stop()
                await asyncio.sleep(fault.seconds)
                engine.cont()
            case "mute":
                network.mute()
                await asyncio.sleep(fault.seconds)
                network.unmute()
            case "slow":
                network.delay = 0.02 + fault.seconds / 100
                await asyncio.sleep(fault.seconds)
                network.delay = 0.0
            case "reset":
                network.reset()


class Managed:
    """An engine that the gateway runs: it is the gateway's to see that it hangs, to bury it, and to start the next one."""

    def __init__(self, gateway: Penstock, replica: str) -> None:
        self._gateway = gateway
        self._replica = replica

    def _processes(self) -> list[psutil.Process]:
        """Of the engine, its API server first."""
        [*_, last] = [
            line["detail"]
            for line in self._gateway.log
            if line["message"] == "engine started" and line["replica"] == self._replica
        ]
        port = last.split(" at ")[1].split(",")[0].rpartition(":")[2]
        words = ({f"--port={port}"}, {"--port", port})
        family = psutil.Process(self._gateway.pid).children(recursive=True)
        # Its keeper has its words in its command line, too, and is the parent.
        *_, server = [p for p in family if any(w <= set(p.cmdline()) for w in words)]
        return [server, *server.children(recursive=True)]

    async def do(self, fault: Fault) -> None:
        with contextlib.suppress(psutil.NoSuchProcess, ValueError):  # it has just died of the fault before
            processes = self._processes()
            # EngineCore works without a worker of its own where one is enough.
            wanted = {"kill-core": ("EngineCore",), "kill-worker": ("Worker", "EngineCore"), "stop": ("EngineCore",)}
            victims = [p for name in wanted.get(fault.kind, ()) for p in processes if name in p.name()]
            victim = victims[0] if victims else processes[0]
            victim.send_signal(signal.SIGSTOP if fault.kind == "stop" else signal.SIGKILL)
            await asyncio.sleep(fault.seconds)


class World(NamedTuple):
    gateway: Penstock
    model: str
    replicas: Mapping[str, Replica]
    targets: list[Target]
    marker: str  # in the environment of every engine of the gateway's own


@contextlib.asynccontextmanager
async def fake_world() -> AsyncIterator[World]:
    marker = secrets.token_hex(8)
    async with contextlib.AsyncExitStack() as stack:
        elsewhere = [Elsewhere(stack) for _ in range(4)]
        urls = [await one.start() for one in elsewhere]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-chaos-")))
        (folder / "model").mkdir()
        python = folder / "python-with-fake-vllm"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/process/fake_as_vllm.py "$@"\n')
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        env = f'{{STANDIN_MARKER: "{marker}", FAKE_BROKEN: "{folder}/broken"}}'
        config = (
            f"models:\n  tiny:\n    failover_wait: 30\n    stall_timeout: 2\n    endpoints: {json.dumps(urls)}\n"
            f'    engine: {{model: "{folder}/model", python: "{python}", replicas: 2, env: {env}}}\n'
            f"keys: [{{name: test, key: {KEY}}}]\n"
        )
        gateway = await stack.enter_async_context(Penstock(config))
        replicas: dict[str, Replica] = {f"tiny/{n}": Managed(gateway, f"tiny/{n}") for n in range(2)}
        replicas |= {f"tiny/{n}": one for n, one in enumerate(elsewhere, start=2)}
        far = {"kill": 3, "stop": 3, "mute": 2, "slow": 3, "reset": 4}
        targets = [Target(f"tiny/{n}", {"kill": 3, "stop": 1}, rest=20.0) for n in range(2)]
        targets += [Target(f"tiny/{n}", far, rest=2.0) for n in range(2, 6)]
        yield World(gateway, "tiny", replicas, targets, marker)


@contextlib.asynccontextmanager
async def real_world() -> AsyncIterator[World]:
    marker = secrets.token_hex(8)
    config = (
        "models:\n  smollm2:\n    failover_wait: 240\n    stall_timeout: 20\n    engine:\n      replicas: 2\n"
        f"      model: {ROOT}/.models/SmolLM2-135M-Instruct\n      python: {ROOT}/.venv-engine/bin/python\n"
        "      args: {dtype: float32, max-model-len: 2048, enforce-eager: true}\n"
        f'      env: {{VLLM_CPU_KVCACHE_SPACE: "1", STANDIN_MARKER: "{marker}"}}\n'
        f"keys: [{{name: test, key: {KEY}}}]\n"
    )
    async with Penstock(config, patience=REAL.patience) as gateway:
        names = ("smollm2/0", "smollm2/1")
        kinds = {"kill": 2, "kill-core": 2, "kill-worker": 2, "stop": 1}
        targets = [Target(name, kinds, rest=30.0) for name in names]
        yield World(gateway, "smollm2", {name: Managed(gateway, name) for name in names}, targets, marker)


class Chaos:
    """One run."""

    def __init__(self, world: World, settings: Settings, faults: Sequence[Fault], load: Load, *, quiet: bool) -> None:
        self.done: Counter[str] = Counter()
        self.skipped = 0
        self._world = world
        self._settings = settings
        self._faults = faults
        self._load = load
        self._quiet = quiet

    async def run(self, seconds: float) -> None:
        self._begun = time.monotonic()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._load.run())
            showing = group.create_task(self._show(seconds))
            under_way = [group.create_task(self._one(fault)) for fault in self._faults]
            await asyncio.sleep(seconds)
            await asyncio.gather(*under_way)
            self._load.stop()
            showing.cancel()

    async def _one(self, fault: Fault) -> None:
        await asyncio.sleep(max(0.0, self._begun + fault.at - time.monotonic()))
        if fault.target == GATEWAY:
            self._world.gateway.signal(signal.SIGHUP)
        elif await self._would_be_too_much(fault):
            self.skipped += 1
            return
        else:
            await self._world.replicas[fault.target].do(fault)
        self.done[fault.kind] += 1

    async def _would_be_too_much(self, fault: Fault) -> bool:
        """The gateway must be left with half of its engines, so that a request has somewhere to go."""
        if fault.kind not in DOWN and not fault.kind.startswith("kill"):
            return False
        up = await ready(self._world)
        return len(up - {fault.target}) < max(1, len(self._world.replicas) // 2)

    async def _show(self, seconds: float) -> None:
        alone = sys.stderr.isatty()
        while True:
            verdicts, passed = self._load.verdicts, time.monotonic() - self._begun
            if not self._quiet:
                line = (
                    f"  {passed:4.0f} of {seconds:.0f} s  {verdicts.requests} requests, {len(verdicts.failures)} failures, "
                    f"{len(verdicts.unequal)} unequal; {sum(self.done.values())} faults"
                )
                print(f"\r{line}" if alone else line, end="" if alone else "\n", file=sys.stderr, flush=True)
            await asyncio.sleep(1 if alone else 10)


async def ready(world: World) -> set[str]:
    """The replicas that take requests, as the gateway says."""
    text = (await world.gateway.get("/metrics")).body.decode()
    return {r for r in world.replicas if f'penstock_engine_up{{model="{world.model}",replica="{r}"}} 1.0' in text}


async def until_all_ready(world: World, timeout: float) -> None:
    async with asyncio.timeout(timeout):
        while len(await ready(world)) < len(world.replicas):  # noqa: ASYNC110 - another process has no event to offer
            await asyncio.sleep(0.2)


async def run(args: argparse.Namespace) -> int:
    settings, seconds = REAL if args.vllm else FAKE, args.minutes * 60
    async with real_world() if args.vllm else fake_world() as world:
        faults = schedule(args.seed, seconds, world.targets, settings.pause, settings.longest)
        say(args, f"chaos: seed {args.seed}, {args.minutes:g} minutes, {len(world.replicas)} replicas; starting them …")
        try:
            await until_all_ready(world, settings.start)
        except TimeoutError:
            print("chaos: the engines did not become ready:", *world.gateway.log[-5:], sep="\n  ", file=sys.stderr)
            return 2
        asked = questions(world.model, real=args.vllm)
        load = Load(world.gateway, asked, settings.clients, args.seed, settings.patience)
        await load.learn()
        chaos = Chaos(world, settings, faults, load, quiet=args.quiet)
        await chaos.run(seconds)
        await load.audit()
        world.gateway.signal(signal.SIGTERM)
        code = await world.gateway.exit_code(60)
        if code:
            load.verdicts.failures.append(f"the gateway ended with exit code {code}")
        load.verdicts.failures += [str(x) for x in world.gateway.log if "fault in the gateway" in x["message"]]
        orphans = await left(world.marker)
    verdicts = load.verdicts
    if not verdicts.requests:
        verdicts.failures.append("no request came to an end: nothing has been shown")
    figures = {
        "unanswered_requests": len(verdicts.asked) - verdicts.requests,
        "failures": len(verdicts.failures),
        "lost_or_duplicated_tokens": verdicts.tokens,
        "unequal_greedy_answers": len(verdicts.unequal),
        "orphan_processes": orphans,
    }
    report(args, verdicts.requests, figures, chaos, [*verdicts.failures, *verdicts.unequal])
    return 1 if any(figures.values()) else 0


async def left(marker: str) -> int:
    """Processes of engines that are still there; what was killed may take a moment to be gone."""
    deadline = time.monotonic() + 3
    while (found := marked(marker)) and time.monotonic() < deadline:  # noqa: ASYNC110 - as above
        await asyncio.sleep(0.1)
    return len(found)


def say(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(text, file=sys.stderr, flush=True)


def report(args: argparse.Namespace, requests: int, figures: dict[str, int], chaos: Chaos, wrong: list[str]) -> None:
    for line in wrong[:10]:
        print(f"  {line[:600]}", file=sys.stderr)
    if args.json:
        done = {"faults": dict(chaos.done), "skipped": chaos.skipped}
        print(json.dumps({"seed": args.seed, "minutes": args.minutes, "requests": requests, **figures, **done}))
        return
    if sys.stderr.isatty() and not args.quiet:
        print(file=sys.stderr)
    width = max(map(len, figures))
    print(f"{'requests':{width}}  {requests}")
    for name, figure in figures.items():
        print(f"{name.replace('_', ' '):{width}}  {figure}")
    faults = ", ".join(f"{kind} {count}" for kind, count in sorted(chaos.done.items()))
    print(f"{'faults':{width}}  {faults}; {chaos.skipped} skipped, seed {args.seed}")
    print(" / ".join(map(str, figures.values())))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/chaos", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="how long the load runs (default: 1)")
    parser.add_argument("--vllm", action="store_true", help="two real replicas instead of six fake ones")
    parser.add_argument("--seed", type=int, help="the same seed gives the same schedule (default: a new one)")
    parser.add_argument("--json", action="store_true", help="the figures as one line of JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    args = parser.parse_args()
    if not 0.1 <= args.minutes <= 24 * 60:
        parser.error("--minutes must be from 0.1 to 1440")
    if args.vllm and not os.access(ROOT / ".venv-engine/bin/python", os.X_OK):
        parser.error("--vllm needs the real engine: run scripts/setup-engine and scripts/make-models first")
    if args.seed is None:
        args.seed = secrets.randbelow(10_000)
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(asyncio.run(run(args)))
    sys.exit(130)


if __name__ == "__main__":
    main()
