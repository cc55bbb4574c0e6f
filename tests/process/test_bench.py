"""`penstock bench` against engines in processes of their own: right counts, and a cause for every failure."""

import asyncio
import contextlib
import json
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner

from gateway.bench.client import Client, Exchange, Target, _Connection
from gateway.bench.load import Body, Lane, Patience, Plan, Spec, bench
from gateway.bench.prompts import Dataset, Item, Lengths, Synthetic
from gateway.bench.results import Cause, Record, Run, Slo, Summary
from gateway.cli import app
from tests.fake_engine import FakeEngine

JSON = dict[str, Any]


class Quiet:
    """A watcher that counts how often it was shown something."""

    def __init__(self) -> None:
        self.over = asyncio.Event()  # the time or number of requests of the run is used up
        self.labels: list[str] = []
        self.looks = 0

    def begin(self, label: str) -> None:
        self.labels.append(label)

    def look(self, lanes: Sequence[Lane]) -> None:
        assert all(0 <= lane.share <= 1 for lane in lanes)
        self.looks += 1
        if all(lane.share == 1 for lane in lanes):
            self.over.set()


def spec(
    *urls: str, fake: Mapping[str, object] | None = None, chat: bool = True, key: str | None = None, **changed: Any
) -> Spec:
    """Ten requests, two at a time, of four tokens each. No calibration: the prompts are a dataset."""
    extra = {"fake": fake} if fake else None
    path = "chat/completions" if chat else "completions"
    whole = Spec(
        [(Target.parse(url, path, key), Body("tiny", chat=chat, extra=extra)) for url in urls],
        Dataset([Item(({"role": "user", "content": "one two three"},), 4, whole=True)], None),
        [Plan(concurrency=2, requests=10)],
        timeout=20,
    )
    return whole._replace(**changed)


async def summary(of: Spec) -> Summary:
    (run,) = await bench(of, Quiet())
    return run.targets[0].summary


def causes(run: Run, target: int = 0) -> dict[Cause, int]:
    return {failure.cause: failure.requests for failure in run.targets[target].summary.failures}


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    "fake",
    [
        {},
        {"crlf": True},
        {"split": 1},
        {"split": 7, "comments": True},
        {"many_per_chunk": 3},
        {"comments": True, "many_per_chunk": 50},
    ],
)
async def test_tokens_are_the_engines_own_count(fake: JSON, chat: bool) -> None:
    async with FakeEngine() as engine:
        found = await summary(spec(engine.url, fake=fake, chat=chat))
        asked = (await engine.stats())["last"][0]["json"]
    assert (found.ok, found.failed, found.uncounted) == (10, 0, 0)
    assert (found.prompt_tokens, found.output_tokens) == (30, 40)
    assert found.peak_running == 2  # though it is over before a second look
    assert found.itl.size == 30  # the role chunk and the usage chunk are no output
    assert found.output_rate == pytest.approx(40 / found.duration)
    assert (asked["stream"], asked["stream_options"], asked["max_tokens"]) == (True, {"include_usage": True}, 4)


async def test_chunks_of_several_tokens_are_fewer_gaps_and_no_fewer_tokens() -> None:
    async with FakeEngine() as engine:
        found = await summary(spec(engine.url, fake={"ids_per_event": 2}))
    assert (found.output_tokens, found.itl.size) == (40, 10)


async def test_without_usage_tokens_are_chunks_and_it_says_so() -> None:
    async with FakeEngine() as engine:
        found = await summary(spec(engine.url, fake={"usage": None}))
    assert (found.output_tokens, found.prompt_tokens, found.uncounted) == (40, 0, 10)


