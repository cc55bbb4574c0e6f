"""The Dockerfile, as far as it can be tested without building it."""

import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.docs.readme import ROOT
from tests.served import Penstock

TEXT = (ROOT / "Dockerfile").read_text()
LINES = re.sub(r"\\\n\s*", "", TEXT).splitlines()  # one instruction a line
HADOLINT = Path(sys.prefix) / "bin/hadolint"
PORT = "8080"


def instructions(name: str) -> list[str]:
    return [line.partition(" ")[2] for line in LINES if line.startswith(f"{name} ")]


def test_hadolint() -> None:
    assert HADOLINT.exists()
    done = subprocess.run([HADOLINT, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_copied_is_in_the_build_context() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for line in instructions("COPY") for source in line.split()[:-1]}
    mounted = set(re.findall(r"type=bind,source=([\w.]+)", TEXT))
    assert copied | mounted == kept
    assert all((ROOT / name).exists() for name in kept)


def test_images() -> None:
    bases = [line.split() for line in instructions("FROM")]
    assert [stage for *_, stage in bases] == ["wheel", "engine", "gateway"], "the last one is the default"
    assert all(re.search(r":v?\d+\.\d+\.\d+", image) for image, *_ in bases), "every base is pinned"
    assert instructions("USER") == ["10001:10001"] * 2
    assert TEXT.count("--require-hashes -r") == 3


def test_command() -> None:
    assert instructions("ENTRYPOINT") == ['["penstock"]'] * 2
    [command] = set(instructions("CMD"))
    serve = json.loads(command)
    assert serve[serve.index("--port") + 1] == PORT
    assert set(instructions("EXPOSE")) == {PORT}
    help_text = subprocess.run(
        [sys.executable, "-m", "gateway", "serve", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert all(word in help_text for word in serve if word.startswith("--"))


@pytest.fixture
async def gateway() -> AsyncIterator[Penstock]:
    """One that is alive, and not ready."""
    config = "models: {tiny: {endpoints: ['http://127.0.0.1:9']}}\nauth: none\n"
    async with Penstock(config) as running:
        yield running


async def test_healthcheck(gateway: Penstock) -> None:
    [line] = {line.partition(" CMD ")[2] for line in instructions("HEALTHCHECK")}
    _, *arguments = json.loads(line)

    def status() -> int:
        argv = [sys.executable, *(a.replace(PORT, str(gateway.port)) for a in arguments)]
        return subprocess.run(argv, capture_output=True, check=False).returncode

    assert status() == 0
    await gateway.__aexit__(None, None, None)
    assert status() != 0
