"""What is read of an engine's answers; and that no answer, however odd, is more than a `ProbeError`."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engines import probe
from engines.machine import find_python, this_machine
from engines.probe import Address, Gauges, Line, Pick, ProbeError, pick_card, read_gauges
from engines.types import Load

A: Mapping[str, Any] = {"id": "a", "max_model_len": 1}
B: Mapping[str, Any] = {"id": "b", "max_model_len": 2}


@pytest.mark.parametrize(
    ("cards", "model", "served", "expected"),
    [
        ([A, B], "a", None, Pick("a", A, None)),
        ([A, B], "b", None, Pick("b", B, None)),
        ([A, B], "a", "b", Pick("b", B, None)),
        ([], "a", None, Pick("a", {}, None)),
        ([], "a", "b", Pick("b", {}, None)),
        (
            [A, B],
            "x",
            None,
            Pick("a", A, "the engine does not serve 'x' but 'a', 'b'; asking it for 'a' (see served_model_name)"),
        ),
        (
            [A, B],
            "b",
            "x",
            Pick("x", B, "the engine does not serve 'x' (served_model_name), only 'a', 'b'"),
        ),
        ([A], "y", "x", Pick("x", A, "the engine does not serve 'x' (served_model_name), only 'a'")),
    ],
)
def test_which_card_stands_for_a_model(
    cards: list[Mapping[str, Any]], model: str, served: str | None, expected: Pick
) -> None:
    assert pick_card(cards, model=model, served_model_name=served) == expected


METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="x"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="m}"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
vllm:prompt_tokens_total{engine="0",model_name="m"} 1e+06
vllm:prompt_tokens_created{engine="0",model_name="m"} 1.7e+09
vllm:generation_tokens_total{engine="0",model_name="m"} 17.0
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (METRICS, Gauges(Load(5, 3 - 2, 0.5), 1_000_017)),
        ("vllm:num_requests_running 1\n", Gauges(Load(1, 0, 0.0), 0)),
        ("vllm:num_requests_running NaN\n", None),
        ("vllm:num_requests_running x\n", None),
        ("process_cpu_seconds_total 1\n", None),
        ("", None),
    ],
)
def test_load_is_read_of_metrics(text: str, expected: Gauges | None) -> None:
    assert read_gauges(text) == expected


class Answering:
    """A server that sends `answer` to whatever it is asked. It closes after so many questions, or holds the connection."""

    def __init__(self, answer: bytes | Callable[[bytes], bytes], closes_after: int | None) -> None:
        self._answer = answer
        self._closes_after = closes_after
        self.connections = 0
        self.served: list[asyncio.Task[None]] = []

    def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.served.append(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(self._closes_after or 1000):
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                break
            writer.write(self._answer(head) if callable(self._answer) else self._answer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@asynccontextmanager
async def answering(
    answer: bytes | Callable[[bytes], bytes], *, closes_after: int | None = 1
) -> AsyncIterator[tuple[Line, Answering]]:
    engine = Answering(answer, closes_after)
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    line = Line(Address(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "k"))
    try:
        yield line, engine
    finally:
        line.close()
        server.close()
        await asyncio.gather(*engine.served)


MODELS = b'{"data":[{"id":"a"}]}'


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(MODELS), MODELS),
        b"HTTP/1.1 200 OK\r\n\r\n" + MODELS,
        b"HTTP/1.0 200\r\nX: y\r\n\r\n" + MODELS,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n5;x=y\r\n%s\r\n10\r\n%s\r\n0\r\n\r\n"
        % (MODELS[:5], MODELS[5:]),
    ],
)
async def test_bodies_in_every_framing(answer: bytes) -> None:
    async with answering(answer) as (line, _):
        assert await probe.cards(line) == [{"id": "a"}]


@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        (b"", None, "does not speak HTTP"),
        (b"SSH-2.0-x\r\n\r\n", None, "does not speak HTTP"),
        (b"HTTP/1.1 abc\r\n\r\n", None, "does not speak HTTP"),
        (b"HTTP/1.1\r\n\r\n", None, "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab", None, "closed the connection"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", None, "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n", None, "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", None, "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n", None, "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (9 << 20), None, "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"x" * 100_000, None, "does not speak HTTP"),
        (b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n", 401, "/v1/models says HTTP 401"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", 200, "not a list of models"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"data":[1]}'[:-1], 200, "not a list of models"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n<", 200, "not a list of models"),
    ],
)
async def test_odd_answers(answer: bytes, status: int | None, message: str) -> None:
    async with answering(answer) as (line, _):
        with pytest.raises(ProbeError, match=message) as caught:
            await probe.cards(line)
    assert caught.value.status == status


async def test_a_silent_server_is_waited_for_only_so_long() -> None:
    async with answering(b"", closes_after=None) as (line, engine):
        for asked in (1, 2):
            with pytest.raises(ProbeError, match="no answer in time"):
                await line.ask("GET", "/health", timeout=0.05)
            assert engine.connections == asked  # what may still come on the first one is no answer to the next question


WELL = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


async def test_many_questions_on_one_connection() -> None:
    async with answering(WELL, closes_after=None) as (line, engine):
        for _ in range(5):
            await probe.health(line)
        assert engine.connections == 1
        line.close()
        await probe.health(line)
        assert engine.connections == 2


@pytest.mark.parametrize("questions", [1, 2])
async def test_a_connection_that_the_engine_closes_is_made_anew(questions: int) -> None:
    async with answering(WELL, closes_after=questions) as (line, engine):
        for _ in range(6):
            await probe.health(line)
        assert engine.connections == 6 // questions


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", WELL.replace(b"\r\n\r\n", b"\r\nConnection: Close\r\n\r\n")],
)
async def test_a_connection_that_will_not_stay_is_not_asked_again(answer: bytes) -> None:
    async with answering(answer, closes_after=None) as (line, engine):
        for _ in range(3):
            await probe.health(line)
        assert engine.connections == 3


async def test_an_engine_that_is_gone_is_found_out_on_a_kept_connection() -> None:
    async with answering(WELL) as (line, _):
        await probe.health(line)
    with pytest.raises(ProbeError, match="no connection"):
        await probe.health(line)


def by_path(**statuses: int) -> Callable[[bytes], bytes]:
    def answer(head: bytes) -> bytes:
        path = head.split(b" ")[1].decode().rpartition("/")[2]
        return b"HTTP/1.1 %d x\r\nContent-Length: 0\r\n\r\n" % statuses.get(path, 404)

    return answer


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ({"completions": 200}, "/v1/completions"),
        ({"completions": 400, "embeddings": 200}, "/v1/embeddings"),
        ({"pooling": 200}, "/pooling"),
        ({"classify": 200}, "/classify"),
        ({"score": 200}, "/score"),
        ({}, None),
    ],
)
async def test_the_least_work_that_an_engine_can_do(statuses: dict[str, int], expected: str | None) -> None:
    async with answering(by_path(**statuses)) as (line, _):
        assert await probe.trial(line, "m", 5) == expected


async def test_work_that_fails() -> None:
    async with answering(by_path(completions=500)) as (line, _):
        with pytest.raises(ProbeError, match="a trial request to /v1/completions got HTTP 500"):
            await probe.trial(line, "m", 5)


@pytest.mark.parametrize(
    ("statuses", "well"),
    [({"health": 200}, True), ({"models": 200}, True), ({}, False), ({"health": 503, "models": 200}, False)],
)
async def test_health(statuses: dict[str, int], well: bool) -> None:
    async with answering(by_path(**statuses)) as (line, _):
        if well:
            await probe.health(line)
        else:
            with pytest.raises(ProbeError, match="its health check says HTTP"):
                await probe.health(line)


def test_this_machine_is_seen_as_its_environment_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, 3")
    machine = this_machine()
    assert machine.gpus == ("1", "3")
    assert machine.cores
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert this_machine().gpus == ()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("os.listdir", lambda _: ["nvidia10", "nvidia2", "nvidiactl", "null"])
    assert this_machine().gpus == ("0", "1")


def test_an_interpreter_without_vllm_is_not_taken(tmp_path: Path) -> None:
    assert find_python("./nothing", tmp_path) is None
    assert find_python(None, tmp_path) is None