@pytest.mark.parametrize(
    ("fake", "cause", "said"),
    [
        ({"status": 401}, Cause.UNAUTHORIZED, "HTTP 401"),
        ({"status": 404}, Cause.NOT_FOUND, "HTTP 404"),
        ({"status": 400, "body": '{"error":{"message":"too long"}}'}, Cause.REJECTED, "HTTP 400: too long"),
        ({"status": 429, "headers": {"retry-after": "1"}}, Cause.RATE_LIMITED, "HTTP 429"),
        ({"status": 503}, Cause.UNAVAILABLE, "HTTP 503"),
        ({"status": 502, "body": "<html>", "content_type": "text/html"}, Cause.SERVER_ERROR, "HTTP 502: <html>"),
        ({"accept_then_close": True}, Cause.CUT, "closed without an answer"),
        ({"cut_after": 2}, Cause.CUT, "ended after 2 chunks"),
        ({"cut_after": 2, "close": "rst"}, Cause.CUT, "without a finish reason"),
        ({"cut_after": -1}, Cause.CUT, "ended after 0 chunks"),
        ({"no_done": True}, Cause.CUT, "without [DONE]"),
        ({"no_finish": True}, Cause.CUT, "without a finish reason"),
        ({"error_event_after": 2}, Cause.ERROR_EVENT, "EngineCore"),
        ({"error_first": True}, Cause.ERROR_EVENT, "EngineCore"),
        ({"garbage": True}, Cause.MALFORMED, "not a chunk"),
        ({"raw": "220 mail.example ESMTP\r\n"}, Cause.MALFORMED, "not HTTP"),
        (
            {"raw": "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"},
            Cause.MALFORMED,
            "not HTTP",
        ),
        ({"status": 500, "body": "x" * 200_000}, Cause.SERVER_ERROR, "HTTP 500: xxx"),
    ],
    ids=lambda value: str(value)[:70],
)
async def test_failures_by_cause(fake: JSON, cause: Cause, said: str) -> None:
    async with FakeEngine() as engine:
        (run,) = await bench(spec(engine.url, fake=fake, plans=[Plan(concurrency=1, requests=2)]), Quiet())
    (failure,) = run.targets[0].summary.failures
    assert failure.cause is cause
    assert said in failure.detail
    assert run.targets[0].summary.ok == 0


async def test_a_server_that_hangs_is_a_timeout() -> None:
    async with FakeEngine() as engine:
        (run,) = await bench(
            spec(engine.url, fake={"hang_after": 1}, timeout=0.2, plans=[Plan(concurrency=3, requests=3)]), Quiet()
        )
    assert causes(run) == {Cause.TIMEOUT: 3}


async def test_a_wrong_key_and_a_dead_port_stop_at_once() -> None:
    async with FakeEngine(api_key="right") as engine:
        (run,) = await bench(spec(engine.url, key="wrong", plans=[Plan(concurrency=1, duration=600)]), Quiet())
        assert causes(run) == {Cause.UNAUTHORIZED: 1}
        assert run.stopped == "every request so far failed: 401 wrong key"
        found = await summary(spec(engine.url, key="right"))
        assert found.ok == 10
    (run,) = await bench(spec(engine.url, plans=[Plan(rate=1000, duration=600), Plan(rate=1, duration=1)]), Quiet())
    assert causes(run).keys() == {Cause.REFUSED}
    assert run.stopped == "every request so far failed: connection refused"


async def test_a_server_that_dies_in_mid_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patience, "GONE", 0.0)
    async with FakeEngine() as engine:
        await engine.script([{}] * 4 + [{"hold_after": 2}] * 4)
        test = asyncio.create_task(bench(spec(engine.url, plans=[Plan(concurrency=4, duration=600)]), Quiet()))
        await engine.until(holding=4)
        engine.kill()
        (run,) = await test
    assert run.targets[0].summary.ok == 4
    assert run.stopped == "the server has been gone for 0 s: connection refused"
    assert causes(run)[Cause.CUT] == 4
    assert causes(run)[Cause.REFUSED] >= Patience.FIRST


async def test_some_failures_do_not_stop_a_test() -> None:
    async with FakeEngine() as engine:
        await engine.script([{}, {"status": 500}, {}, {"cut_after": 1}, {"status": 429}])
        (run,) = await bench(spec(engine.url, plans=[Plan(concurrency=1, requests=8)]), Quiet())
    assert causes(run) == {Cause.SERVER_ERROR: 1, Cause.CUT: 1, Cause.RATE_LIMITED: 1}
    assert (run.targets[0].summary.ok, run.stopped) == (5, None)


async def test_connections_are_kept_and_a_stale_one_is_replaced() -> None:
    async with FakeEngine() as engine:
        assert (await summary(spec(engine.url))).ok == 10
        assert (await engine.stats())["connections"] <= 2 + 2  # the two of the test, and those that control the engine


class Wire(asyncio.Transport):
    """A transport that leads nowhere."""

    aborted = False

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted


