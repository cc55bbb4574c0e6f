"""Hostile requests, a row each in data/bad_inputs.json: every one is answered as the contract says, and nothing else happens."""

import asyncio
import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fake_engine import FakeEngine
from tests.flow.conftest import Start
from tests.flow.rows import ELSEWHERE, FACTS, NOT_YET, ROWS, encode, expand
from tests.flow.talk import CHAT, Served, exchange, logged, post
from tests.named import exists
from tests.served import KEY, Answer, Penstock, bearer, chat_body


def named(row: dict[str, Any]) -> str:
    if "http" in row:
        return f"{row['row']} {row['why']}"
    if "path" in row:
        return f"{row['row']} {row['method']} {row['path']}"
    return f"{row['row']} {row.get('post', 'chat')} {json.dumps(row['fields'])[:60]}"


def rows(kind: str) -> list[Any]:
    kept = [row for row in ROWS if kind in row]
    return [pytest.param(row, id=named(row).encode("unicode_escape").decode()) for row in kept]


def judge(answer: Answer, row: dict[str, Any]) -> None:
    assert answer.status == row["status"], answer.body[:500]
    assert KEY.encode() not in answer.body
    assert b"Traceback" not in answer.body
    if row["status"] == 200:
        return
    assert len(answer.body) < 2000
    error = answer.error
    if row["code"] == "anthropic":
        assert error["type"] == "invalid_request_error"
        return
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", row["code"])
    assert error["param"] == row.get("param")


async def judge_aftermath(served: Served, row: dict[str, Any]) -> None:
    """The gateway still answers, and its engines have seen no more than what was accepted."""
    assert (await served.gateway.get("/health/ready")).status == 200
    seen = [await engine.stats() for engine in (served.engine, served.pooling)]
    assert sum(one["requests"] for one in seen) == (row["status"] == 200)
    for last in (request for one in seen for request in one["last"]):
        headers = {name.lower() for name, _ in last["headers"]}
        assert headers <= {"host", "content-type", "content-length", "accept-encoding", "authorization"}


@pytest.mark.parametrize("row", rows("http"))
async def test_transport(served: Served, door: str, row: dict[str, Any]) -> None:
    if door != "edge":
        pytest.skip("what uvicorn makes of it is not ours")
    head = "\r\n".join(expand(line) for line in row["http"]) + "\r\n\r\n"
    data = (head + expand(row["body"])).replace("KEY", KEY).encode()
    answer, *more = await exchange(served.gateway, data)
    judge(answer, row)
    assert more == []
    assert answer.headers["connection"] == "close"
    if row["status"] == 405:
        assert "POST" in answer.headers["allow"]
    await judge_aftermath(served, row)


@pytest.mark.parametrize("row", rows("path"))
async def test_paths(served: Served, row: dict[str, Any]) -> None:
    body = json.dumps(chat_body()) if row["method"] == "POST" else ""
    head = f"{row['method']} {row['path']} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    [answer] = await exchange(served.gateway, (head + body).encode())
    judge(answer, row)
    await judge_aftermath(served, row)


@pytest.mark.parametrize("row", rows("fields"))
async def test_bodies(served: Served, row: dict[str, Any]) -> None:
    body = expand(row["fields"])
    if "post" not in row:
        body = {**chat_body(max_tokens=1), **body}
        if "max_completion_tokens" in body or row["row"] == 34:
            body.setdefault("max_tokens", 1)
    answer = await served.gateway.post(row.get("post", CHAT), encode(body), headers={"x-request-id": "bad-input"})
    judge(answer, row)
    await judge_aftermath(served, row)


async def test_a_header_of_16_mb_costs_no_memory(served: Served, door: str) -> None:
    if door != "edge":
        pytest.skip("the socket's guard is the edge's")
    data = post(more=f"x: {'y' * (16 << 20)}\r\n")

    async def once() -> int:
        [answer] = await exchange(served.gateway, data)
        assert answer.status == 431
        return resident(served.gateway)

    await once()
    before = await once()
    assert await once() - before < 1 << 20


def resident(gateway: Penstock) -> int:
    """Bytes of the process's memory."""
    return int(Path(f"/proc/{gateway.pid}/statm").read_text().split()[1]) * 4096


