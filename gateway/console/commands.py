"""The commands that talk to a running gateway: their options, one call each, a table or the answer as it came.

Rooms are imported when a command runs. `Problem` ends a command: one line on stderr and exit code 1 (see `gateway.cli`).
"""
# ruff: noqa: PLC0415 - `penstock --help` shall be quick

import os
import sys
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from gateway.console.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.console import RenderableType

    from gateway.console.client import Client

_KEY_VARIABLE: Final = "PENSTOCK_ADMIN_KEY"
_CONNECTION: Final = "Connection"

Url = Annotated[
    str,
    typer.Option(
        envvar="PENSTOCK_URL",
        metavar="URL",
        rich_help_panel=_CONNECTION,
        help="The gateway; its server.admin_listen, if its config has one.",
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--admin-key-file",
        metavar="FILE",
        rich_help_panel=_CONNECTION,
        show_default=f"the environment's {_KEY_VARIABLE}",
        help="Holds the admin key. There is no option for the key itself: the shell's history would keep it, and every user of this machine could read it in the list of processes.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the gateway's answer as it came, for scripts.")]

DEFAULT_URL: Final = "http://127.0.0.1:8080"


def client(url: str, key_file: Path | None) -> "Client":
    """Raises `typer.BadParameter` for what is wrong with the command line."""
    from gateway.console.client import Address, Client

    return Client(_checked("--url", Address.parse, url), _admin_key(key_file))


def _admin_key(file: Path | None) -> str:
    if file is None:
        key, where = os.environ.get(_KEY_VARIABLE, ""), _KEY_VARIABLE
        if not key:
            raise typer.BadParameter(f"set {_KEY_VARIABLE} to the admin_key of the gateway's config, or give this option", param_hint="--admin-key-file")  # fmt: skip
    else:
        try:
            key, where = file.read_text().strip(), str(file)
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text"
            raise typer.BadParameter(f"cannot read {file}: {why}", param_hint="--admin-key-file") from None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise typer.BadParameter(
            f"{where} holds no key: expected visible ASCII characters", param_hint="--admin-key-file"
        )
    return key


def _checked(option: str, parse: "Callable[..., Any]", *args: Any, **kwargs: Any) -> Any:
    """What `parse` makes of the option's value; its `ValueError` becomes a usage error."""
    try:
        return parse(*args, **kwargs)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _show(answer: bytes, as_json: bool, render: "Callable[[Any], RenderableType | None]") -> None:
    """The answer as it came, or what `render` makes of it."""
    from gateway.console.client import decoded

    if as_json:
        _raw(answer)
    elif (shown := render(decoded(answer))) is not None:
        _print(shown)


def _raw(answer: bytes) -> None:
    sys.stdout.buffer.write(answer.rstrip(b"\n") + b"\n")
    sys.stdout.buffer.flush()


def _print(shown: "RenderableType") -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=1000)  # for grep and awk: nothing is wrapped
    console.print(shown)


def _note(text: str) -> None:
    typer.echo(text, err=True)


def _list(to: "Client", what: str, **query: object) -> "list[Mapping[str, Any]]":
    from gateway.console.client import decoded

    rows: list[Mapping[str, Any]] = decoded(to.get(f"/{what}", **query))["data"]
    return rows


def _find(to: "Client", what: str, wanted: str) -> "Mapping[str, Any]":
    from gateway.console.named import find

    return find(what, _list(to, f"{what}s"), wanted)


# ---- what keys and teams have in common

Team = Annotated[str | None, typer.Option(metavar="NAME", help="The team it belongs to, whose limits it shares.")]
Owner = Annotated[str | None, typer.Option(metavar="TEXT", help="Who has it.")]
Note = Annotated[str | None, typer.Option(metavar="TEXT", help="What it is for.")]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model", metavar="PATTERN", show_default="all", help="A model it may use, * for any characters; repeatable."
    ),
]
RequestsPerMinute = Annotated[int | None, typer.Option(metavar="N", min=1, help="In any 60 seconds.")]
TokensPerMinute = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Prompt and completion, in any 60 seconds.")
]
ParallelRequests = Annotated[int | None, typer.Option(metavar="N", min=1, help="Open at once.")]
Budgets = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        metavar="AMOUNT",
        help="What it may use in a day, a month or in total: '5M tokens/month', '25 money/day'; repeatable.",
    ),
]
Expires = Annotated[
    str | None,
    typer.Option(metavar="WHEN", show_default="never", help="A span from now (30d, 12h), a date or a time in UTC."),
]