@asynccontextmanager
async def tcp_server(answer: Any, context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """`answer(reader, writer)` is the whole server."""
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError):
            await answer(reader, writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        async with server:
            yield server.sockets[0].getsockname()[1]
    finally:
        for writer in writers:
            writer.transport.abort()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await asyncio.gather(*(writer.wait_closed() for writer in writers))


EVENTS = (
    b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1}}\n\ndata: [DONE]\n\n'
)
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(EVENTS), EVENTS)


async def request(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))


async def one_after_the_other(port: int, number: int) -> list[Exchange]:
    client = Client(Target.parse(f"http://127.0.0.1:{port}", "chat/completions", None), 20)
    ended: list[Exchange] = []
    for _ in range(number):
        end: asyncio.Future[Exchange] = asyncio.get_running_loop().create_future()
        client.send(Exchange(b"{}", end.set_result, due=0))
        ended.append(await end)
    client.close()
    await asyncio.sleep(0)
    return ended


async def test_a_kept_connection_that_is_closed_under_a_request_is_no_failure() -> None:
    connections = 0

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await request(reader)
        writer.write(WHOLE)
        await request(reader)
        writer.close()

    async with tcp_server(once) as port:
        assert [exchange.cause for exchange in await one_after_the_other(port, 3)] == [None] * 3
    assert connections == 3


