import stat
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.process.world import World, marked, zombies

HERE = Path(__file__).parent


@pytest.fixture
def marker() -> Iterator[str]:
    """A variable in the environment of every process of the test's engines; at the end none may be left, nor a zombie."""
    value = uuid.uuid4().hex
    yield value
    # What was killed together with its keeper may take a moment to be gone.
    left, deadline = marked(value), time.monotonic() + 3
    while left and time.monotonic() < deadline:
        psutil.wait_procs(left, timeout=0.1)
        left = marked(value)
    for process in left:
        process.kill()
    assert left == []
    assert zombies() == []


@pytest.fixture
def python(tmp_path: Path) -> str:
    """An interpreter that has "vLLM"."""
    path = tmp_path / "python-with-vllm"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / "standin_engine.py"} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def world(tmp_path: Path, python: str, marker: str) -> World:
    return World(tmp_path, python, marker)