class Clear(StrEnum):
    TEAM = "team"
    OWNER = "owner"
    NOTE = "note"
    MODELS = "models"
    BUDGETS = "budgets"
    EXPIRES = "expires"
    REQUESTS = "requests-per-minute"
    TOKENS = "tokens-per-minute"
    PARALLEL = "parallel-requests"


_LIMITS: Final = (Clear.REQUESTS, Clear.TOKENS, Clear.PARALLEL)
_EMPTY: "Final[Mapping[Clear, tuple[str, Any]]]" = {  # the field, and its value when there is none
    Clear.TEAM: ("team", None),
    Clear.OWNER: ("owner", None),
    Clear.NOTE: ("note", None),
    Clear.MODELS: ("models", ["*"]),
    Clear.BUDGETS: ("budgets", []),
    Clear.EXPIRES: ("expires_at", None),
    Clear.REQUESTS: ("requests_per_minute", None),
    Clear.TOKENS: ("tokens_per_minute", None),
    Clear.PARALLEL: ("parallel_requests", None),
}
Clears = Annotated[
    list[Clear] | None,
    typer.Option("--clear", help="Take this away: no limit, no budget, no end, all models, …; repeatable."),
]


def _fields(
    *,
    limits: "Mapping[str, int | None]",
    budgets: "Sequence[str] | None",
    expires: str | None = None,
    **plain: object,
) -> dict[str, Any]:
    """The body's fields, those alone that were given."""
    from gateway.console import given

    fields: dict[str, Any] = {name: value for name, value in plain.items() if value is not None}
    if any(value is not None for value in limits.values()):
        fields["limits"] = {name: value for name, value in limits.items() if value is not None}
    if budgets:
        fields["budgets"] = [_checked("--budget", given.budget, one) for one in budgets]
    if expires is not None:
        fields["expires_at"] = _checked("--expires", given.moment, expires, datetime.now(UTC), past=False)
    return fields


def _changes(fields: dict[str, Any], clear: "Sequence[Clear]") -> dict[str, Any]:
    """The fields of a PATCH, with what is to be cleared; of the limits, those alone that change."""
    for one in clear:
        place, name, empty = fields, *_EMPTY[one]
        if one in _LIMITS:
            place = fields.setdefault("limits", {})
        if name in place:
            raise typer.BadParameter(f"{one} cannot be set and cleared at once", param_hint="--clear")
        place[name] = empty
    if not fields:
        raise typer.BadParameter("there is nothing to change; --help lists what there is", param_hint="options")
    return fields


def _limits(requests: int | None, tokens: int | None, parallel: int | None) -> dict[str, int | None]:
    return {"requests_per_minute": requests, "tokens_per_minute": tokens, "parallel_requests": parallel}


# ---- keys

keys: Final = typer.Typer(
    no_args_is_help=True,
    help="Make, list, change, revoke and rotate clients' keys.",
    epilog="KEY is a key's name or its id, never the secret itself.",
)
KeyName = Annotated[str, typer.Argument(metavar="KEY", show_default=False, help="Its name or id.")]


class KeyStatus(StrEnum):
    ACTIVE = "active"
    EXPIRED = "expired"
    REVOKED = "revoked"


