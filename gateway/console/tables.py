"""The admin API's answers as tables for people. Pure: from an answer to what rich prints."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from rich.table import Table
from rich.text import Text

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], Text | str], bool]  # title, cell, whether it holds numbers

NOTHING: Final = Text("–", "dim")
STATES: Final = {  # of keys, engines and requests
    "active": "green",
    "ready": "green",
    "completed": "green",
    "expired": "yellow",
    "starting": "yellow",
    "draining": "yellow",
    "unhealthy": "red",
    "failed": "red",
    "engine_failed": "red",
    "error": "red",
    "revoked": "dim",
    "stopped": "dim",
    "client_cancelled": "dim",
}
_LIMITS: Final = (
    ("requests_per_minute", "req/min"),
    ("tokens_per_minute", "tok/min"),
    ("parallel_requests", "at once"),
)


def table(columns: Sequence[Column], rows: Sequence[Row], total: Row | None = None) -> Table:
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0), show_footer=total is not None)
    for title, cell, number in columns:
        made.add_column(
            title,
            justify="right" if number else "left",
            overflow="fold",
            footer=cell(total) if total is not None else "",
            footer_style="bold",
        )
    for row in rows:
        made.add_row(*(cell(row) for _, cell, _ in columns))
    return made


# ---- cells


def plain(value: object) -> str:
    """A name that somebody else chose, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(value))


def text(name: str) -> Callable[[Row], Text]:
    def cell(row: Row) -> Text:
        value = row.get(name)
        return NOTHING if value in (None, "") else Text(plain(value))

    return cell


def state(name: str) -> Callable[[Row], Text]:
    return lambda row: Text(plain(row[name]), STATES.get(row[name], ""))


def number(name: str) -> Callable[[Row], Text]:
    def cell(row: Row) -> Text:
        value = row.get(name)
        return NOTHING if value is None else Text(count(value))

    return cell


def count(value: float) -> str:
    """Digits in groups of three; decimals only where there are any."""
    digits = f"{value:,.0f}" if value == int(value) else f"{value:,.6f}".rstrip("0")
    return digits.replace(",", " ")


def short(value: float) -> str:
    """Three digits: 950, 12.3k, 1.2M."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            scaled = value / factor
            return f"{scaled:.{0 if scaled >= 100 else 1}f}".removesuffix(".0") + suffix
    return f"{value:.1f}".removesuffix(".0")


def money(value: float | None) -> Text:
    return (
        NOTHING
        if value is None
        else Text(f"{value:,.2f}" if value >= 100 or not value else f"{value:.6f}".rstrip("0").rstrip("."))
    )


def percent(share: float | None) -> Text:
    if share is None:
        return NOTHING
    return Text(f"{share:.0%}", "red" if share >= 0.95 else "yellow" if share >= 0.8 else "")


def milliseconds(value: float | None) -> Text:
    if value is None:
        return NOTHING
    return Text(
        f"{value / 1000:.1f} s"
        if value >= 10_000
        else f"{value / 1000:.2f} s"
        if value >= 1000
        else f"{value:.0f} ms"
        if value >= 10
        else f"{value:.1f} ms"
    )


def when(value: str | None) -> Text:
    """A moment in this machine's own time zone, to the minute."""
    return NOTHING if value is None else Text(local(value).strftime("%Y-%m-%d %H:%M"))


def local(value: str) -> datetime:
    return datetime.fromisoformat(value).astimezone()


def limits(row: Row) -> Text:
    given = row.get("limits") or {}
    parts = [f"{short(given[name])} {unit}" for name, unit in _LIMITS if given.get(name) is not None]
    return Text(", ".join(parts)) if parts else NOTHING


def budgets(row: Row) -> Text:
    """Used of what may be used: `1.2M/5M tokens a month`."""
    parts: list[Text] = []
    for one in row.get("budgets") or ():
        used, amount = one.get("used"), one["amount"]
        share = used / amount if used is not None and amount else 0.0
        spent = "" if used is None else f"{short(used)}/"
        period = "in total" if one["period"] == "total" else f"a {one['period']}"
        parts.append(
            Text(
                f"{spent}{short(amount)} {one['unit']} {period}",
                "red" if share >= 1 else "yellow" if share >= 0.8 else "",
            )
        )
    return Text(", ").join(parts) if parts else NOTHING


def models(row: Row) -> Text:
    given = row.get("models") or []
    return Text("all", "dim") if given == ["*"] else Text(plain(", ".join(given))) if given else Text("none", "red")


