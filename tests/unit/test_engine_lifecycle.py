"""States, restarts, progress, and causes of death: by table."""

import pytest

from engines.autopsy import Verdict, explain
from engines.lifecycle import NEXT, Happening, Progress, RestartPolicy, shown
from engines.types import FleetView, Replica, ReplicaState


def test_ready_is_reached_by_an_answer_only_and_left_by_anything_else() -> None:
    for (before, what), after in NEXT.items():
        if after is ReplicaState.READY:
            assert what is Happening.ANSWERED
            assert before in {ReplicaState.STARTING, ReplicaState.UNHEALTHY}
        if before is ReplicaState.READY:
            assert after is not ReplicaState.READY


def test_failed_is_left_only_when_asked() -> None:
    assert {what for before, what in NEXT if before is ReplicaState.FAILED} == {Happening.LAUNCHED, Happening.ENDED}


def test_whatever_happens_it_can_end() -> None:
    assert all(NEXT[state, Happening.ENDED] is ReplicaState.STOPPED for state in ReplicaState)


@pytest.mark.parametrize(
    ("own", "seen"),
    [
        (ReplicaState.STARTING, ReplicaState.DRAINING),
        (ReplicaState.READY, ReplicaState.DRAINING),
        (ReplicaState.UNHEALTHY, ReplicaState.DRAINING),
        (ReplicaState.DRAINING, ReplicaState.DRAINING),
        (ReplicaState.STOPPED, ReplicaState.STOPPED),
        (ReplicaState.FAILED, ReplicaState.FAILED),
    ],
)
def test_a_held_replica_takes_nothing_and_hides_no_failure(own: ReplicaState, seen: ReplicaState) -> None:
    replica = Replica("m/0", "m", "http://127.0.0.1:1", None, "m", own, reason="because")
    assert shown(replica, None) is replica
    held = shown(replica, "drained")
    assert held.state is seen
    assert held.reason == ("because" if own is seen else "drained; because")


@pytest.mark.parametrize(
    ("starts", "deaths", "now", "expected"),
    [
        ([], 0, 0.0, 0.0),
        ([0.0], 1, 1.0, 0.5),
        ([0.0], 2, 1.0, 1.0),
        ([0.0], 4, 1.0, 4.0),
        ([0.0], 8, 1.0, 30.0),
        ([0.0], 100_000, 1.0, 30.0),
        ([0.0, 1.0, 2.0, 3.0], 0, 4.0, 0.0),  # the fifth start within the minute
        ([0.0, 1.0, 2.0, 3.0, 4.0], 0, 5.0, None),  # the sixth
        ([0.0, 1.0, 2.0, 3.0, 4.0], 0, 60.0, 0.0),  # the first no longer counts
        ([0.0, 1.0, 2.0, 3.0, 4.0], 7, 31.0, 30.0),  # nor will it after the wait
        ([0.0, 9.0, 9.0, 9.0, 9.0, 9.0], 0, 65.0, None),
    ],
)
def test_when_an_engine_is_started_again(starts: list[float], deaths: int, now: float, expected: float | None) -> None:
    assert RestartPolicy().delay(starts, deaths, now) == expected


@pytest.mark.parametrize(
    ("ready_at", "too_soon"), [(None, True), (99.0, True), (40.5, True), (40.0, False), (0.0, False)]
)
def test_a_death_after_a_minute_of_good_work_does_not_count(ready_at: float | None, too_soon: bool) -> None:
    assert RestartPolicy().died_too_soon(ready_at, now=100.0) is too_soon


@pytest.mark.parametrize(
    ("tokens", "running", "since"),
    [(5.0, 1, 10.0), (6.0, 1, 20.0), (5.0, 0, 20.0), (1.0, 3, 20.0)],
)
def test_progress_is_a_token_or_nothing_to_do(tokens: float, running: int, since: float) -> None:
    assert Progress(tokens=5.0, since=10.0).seen(tokens, running, now=20.0) == Progress(tokens, since)


@pytest.mark.parametrize(
    ("status", "log", "expected"),
    [
        (3, [], Verdict("exited with code 3")),
        (0, ["INFO: bye"], Verdict("exited with code 0")),
        (137, ["INFO: all is well"], Verdict("killed (SIGKILL), most likely because the machine is out of memory")),
        (139, [], Verdict("ended by SIGSEGV")),
        (255, [], Verdict("ended by signal 127")),
        (
            1,
            ["Traceback:", "ValueError: first", "(APIServer pid=12) ValueError: last", "INFO 11-24 06:51:03 bye"],
            Verdict("exited with code 1: ValueError: last"),
        ),
        (
            0,
            ["(APIServer pid=3) ERROR 11-24 06:51:03 [async_llm.py:5] vllm.v1.engine.exceptions.EngineDeadError: gone"],
            Verdict("exited with code 0: vllm.v1.engine.exceptions.EngineDeadError: gone"),
        ),
        (
            2,
            ["usage: …", "api_server.py: error: unrecognized arguments: --a=1 --b"],
            Verdict("vLLM does not know this flag: --a=1 --b (see engine.args)", hopeless=True),
        ),
        (
            2,
            ["api_server.py: error: argument --dtype: invalid choice: 'x'"],
            Verdict("vLLM does not accept engine.args: argument --dtype: invalid choice: 'x'", hopeless=True),
        ),
        (
            1,
            ["python: No module named vllm"],
            Verdict(
                "the interpreter has no vLLM: run scripts/setup-engine, or set engine.python to one that has it",
                hopeless=True,
            ),
        ),
        (
            1,
            ["(APIServer pid=1) OSError: [Errno 98] Address already in use"],
            Verdict("its port was taken by another process", port_taken=True),
        ),
        (
            1,
            ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "RuntimeError: Engine core failed"],
            Verdict("out of memory: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"),
        ),
        (1, ["MemoryError"], Verdict("out of memory: MemoryError")),
        (134, ["terminate called after throwing 'std::bad_alloc'"], None),
    ],
)
def test_why_an_engine_died(status: int, log: list[str], expected: Verdict | None) -> None:
    assert explain(status, log) == (expected or Verdict(f"out of memory: {log[0]}"))


def test_a_reason_is_one_line_of_bearable_length() -> None:
    verdict = explain(2, [f"x: error: unrecognized arguments: {'--y ' * 1000}"])
    assert len(verdict.reason) == 300
    assert verdict.hopeless


def test_a_view_of_nothing() -> None:
    view = FleetView()
    assert view.of("m") == ()
    assert view.ready("m") == []


@pytest.mark.parametrize(("card", "expected"), [({}, None), ({"max_model_len": 7}, 7), ({"max_model_len": "7"}, None)])
def test_the_length_a_card_tells(card: dict[str, object], expected: int | None) -> None:
    replica = Replica("m/0", "m", "http://127.0.0.1:1", None, "m", ReplicaState.READY, card=card)
    assert replica.max_model_len == expected
    assert FleetView({"m": (replica,)}).ready("m") == [replica]
