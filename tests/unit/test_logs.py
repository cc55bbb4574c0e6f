"""One line a message and a request, whatever is in it and however slow the reader is."""

import asyncio
import json
import logging
import logging.config
import os
import re
import select
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
import uvicorn

from gateway.observe import logs
from gateway.observe.access import AccessLog, AccessRecord, encode
from gateway.observe.logs import UVICORN

RECORD = AccessRecord(
    time=1795503123.25,
    request_id="req-1",
    key="demo",
    model="tiny",
    endpoint="/v1/chat/completions",
    replica="tiny/0",
    status=200,
    prompt_tokens=10,
    completion_tokens=20,
    cached_tokens=0,
    ttft=0.0123456789,
    duration=1.5,
    attempts=1,
    outcome="completed",
    code=None,
    retry_count=None,
    client="127.0.0.1",
)


class Pipe:
    """A descriptor to log to, and what has come out of it."""

    def __init__(self) -> None:
        self.read_end, self.fd = os.pipe()

    def read(self) -> bytes:
        """All that is there now."""
        data = b""
        while select.select([self.read_end], [], [], 0)[0] and (piece := os.read(self.read_end, 1 << 16)):
            data += piece
        return data

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.read().splitlines()]

    def fill(self) -> int:
        """Leaves no room. Returns how many bytes that took."""
        os.set_blocking(self.fd, False)
        filled = 0
        while select.select([], [self.fd], [], 0)[1]:
            filled += os.write(self.fd, b"." * select.PIPE_BUF)
        return filled


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    os.close(made.read_end)
    os.close(made.fd)


@pytest.fixture
def program(pipe: Pipe) -> Iterator[Pipe]:
    """The program's log, in JSON, to a pipe."""
    root = logging.getLogger()
    level = root.level
    logs.configure("info", json=True, fd=pipe.fd)
    yield pipe
    for handler in [h for h in root.handlers if isinstance(h, logs._Lines)]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    structlog.reset_defaults()


# ---- the program's log


def test_structlog_and_logging_write_the_same_lines(program: Pipe) -> None:
    structlog.get_logger("gateway.x").warning("engine is down", replica="tiny/0", after=1.5)
    logging.getLogger("some.library").error("no %s", "luck")
    ours, theirs = program.lines()
    assert ours.items() >= {"message": "engine is down", "level": "warning", "logger": "gateway.x"}.items()
    assert ours.items() >= {"replica": "tiny/0", "after": 1.5}.items()
    assert theirs.items() >= {"message": "no luck", "level": "error", "logger": "some.library"}.items()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", ours["timestamp"])
    assert ours.keys() - {"replica", "after"} == theirs.keys()


def test_the_level_holds_for_both(program: Pipe) -> None:
    structlog.get_logger("a").debug("quiet")
    logging.getLogger("b").debug("quiet")
    assert program.read() == b""
    logs.configure("debug", json=True, fd=program.fd)
    structlog.get_logger("a").debug("loud")
    logging.getLogger("b").debug("loud")
    assert [line["message"] for line in program.lines()] == ["loud", "loud"]  # once each: the old handler is gone


@pytest.mark.parametrize("json", [True, False])
def test_a_traceback_shows_no_variables(program: Pipe, json: bool) -> None:
    logs.configure("info", json=json, fd=program.fd)

    def fail() -> None:
        prompt = "my secret " + "prompt"
        raise ValueError(len(prompt))

    try:
        fail()
    except ValueError:
        structlog.get_logger("a").exception("failed")
    said = program.read().decode()
    assert "ValueError: 16" in said
    assert "my secret prompt" not in said


def test_values_of_any_kind_are_written(program: Pipe) -> None:
    structlog.get_logger("a").info("odd", what=object, line="a\nb", broken="\ud800")
    (line,) = program.lines()
    assert line["what"] == "<class 'object'>"
    assert line["line"] == "a\nb"
    assert line["broken"] == "\ud800"


def test_people_at_a_terminal_get_plain_text() -> None:
    master, slave = os.openpty()
    root = logging.getLogger()
    try:
        logs.configure("warning", fd=slave)
        structlog.get_logger("a").warning("look here")
        said = os.read(master, 4096)
    finally:
        for handler in [h for h in root.handlers if isinstance(h, logs._Lines)]:
            root.removeHandler(handler)
            handler.close()
        structlog.reset_defaults()
        os.close(slave)
        os.close(master)
    assert b"look here" in said
    assert not said.startswith(b"{")


def test_a_reader_that_rests_blocks_nobody(program: Pipe) -> None:
    filled = program.fill()
    log = structlog.get_logger("a")
    for number in range(100):
        log.info("waiting", number=number)
    assert program.read() == b"." * filled
    log.info("last")
    assert [line.get("number") for line in program.lines()] == [*range(100), None]


def test_what_finds_no_room_is_counted(program: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs._Lines, "ROOM", 0)
    program.fill()
    log = structlog.get_logger("a")
    for name in ("kept", "lost", "lost"):
        log.info(name)
    program.read()
    log.info("after")
    assert [line["message"] for line in program.lines()] == ["kept", "2 messages lost", "after"]


def test_a_reader_that_is_gone_harms_nobody(program: Pipe) -> None:
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, program.read_end)
    os.close(devnull)
    structlog.get_logger("a").info("nobody hears")