async def test_bytes_that_are_no_http(served: Served, door: str) -> None:
    if door != "edge":
        pytest.skip("what uvicorn makes of it is not ours")
    for data in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"\x00" * 100,
        b"SSH-2.0-x\r\n",
        b"{}\r\n",
    ):
        [answer] = await exchange(served.gateway, data)
        judge(answer, {"status": 400, "code": None})


async def test_chunked_bodies_in_pieces_of_any_size(served: Served, door: str) -> None:
    """A chunked message ends where it ends, however the network cuts it, and the next one is not lost."""
    body = json.dumps(chat_body("a\r\n\r\n0\r\n\r\nb", max_tokens=1)).encode()
    chunks = (
        b"".join(b"%x;ext=1\r\n%b\r\n" % (len(p), p) for p in (body[:1], body[1:30], body[30:]))
        + b"000\r\nx: y\r\n\r\n"
    )
    head = post(body=b"").replace(b"content-length: 0", b"transfer-encoding: chunked")
    first = head.replace(b"connection: close\r\n", b"") + chunks
    data = first + head + chunks
    for size in (1, 2, 3, 7, 64, len(first), len(first) + 1, len(data)):
        reader, writer = await served.gateway.connect()
        for at in range(0, len(data), size):
            writer.write(data[at : at + size])
            await writer.drain()
            await asyncio.sleep(0)
        answers = (await reader.read(-1)).count(b"HTTP/1.1 200 OK")
        writer.close()
        assert answers == 2, size
    for seen in (await served.engine.stats())["last"]:
        assert seen["json"]["messages"][0]["content"] == "a\r\n\r\n0\r\n\r\nb"


async def test_many_small_chunks_hold_nobody_up(served: Served) -> None:
    """Blank lines as a body: what a parser that looks for them takes quadratic time for."""
    head = post(body=b"").replace(b"content-length: 0", b"transfer-encoding: chunked")
    body = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in [b"\r\n" * 500_000, *[b"\r\n"] * 100_000]) + b"0\r\n\r\n"
    [answer] = await exchange(served.gateway, head + body)
    assert (answer.status, answer.error["code"]) == (400, "invalid_json")


async def test_what_a_client_calls_itself_is_not_believed(served: Served) -> None:
    headers = {"x-forwarded-for": "1.2.3.4", "forwarded": "for=1.2.3.4", "x-request-id": "spoofed"}
    await served.gateway.post(CHAT, chat_body(max_tokens=1), headers=headers)
    assert (await logged(served.gateway, "spoofed"))["client"] == "127.0.0.1"


async def test_odd_model_names_make_no_series_and_no_lines(served: Served) -> None:
    name = "x\n\x1b[31m" + "y" * 65_536
    answer = await served.gateway.post(CHAT, chat_body(model=name), headers={"x-request-id": "odd-name"})
    assert answer.status == 404
    assert len(answer.error["message"]) < 300
    entry = await logged(served.gateway, "odd-name")
    assert len(entry["model"]) < 300
    assert entry["model"].isprintable()


async def test_cors_is_off(served: Served) -> None:
    for method in ("OPTIONS", "POST"):
        headers = {"origin": "https://evil.example", "access-control-request-method": "POST", **bearer(KEY)}
        answer = await served.gateway.request(method, CHAT, headers)
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_prompts_of_a_size_that_no_model_takes(start: Start) -> None:
    """100 000 messages, 10 million blanks: the engine says that it is too long, and the gateway has not worked much on it."""
    async with FakeEngine("--max-model-len", "2048") as engine:
        gateway = await start(engine.url, limits="{tokens_per_minute: 100000000}")
        process = psutil.Process(gateway.pid)
        for messages in (
            [{"role": "user", "content": "hi"}] * 100_000,
            [{"role": "user", "content": " " * 10_000_000 + "word " * 3000}],
        ):
            before = process.cpu_times()
            answer = await gateway.post(CHAT, chat_body(messages=messages))
            after = process.cpu_times()
            judge(answer, {"status": 400, "code": "context_length_exceeded", "param": "messages"})
            assert after.user + after.system - before.user - before.system < 1.0


def test_every_row_of_the_facts_is_played() -> None:
    played = {row["row"] for row in ROWS} | ELSEWHERE.keys()
    assert {fact["n"] for fact in FACTS} == played | NOT_YET.keys()
    assert not played & NOT_YET.keys()
    assert [test for tests in ELSEWHERE.values() for test in tests if not exists(test)] == []