@pytest.mark.parametrize(
    "reply",
    [
        WHOLE,
        b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + WHOLE,
        WHOLE.replace(b"content-length", b"connection: close\r\ncontent-length"),
        b"HTTP/1.0 200 OK\r\n\r\n" + EVENTS,
    ],
)
async def test_ways_to_end_an_answer(reply: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(reply)
        writer.close()

    async with tcp_server(answer) as port:
        assert [(e.cause, e.reader.usage) for e in await one_after_the_other(port, 2)] == [(None, (3, 1))] * 2


async def test_bytes_that_nobody_asked_for_end_a_connection() -> None:
    client, wire = Client(Target.parse(dead_url(), "chat/completions", None), 20), Wire()
    connection = _Connection(client)
    connection.connection_made(wire)
    connection.data_received(WHOLE)
    assert wire.is_closing()
    connection.connection_lost(None)
    client.close()


async def test_a_connection_that_is_closing_takes_no_request() -> None:
    client, wire = Client(Target.parse(dead_url(), "chat/completions", None), 20), Wire()
    connection = _Connection(client)
    connection.connection_made(wire)
    client.idle(connection)
    wire.abort()
    end: asyncio.Future[Exchange] = asyncio.get_running_loop().create_future()
    client.send(Exchange(b"{}", end.set_result, due=0))
    assert (await end).cause is Cause.REFUSED  # by the address: a new connection was tried


async def test_a_server_that_never_shakes_hands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.bench.client._CONNECT_TIMEOUT", 0.1)

    async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with tcp_server(silent) as port:
        (run,) = await bench(spec(f"https://127.0.0.1:{port}"), Quiet())
    assert causes(run).keys() == {Cause.UNREACHABLE}
    assert run.targets[0].summary.failures[0].detail.endswith("no TLS connection within 0.1 s")


async def test_a_host_that_does_not_exist() -> None:
    (run,) = await bench(spec(f"http://{'a' * 70}.invalid", plans=[Plan(concurrency=1, requests=1)]), Quiet())
    assert causes(run) == {Cause.UNREACHABLE: 1}


# Of a self-signed certificate for 127.0.0.1; protects nothing.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgCrDGqNTd3hiPFnu/
TeNSPPM7FH0Zed+RbLhiVdN9R1WhRANCAATCvJitUgapOlLB5GjFL31sDR7T09rR
IYZiDVfOl70O8bql+SBNcGBnn+b36Tr/cr0CLSW+LqngD6e7cLsuW4T8
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBkTCCATagAwIBAgIULjyX1tVH7sp63s0pRT+K8AI7JZEwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJMTI3LjAuMC4xMCAXDTI2MTEyNDA4MDUyNloYDzIxMjYxMDMx
MDgwNTI2WjAUMRIwEAYDVQQDDAkxMjcuMC4wLjEwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATCvJitUgapOlLB5GjFL31sDR7T09rRIYZiDVfOl70O8bql+SBNcGBn
n+b36Tr/cr0CLSW+LqngD6e7cLsuW4T8o2QwYjAdBgNVHQ4EFgQU6e8WZSKP+e9a
IMccoRn/Cf+VnTYwHwYDVR0jBBgwFoAU6e8WZSKP+e9aIMccoRn/Cf+VnTYwDwYD
VR0TAQH/BAUwAwEB/zAPBgNVHREECDAGhwR/AAABMAoGCCqGSM49BAMCA0kAMEYC
IQCGIpGOGt6YXL4Pr40a5Tx0gWPzRsT/E34498pH61OZYQIhAOymgoH1zma4whIz
3JZ1XqzYLGXOICJL5p7UXNCczOzU
-----END CERTIFICATE-----
"""


async def test_tls(tmp_path: Path) -> None:
    (tmp_path / "pem").write_text(CERTIFICATE)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "pem")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(WHOLE)
        writer.close()

    async with tcp_server(answer, context) as port:
        url = f"https://127.0.0.1:{port}"
        test = spec(url, plans=[Plan(concurrency=1, requests=2)])
        (run,) = await bench(test, Quiet())
        assert causes(run) == {Cause.UNREACHABLE: 1}
        assert "certificate" in run.targets[0].summary.failures[0].detail
        trusting = Target.parse(url, "chat/completions", None, insecure=True)
        (run,) = await bench(test._replace(targets=[(trusting, Body("tiny"))]), Quiet())
        assert (run.targets[0].summary.ok, run.targets[0].summary.failed) == (2, 0)


async def test_synthetic_prompts_are_calibrated_by_the_engines_count() -> None:
    source = Synthetic(Lengths.parse("50..80"), Lengths.parse("3"), prefix_tokens=40)
    watcher = Quiet()
    async with FakeEngine() as engine:
        (run,) = await bench(spec(engine.url, source=source, warmup=4), watcher)
        stats = await engine.stats()
    assert watcher.labels == ["calibration", "warm-up", "concurrency 2"]
    assert watcher.looks >= 3
    assert stats["requests"] == 2 + 4 + 10
    tokens = [record.prompt_tokens for record in run.targets[0].records]
    assert 90 <= min(tokens) <= max(tokens) <= 120
    assert len(set(tokens)) > 3
    prompts = {request["json"]["messages"][0]["content"] for request in stats["last"]}
    assert len(prompts) == 16  # no prompt twice, so that none is cached but the prefix


async def test_turns_feed_the_answers_back() -> None:
    source = Synthetic(Lengths.parse("5"), Lengths.parse("2"), turns=3)
    async with FakeEngine() as engine:
        (run,) = await bench(spec(engine.url, source=source, plans=[Plan(concurrency=1, requests=3)]), Quiet())
        last = (await engine.stats())["last"]
    records = run.targets[0].records
    assert [(record.conversation, record.turn) for record in records] == [(0, 0), (0, 1), (0, 2)]
    messages = max((request["json"]["messages"] for request in last), key=len)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2 + ["user"]
    assert messages[1]["content"].strip() == "t0 t1"
    assert [record.prompt_tokens for record in records] == sorted({record.prompt_tokens for record in records})


async def test_an_open_loop_sends_when_requests_are_due_whether_or_not_others_are_answered() -> None:
    async with FakeEngine() as engine:
        await engine.script([{"hold": True}] * 5)
        plan = Plan(rate=500, poisson=False, requests=5)
        test = asyncio.create_task(bench(spec(engine.url, plans=[plan], keep_times=True), Quiet()))
        await engine.until(holding=5)
        await engine.release()
        (run,) = await test
    records: Sequence[Record] = sorted(run.targets[0].records)
    assert [record.due for record in records] == pytest.approx([0, 0.002, 0.004, 0.006, 0.008])
    assert all(record.sent >= record.due - 0.001 for record in records)
    assert all(len(record.times or ()) == record.chunks == 4 for record in records)
    assert run.targets[0].summary.lateness.size == 5


async def test_two_targets_get_the_same_requests() -> None:
    source = Synthetic(Lengths.parse("5..50"), Lengths.parse("1..9"))
    async with FakeEngine(replicas=2) as engine:
        (run,) = await bench(
            spec(*engine.urls, source=source, plans=[Plan(rate=1000, requests=20)], slo=Slo(ttft=60)), Quiet()
        )
        bodies = [[request["json"] for request in (await engine.stats(i))["last"]] for i in (0, 1)]
    first, second = (target.summary for target in run.targets)
    assert (first.ok, second.ok, first.good, second.good) == (20, 20, 20, 20)
    assert (first.prompt_tokens, first.output_tokens) == (second.prompt_tokens, second.output_tokens)
    sent = [sorted(body["messages"][0]["content"] for body in of_target) for of_target in bodies]
    assert set(sent[0]) >= set(sent[1])  # the first was asked the calibration's two besides
    assert len(sent[1]) == 20


async def test_half_a_comparison_is_none() -> None:
    async with FakeEngine() as engine:
        (run,) = await bench(spec(engine.url, dead_url(), plans=[Plan(concurrency=2, duration=600)]), Quiet())
    assert run.stopped == "every request so far failed: connection refused"
    assert causes(run, 1) == {Cause.REFUSED: 1}


async def test_a_fault_of_the_watcher_is_no_hang() -> None:
    class Faulty(Quiet):
        def look(self, lanes: Sequence[Lane]) -> None:
            raise ZeroDivisionError

    async with FakeEngine() as engine:
        with pytest.raises(ZeroDivisionError):
            await bench(spec(engine.url, plans=[Plan(concurrency=2, duration=600)]), Faulty())


async def test_a_warm_up_that_fails_is_what_is_shown() -> None:
    async with FakeEngine() as engine:
        await engine.script([{"status": 503}] * 3)
        (run,) = await bench(spec(engine.url, warmup=3), Quiet())
        assert (run.label, causes(run)) == ("warm-up", {Cause.UNAVAILABLE: 3})
        await engine.script([{"status": 503}] * 2)
        source = Synthetic(Lengths.parse("9"), Lengths.parse("1"))
        (run,) = await bench(spec(engine.url, source=source), Quiet())
        assert (run.label, causes(run)) == ("calibration", {Cause.UNAVAILABLE: 2})


async def test_a_sweep_stops_where_it_had_to() -> None:
    async with FakeEngine(api_key="right") as engine:
        plans = [Plan(concurrency=1, requests=1), Plan(concurrency=1, requests=2)]
        assert len(await bench(spec(engine.url, key="wrong", plans=plans), Quiet())) == 1


async def test_the_clock_ends_a_conversation_between_two_turns() -> None:
    source = Synthetic(Lengths.parse("5"), Lengths.parse("2"), turns=2)
    async with FakeEngine() as engine:
        await engine.script([{}, {}, {"hold": True}])
        watcher = Quiet()
        test = asyncio.create_task(
            bench(spec(engine.url, source=source, plans=[Plan(rate=100, duration=0.3)]), watcher)
        )
        await engine.until(holding=1)
        await watcher.over.wait()
        await engine.release()
        (run,) = await test
    turns = {(record.conversation, record.turn) for record in run.targets[0].records}
    held = min(conversation for conversation, turn in turns if (conversation, 1) not in turns)
    assert (held, 0) in turns
    assert run.targets[0].summary.failed == 0


async def test_a_sweep_goes_on_with_new_prompts() -> None:
    source = Synthetic(Lengths.parse("9"), Lengths.parse("1"))
    plans = [Plan(concurrency=n, requests=4) for n in (1, 2, 50)]
    async with FakeEngine() as engine:
        runs = await bench(spec(engine.url, source=source, plans=plans), Quiet())
    assert [run.label for run in runs] == ["concurrency 1", "concurrency 2", "concurrency 50"]
    indices = [record.conversation for run in runs for record in run.targets[0].records]
    assert sorted(indices) == list(range(12))


async def test_a_duration_ends_a_closed_loop_and_lets_what_runs_finish() -> None:
    async with FakeEngine() as engine:
        await engine.script([{"hold_after": 1}] * 40)
        watcher = Quiet()
        test = asyncio.create_task(bench(spec(engine.url, plans=[Plan(concurrency=40, duration=1)]), watcher))
        await engine.until(holding=40)
        await watcher.over.wait()
        await engine.release()
        (run,) = await test
        assert (await engine.stats())["requests"] == 40
    found = run.targets[0].summary
    assert (found.ok, found.failed, found.abandoned, run.stopped) == (40, 0, 0, None)


# ---- the command


async def penstock(*words: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `penstock bench …`."""
    process = await start(*words)
    out, err = await process.communicate()
    assert b"Traceback" not in out + err
    return process.returncode or 0, out.decode(), err.decode()


async def start(*words: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "bench", "--model", "tiny", "--output-tokens", "4", *words,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


def dead_url() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


async def test_the_command_prints_a_table_and_writes_reports(tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text(json.dumps({"prompt": "one two three"}))
    async with FakeEngine() as engine:
        code, out, _ = await penstock(
            "--url", engine.url + "/v1", "--dataset", str(data), "--requests", "10", "--concurrency", "3", "--key", "sk-secret",
            "--slo", "ttft=60s", "--json", str(tmp_path / "json"), "--json-requests", "--html", str(tmp_path / "html"),
        )  # fmt: skip
    assert code == 0
    for part in ("10 ok", "output tokens/s", "time to first token", "within the SLO"):
        assert part in out
    whole = orjson.loads((tmp_path / "json").read_bytes())
    assert (whole["ok"], whole["config"]["concurrency"]) == (True, 3)
    (target,) = whole["runs"][0]["targets"]
    assert target["summary"]["output_tokens"] == 40
    assert len(target["requests"]) == 10
    assert "sk-secret" not in (tmp_path / "json").read_text() + (tmp_path / "html").read_text() + out
    assert "<svg" in (tmp_path / "html").read_text()


async def test_json_on_stdout_is_nothing_but_json() -> None:
    async with FakeEngine() as engine:
        code, out, err = await penstock(
            "--url", engine.url, "--requests", "4", "--sweep", "concurrency=1,2", "--json", "-"
        )
    assert code == 0
    assert [run["label"] for run in orjson.loads(out)["runs"]] == ["concurrency 1", "concurrency 2"]
    assert "sweep" in err


async def test_a_dead_port_ends_with_a_table_and_exit_code_1() -> None:
    code, out, _ = await penstock("--url", dead_url(), "--duration", "600")
    assert code == 1
    assert "connection refused" in out
    assert "Is the server running" in out


async def test_one_failed_request_is_exit_code_1() -> None:
    async with FakeEngine() as engine:
        await engine.script([{}] * 5 + [{"cut_after": 1}])
        code, out, _ = await penstock("--url", engine.url, "--requests", "8", "--concurrency", "1")
    assert code == 1
    assert "7 ok" in out
    assert "stream cut off" in out


async def test_an_interrupt_shows_what_there_is() -> None:
    async with FakeEngine() as engine:
        await engine.script([{}] * 5 + [{"hold_after": 1}])
        process = await start("--url", engine.url, "--duration", "600", "--concurrency", "1")
        await engine.until(holding=1)
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
    assert process.returncode == 1
    assert b"stopped: interrupted" in out
    assert b"3 ok" in out  # two were the calibration's
    assert b"1 abandoned" in out
    assert b"Traceback" not in out + err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--url", "ftp://x"], "no http"),
        (["--url", "http://x", "--rate", "1", "--concurrency", "1"], "one of them only"),
        (["--url", "http://x", "--duration", "1", "--requests", "1"], "one of them only"),
        (["--url", "http://x", "--sweep", "rate=0"], "expected rate=1,2,4"),
        (["--url", "http://x", "--slo", "ttft=5"], "expected a duration"),
        (["--url", "http://x", "--extra", "[]"], "JSON object"),
        (["--url", "http://x", "--extra", "{"], "--extra"),
        (["--url", "http://x", "--prompt-tokens", "0"], "no length"),
        (["--url", "http://x", "--dataset", "/no/such/file"], "does not exist"),
        (["--url", "http://x", "--rate", "0"], "--rate"),
    ],
)
def test_wrong_options_are_exit_code_2(words: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["bench", "--model", "tiny", *words])
    assert result.exit_code == 2
    assert said in " ".join(result.output.replace("│", " ").split())


def test_reports_are_written_whatever_came_of_it(tmp_path: Path) -> None:
    json_file, html_file = tmp_path / "json", tmp_path / "html"
    words = [
        "--url",
        dead_url(),
        "--compare",
        dead_url(),
        "--json",
        str(json_file),
        "--html",
        str(html_file),
        "--rate",
        "9",
    ]
    result = CliRunner().invoke(app, ["bench", "--model", "tiny", "--prompt-tokens", "4..5", *words])
    assert result.exit_code == 1
    assert orjson.loads(json_file.read_bytes())["runs"][0]["targets"][0]["summary"]["failures"][0]["requests"] == 1
    assert "connection refused" in html_file.read_text()


def test_a_report_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    path = tmp_path / "no" / "such" / "folder"
    result = CliRunner().invoke(app, ["bench", "--model", "tiny", "--url", dead_url(), "--json", str(path)])
    assert result.exit_code == 1
    assert "connection refused" in result.output
    assert "No such file or directory" in result.output
