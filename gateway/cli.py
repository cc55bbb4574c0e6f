"""The `penstock` command: parses and prints, nothing else.

Each command is one function that imports its room when it runs, so that `penstock --help` is quick.
Exit codes: 0 done, 1 failed, 2 wrong command line or config.
"""
# ruff: noqa: PLC0415 - see above

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

from gateway import __version__
from gateway.bench.command import bench
from gateway.console import commands
from gateway.console.problem import Problem

if TYPE_CHECKING:
    from gateway.config.schema import Config

_DEFAULT_CONFIG: Final = Path("penstock.yaml")

app = typer.Typer(
    name="penstock",
    help="An OpenAI-compatible serving gateway in front of vLLM: keys, limits, routing, failover, supervised engines.",
    epilog="First:  penstock check penstock.yaml     Then:  penstock serve --config penstock.yaml",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,  # its tracebacks show local variables, and so keys
)


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def main() -> None:
    try:
        app(prog_name="penstock")
    except Problem as problem:
        typer.echo(f"penstock: {problem}", err=True)
        sys.exit(1)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"penstock {__version__}")
        raise typer.Exit


@app.callback()
def _penstock(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example:  penstock serve --config penstock.yaml --host 0.0.0.0 --port 9000")
def serve(
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE", show_default="penstock.yaml", help="The YAML file to serve."),
    ] = None,
    host: Annotated[str | None, typer.Option(metavar="HOST", help="Listen here instead of on server.host.")] = None,
    port: Annotated[
        int | None,
        typer.Option(
            metavar="PORT", min=0, max=65535, help="Listen on this port instead of server.port; 0: a free one."
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Read the file again whenever it changes.")] = False,
    log_level: Annotated[
        LogLevel, typer.Option(case_sensitive=False, help="The least severe messages to log, on stderr.")
    ] = LogLevel.INFO,
) -> None:
    """Serve the models of a config file until told to stop.

    SIGHUP reads the file again.
    SIGTERM or Ctrl-C lets open requests finish and stops; a second one stops at once.
    Faults of the config are told as by penstock check, with exit code 2.
    """
    if config is None and not _DEFAULT_CONFIG.exists():
        _stop(f"there is no {_DEFAULT_CONFIG} here; type: penstock serve --config FILE")
    path = config or _DEFAULT_CONFIG
    given = _address(host, port)
    checked = _load(path)

    from gateway import runtime
    from gateway.observe import logs

    logs.configure(log_level.value)
    raise typer.Exit(runtime.run(checked, path, given, watch=watch))


@app.command(epilog="Example:  penstock check penstock.yaml && echo fine")
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False, help="The YAML file to check.")],
) -> None:
    """Check a config file without starting anything.

    Exit code 0 and a summary; or 2, and one line on stderr for each fault:
    FILE:LINE: field: what is wrong, and what is allowed.

    The environment variables that the file names must be set, as for serve.
    """
    config = _load(file)
    replicas = sum((m.engine.replicas if m.engine else 0) + len(m.endpoints) for m in config.models.values())
    counts = (("model", len(config.models)), ("replica", replicas), ("key", len(config.keys)))
    typer.echo(f"{file}: valid: " + ", ".join(f"{count} {noun}{'' if count == 1 else 's'}" for noun, count in counts))


@app.command(epilog="Example:  penstock schema > penstock.schema.json")
def schema() -> None:
    """Print the JSON schema of the config file: every field with its type, default and meaning.

    Editors that know YAML complete and check a config by it.
    """
    import json

    from gateway.config.schema import Config

    typer.echo(json.dumps(Config.model_json_schema(), indent=2))


app.command(epilog="Example:  penstock bench --url http://127.0.0.1:8080 --model default --rate 4 --duration 60")(bench)

_REMOTE: Final = "A running gateway"
app.add_typer(commands.keys, name="keys", rich_help_panel=_REMOTE)
app.add_typer(commands.teams, name="teams", rich_help_panel=_REMOTE)
app.command(rich_help_panel=_REMOTE, epilog="Example:  penstock usage --from 30d --by team,model")(commands.usage)
app.command(rich_help_panel=_REMOTE, epilog="Example:  penstock requests --status 5xx")(commands.requests)
app.command(rich_help_panel=_REMOTE, epilog="Example:  penstock engines restart smollm2/0")(commands.engines)
app.command(rich_help_panel=_REMOTE, epilog="Example:  penstock reload")(commands.reload)
app.command(rich_help_panel=_REMOTE, epilog="Example:  penstock top")(commands.top)


def _load(path: Path) -> "Config":
    from gateway.config.load import ConfigError, load

    try:
        return load(path, os.environ)
    except ConfigError as error:
        _stop(str(error))


def _address(host: str | None, port: int | None) -> dict[str, object]:
    """What of `server` is set on the command line."""
    from gateway.config.schema import listen_host

    try:
        given = {"host": None if host is None else listen_host(host), "port": port}
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--host'") from None
    return {name: value for name, value in given.items() if value is not None}


def _stop(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(2)