def test_uvicorn_speaks_through_it_and_keeps_no_access_log(program: Pipe) -> None:
    uvicorn.Config("app", log_config=UVICORN, access_log=False)
    logging.getLogger("uvicorn.error").info("Started on %s", 1, extra={"color_message": "\x1b[1mStarted"})
    logging.getLogger("uvicorn.access").info("GET /?key=secret")
    (line,) = program.lines()
    assert line["message"] == "Started on 1"
    assert "color_message" not in line


# ---- the access log


def test_a_record_is_one_line_of_json() -> None:
    line = encode(RECORD)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert json.loads(line) == {**RECORD._asdict(), "time": "2026-11-24T06:52:03.250Z", "ttft": 0.012346}


@pytest.mark.parametrize(
    "hostile", ["a\nb", "\x1b[2J", "\x9b2J", "\u2028", "\x7f", "\u202e", "\ud800", "\x00", '"}\n{"']
)
def test_nothing_ends_the_line_or_steers_a_terminal(hostile: str) -> None:
    line = encode(RECORD._replace(model=hostile))
    assert line.decode().rstrip("\n").isprintable()
    assert line.count(b"\n") == 1
    json.loads(line)


def test_names_in_any_language_stay_readable() -> None:
    assert json.loads(encode(RECORD._replace(key="Zürich 東京 🌍")))["key"] == "Zürich 東京 🌍"


def test_fields_are_bounded() -> None:
    assert len(json.loads(encode(RECORD._replace(model="m" * 10_000)))["model"]) == 256


async def test_records_are_written_in_order_and_all(pipe: Pipe) -> None:
    log = AccessLog(pipe.fd, interval=1000, batch=10)
    log.start()
    for status in range(25):
        log.append(RECORD._replace(status=status))
    await log.stop()
    assert [line["status"] for line in pipe.lines()] == [*range(25)]
    assert log.dropped == 0


async def test_the_tap_gets_every_record_in_order(pipe: Pipe) -> None:
    seen: list[AccessRecord] = []
    log = AccessLog(pipe.fd, interval=1000, batch=10, tap=seen.extend)
    log.start()
    for status in range(25):
        log.append(RECORD._replace(status=status))
        if status % 7 == 6:
            log.show()
            assert [record.status for record in seen] == [*range(status + 1)]  # at once
        if status % 9 == 8:
            await asyncio.sleep(0)
    await log.stop()
    assert [record.status for record in seen] == [*range(25)]
    assert len(pipe.lines()) == 25


async def test_a_full_batch_is_written_at_once(pipe: Pipe) -> None:
    log = AccessLog(pipe.fd, interval=1000, batch=3)
    log.start()
    await _append_and_read(log, pipe, 3)
    await _append_and_read(log, pipe, 4)
    await log.stop()


async def test_a_lone_record_is_written_after_the_interval(pipe: Pipe) -> None:
    log = AccessLog(pipe.fd, interval=0.01)
    log.start()
    await _append_and_read(log, pipe, 1)
    await log.stop()


async def _append_and_read(log: AccessLog, pipe: Pipe, count: int) -> None:
    """Appends, and waits until as much has come out."""
    loop = asyncio.get_running_loop()
    arrived = asyncio.Event()
    for _ in range(count):
        log.append(RECORD)
    loop.add_reader(pipe.read_end, arrived.set)
    await arrived.wait()
    loop.remove_reader(pipe.read_end)
    assert len(pipe.lines()) == count


async def test_a_file_takes_any_amount(tmp_path: Any) -> None:
    path = tmp_path / "access.log"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    log = AccessLog(fd)
    log.start()
    for status in range(5000):
        log.append(RECORD._replace(status=status))
    await log.stop()
    os.close(fd)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["status"] for line in lines] == [*range(5000)]


async def test_a_stuck_reader_costs_records_and_they_are_counted(pipe: Pipe) -> None:
    log = AccessLog(pipe.fd, patience=0)
    log.start()
    for status in range(1000):
        log.append(RECORD._replace(status=status))
    await log.stop()
    first = pipe.read()
    whole = first.count(b"\n")
    assert 0 < whole < 1000
    assert log.dropped == 1000 - whole - (not first.endswith(b"\n"))

    log.start()  # the reader is back: the line that was torn is finished first
    log.append(RECORD._replace(status=1001))
    await log.stop()
    lines = [json.loads(line)["status"] for line in (first + pipe.read()).splitlines()]
    assert lines == [*range(1000 - log.dropped), 1001]


async def test_a_broken_sink_is_told_once_and_mends(pipe: Pipe, program: Pipe, tmp_path: Any) -> None:
    fd = os.open(tmp_path / "log", os.O_RDONLY | os.O_CREAT)  # not for writing
    log = AccessLog(fd)
    for _ in range(2):
        log.start()
        log.append(RECORD)
        await log.stop()
    assert log.dropped == 2
    (told,) = program.lines()
    assert told["message"] == "access log records are being dropped"
    assert told["why"] == "Bad file descriptor"
    os.dup2(pipe.fd, fd)
    log.start()
    log.append(RECORD)
    await log.stop()
    os.close(fd)
    assert len(pipe.lines()) == 1
    assert log.dropped == 2


async def test_stopping_what_never_started_is_fine() -> None:
    await AccessLog().stop()
