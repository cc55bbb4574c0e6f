"""A gateway process for the length of an `async with`, and small ways to talk to it."""

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import psutil

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-test-0123456789"
JSON_TYPE = {"content-type": "application/json"}
DEADLINE = 20.0  # seconds that anything in a test may take


# What a gateway keeps on purpose, up to a bound: recent requests, known heads of engines' answers, the last hour's figures.
KEPT = {
    "gateway.observe.access.AccessRecord",
    "gateway.upstream.client.ReplyHead",
    "gateway.admin.shapes.Figures",
    "gateway.admin.shapes.ModelFigures",
    "gateway.admin.shapes.Percentiles",
}


def leaked(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """The types of which a census counts at least ten more than the one before."""
    grown = {kind: n - before.get(kind, 0) for kind, n in after.items() if kind not in KEPT}
    return {kind: n for kind, n in grown.items() if n >= 10}


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["error"]
        return found


def simple_config(*endpoints: str, model: str = "tiny", limits: str = "{}", more: str = "") -> str:
    """One model over remote endpoints, one key."""
    urls = ", ".join(f'"{url}"' for url in endpoints)
    return f"""\
models:
  {model}:
    aliases: [default]
    endpoints: [{urls}]
keys:
  - {{name: test, key: {KEY}, models: ["*"], limits: {limits}}}
{more}"""


class Penstock:
    """`penstock serve` on a free port. `door`: "edge", or "asgi" for the application under plain uvicorn, or "watched" for
    an edge that `census` can look behind. `patience`: seconds that an answer may take."""

    def __init__(
        self,
        config: str,
        door: str = "edge",
        env: Mapping[str, str] | None = None,
        patience: float = DEADLINE,
        options: Sequence[str] = (),
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="penstock-test-"))
        self.config = self.folder / "penstock.yaml"
        self.config.write_text(config)
        program = ["-m", "gateway"] if door == "edge" else [str(ROOT / f"tests/{door}_door.py")]
        self._argv = [sys.executable, *program, "serve", "--config", str(self.config), "--port", "0", *options]
        self._env = {**os.environ, **(env or {}), "PYTHONPATH": str(ROOT)}
        self.patience = patience
        self.pass_fds: Sequence[int] = ()
        self.port = 0
        self.log: list[dict[str, Any]] = []  # the program's log
        self._logged = asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    async def __aenter__(self) -> Self:
        self._access = (self.folder / "access.log").open("wb")
        self._process = await asyncio.create_subprocess_exec(
            *self._argv,
            stdin=subprocess.DEVNULL,
            stdout=self._access,
            stderr=subprocess.PIPE,
            env=self._env,
            cwd=self.folder,
            limit=1 << 20,
            pass_fds=self.pass_fds,
        )
        self._reading = asyncio.create_task(self._read_log())
        serving = await self.logged(lambda line: line.get("message") == "serving")
        self.port = int(serving["url"].rpartition(":")[2])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()
        await self._reading
        self._access.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._process._transport.close()  # type: ignore[attr-defined]  # or its pipes close only when collected

    async def _read_log(self) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            try:
                self.log.append(json.loads(line))
            except ValueError:
                self.log.append({"message": line.decode(errors="replace").rstrip()})
            self._logged.set()
        self.log.append({"message": "<end>"})
        self._logged.set()

    async def logged(self, wanted: Callable[[dict[str, Any]], bool], timeout: float = DEADLINE) -> dict[str, Any]:
        """The first line of the program's log that is `wanted`, now or later."""
        seen = 0
        async with asyncio.timeout(timeout):
            while True:
                for line in self.log[seen:]:
                    seen += 1
                    if wanted(line):
                        return line
                    if line["message"] == "<end>":
                        raise AssertionError("the gateway ended:\n" + "\n".join(map(str, self.log)))
                self._logged.clear()
                await self._logged.wait()

    async def ready(self, timeout: float = DEADLINE) -> Self:
        await until(self._is_ready, timeout)
        return self

    async def _is_ready(self) -> bool:
        return (await self.get("/health/ready")).status == 200

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def exit_code(self, timeout: float = DEADLINE) -> int:
        async with asyncio.timeout(timeout):
            return await self._process.wait()

    async def census(self) -> dict[str, int]:
        """Living objects of the process by type, if its door is "watched"."""
        counted: dict[str, int] = (await self._census())["objects"]
        return counted

    async def settled(self) -> tuple[dict[str, int], int]:
        """The census once nothing goes on, which is when two are the same, and the fewest descriptors seen open.

        A probe of an engine opens a connection at any moment, and a census holds it up: one look may count it.
        """
        looks: list[tuple[dict[str, int], int]] = []

        async def quiet() -> bool:
            looks.append((await self.census(), self.descriptors()))
            return len(looks) >= 5 and looks[-1][0] == looks[-2][0]

        await until(quiet, 30)
        return looks[-1][0], min(descriptors for _, descriptors in looks)

    def descriptors(self) -> int:
        return psutil.Process(self.pid).num_fds()

    async def in_cycles(self) -> int:
        """Dead objects since the last look that hold one another, if its door is "watched" and no collection was before."""
        found: int = (await self._census())["in_cycles"]
        return found

    async def _census(self) -> dict[str, Any]:
        before = sum(line["message"] == "census" for line in self.log)
        self.signal(signal.SIGUSR1)
        seen = 0

        def newer(line: dict[str, Any]) -> bool:
            nonlocal seen
            seen += bool(line["message"] == "census")
            return bool(seen > before)

        return await self.logged(newer)

    async def access_log(self, lines: int) -> list[dict[str, Any]]:
        """The access log, once it has that many lines."""
        path = self.folder / "access.log"

        async def enough() -> bool:
            return path.read_bytes().count(b"\n") >= lines

        await until(enough)
        return [json.loads(line) for line in path.read_bytes().splitlines()]

    # ---- requests

    async def request(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Answer:
        return await asyncio.to_thread(self._request, method, path, dict(headers or {}), body)

    def _request(self, method: str, path: str, headers: dict[str, str], body: bytes | None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.patience)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    async def get(self, path: str, key: str | None = KEY) -> Answer:
        return await self.request("GET", path, bearer(key))

    async def post(
        self, path: str, body: object, key: str | None = KEY, headers: Mapping[str, str] | None = None
    ) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.request("POST", path, {**JSON_TYPE, **bearer(key), **(headers or {})}, data)

    async def chat(self, text: str = "hi", key: str | None = KEY, **fields: object) -> Answer:
        return await self.post("/v1/chat/completions", chat_body(text, **fields), key)

    async def raw(self, data: bytes, *, half_close: bool = False) -> bytes:
        """Everything that comes back for these bytes, until the gateway closes."""
        reader, writer = await self.connect()
        async with asyncio.timeout(DEADLINE):
            writer.write(data)
            if half_close:
                writer.write_eof()
            answer = await reader.read(-1)
            await close(writer)
            return answer

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)

    async def metric(self, name: str, **labels: str) -> float:
        """The value of one series; 0 if there is none."""
        from prometheus_client.parser import text_string_to_metric_families

        text = (await self.get("/metrics")).body.decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return sample.value
        return 0.0


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


def chat_body(text: str = "hi", **fields: object) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], **fields}


def http_post(path: str, body: object, key: str | None = KEY, more: str = "") -> bytes:
    """A request as bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    credential = f"authorization: Bearer {key}\r\n" if key else ""
    return (
        f"POST {path} HTTP/1.1\r\nhost: test\r\n{credential}{more}content-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    ).encode() + data


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def until(condition: Callable[[], Any], timeout: float = DEADLINE) -> None:
    """Waits for a condition of another process, which can only be asked again and again."""
    async with asyncio.timeout(timeout):
        while not await condition():  # noqa: ASYNC110 - another process has no event to offer
            await asyncio.sleep(0.02)
