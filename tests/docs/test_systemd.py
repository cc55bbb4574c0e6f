"""configs/systemd, as far as it can be checked without systemd at work."""

import configparser
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from gateway import cli
from tests.docs.readme import ROOT

UNITS = ROOT / "configs/systemd"


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, delimiters=["="])
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((UNITS / name).read_text())
    return parser


def test_socket_and_service_know_each_other() -> None:
    assert unit("penstock.socket")["Socket"]["Service"] == "penstock@blue.service"
    service = unit("penstock@.service")
    assert service["Service"]["Sockets"] == service["Unit"]["Requires"] == "penstock.socket"
    assert service["Service"]["Type"] == "notify"


def test_the_command_is_one_that_there_is() -> None:
    program, *given = shlex.split(unit("penstock@.service")["Service"]["ExecStart"])
    assert program == "/opt/penstock/%i/.venv/bin/penstock"
    command = typer.main.get_command(cli.app)
    assert command.commands[given[0]].make_context(given[0], given[1:]).params["config"] == Path(  # type: ignore[attr-defined]
        "/etc/penstock/penstock.yaml"
    )


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd")
def test_systemd_finds_no_fault(tmp_path: Path) -> None:
    shutil.copy(UNITS / "penstock.socket", tmp_path)
    text = (UNITS / "penstock@.service").read_text()
    text = text.replace("/opt/penstock/%i/.venv/bin/penstock", f"{sys.prefix}/bin/penstock")
    # Its user is the operator's to make.
    (tmp_path / "penstock@blue.service").write_text(text.replace("User=penstock\n", ""))
    done = subprocess.run(
        ["systemd-analyze", "verify", "penstock.socket", "penstock@blue.service"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    ours = [line for line in done.stderr.splitlines() if "penstock" in line]
    assert (done.returncode, ours) == (0, [])
