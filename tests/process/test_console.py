"""The commands that talk to a running gateway, as processes, against a real one."""

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from gateway.console.client import Address, Client
from gateway.console.problem import Problem
from tests.fake_engine import FakeEngine
from tests.served import DEADLINE, KEY, ROOT, Penstock, bearer, chat_body, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADMIN = "sk-admin-0123456789"
STANDIN = ROOT / "tests/process/standin_engine.py"


class Result(NamedTuple):
    code: int
    out: str
    err: str

    def rows(self) -> list[list[str]]:
        return [line.split() for line in self.out.splitlines()]


def environment(url: str, **more: str) -> dict[str, str]:
    return {
        "PATH": "/usr/bin:/bin",
        "PYTHONWARNINGS": "error",
        "PYTHONPATH": str(ROOT),
        "PENSTOCK_URL": url,
        "PENSTOCK_ADMIN_KEY": ADMIN,
        **more,
    }


async def penstock(url: str, *args: str, **env: str) -> Result:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", *args,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(url, **env),
    )  # fmt: skip
    async with asyncio.timeout(DEADLINE):
        out, err = await process.communicate()
    assert process.returncode is not None
    return Result(process.returncode, out.decode(), err.decode())


def config(folder: Path, *urls: str) -> str:
    """Two replicas that run elsewhere, and an engine of our own that is a stand-in."""
    python = folder / "python-with-vllm"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {STANDIN} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    (folder / "model").mkdir(exist_ok=True)
    return f"""\
admin_key: {ADMIN}
models:
  tiny: {{aliases: [default], endpoints: {json.dumps(urls)}}}
  own: {{engine: {{model: {folder}/model, python: {python}, stop_timeout: 2}}}}
keys:
  - {{name: test, key: {KEY}}}
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(replicas=2) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Penstock]:
    async with Penstock(config(tmp_path_factory.mktemp("console"), *engine.urls)) as running:

        async def all_up() -> bool:
            names = ("tiny/0", "tiny/1", "own/0")
            return all([await running.metric("penstock_engine_up", replica=name) == 1 for name in names])

        await until(all_up)
        yield running


async def raw(gateway: Penstock, path: str) -> bytes:
    return (await gateway.request("GET", f"/admin/api{path}", bearer(ADMIN))).body


# ---- engines


async def test_engines(gateway: Penstock, engine: FakeEngine) -> None:
    told = await penstock(gateway.url, "engines")
    assert (told.code, told.err) == (0, "")
    head, *rows = told.rows()
    assert head[:3] == ["ENGINE", "STATE", "OPEN"]
    assert [row[:2] for row in rows] == [["tiny/0", "ready"], ["tiny/1", "ready"], ["own/0", "ready"]]
    assert [row[-2] for row in rows] == [*engine.urls, "Penstock"]
    as_json = await penstock(gateway.url, "engines", "list", "--json")
    assert [row["id"] for row in json.loads(as_json.out)["data"]] == ["tiny/0", "tiny/1", "own/0"]
    assert as_json.out.count("\n") == 1


async def test_an_engine_is_restarted_and_its_log_shown(gateway: Penstock) -> None:
    restarts = await gateway.metric("penstock_engine_restarts_total", replica="own/0")
    told = await penstock(gateway.url, "engines", "restart", "own/0")
    assert (told.code, told.err) == (0, "")
    assert told.rows()[1][0] == "own/0"

    async def back() -> bool:
        return (
            await gateway.metric("penstock_engine_restarts_total", replica="own/0") == restarts + 1
            and await gateway.metric("penstock_engine_up", replica="own/0") == 1
        )

    await until(back)
    log = await penstock(gateway.url, "engines", "log", "own/0", "-n", "3")
    assert (log.code, log.err) == (0, "")
    assert log.out.count("\n") == 3
    assert "access: " in log.out
    nothing = await penstock(gateway.url, "engines", "log", "tiny/0")
    assert nothing == (0, "", "tiny/0 has no log here: it runs elsewhere, or has not said anything yet\n")


async def test_an_engine_is_drained_and_resumed(gateway: Penstock) -> None:
    drained = await penstock(gateway.url, "engines", "drain", "tiny/0")
    assert (drained.code, drained.err) == (0, "")
    assert drained.rows()[1][:2] == ["tiny/0", "draining"]
    assert {(await gateway.chat()).status for _ in range(4)} == {200}
    used = json.loads((await penstock(gateway.url, "requests", "-n", "4", "--json")).out)["data"]
    assert {row["replica"] for row in used} == {"tiny/1"}
    resumed = await penstock(gateway.url, "engines", "resume", "tiny/0")
    assert resumed.rows()[1][:2] == ["tiny/0", "ready"]


async def test_an_engine_that_cannot_be_restarted(gateway: Penstock) -> None:
    elsewhere = await penstock(gateway.url, "engines", "restart", "tiny/0")
    assert (elsewhere.code, elsewhere.out) == (1, "")
    assert elsewhere.err.startswith("penstock: The engine 'tiny/0' runs elsewhere")
    said = "penstock: there is no engine 'tiyn/1'; did you mean 'tiny/1'?\n"
    for action in ("restart", "log"):
        assert await penstock(gateway.url, "engines", action, "tiyn/1") == (1, "", said)


@pytest.mark.parametrize("args", [("restart",), ("list", "own/0"), ("explode", "own/0"), ("log", "own/0", "-n", "0")])
async def test_engines_command_lines_that_are_wrong(gateway: Penstock, args: tuple[str, ...]) -> None:
    told = await penstock(gateway.url, "engines", *args)
    assert (told.code, told.out) == (2, "")
    assert "Usage: penstock engines" in told.err


# ---- requests


async def test_requests(gateway: Penstock) -> None:
    assert (await gateway.chat(stream=True, max_tokens=7)).status == 200
    assert (await gateway.chat(model="no-such-model")).status == 404
    told = await penstock(gateway.url, "requests", "-n", "2")
    head, newest, before = told.rows()
    assert (told.code, told.err) == (0, "")
    assert head[:3] == ["TIME", "KEY", "MODEL"]
    assert newest[2:7] == ["test", "no-such-model", "/v1/chat/completions", "–", "404"]
    assert before[3:5] == ["tiny", "/v1/chat/completions"]
    assert before[-7:-4] == ["completed", "1", "7"] or "completed" in before
    only = await penstock(gateway.url, "requests", "--status", "4xx", "--model", "no-such-model", "--json")
    assert [row["status"] for row in json.loads(only.out)["data"]] == [404]
    assert (await penstock(gateway.url, "requests", "--key", "nobody")).rows() == [head]


async def test_a_filter_that_the_gateway_refuses(gateway: Penstock) -> None:
    told = await penstock(gateway.url, "requests", "--status", "abc")
    assert (told.code, told.out) == (1, "")
    assert told.err.startswith("penstock: Invalid value for 'status'")


# ---- reload


async def test_reload(gateway: Penstock) -> None:
    before = gateway.config.read_text()
    told = await penstock(gateway.url, "reload")
    assert (told.code, told.err) == (0, "")
    assert told.out.startswith("The new configuration is in force.\n")
    gateway.config.write_text(before + "limitr: memory\nstroe: 3\n")
    try:
        refused = await penstock(gateway.url, "reload")
    finally:
        gateway.config.write_text(before)
    assert (refused.code, refused.out) == (1, "")
    assert "limitr: unknown field; did you mean 'limiter'?" in refused.err
    assert "stroe: unknown field; did you mean 'store'?" in refused.err
    assert await gateway.metric("penstock_config_reloads_total", outcome="failed") == 1


# ---- keys and teams


async def made(gateway: Penstock, *args: str) -> str:
    """What a command that has to succeed prints."""
    told = await penstock(gateway.url, *args)
    assert told.code == 0, told.err
    return told.out


async def key_row(gateway: Penstock, key: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(await made(gateway, "keys", "show", key, "--json"))
    return found


async def test_a_key_is_printed_once_and_works_at_once(gateway: Penstock) -> None:
    told = await penstock(gateway.url, "keys", "create", "alice", "--owner", "Alice", "--note", "for tests", "--model", "tin*",
                          "--requests-per-minute", "60", "--budget", "5M tokens/month", "--budget", "2.5 money/day", "--expires", "2d")  # fmt: skip
    assert told.code == 0
    secret = told.out.removesuffix("\n")
    assert re.fullmatch(r"sk-ps-[A-Za-z0-9]{38}", secret), "the key and nothing else, for $(…)"
    assert told.err.startswith("The key 'alice' is made. Keep it now: ")
    assert secret not in told.err
    assert (await gateway.chat(key=secret)).status == 200
    shown = await key_row(gateway, "alice")
    assert (shown["owner"], shown["note"], shown["models"]) == ("Alice", "for tests", ["tin*"])
    assert shown["limits"] == {"requests_per_minute": 60, "tokens_per_minute": None, "parallel_requests": None}
    assert [(b["amount"], b["unit"], b["period"]) for b in shown["budgets"]] == [
        (5_000_000, "tokens", "month"),
        (2.5, "money", "day"),
    ]
    assert secret.endswith(shown["last4"])
    assert timedelta(days=1) < datetime.fromisoformat(shown["expires_at"]) - datetime.now(UTC) <= timedelta(days=2)
    told_again = await made(gateway, "keys", "list") + await made(gateway, "keys", "show", shown["id"])
    assert secret not in told_again
    assert f"…{secret[-4:]}" in told_again


async def test_a_key_with_the_name_of_another(gateway: Penstock) -> None:
    told = await penstock(gateway.url, "keys", "create", "test")
    assert (told.code, told.out) == (1, "")
    assert told.err.count("\n") == 1


async def test_a_key_is_changed(gateway: Penstock) -> None:
    await made(
        gateway, "keys", "create", "bob", "--tokens-per-minute", "1000", "--budget", "1k tokens/day", "--note", "x"
    )
    await made(gateway, "keys", "change", "bob", "--parallel-requests", "2", "--clear", "note")
    shown = await key_row(gateway, "bob")
    assert shown["limits"] == {"requests_per_minute": None, "tokens_per_minute": 1000, "parallel_requests": 2}
    assert (shown["note"], len(shown["budgets"])) == (None, 1)
    await made(
        gateway, "keys", "change", "bob", "--clear", "tokens-per-minute", "--clear", "budgets", "--name", "robert"
    )
    shown = await key_row(gateway, "robert")
    assert shown["limits"] == {"requests_per_minute": None, "tokens_per_minute": None, "parallel_requests": 2}
    assert shown["budgets"] == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "there is nothing to change"),
        (("--note", "x", "--clear", "note"), "note cannot be set and cleared at once"),
        (("--requests-per-minute", "6", "--clear", "requests-per-minute"), "cannot be set and cleared at once"),
        (("--budget", "5 francs/day"), "'5 francs/day' is no budget"),
        (("--expires", "soon"), "'soon' is no time"),
        (("--parallel-requests", "0"), "greater than or equal to 1"),
    ],
)
async def test_changes_that_are_none(gateway: Penstock, args: tuple[str, ...], said: str) -> None:
    told = await penstock(gateway.url, "keys", "change", "test", *args, COLUMNS="200")
    assert (told.code, told.out) == (2, "")
    assert said in told.err


async def test_a_key_of_the_config_cannot_be_changed(gateway: Penstock) -> None:
    for args in (("change", "test", "--note", "x"), ("revoke", "config:test"), ("rotate", "test")):
        told = await penstock(gateway.url, "keys", *args)
        assert (told.code, told.out) == (1, "")
        assert "config file" in told.err


async def test_a_key_is_rotated_and_revoked(gateway: Penstock) -> None:
    first = (await made(gateway, "keys", "create", "carol")).strip()
    told = await penstock(gateway.url, "keys", "rotate", "carol", "--overlap", "10m")
    second = told.out.strip()
    assert first != second
    assert "has a new secret; the old one works until 20" in told.err
    assert [(await gateway.chat(key=key)).status for key in (first, second)] == [200, 200]
    third = (await made(gateway, "keys", "rotate", "carol", "--overlap", "0")).strip()
    assert (await gateway.chat(key=third)).status == 200
    assert (await gateway.chat(key=second)).status == 401
    assert await made(gateway, "keys", "revoke", "carol") == "The key 'carol' is revoked.\n"
    assert (await gateway.chat(key=third)).status == 401
    assert "carol" not in await made(gateway, "keys", "list", "--status", "active")
    assert "carol" in await made(gateway, "keys", "list", "--status", "revoked")


async def test_a_terminal_is_asked_before_a_key_is_revoked(gateway: Penstock) -> None:
    secret = (await made(gateway, "keys", "create", "dora")).strip()
    with terminal(gateway.url, "keys", "revoke", "dora") as shown:
        await shown.shows(lambda seen: f"Revoke the key 'dora' (…{secret[-4:]}) for good? [y/N]" in seen)
        shown.type(b"n\n")
        assert await shown.ends() == 1
    assert (await gateway.chat(key=secret)).status == 200
    with terminal(gateway.url, "keys", "revoke", "--yes", "dora") as shown:
        await shown.shows(lambda seen: "is revoked" in seen)
        assert await shown.ends() == 0
    assert (await gateway.chat(key=secret)).status == 401


@pytest.mark.parametrize(
    "args", [("show",), ("revoke",), ("rotate",), ("change", "--note", "x")], ids=lambda args: args[0]
)
async def test_a_key_that_there_is_not(gateway: Penstock, args: tuple[str, ...]) -> None:
    said = "penstock: there is no key 'tset'; did you mean 'test'?\n"
    assert await penstock(gateway.url, "keys", *args, "tset") == (1, "", said)


async def test_teams(gateway: Penstock) -> None:
    await made(gateway, "teams", "create", "research", "--requests-per-minute", "1", "--note", "R & D")
    secret = (await made(gateway, "keys", "create", "erin", "--team", "research")).strip()
    assert [(await gateway.chat(key=secret)).status for _ in range(2)] == [200, 429], "the team's limit is the key's"
    in_use = await penstock(gateway.url, "teams", "delete", "research")
    assert (in_use.code, in_use.out) == (1, "")
    assert "erin" in await made(gateway, "keys", "list", "--team", "research")
    await made(gateway, "teams", "change", "research", "--clear", "requests-per-minute", "--name", "lab")
    assert (await gateway.chat(key=secret)).status == 200
    await made(gateway, "keys", "revoke", "erin")
    assert await made(gateway, "teams", "delete", "lab") == "The team 'lab' is deleted.\n"
    assert "lab" not in await made(gateway, "teams", "list")
    unknown = await penstock(gateway.url, "keys", "create", "frank", "--team", "lab")
    assert (unknown.code, unknown.out) == (1, "")
    assert "there is no team 'lab'" in unknown.err


async def test_usage(gateway: Penstock) -> None:
    secret = (await made(gateway, "keys", "create", "gina")).strip()
    assert (await gateway.chat(key=secret, max_tokens=5)).status == 200

    async def booked() -> bool:
        answer = json.loads(await made(gateway, "usage", "--by", "key", "--json"))
        return any(row["key"] == "gina" for row in answer["data"])

    await until(booked)
    head, *rows = (await penstock(gateway.url, "usage", "--by", "key,model", "--from", "1d")).rows()
    assert head == ["KEY", "MODEL", "REQUESTS", "ERRORS", "PROMPT", "CACHED", "COMPLETION", "COST"]
    assert ["gina", "tiny", "1", "0", "1", "0", "5"] in [row[:7] for row in rows]
    assert rows[-1][0] == "total"
    as_csv = await made(gateway, "usage", "--by", "key,model", "--csv")
    assert as_csv.splitlines()[0].split(",")[:3] == ["key", "model", "requests"]
    assert (await penstock(gateway.url, "usage", "--from", "2020-01-01", "--to", "2020-01-02")).rows() == [
        ["KEY", *head[2:]],
        ["total", "0", "0", "0", "0", "0", "0.00"],
    ]


@pytest.mark.parametrize("args", [("--by", "moon"), ("--from", "yesteryear"), ("--csv", "--json")])
async def test_usage_command_lines_that_are_wrong(gateway: Penstock, args: tuple[str, ...]) -> None:
    told = await penstock(gateway.url, "usage", *args)
    assert (told.code, told.out) == (2, "")


# ---- top


async def test_top_without_a_terminal(gateway: Penstock) -> None:
    for flags, judge in (((), text_line), (("--json",), json_line)):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway", "top", *flags,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment(gateway.url),
        )  # fmt: skip
        assert process.stdout is not None
        try:
            async with asyncio.timeout(DEADLINE):
                for _ in range(2):
                    judge((await process.stdout.readline()).decode())
        finally:
            process.send_signal(signal.SIGINT)
            await process.communicate()


def text_line(line: str) -> None:
    assert " req/s " in line
    assert line.endswith("3/3 engines\n")


def json_line(line: str) -> None:
    figures = json.loads(line)
    assert [engine["id"] for engine in figures["engines"]] == ["tiny/0", "tiny/1", "own/0"]


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, url: str, *args: str) -> None:
        self._here, there = pty.openpty()
        fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.before = termios.tcgetattr(there)
        self._there = there
        self.process = subprocess.Popen(
            ["setsid", "--ctty", sys.executable, "-m", "gateway", *args],  # so that Ctrl-C is a signal
            stdin=there, stdout=there, stderr=there, env=environment(url, TERM="xterm-256color"),
        )  # fmt: skip
        self.seen = ""
        self._new = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._here, self._read)

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            self.seen += os.read(self._here, 1 << 16).decode(errors="replace")
        self._new.set()

    async def shows(self, wanted: Callable[[str], bool]) -> None:
        """Waits for it in what was written since the last call."""
        async with asyncio.timeout(DEADLINE):
            while not wanted(self.seen):
                self._new.clear()
                await self._new.wait()
        self.seen = ""

    def type(self, keys: bytes) -> None:
        os.write(self._here, keys)

    async def ends(self) -> int:
        async with asyncio.timeout(DEADLINE):
            return await asyncio.to_thread(self.process.wait)

    def settings(self) -> list[Any]:
        return termios.tcgetattr(self._there)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._here)
        self.process.kill()
        self.process.wait()
        os.close(self._here)
        os.close(self._there)


@contextlib.contextmanager
def terminal(url: str, *args: str) -> Any:
    made = Terminal(url, *args)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("end", [b"q", b"\x03"], ids=["q", "ctrl-c"])
async def test_top_on_a_terminal(gateway: Penstock, end: bytes) -> None:
    with terminal(gateway.url, "top") as shown:
        await shown.shows(lambda seen: "own/0" in seen and "q quits" in seen)
        work = asyncio.create_task(
            gateway.post("/v1/chat/completions", chat_body(stream=True, max_tokens=150, fake={"delay": 0.01}))
        )
        await shown.shows(lambda seen: "█" in seen)  # the graph
        shown.type(b"x")  # means nothing
        shown.type(end)
        assert await shown.ends() == 0
        assert shown.settings() == shown.before, "the terminal echoes again"
        assert (await work).status == 200


async def test_top_outlives_the_gateway(engine: FakeEngine, tmp_path: Path) -> None:
    port = free_port()
    async with contextlib.AsyncExitStack() as stack:
        text = config(tmp_path, *engine.urls).replace("admin_key", f"server: {{port: {port}}}\nadmin_key")
        first = await stack.enter_async_context(OnItsPort(text))
        shown = stack.enter_context(terminal(first.url, "top"))
        await shown.shows(lambda seen: "tiny/0" in seen)
        first.signal(signal.SIGKILL)
        await first.exit_code()
        await shown.shows(lambda seen: "waiting for it to come back" in seen)
        await stack.enter_async_context(OnItsPort(text))
        await shown.shows(lambda seen: "q quits" in seen)
        shown.type(b"q")
        assert await shown.ends() == 0


class OnItsPort(Penstock):
    """On the port of its config."""

    def __init__(self, config: str) -> None:
        super().__init__(config)
        self._argv = self._argv[:-2]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


# ---- who cannot be reached, and who is not let in

COMMANDS = (("engines",), ("requests",), ("reload",), ("top",), ("keys", "list"), ("teams", "list"), ("usage",))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
async def test_nobody_there(command: tuple[str, ...]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    told = await penstock(url, *command)
    assert (told.code, told.out) == (1, "")
    assert told.err == (
        f"penstock: nobody answers at {url} (connection refused); is the gateway running? "
        "--url or PENSTOCK_URL says where it listens (or server.admin_listen, if its config has that)\n"
    )


@pytest.mark.parametrize(
    ("key", "said"), [("sk-wrong-0123456789", "does not know this admin key"), (KEY, "this is a client's key")]
)
@pytest.mark.parametrize("command", [("engines",), ("top",), ("keys", "revoke", "x")], ids=" ".join)
async def test_the_wrong_key(gateway: Penstock, command: tuple[str, ...], key: str, said: str) -> None:
    told = await penstock(gateway.url, *command, PENSTOCK_ADMIN_KEY=key)
    assert (told.code, told.out) == (1, "")
    assert said in told.err
    assert told.err.count("\n") == 1
    assert key not in told.err


async def test_the_admin_api_is_off(engine: FakeEngine) -> None:
    async with Penstock(f"auth: none\nmodels: {{tiny: {{endpoints: ['{engine.url}']}}}}\n") as gateway:
        told = await penstock(gateway.url, "engines")
        assert (told.code, told.out) == (1, "")
        assert told.err.startswith(
            f"penstock: there is no admin API at {gateway.url}: set admin_key in the gateway's config"
        )


async def test_what_is_no_gateway(engine: FakeEngine) -> None:
    told = await penstock(engine.url, "engines")
    assert (told.code, told.out) == (1, "")
    assert "not as Penstock does; is it the right address?" in told.err


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n{", b""]
)
async def test_what_speaks_no_http(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        told = await penstock(f"http://127.0.0.1:{port}", "engines")
    assert (told.code, told.out) == (1, "")
    assert told.err.startswith("penstock: ")
    assert told.err.count("\n") == 1


async def test_a_gateway_that_is_stuck() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        client = Client(Address.parse(f"127.0.0.1:{deaf.getsockname()[1]}"), ADMIN, timeout=0.05)
        with pytest.raises(Problem, match="is the gateway stuck"):
            await asyncio.to_thread(client.get, "/engines")


# ---- the admin key


async def test_the_admin_key_from_a_file(gateway: Penstock, tmp_path: Path) -> None:
    file = tmp_path / "admin-key"
    file.write_text(f"{ADMIN}\n")
    told = await penstock(
        gateway.url, "engines", "--admin-key-file", str(file), PENSTOCK_ADMIN_KEY="sk-wrong-0123456789"
    )
    assert (told.code, told.err) == (0, "")


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "holds no key"), (b"two words\n", "holds no key"), (b"\xff\xfe", "it is no text"), (None, "No such file")],
)
async def test_a_file_without_a_key(gateway: Penstock, tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "admin-key"
    if content is not None:
        file.write_bytes(content)
    told = await penstock(gateway.url, "engines", "--admin-key-file", str(file), COLUMNS="300")
    assert (told.code, told.out) == (2, "")
    assert said in told.err
    assert "two words" not in told.err


async def test_no_key_at_all(gateway: Penstock) -> None:
    told = await penstock(gateway.url, "engines", PENSTOCK_ADMIN_KEY="", COLUMNS="300")
    assert (told.code, told.out) == (2, "")
    assert "set PENSTOCK_ADMIN_KEY to the admin_key of the gateway's config, or give this option" in told.err


async def test_a_key_on_the_command_line_is_not_taken(gateway: Penstock) -> None:
    told = await penstock(gateway.url, "engines", "--admin-key", ADMIN)
    assert (told.code, told.out) == (2, "")


# ---- help


async def test_help_is_quick_because_nothing_is_imported_for_it() -> None:
    heavy = (
        "gateway.console.client",
        "gateway.console.live",
        "http.client",
        "pydantic",
        "fastapi",
        "yaml",
        "uvloop",
        "rich.live",
    )
    code = f"import sys, gateway.cli; print([name for name in {heavy} if name in sys.modules])"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE, cwd=ROOT)
    assert (await process.communicate())[0] == b"[]\n"
