"""A real Prometheus for the length of an `async with`, and promtool: from .tools/bin (scripts/setup-tool), else the PATH."""

import asyncio
import contextlib
import json
import shutil
import signal
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import pytest

from tests.served import DEADLINE, ROOT

_TOOLS = ROOT / ".tools/bin"
CONFIG = ROOT / "configs/prometheus/prometheus.yml"
ALERTS = ROOT / "configs/prometheus/alerts.yml"


def program(name: str) -> str:
    found = shutil.which(name, path=str(_TOOLS)) or shutil.which(name)
    if found is None:
        pytest.skip(f"there is no {name}; scripts/setup-tool --unpack prometheus says why")
    return found


class Sample(NamedTuple):
    labels: dict[str, str]
    value: float


class QueryError(Exception):
    pass


class Prometheus:
    """Scrapes `targets` every 200 ms by configs/prometheus, and evaluates its alerts as often."""

    def __init__(self, folder: Path, targets: Sequence[str]) -> None:
        self._folder = folder
        text = CONFIG.read_text()
        assert text.count("_interval: 15s") == 2
        assert text.count('["127.0.0.1:8080"]') == 1
        text = text.replace("_interval: 15s", "_interval: 200ms").replace('["127.0.0.1:8080"]', json.dumps(targets))
        (folder / "prometheus.yml").write_text(text)
        shutil.copy(ALERTS, folder / "alerts.yml")
        self._url = ""

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            program("prometheus"),
            f"--config.file={self._folder}/prometheus.yml",
            f"--storage.tsdb.path={self._folder}/data",
            "--web.listen-address=127.0.0.1:0",
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            cwd=self._folder,
        )
        assert self._process.stderr is not None
        said = b""
        async with asyncio.timeout(DEADLINE):
            async for line in self._process.stderr:
                said += line
                if b"Listening on" in line:
                    self._url = "http://" + line.rpartition(b"address=")[2].decode().strip()
                if b"ready to receive web requests" in line:
                    break
            else:
                raise AssertionError(said.decode())
        self._reading = asyncio.create_task(self._process.stderr.read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        await self._process.wait()
        await self._reading
        self._process._transport.close()  # type: ignore[attr-defined]  # or its pipes close only when collected

    async def query(self, expression: str) -> list[Sample]:
        """What an instant query gives now. Raises `QueryError` where Prometheus refuses it."""
        found = await self._ask("query", query=expression)
        return [Sample(row["metric"], float(row["value"][1])) for row in found["result"]]

    async def rules(self) -> list[dict[str, Any]]:
        return [rule for group in (await self._ask("rules"))["groups"] for rule in group["rules"]]

    async def _ask(self, what: str, **parameters: str) -> Any:
        return await asyncio.to_thread(self._get, f"{self._url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}")

    def _get(self, url: str) -> Any:
        try:
            with urllib.request.urlopen(url, timeout=DEADLINE) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as refused:
            with refused:
                raise QueryError(json.load(refused)["error"]) from None