def last4(row: Row) -> Text:
    return Text(f"…{plain(row['last4'])}") if row.get("last4") else NOTHING


# ---- tables


def keys(rows: Sequence[Row]) -> Table:
    columns: list[Column] = [
        ("NAME", text("name"), False),
        ("ID", text("id"), False),
        ("KEY", last4, False),
        ("STATUS", state("status"), False),
        ("TEAM", text("team"), False),
        ("MODELS", models, False),
        ("LIMITS", limits, False),
        ("BUDGETS", budgets, False),
        ("EXPIRES", lambda row: when(row.get("expires_at")), False),
    ]
    return table(columns, rows)


def key(row: Row) -> Table:
    """Everything about one key, a line each."""
    now = [f"{count(value)} {name}" for name, value in (row.get("now") or {}).items() if value is not None]
    pairs: list[tuple[str, Text]] = [
        ("name", text("name")(row)),
        ("id", text("id")(row)),
        ("key", last4(row)),
        ("status", state("status")(row)),
        ("team", text("team")(row)),
        ("owner", text("owner")(row)),
        ("note", text("note")(row)),
        ("models", models(row)),
        ("limits", limits(row)),
        ("budgets", budgets(row)),
        ("now", Text(", ".join(now)) if now else NOTHING),
        ("created", when(row.get("created_at"))),
        ("expires", when(row.get("expires_at"))),
        ("revoked", when(row.get("revoked_at"))),
        ("from", Text("the config file" if row.get("source") == "config" else "the store")),
    ]
    return properties(pairs)


def properties(pairs: Sequence[tuple[str, Text]]) -> Table:
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    for name, value in pairs:
        made.add_row(name, value)
    return made


def teams(rows: Sequence[Row]) -> Table:
    columns: list[Column] = [
        ("NAME", text("name"), False),
        ("ID", text("id"), False),
        ("KEYS", number("keys"), True),
        ("MODELS", models, False),
        ("LIMITS", limits, False),
        ("BUDGETS", budgets, False),
        ("NOTE", text("note"), False),
    ]
    return table(columns, rows)


def usage(answer: Row) -> Table:
    groups: list[Column] = [(name.upper(), text(name), False) for name in answer["group_by"]]
    columns: list[Column] = [
        *groups,
        ("REQUESTS", number("requests"), True),
        ("ERRORS", number("errors"), True),
        ("PROMPT", number("prompt_tokens"), True),
        ("CACHED", number("cached_tokens"), True),
        ("COMPLETION", number("completion_tokens"), True),
        ("COST", lambda row: money(row.get("cost")), True),
    ]
    blank = dict.fromkeys(answer["group_by"], " ")
    return table(columns, answer["data"], {**blank, answer["group_by"][0]: "total", **answer["total"]})


def requests(rows: Sequence[Row]) -> Table:
    def outcome(row: Row) -> Text:
        shown = row["outcome"] if row["error"] is None else f"{row['outcome']}: {row['error']}"
        return Text(plain(shown), STATES.get(row["outcome"], "yellow"))

    columns: list[Column] = [
        ("TIME", lambda row: local(row["time"]).strftime("%m-%d %H:%M:%S"), False),
        ("KEY", text("key"), False),
        ("MODEL", text("model"), False),
        ("ENDPOINT", text("endpoint"), False),
        ("ENGINE", text("replica"), False),
        (
            "STATUS",
            lambda row: Text(
                str(row["status"]), "red" if row["status"] >= 500 else "yellow" if row["status"] >= 400 else "green"
            ),
            True,
        ),
        ("OUTCOME", outcome, False),
        ("PROMPT", number("prompt_tokens"), True),
        ("COMPL.", number("completion_tokens"), True),
        ("TTFT", lambda row: milliseconds(row["ttft_ms"]), True),
        ("TOOK", lambda row: milliseconds(row["duration_ms"]), True),
    ]
    return table(columns, rows)


def engines(rows: Sequence[Row]) -> Table:
    columns: list[Column] = [
        ("ENGINE", text("id"), False),
        ("STATE", state("state"), False),
        ("OPEN", number("open_requests"), True),
        ("RUNNING", number("running"), True),
        ("WAITING", number("waiting"), True),
        ("KV CACHE", lambda row: percent(row["kv_cache_usage"]), True),
        ("RESTARTS", number("restarts"), True),
        ("RUN BY", lambda row: "Penstock" if row["managed"] else Text(plain(row["url"])), False),
        ("WHY", text("reason"), False),
    ]
    return table(columns, rows)
