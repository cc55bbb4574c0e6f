"""A short run of scripts/chaos, and its schedule."""

import asyncio
import json

import pytest

from tests.chaos.plan import DOWN, RECOVERY, Target, schedule
from tests.served import ROOT

TARGETS = [Target(f"m/{n}", {"kill": 1, "stop": 1, "mute": 1, "slow": 1, "reset": 1}, rest=5.0) for n in range(4)]


@pytest.mark.timeout(240)
async def test_a_little_chaos() -> None:
    process = await asyncio.create_subprocess_exec(
        ROOT / "scripts/chaos", "--minutes", "0.25", "--seed", "7", "--json",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    said, progress = await process.communicate()
    assert process.returncode == 0, (said, progress.decode())
    report = json.loads(said)
    assert report["requests"] > 20
    assert sum(report["faults"].values()) > 5
    names = (
        "unanswered_requests",
        "failures",
        "lost_or_duplicated_tokens",
        "unequal_greedy_answers",
        "orphan_processes",
    )
    assert [report[name] for name in names] == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_no_more_than_half_of_the_engines_are_down_at_once(seed: int) -> None:
    faults = schedule(seed, 300, TARGETS, pause=0.5, longest=6)
    assert faults == schedule(seed, 300, TARGETS, pause=0.5, longest=6)
    assert faults != schedule(seed + 1, 300, TARGETS, pause=0.5, longest=6)
    assert {fault.kind for fault in faults} == {"kill", "stop", "mute", "slow", "reset", "reload"}
    assert all(fault.at + fault.seconds <= 300 for fault in faults)
    down = [fault for fault in faults if fault.kind in DOWN]
    for one in down:
        at_once = {o.target for o in down if o.at <= one.at < o.at + o.seconds + RECOVERY}
        assert len(at_once) <= 2


@pytest.mark.parametrize(
    ("argument", "said"), [("--help", b"What it does not do"), ("--minutes=0", b"--minutes must be")]
)
async def test_it_explains_itself(argument: str, said: bytes) -> None:
    process = await asyncio.create_subprocess_exec(
        ROOT / "scripts/chaos", argument, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert said in out + err
    assert b"Traceback" not in err
    assert process.returncode == (0 if argument == "--help" else 2)
