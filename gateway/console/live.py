"""`penstock top`: what the gateway does, once a second. The screen is a pure function of what has come so far."""

import contextlib
import os
import queue
import sys
import termios
import threading
import time
import tty
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gateway.console.client import Client, Refused
from gateway.console.problem import Problem
from gateway.console.tables import NOTHING, STATES, local, milliseconds, percent, plain, short

BLOCKS: Final = " ▁▂▃▄▅▆▇█"
_KEPT: Final = 600  # points of a second
_RETRY: Final = 2.0  # seconds between two attempts to reach a gateway that is gone
_WORST_FIRST: Final = ("failed", "unhealthy", "stopped", "draining", "starting", "ready")

Row = Mapping[str, Any]


class View:
    """What has come so far."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.interval = 10.0  # seconds between two points of the last hour
        self.hour: deque[float] = deque(maxlen=360)  # output tokens per second
        self.seconds: deque[float] = deque(maxlen=_KEPT)  # the same, since the start
        self.latest: Row | None = None
        self.trouble: str | None = None  # why nothing comes
        self._since: list[float] = []  # of the point of the hour that is not whole yet

    def history(self, data: Row) -> None:
        self.interval = float(data["interval"]) or self.interval
        self.hour.clear()
        self.hour.extend(point["output_tokens_per_second"] for point in data["points"])
        self._since.clear()

    def figures(self, data: Row) -> None:
        rate = float(data["output_tokens_per_second"])
        self.latest, self.trouble = data, None
        self.seconds.append(rate)
        self._since.append(rate)
        if len(self._since) >= self.interval:
            self.hour.append(sum(self._since) / len(self._since))
            self._since.clear()


# ---- what is shown


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values, each a block as high as its share of the highest; what is not zero can be seen."""
    shown = list(values)[-width:] if width > 0 else []
    highest = max(shown, default=0.0)
    if not highest:
        return " " * (width - len(shown)) + BLOCKS[1] * len(shown)
    heights = [0 if not value else max(1, round(value / highest * (len(BLOCKS) - 1))) for value in shown]
    return " " * (width - len(shown)) + "".join(BLOCKS[height] for height in heights)


def line(figures: Row) -> str:
    """One second as one line of text."""
    ttft, itl = figures["ttft_ms"], figures["itl_ms"]
    up = sum(engine["state"] == "ready" for engine in figures["engines"])
    return (
        f"{figures['time']}  {figures['requests_per_second']:.1f} req/s  {figures['output_tokens_per_second']:.1f} tok/s"
        f"  {figures['open_requests']} open  {figures['errors_per_second']:.1f} errors/s"
        f"  ttft p95 {milliseconds(ttft['p95'])}  itl p95 {milliseconds(itl['p95'])}"
        f"  {up}/{len(figures['engines'])} engines"
    )


def screen(view: View, width: int, height: int) -> Group:
    """Never more than `height` lines of `width` columns."""
    parts: list[RenderableType] = [_head(view, width)]
    if view.latest is None:
        parts.append(Text(f"\n {view.trouble or 'waiting for the first figures …'}", "dim"))
        return Group(*parts)
    now = view.latest
    graph = max(10, width - 28)
    parts += [
        Text(""),
        _summary(now),
        Text(""),
        _graph("tokens/s, now", view.seconds, graph),
        _graph("tokens/s, last hour", view.hour, graph),
    ]
    room = height - 11  # lines for what stands in both tables: each has a blank line and a head, and above are seven
    models = sorted(now["models"], key=lambda m: (-m["output_tokens_per_second"], -m["open_requests"]))
    engines = sorted(now["engines"], key=lambda e: (_rank(e["state"]), -e["open_requests"]))
    for_models, for_engines = shares(room, len(models), len(engines))
    if room > 0:
        parts += [Text(""), *_cut(_models, models, for_models)]
        parts += [Text(""), *_cut(_engines, engines, for_engines)]
    return Group(*parts)


def shares(room: int, first: int, second: int) -> tuple[int, int]:
    """How `room` lines are given to two lists that want `first` and `second`: half to each, and what one leaves to the
    other."""
    half = max(0, room) // 2
    taken = min(first, max(half, room - second))
    return max(0, taken), max(0, min(second, room - taken))


def _rank(state: str) -> int:
    return _WORST_FIRST.index(state) if state in _WORST_FIRST else len(_WORST_FIRST)


def _head(view: View, width: int) -> Text:
    left = Text.assemble((" Penstock", "bold cyan"), f" {view.address}")
    if view.trouble is not None:
        right = Text(f"{view.trouble} ", "bold red")
    else:
        at = local(view.latest["time"]).strftime("%H:%M:%S") if view.latest else ""
        right = Text(f"{at}   q quits ", "dim")
    left.append(" " * max(1, width - left.cell_len - right.cell_len))
    left.append_text(right)
    left.no_wrap = True
    return left


def _summary(now: Row) -> Table:
    ttft, itl, errors = now["ttft_ms"], now["itl_ms"], now["errors_per_second"]
    columns: tuple[tuple[str, Text], ...] = (
        ("req/s", Text(short(now["requests_per_second"]))),
        ("err/s", Text(short(errors), "bold red" if errors else "")),
        ("open", Text(str(now["open_requests"]))),
        ("out tok/s", Text(short(now["output_tokens_per_second"]), "bold cyan")),
        ("in tok/s", Text(short(now["prompt_tokens_per_second"]))),
        ("ttft p50/p95", _pair(ttft)),
        ("itl p50/p95", _pair(itl)),
        ("loop lag", milliseconds(now["loop_lag_ms"])),
    )
    made = Table(box=None, padding=(0, 1), header_style="dim")
    for title, _ in columns:
        made.add_column(title, justify="right", no_wrap=True)
    made.add_row(*(value for _, value in columns))
    return made