@keys.command("list", epilog="Example:  penstock keys list --status active")
def list_keys(
    *,
    team: Annotated[str | None, typer.Option(metavar="NAME", help="Those of this team.")] = None,
    status: Annotated[KeyStatus | None, typer.Option(help="Those that are so.")] = None,
    url: Url = DEFAULT_URL,
    admin_key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """List the keys, those of the config file included."""
    from gateway.console import tables

    answer = client(url, admin_key_file).get("/keys", team=team, status=status)
    _show(answer, as_json, lambda found: tables.keys(found["data"]))


@keys.command("show", epilog="Example:  penstock keys show alice")
def show_key(key: KeyName, url: Url = DEFAULT_URL, admin_key_file: KeyFile = None, as_json: AsJson = False) -> None:
    """Show all about one key."""
    from gateway.console import tables
    from gateway.console.client import escaped

    to = client(url, admin_key_file)
    _show(to.get(f"/keys/{escaped(_find(to, 'key', key)['id'])}"), as_json, tables.key)


@keys.command(
    "create",
    epilog="Example:  penstock keys create alice --requests-per-minute 60 --budget '5M tokens/month' --expires 90d",
)
def create_key(
    *,
    name: Annotated[
        str, typer.Argument(metavar="NAME", show_default=False, help="Stands for the key in logs, metrics and usage.")
    ],
    team: Team = None,
    owner: Owner = None,
    note: Note = None,
    model: Models = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    parallel_requests: ParallelRequests = None,
    budget: Budgets = None,
    expires: Expires = None,
    url: Url = DEFAULT_URL,
    admin_key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it. It works at once, and is never shown again.

    The key alone goes to stdout, everything else to stderr: KEY=$(penstock keys create alice)
    """
    limits = _limits(requests_per_minute, tokens_per_minute, parallel_requests)
    fields = _fields(
        name=name, team=team, owner=owner, note=note, models=model, limits=limits, budgets=budget, expires=expires
    )
    answer = client(url, admin_key_file).call("POST", "/keys", body=fields)
    _show(answer, as_json, lambda made: _new_key(made, f"The key {made['name']!r} is made."))


def _new_key(made: "Mapping[str, Any]", what: str) -> None:
    typer.echo(made["key"])
    _note(f"{what} Keep it now: the gateway has only its digest, and will not show it again.")


@keys.command("change", epilog="Example:  penstock keys change alice --tokens-per-minute 50000 --clear budgets")
def change_key(
    *,
    key: KeyName,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="A new name.")] = None,
    team: Team = None,
    owner: Owner = None,
    note: Note = None,
    model: Models = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    parallel_requests: ParallelRequests = None,
    budget: Budgets = None,
    expires: Expires = None,
    clear: Clears = None,
    url: Url = DEFAULT_URL,
    admin_key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Change what a key may do. What is not named stays; --model and --budget replace all of theirs."""
    limits = _limits(requests_per_minute, tokens_per_minute, parallel_requests)
    fields = _fields(
        name=name, team=team, owner=owner, note=note, models=model, limits=limits, budgets=budget, expires=expires
    )
    _change("key", key, _changes(fields, clear or ()), client(url, admin_key_file), as_json)


def _change(what: str, wanted: str, body: dict[str, Any], to: "Client", as_json: bool) -> None:
    from gateway.console import tables
    from gateway.console.client import escaped

    row = _find(to, what, wanted)
    if "limits" in body:  # they are one field to the gateway: those that were not named go out as they are
        body["limits"] = {**row["limits"], **body["limits"]}
    answer = to.call("PATCH", f"/{what}s/{escaped(row['id'])}", body=body)
    _show(answer, as_json, tables.key if what == "key" else lambda team: tables.teams([team]))


@keys.command("revoke", epilog="Example:  penstock keys revoke alice")
def revoke_key(
    *,
    key: KeyName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first; nobody is asked in a script.")] = False,
    url: Url = DEFAULT_URL,
    admin_key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Revoke a key for good. Requests with it are refused from now on; open ones finish."""
    from gateway.console.client import escaped

    to = client(url, admin_key_file)
    row = _find(to, "key", key)
    if not yes and sys.stdin.isatty():
        typer.confirm(f"Revoke the key {row['name']!r} (…{row['last4']}) for good?", abort=True, err=True)
    answer = to.call("DELETE", f"/keys/{escaped(row['id'])}")
    _show(answer, as_json, lambda gone: typer.echo(f"The key {gone['name']!r} is revoked."))


@keys.command("rotate", epilog="Example:  penstock keys rotate alice --overlap 24h")
def rotate_key(
    *,
    key: KeyName,
    overlap: Annotated[str, typer.Option(metavar="SPAN", help="For so long the old one works too.")] = "1h",
    url: Url = DEFAULT_URL,
    admin_key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Give a key a new secret and print it; name, limits and usage stay.

    The secret alone goes to stdout, as with create.
    """
    from gateway.console import given
    from gateway.console.client import escaped

    seconds = int(_checked("--overlap", given.seconds, overlap))
    to = client(url, admin_key_file)
    row = _find(to, "key", key)
    answer = to.call("POST", f"/keys/{escaped(row['id'])}/rotate", body={"overlap_seconds": seconds})

    def told(made: "Mapping[str, Any]") -> None:
        until = made["old_valid_until"]
        old = "the old one works no more" if until is None else f"the old one works until {until}"
        _new_key(made, f"The key {made['name']!r} has a new secret; {old}.")

    _show(answer, as_json, told)


# ---- teams

teams: Final = typer.Typer(
    no_args_is_help=True,
    help="Make, list, change and delete teams, whose limits and budgets their keys share.",
    epilog="TEAM is a team's name or its id.",
)
TeamName = Annotated[str, typer.Argument(metavar="TEAM", show_default=False, help="Its name or id.")]


@teams.command("list")
def list_teams(url: Url = DEFAULT_URL, admin_key_file: KeyFile = None, as_json: AsJson = False) -> None:
    """List the teams."""
    from gateway.console import tables

    _show(client(url, admin_key_file).get("/teams"), as_json, lambda found: tables.teams(found["data"]))


@teams.command("create", epilog="Example:  penstock teams create research --budget '500 money/month' --model 'llama-*'")
def create_team(
    *,
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="By which keys name it.")],
    note: Note = None,
    model: Models = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    parallel_requests: ParallelRequests = None,
    budget: Budgets = None,
    url: Url = DEFAULT_URL,
    admin_key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a team. A key's request must pass its own limits and its team's."""
    from gateway.console import tables

    limits = _limits(requests_per_minute, tokens_per_minute, parallel_requests)
    fields = _fields(name=name, note=note, models=model, limits=limits, budgets=budget)
    answer = client(url, admin_key_file).call("POST", "/teams", body=fields)
    _show(answer, as_json, lambda made: tables.teams([made]))


@teams.command("change", epilog="Example:  penstock teams change research --clear budgets")
def change_team(
    *,
    team: TeamName,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="A new name.")] = None,
    note: Note = None,
    model: Models = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    parallel_requests: ParallelRequests = None,
    budget: Budgets = None,
    clear: Clears = None,
    url: Url = DEFAULT_URL,
    admin_key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Change a team. What is not named stays; --model and --budget replace all of theirs."""
    limits = _limits(requests_per_minute, tokens_per_minute, parallel_requests)
    fields = _fields(name=name, note=note, models=model, limits=limits, budgets=budget)
    _change("team", team, _changes(fields, clear or ()), client(url, admin_key_file), as_json)


@teams.command("delete", epilog="Example:  penstock teams delete research")
def delete_team(
    team: TeamName, url: Url = DEFAULT_URL, admin_key_file: KeyFile = None, as_json: AsJson = False
) -> None:
    """Delete a team that has no live keys."""
    from gateway.console.client import escaped

    to = client(url, admin_key_file)
    row = _find(to, "team", team)
    answer = to.call("DELETE", f"/teams/{escaped(row['id'])}")
    _show(answer or b"{}", as_json, lambda _: typer.echo(f"The team {row['name']!r} is deleted."))


# ---- what was and is going on


class Group(StrEnum):
    KEY = "key"
    TEAM = "team"
    MODEL = "model"
    DAY = "day"
    HOUR = "hour"


def usage(
    *,
    since: Annotated[
        str | None, typer.Option("--from", metavar="WHEN", help="A date, a time in UTC, or so long ago (7d, 36h).")
    ] = None,
    until: Annotated[str | None, typer.Option("--to", metavar="WHEN", show_default="now", help="Likewise.")] = None,
    by: Annotated[
        str, typer.Option(metavar="…", help="A sum for each: key, team, model, day, hour; several with commas.")
    ] = "key",
    csv: Annotated[bool, typer.Option("--csv", help="Print it as CSV.")] = False,
    url: Url = DEFAULT_URL,
    admin_key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Show who used how many tokens, and what they cost."""
    from gateway.console import given, tables

    if csv and as_json:
        raise typer.BadParameter("give one of them only", param_hint="--csv, --json")
    groups = [part.strip() for part in by.split(",")]
    if unknown := [part for part in groups if part not in list(Group)]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(Group)}", param_hint="--by")
    now = datetime.now(UTC)
    span = {
        name: None if text is None else _checked(f"--{name}", given.moment, text, now, past=True)
        for name, text in (("from", since), ("to", until))
    }
    to = client(url, admin_key_file)
    answer = to.get("/usage", **span, group_by=",".join(groups), format="csv" if csv else None)
    _show(answer, as_json or csv, tables.usage)


class Outcome(StrEnum):
    COMPLETED = "completed"
    CLIENT_CANCELLED = "client_cancelled"
    ENGINE_FAILED = "engine_failed"
    REFUSED = "refused"
    ERROR = "error"


def requests(
    *,
    limit: Annotated[int, typer.Option("--limit", "-n", metavar="N", min=1, max=1000, help="At most so many.")] = 20,
    key: Annotated[str | None, typer.Option(metavar="NAME", help="Those with this key.")] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Those for this model.")] = None,
    status: Annotated[str | None, typer.Option(metavar="STATUS", help="Those so answered: 429, or 5xx.")] = None,
    outcome: Annotated[Outcome | None, typer.Option(help="Those that ended so.")] = None,
    before: Annotated[int | None, typer.Option(metavar="SEQ", min=1, help="Older than this seq of --json.")] = None,
    url: Url = DEFAULT_URL,
    admin_key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Show the last requests, the newest first; never what they said."""
    from gateway.console import tables

    to = client(url, admin_key_file)
    answer = to.get("/requests", limit=limit, key=key, model=model, status=status, outcome=outcome, before=before)
    _show(answer, as_json, lambda found: tables.requests(found["data"]))


class EngineAction(StrEnum):
    LIST = "list"
    RESTART = "restart"
    DRAIN = "drain"
    RESUME = "resume"
    LOG = "log"


def engines(
    *,
    action: Annotated[
        EngineAction,
        typer.Argument(
            help="restart: stop it at once and start it anew. drain: no new requests; resume: take them again. log: the end of its output."
        ),
    ] = EngineAction.LIST,
    engine: Annotated[
        str | None, typer.Argument(metavar="[ID]", show_default=False, help="Which one, as the list names it.")
    ] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", metavar="N", min=1, max=1000, help="Of the log.")] = 100,
    url: Url = DEFAULT_URL,
    admin_key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """List the engines, and how they are; restart one, drain it, resume it, or show its log."""
    from gateway.console import tables
    from gateway.console.client import Refused, escaped
    from gateway.console.named import hint

    if (engine is None) != (action is EngineAction.LIST):
        needs = "takes no engine" if engine is not None else "needs an engine's id; penstock engines lists them"
        raise typer.BadParameter(f"{action} {needs}", param_hint="ID")
    to = client(url, admin_key_file)
    if engine is None:
        _show(to.get("/engines"), as_json, lambda found: tables.engines(found["data"]))
        return
    path = f"/engines/{escaped(engine)}/{action}"
    try:
        answer = to.get(path, lines=lines) if action is EngineAction.LOG else to.call("POST", path)
    except Refused as refused:
        if refused.code != "not_found":
            raise
        known = [str(row["id"]) for row in _list(to, "engines")]
        raise Problem(f"there is no engine {engine!r}; {hint('engine', engine, known)}") from None
    if action is EngineAction.LOG:
        _show(answer, as_json, lambda log: _log(engine, log["lines"]))
    else:
        _show(answer, as_json, lambda now: tables.engines([now]))


def _log(engine: str, lines: "Sequence[str]") -> None:
    from gateway.console.tables import plain

    for line in lines:
        typer.echo(plain(line.replace("\t", "    ")))
    if not lines:
        _note(f"{engine} has no log here: it runs elsewhere, or has not said anything yet")


def reload(url: Url = DEFAULT_URL, admin_key_file: KeyFile = None, as_json: AsJson = False) -> None:
    """Make the gateway read its config file again, as SIGHUP does.

    A file with a fault changes nothing; the faults are told, with exit code 1.
    """

    def told(answer: "Mapping[str, Any]") -> None:
        typer.echo("The new configuration is in force.")
        for note in answer["notes"]:
            typer.echo(f"- {note}")

    _show(client(url, admin_key_file).call("POST", "/reload"), as_json, told)


def top(url: Url = DEFAULT_URL, admin_key_file: KeyFile = None, as_json: AsJson = False) -> None:
    """Watch the gateway at work: tokens, latency, models and engines, once a second.

    Ends with q or Ctrl-C. Where stdout is no terminal: a line a second, or with --json an object.
    """
    from gateway.console import live

    to = client(url, admin_key_file)
    if as_json:
        for event in to.events():
            if event.name == "figures":
                _raw(event.raw)
    elif sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        live.watch(to)
        return
    else:
        live.lines(to, typer.echo)
    raise Problem(f"{to.address} has ended the stream; it is draining, or gone")
