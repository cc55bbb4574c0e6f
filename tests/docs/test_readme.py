"""Every example in the README is run: against a real gateway, in front of fake engines."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from gateway.config.load import parse
from gateway.observe.access import AccessRecord
from tests.docs.readme import BLOCKS, ROOT, TEXT, Block, after, blocks, commands, words
from tests.fake_engine import FakeEngine
from tests.served import KEY, Penstock, until

URL = "http://127.0.0.1:8080"
ADMIN_KEY = "sk-admin-0123456789"
ENV = {"ENGINE_KEY": "the-key-of-your-engines", "ALICE_KEY": "sk-alice-0123456789"}
PATIENCE = 60.0  # seconds for one example; importing an SDK takes a few on a busy machine
LANGUAGES = {"sh", "python", "yaml", "json", "text"}

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")


def test_there_is_a_rule_for_every_example() -> None:
    unknown = [block.id for block in BLOCKS if block.language not in LANGUAGES]
    assert not unknown, f"no rule says how these are tested: {unknown}"
    assert all(blocks(language) for language in LANGUAGES)


@pytest.mark.parametrize("command", ["wget http://127.0.0.1:8080/", "penstock fly", "curl-x", "penstock serve\ncurl x"])
def test_a_command_without_a_rule_fails(command: str) -> None:
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        judge(command)


@pytest.mark.parametrize(
    "command",
    [
        "scripts/nothing",
        "scripts/run --fly",
        "docker build --target moon .",
        "docker run -p 1:1 penstock",
        "systemctl stop penstock.sock",
    ],
)
def test_a_command_that_is_not_run_is_checked(command: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        judge(command)


# ---- configs


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.id)
def test_config(block: Block) -> None:
    open_to_all = "" if "keys:" in block.text else "auth: none\n"
    parse(block.text + open_to_all, block.id, ENV)


# ---- shell: each command has a rule that checks it, and says whether it is run


class Shell(NamedTuple):
    """What a block's commands come to."""

    script: str  # what is run
    serves: str | None  # its last command, if that is `penstock serve`
    talks: bool  # to a gateway …
    console: bool  # … by the admin API's commands


def script_exists(command: str) -> None:
    name, *flags = words(command)
    path = ROOT / name
    assert os.access(path, os.X_OK), f"{name} is not there, or not executable"
    assert all(flag in path.read_text() for flag in flags), f"{name} does not know all of {flags}"


def docker_builds(command: str) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    given = words(command)
    if given[1] == "build":
        assert given[-1] == "."
        if "--target" in given:
            assert f" AS {given[given.index('--target') + 1]}\n" in dockerfile
        return
    assert given[1] == "run"
    built = [words(c) for block in blocks("sh") for c in commands(block.text) if words(c)[:2] == ["docker", "build"]]
    assert given[-1] in [one[one.index("-t") + 1] for one in built], f"nothing builds the image {given[-1]}"
    mounts = [given[i + 1].split(":") for i, word in enumerate(given) if word == "-v"]
    assert "/etc/penstock/penstock.yaml" in [mount[1] for mount in mounts]
    assert '"/etc/penstock/penstock.yaml"' in dockerfile
    for _, target, *_ in mounts:
        assert target.startswith(("/etc/penstock/", "/var/lib/penstock/"))
    published = given[given.index("-p") + 1].split(":")[1]
    assert f"EXPOSE {published}\n" in dockerfile


def units_are_there(command: str) -> None:
    for unit in (word for word in words(command)[2:] if not word.startswith("-")):
        name, at, _ = unit.partition("@")
        assert (ROOT / "configs/systemd" / (f"{name}@.service" if at else unit)).exists(), f"there is no unit {unit}"


NOT_RUN: Mapping[str, Callable[[str], None]] = {
    "scripts/": script_exists,
    "docker": docker_builds,
    "systemctl": units_are_there,
}
CONSOLE = tuple(f"penstock {name}" for name in ("keys", "teams", "usage", "requests", "engines", "reload"))
TALKS = ("curl", "penstock bench", *CONSOLE)
RUN = ("export", ".", "penstock check")


