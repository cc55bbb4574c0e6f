"""The `penstock` command as a process: exit codes, and every byte on stdout and stderr."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from gateway import __version__
from gateway.config.schema import Config

CONFIGS = Path(__file__).parents[2] / "configs"
OPEN = "auth: none\nmodels: {tiny: {endpoints: ['http://h:1']}}\n"


class Result(NamedTuple):
    code: int
    out: str
    err: str


def penstock(*args: str, cwd: Path, **env: str) -> Result:
    done = subprocess.run(
        [sys.executable, "-m", "gateway", *args],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "100", "PYTHONWARNINGS": "error", **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "good.yaml").write_text(OPEN)
    (tmp_path / "bad.yaml").write_text(OPEN + "server:\n  prot: 1\n  port: abc\n")
    return tmp_path


BAD = (
    "bad.yaml:4: server.prot: unknown field; did you mean 'port'?\n"
    "bad.yaml:5: server.port: must be a whole number from 0 to 65535, not 'abc'\n"
)


def test_check_sums_up_a_good_config(here: Path) -> None:
    assert penstock("check", "good.yaml", cwd=here) == (0, "good.yaml: valid: 1 model, 1 replica, 0 keys\n", "")


@pytest.mark.parametrize("command", [("check",), ("serve", "--config"), ("serve", "--port", "0", "-c")])
def test_faults_are_all_that_is_said(here: Path, command: tuple[str, ...]) -> None:
    assert penstock(*command, "bad.yaml", cwd=here) == (2, "", BAD)


@pytest.mark.parametrize("command", [("check",), ("serve", "--config")])
def test_a_missing_file(here: Path, command: tuple[str, ...]) -> None:
    assert penstock(*command, "none.yaml", cwd=here) == (2, "", "none.yaml: there is no such file\n")


def test_serve_without_a_config_says_what_to_type(here: Path) -> None:
    said = "there is no penstock.yaml here; type: penstock serve --config FILE\n"
    assert penstock("serve", cwd=here) == (2, "", said)


def test_serve_takes_the_config_that_is_here(here: Path) -> None:
    (here / "penstock.yaml").write_text(OPEN + "limiter: disk\n")
    assert penstock("serve", cwd=here) == (2, "", "penstock.yaml:3: limiter: must be memory\n")


def test_the_environment_is_read(here: Path) -> None:
    path = str(CONFIGS / "quickstart.yaml")
    admin = {"PENSTOCK_ADMIN_KEY": "sk-admin-0123456789"}
    code, out, err = penstock("check", path, cwd=here, **admin)
    assert (code, out) == (2, "")
    assert err.endswith(": keys[0].key: the environment variable PENSTOCK_DEMO_KEY is not set\n")
    told = penstock("check", path, cwd=here, PENSTOCK_DEMO_KEY="sk-demo-0123456789", **admin)
    assert told == (0, f"{path}: valid: 2 models, 2 replicas, 1 key\n", "")


def test_a_wrong_host_on_the_command_line(here: Path) -> None:
    code, out, err = penstock("serve", "-c", "good.yaml", "--host", "h:80", cwd=here)
    assert (code, out) == (2, "")
    assert "Invalid value for '--host': must be an IP address or a host name, without a port" in err


def test_schema_prints_the_schema(here: Path) -> None:
    code, out, err = penstock("schema", cwd=here)
    assert (code, err) == (0, "")
    assert json.loads(out) == Config.model_json_schema()


def test_version(here: Path) -> None:
    assert penstock("--version", cwd=here) == (0, f"penstock {__version__}\n", "")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("chek",), "Did you mean 'check'"),
        (("xyzzy",), "Try 'penstock"),
        (("serve", "--prot", "1"), "--port"),
        (("serve", "--port", "70000"), "'--port'"),
        (("check",), "Missing argument 'FILE'"),
        (("check", "a", "b"), "Try 'penstock check"),
    ],
)
def test_a_wrong_command_line_says_what_to_type(here: Path, args: tuple[str, ...], said: str) -> None:
    code, out, err = penstock(*args, cwd=here)
    assert (code, out) == (2, "")
    assert said in err


@pytest.mark.parametrize("args", [("--help",), ("serve", "--help"), ("check", "-h"), ("schema", "--help")])
def test_help_teaches_by_example(here: Path, args: tuple[str, ...]) -> None:
    code, out, err = penstock(*args, cwd=here)
    assert (code, err) == (0, "")
    assert f"penstock {args[0] if len(args) > 1 else 'serve'}" in out.split("Usage:")[1]


def test_help_loads_nothing_heavy(here: Path) -> None:
    program = (
        "import sys, contextlib\n"
        "from gateway.cli import app\n"
        "with contextlib.suppress(SystemExit): app(['--help'], prog_name='penstock')\n"
        "print(sorted({'yaml', 'gateway.runtime', 'gateway.config', 'fastapi', 'uvicorn', 'structlog'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=here, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
