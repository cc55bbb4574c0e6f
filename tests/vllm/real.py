"""A gateway with real engines of its own: configs for it, and what only the engine itself can say."""

import asyncio
import contextlib
import json
import urllib.request
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests.served import KEY, ROOT, Answer, Penstock, until

START = 300.0  # seconds within which engines are ready, on a busy machine too
PATIENCE = 120.0  # seconds that one answer may take
QUESTION = "What is the capital of France?"

_MODELS = f"{ROOT}/.models"
_PYTHON = f"{ROOT}/.venv-engine/bin/python"

# Without enable-prompt-tokens-details vLLM does not say how many tokens of a prompt it had in its cache.
CHAT = f"""\
  smollm2:
    aliases: [default]
    engine:
      model: {_MODELS}/SmolLM2-135M-Instruct
      python: {_PYTHON}
      args: {{dtype: float32, max-model-len: 2048, enforce-eager: true, enable-prompt-tokens-details: true}}
      env: {{VLLM_CPU_KVCACHE_SPACE: "1"}}
"""

ENCODER = f"""\
  minilm:
    engine:
      model: {_MODELS}/all-MiniLM-L6-v2
      python: {_PYTHON}
      args: {{runner: pooling, dtype: float32, enforce-eager: true}}
      env: {{VLLM_CPU_KVCACHE_SPACE: "1"}}
"""


def config(*models: str, keys: Iterable[str] = ()) -> str:
    return "".join(["models:\n", *models, "keys:\n", f'  - {{name: test, key: {KEY}, models: ["*"]}}\n', *keys])


@contextlib.asynccontextmanager
async def serving(text: str) -> AsyncIterator[Penstock]:
    """A gateway whose engines are all ready."""
    async with Penstock(text, patience=PATIENCE) as gateway:
        names = (await gateway.logged(lambda line: line.get("message") == "serving"))["models"]
        for name in names:
            await until_ready(gateway, f"{name}/0")
        yield gateway


async def until_ready(gateway: Penstock, replica: str, times: int = 1) -> None:
    """Until an engine has become ready so many times."""
    seen = 0

    def last(line: Mapping[str, Any]) -> bool:
        nonlocal seen
        if line["message"] == "engine failed":
            raise AssertionError(line)
        if line["message"] == "engine ready" and line["replica"] == replica:
            seen += 1
        return seen == times

    await gateway.logged(last, START)


def chat(text: str = QUESTION, **fields: object) -> dict[str, Any]:
    """A greedy request, so that its answer is always the same."""
    return {
        "model": "smollm2",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 16,
        **fields,
    }


# ---- streams


def data_of(answer: Answer) -> list[str]:
    """The data of each event of a stream of anonymous events: nothing else may be in it."""
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, rest = answer.body.decode().split("\n\n")
    assert rest == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [event.removeprefix("data: ") for event in events]


def chunks_of(answer: Answer) -> list[dict[str, Any]]:
    """The chunks of a stream that ended well."""
    *chunks, last = data_of(answer)
    assert last == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def named_events_of(answer: Answer) -> list[tuple[str, dict[str, Any]]]:
    """The events of a stream in which each has a name."""
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for event in answer.body.decode().removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


# ---- the engine itself


def engine_url(gateway: Penstock, replica: str) -> str:
    """Where the engine listens now; its key is the gateway's secret, but health and metrics need none."""
    started = [x for x in gateway.log if x["message"] == "engine started" and x["replica"] == replica]
    url: str = started[-1]["detail"].split(" at ")[1].split(",")[0]
    return url


async def engine_metrics(gateway: Penstock, replica: str = "smollm2/0") -> dict[str, float]:
    """The engine's own metrics by name, summed over labels."""

    def read() -> str:
        with urllib.request.urlopen(f"{engine_url(gateway, replica)}/metrics", timeout=PATIENCE) as reply:
            text: str = reply.read().decode()
            return text

    found: dict[str, float] = {}
    for family in text_string_to_metric_families(await asyncio.to_thread(read)):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


async def running(gateway: Penstock) -> float:
    """Requests that the chat engine works on."""
    return (await engine_metrics(gateway))["vllm:num_requests_running"]


# ---- logs and processes


async def access(gateway: Penstock, request_id: str) -> dict[str, Any]:
    """The line of the access log for one request."""
    path = gateway.folder / "access.log"
    found: list[dict[str, Any]] = []

    async def there() -> bool:
        lines = path.read_bytes().rpartition(b"\n")[0].splitlines()
        found[:] = [line for line in map(json.loads, lines) if line["request_id"] == request_id]
        return bool(found)

    await until(there)
    [line] = found
    return line


def family(pid: int) -> list[psutil.Process]:
    """All processes that a process has started, directly or not."""
    return psutil.Process(pid).children(recursive=True)


def mapped_files(pid: int) -> str:
    """The paths of all files, libraries among them, that a process has in its memory."""
    return "\n".join(mapping.path for mapping in psutil.Process(pid).memory_maps())


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that still run: neither gone nor zombies that only wait to be collected."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


async def until_gone(processes: Iterable[psutil.Process], timeout: float = 10) -> None:
    """What was killed may take a moment to be gone."""
    processes = list(processes)

    async def gone() -> bool:
        return not alive(processes)

    await until(gone, timeout)