def judge(text: str) -> Shell:
    """Fails on a command that no rule covers."""
    script, serves, talks, console = [], None, False, False
    for command in commands(text):
        assert serves is None, f"this would wait for the end of `penstock serve`: {command}"
        start = " ".join(words(command)[:2]) + " "
        check = next((check for name, check in NOT_RUN.items() if start.startswith(name)), None)
        if check is not None:
            check(command)
        elif start.startswith("penstock serve"):
            serves = command
        elif start.startswith(tuple(f"{name} " for name in (*TALKS, *RUN))):
            talks = talks or start.startswith(TALKS)
            console = console or start.startswith(CONSOLE)
            script.append(command)
        else:
            pytest.fail(f"no rule covers this command: {command}")
    return Shell("\n".join(script), serves, talks, console)


def variables(block: Block) -> str:
    """What a reader who has followed the README has set when they come to this block."""
    before = [one for one in blocks("sh") if one.line < block.line]
    return "\n".join(c for one in before for c in commands(one.text) if words(c)[0] == "export")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A clone in which scripts/run has been: what examples may rely on."""
    (tmp_path / ".penstock").mkdir()
    (tmp_path / ".penstock/demo-key").write_text(KEY + "\n")
    (tmp_path / ".penstock/admin-key").write_text(ADMIN_KEY + "\n")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


@contextlib.asynccontextmanager
async def bash(script: str, folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A shell as a reader has it, without variables that would change what the example does."""
    path = f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}"
    process = await asyncio.create_subprocess_exec(
        "bash", "-euo", "pipefail", "-c", script,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        cwd=folder, env={"PATH": path, "HOME": str(folder), "PYTHONPATH": str(ROOT)}, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()
        process._transport.close()  # type: ignore[attr-defined]  # or its pipes close only when collected


async def output(script: str, folder: Path) -> str:
    async with asyncio.timeout(PATIENCE), bash(script, folder) as process:
        out, err = await process.communicate()
        assert process.returncode == 0, f"exit code {process.returncode}\n{out.decode()}\n{err.decode()}"
        return out.decode()


class Demo(NamedTuple):
    """What scripts/run serves, with fake engines in place of its own."""

    gateway: Penstock
    engines: tuple[FakeEngine, FakeEngine]

    async def inferences(self) -> int:
        return sum([int((await engine.stats())["requests"]) for engine in self.engines])


@contextlib.asynccontextmanager
async def demo() -> AsyncIterator[Demo]:
    config = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    models = config["models"]
    assert list(models) == ["smollm2", "minilm"]
    async with FakeEngine(models=["smollm2"]) as chat, FakeEngine("--pooling", models=["minilm"]) as pooling:
        for model, engine in zip(models.values(), (chat, pooling), strict=True):
            del model["engine"]
            model["endpoints"] = [engine.url]
        env = {"PENSTOCK_DEMO_KEY": KEY, "PENSTOCK_ADMIN_KEY": ADMIN_KEY}
        async with Penstock(yaml.safe_dump(config), env=env) as gateway:

            async def up() -> bool:
                return all([await gateway.metric("penstock_engine_up", model=name) == 1 for name in models])

            await until(up)
            yield Demo(gateway, (chat, pooling))


@needs_curl
@pytest.mark.parametrize("block", blocks("sh"), ids=lambda block: block.id)
async def test_shell(block: Block, folder: Path) -> None:
    shell = judge(block.text)
    script = f"{variables(block)}\n{shell.script}\n"
    files = write_files(folder)
    if shell.serves is not None:
        await serve(script, shell.serves, folder, files)
    elif shell.talks:
        async with demo() as running:
            told = await output(script.replace(URL, running.gateway.url), folder)
            if "penstock bench" in script:
                assert re.search(r"\b16 ok +0 failed\b", told)
            elif shell.console:
                assert len(told.splitlines()) >= len(commands(shell.script))
            else:
                judge_answer(told, after(block))
            assert await running.inferences() > 0 or '"error"' in told or "/admin/" in script or shell.console
    elif shell.script:
        await output(script, folder)


def judge_answer(told: str, shown: Block | None) -> None:
    """An answer is the one that the README shows after its example; if it shows none, it is a success."""
    if told.startswith("data: "):
        *events, end = told.rstrip("\n").split("\n\n")
        assert end == "data: [DONE]"
        assert json.loads(events[-1].removeprefix("data: "))["usage"]["total_tokens"] > 0
    elif shown is not None and shown.language == "json":
        assert json.loads(told) == json.loads(shown.text)
    else:
        answer = json.loads(told)
        assert answer.get("choices") or answer["key"].startswith("sk-ps-")


def write_files(folder: Path) -> list[Path]:
    """The files that the README tells to write."""
    made = []
    for block in BLOCKS:
        if block.tag.startswith("file="):
            made.append(folder / block.tag.removeprefix("file="))
            made[-1].write_text(block.text)
    return made


async def serve(script: str, command: str, folder: Path, files: list[Path]) -> None:
    """Runs `penstock serve` of an example over fake engines in place of the reader's own, and asks it something."""
    [config] = files
    read = parse(config.read_text(), config.name, ENV)
    [(name, model)] = read.models.items()
    assert model.served_model_name is not None
    assert model.engine_api_key is not None
    key = model.engine_api_key.get_secret_value()
    engines = FakeEngine(models=[model.served_model_name], replicas=len(model.endpoints), api_key=key)
    async with asyncio.timeout(PATIENCE), engines:
        text = config.read_text()
        for written, url in zip(model.endpoints, engines.urls, strict=True):
            text = text.replace(written, url)
        config.write_text(text)
        # The last --host and --port count.
        script += f"echo KEY=$ALICE_KEY\nexec {command} --host 127.0.0.1 --port 0\n"
        async with bash(script, folder) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            told = [line async for line in lines(process.stdout, until=lambda line: line.startswith("KEY="))]
            logged = [line async for line in lines(process.stderr, until=lambda line: "engine ready" in line)]
            url = next(json.loads(line)["url"] for line in logged if '"serving"' in line)
            answer = await output(ask(url, name, told[-1].removeprefix("KEY=")), folder)
            assert json.loads(answer)["choices"]
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0


async def lines(stream: asyncio.StreamReader, until: Callable[[str], bool]) -> AsyncIterator[str]:
    async for line in stream:
        text = line.decode().rstrip("\n")
        yield text
        if until(text):
            return


def ask(url: str, model: str, key: str) -> str:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}]})
    return f"curl -s {url}/v1/chat/completions -H 'x-api-key: {key}' -H 'Content-Type: application/json' -d '{body}'"