def _pair(values: Row) -> Text:
    if values["p50"] is None:
        return NOTHING
    first, second = f"{milliseconds(values['p50'])}", f"{milliseconds(values['p95'])}"
    unit = second.rpartition(" ")[2]
    return Text(f"{first.removesuffix(f' {unit}')}/{second}")


def _graph(title: str, values: Sequence[float], width: int) -> Text:
    highest = max(list(values)[-width:], default=0.0)
    return Text.assemble(
        (f" {title:<20}", "dim"), (sparkline(values, width), "cyan"), (f" {short(highest):>5}", "dim"), no_wrap=True
    )


def _cut(make: Callable[[Sequence[Row]], Table], rows: Sequence[Row], room: int) -> list[RenderableType]:
    if len(rows) <= room:
        return [make(rows)]
    if room < 1:
        return []
    return [make(rows[: room - 1]), Text(f" … and {len(rows) - (room - 1)} more", "dim", no_wrap=True)]


def _models(rows: Sequence[Row]) -> Table:
    made = _table("MODEL", "REQ/S", "TOK/S", "OPEN")
    for row in rows:
        idle = not (row["requests_per_second"] or row["output_tokens_per_second"] or row["open_requests"])
        made.add_row(
            plain(row["name"]),
            short(row["requests_per_second"]),
            short(row["output_tokens_per_second"]),
            str(row["open_requests"]),
            style="dim" if idle else "",
        )
    return made


def _engines(rows: Sequence[Row]) -> Table:
    made = _table("ENGINE", "STATE", "OPEN", "RUNNING", "WAITING", "KV CACHE", "RESTARTS")
    made.columns[1].justify = "left"
    for row in rows:
        made.add_row(
            plain(row["id"]),
            Text(plain(row["state"]), STATES.get(row["state"], "")),
            str(row["open_requests"]),
            NOTHING if row["running"] is None else str(row["running"]),
            NOTHING if row["waiting"] is None else Text(str(row["waiting"]), "yellow" if row["waiting"] else ""),
            percent(row["kv_cache_usage"]),
            Text(str(row["restarts"]), "yellow" if row["restarts"] else ""),
        )
    return made


def _table(first: str, *numbers: str) -> Table:
    made = Table(box=None, padding=(0, 1), header_style="bold")
    made.add_column(first, no_wrap=True, min_width=20)
    for title in numbers:
        made.add_column(title, justify="right", no_wrap=True, min_width=7)
    return made


# ---- what comes

Came = tuple[Literal["history", "figures", "trouble", "over", "quit"], Any]


def lines(client: Client, echo: Callable[[str], None]) -> None:
    """A line a second, until the gateway ends the stream. Blocks; raises `Problem`."""
    for event in client.events():
        if event.name == "figures":
            echo(line(event.data))


def watch(client: Client) -> None:
    """The live screen, until q or Ctrl-C; a gateway that goes away is waited for. Blocks. Raises `Problem` if it cannot be
    reached to begin with, or refuses."""
    console = Console(highlight=False)
    view = View(str(client.address))
    came: queue.SimpleQueue[Came] = queue.SimpleQueue()
    threading.Thread(target=_follow, args=(client, came), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt), _keys(came):
        kind, data = came.get()
        if kind == "over":
            raise data
        with Live(console=console, screen=True, auto_refresh=False) as shown:
            while kind != "quit":
                if kind == "over":
                    raise data
                _take(view, kind, data)
                shown.update(screen(view, console.width, console.height), refresh=True)
                kind, data = came.get()


def _take(view: View, kind: str, data: Any) -> None:
    if kind == "history":
        view.history(data)
    elif kind == "figures":
        view.figures(data)
    elif kind == "trouble":
        view.trouble = data


def _follow(client: Client, came: "queue.SimpleQueue[Came]") -> None:
    """Passes on every event. What fails at first, or is refused, is `over`; what fails later is tried again."""
    connected = False
    while True:
        try:
            for event in client.events():
                connected = True
                if event.name in ("history", "figures"):
                    came.put((event.name, event.data))  # type: ignore[arg-type]  # one of the two
            came.put(("trouble", "the gateway is draining; waiting for it to come back"))
        except Refused as refused:
            came.put(("over", refused))
            return
        except Problem as problem:
            if not connected:
                came.put(("over", problem))
                return
            came.put(("trouble", "the gateway is gone; waiting for it to come back"))
        time.sleep(_RETRY)


@contextlib.contextmanager
def _keys(came: "queue.SimpleQueue[Came]") -> Iterator[None]:
    """Puts `quit` when q is typed. Without a terminal to type on there is only Ctrl-C."""
    if not sys.stdin.isatty():
        yield
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)

    def read() -> None:
        while key := os.read(keyboard, 1):
            if key in b"qQ":
                came.put(("quit", None))

    try:
        tty.setcbreak(keyboard)
        threading.Thread(target=read, daemon=True).start()
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