# ---- Python


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.id)
async def test_python(block: Block, folder: Path) -> None:
    (folder / "example.py").write_text(block.text)
    async with demo() as running:
        script = f"{variables(block)}\npython -W error example.py\n".replace(URL, running.gateway.url)
        assert (await output(script, folder)).strip()
        assert await running.inferences() == 1


# ---- what is shown, not run


@pytest.mark.parametrize("block", blocks("json"), ids=lambda block: block.id)
def test_json(block: Block) -> None:
    shown = json.loads(block.text)
    if block.tag == "access-log":
        assert list(shown) == list(AccessRecord._fields)
    else:
        before = BLOCKS[BLOCKS.index(block) - 1]
        assert before.language == "sh", "test_shell compares an answer with the block after its example"


def test_scripts_and_links_are_there() -> None:
    named = set(re.findall(r"\b(?:scripts|configs)/[\w.-]*\w", TEXT)) | set(
        re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    )
    assert {"scripts/run", "scripts/test", "LICENSE"} <= named
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


@pytest.mark.parametrize("script", ["run", "test", "setup-engine", "setup-tool", "make-models"])
async def test_scripts_tell_what_they_do(script: str, folder: Path) -> None:
    assert f"scripts/{script}" in await output(f"{ROOT}/scripts/{script} --help", folder)
