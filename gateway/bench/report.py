"""What a person and a program get to see of a load test: the terminal's tables, and JSON."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from gateway.bench.results import CHECK, QUANTILES, Record, Report, Run, Spread, Summary, TargetResult

if TYPE_CHECKING:
    from gateway.bench.load import Lane

SCHEMA: Final = "penstock-bench/1"


class Row(NamedTuple):
    """One figure of a summary."""

    name: str
    value: Callable[[Summary], float]
    show: Callable[[float], str]


def count(n: float) -> str:
    return f"{n:,.0f}".replace(",", " ")


def rate(n: float) -> str:
    return count(n) if n >= 1000 else f"{n:.1f}" if n >= 10 else f"{n:.2f}"


def duration(seconds: float) -> str:
    """Three digits with the unit that suits."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor:
            value = seconds / factor
            return f"{value:.{max(0, 2 - (value >= 10) - (value >= 100))}f} {unit}"
    return f"{seconds * 1e6:.0f} µs" if seconds else "0"


THROUGHPUT: Final = (
    Row("requests/s", lambda s: s.request_rate, rate),
    Row("prompt tokens/s", lambda s: s.prompt_rate, rate),
    Row("output tokens/s", lambda s: s.output_rate, rate),
    Row("total tokens/s", lambda s: s.total_rate, rate),
    Row("peak output tokens/s", lambda s: s.peak_output_rate, rate),
    Row("peak running requests", lambda s: s.peak_running, count),
    Row("prompt tokens", lambda s: s.prompt_tokens, count),
    Row("output tokens", lambda s: s.output_tokens, count),
)
LATENCIES: Final[Sequence[tuple[str, Callable[[Summary], Spread]]]] = (
    ("time to first token", lambda s: s.ttft),
    ("inter-token time", lambda s: s.itl),
    ("time per output token", lambda s: s.tpot),
    ("request time", lambda s: s.e2e),
)
COLUMNS: Final = ("mean", *QUANTILES, "max")


def ratio(first: float, second: float) -> str:
    return f"{second / first:.2f}×" if first else "–"


def as_json(report: Report, *, requests: bool = False) -> bytes:
    """The whole result for machines; with every request when asked. Times are in seconds."""
    whole = {
        "schema": SCHEMA,
        "created": report.created,
        "config": report.config,
        "ok": not report.failed,
        "runs": [_run_json(run, requests) for run in report.runs],
    }
    return orjson.dumps(whole, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def _run_json(run: Run, requests: bool) -> dict[str, Any]:
    return {
        "label": run.label,
        "load": run.load,
        "stopped": run.stopped,
        "generator": {
            "cpu": run.health.cpu,
            "loop_lag": run.health.lag._asdict(),
            "bottleneck": run.health.bottleneck,
        },
        "targets": [_target_json(target, requests) for target in run.targets],
    }


def _target_json(target: TargetResult, requests: bool) -> dict[str, Any]:
    summary = {
        name: value._asdict() if isinstance(value, Spread) else value
        for name, value in target.summary._asdict().items()
    }
    summary["failures"] = [failure._asdict() for failure in target.summary.failures]
    shown = {"url": target.name, "summary": summary, "samples": [sample._asdict() for sample in target.samples]}
    if requests:
        shown["requests"] = [_record_json(record) for record in target.records]
    return shown


def _record_json(record: Record) -> dict[str, Any]:
    return {
        **record._asdict(),
        "ttft": record.ttft if record.chunks else None,
        "e2e": record.latency if record.chunks else None,
        "times": None if record.times is None else [round(at, 6) for at in record.times],
    }


def render(report: Report, console: Console) -> None:
    """The tables for a terminal of 80 columns or more; what is none counts as one of 80."""
    for run in report.runs:
        console.print(_run(run, several=len(report.runs) > 1))
    if len(report.runs) > 1:
        console.print(_sweep(report.runs))


def _run(run: Run, *, several: bool) -> RenderableType:
    parts: list[RenderableType] = [Text(), _headline(run, several=several)]
    answered = any(target.summary.ok for target in run.targets)
    if answered and len(run.targets) == 1:
        parts += [Text(), _figures(run.targets[0].summary), Text(), _latencies(run.targets[0].summary)]
    elif answered:
        parts += [Text(), _comparison(run.targets[0], run.targets[1])]
    for target in run.targets:
        if target.summary.failures:
            parts += [Text(), _failures(target, named=len(run.targets) > 1)]
    parts += [Text(), _footnotes(run)]
    return Group(*parts)


def _headline(run: Run, *, several: bool) -> Text:
    ok, failed = sum(t.summary.ok for t in run.targets), sum(t.summary.failed for t in run.targets)
    abandoned = sum(t.summary.abandoned for t in run.targets)
    longest = max(t.summary.duration for t in run.targets)
    line = Text(" ")
    line.append("● ", "red" if failed or run.stopped else "green")
    line.append(run.label, "bold")
    line.append(f"   {count(ok)} ok", "green" if ok else "dim")
    line.append(f"   {count(failed)} failed", "bold red" if failed else "dim")
    if abandoned:
        line.append(f"   {count(abandoned)} abandoned", "yellow")
    if longest:
        line.append(f"   {duration(longest)}", "dim")
    if run.stopped:
        line.append(f"\n   stopped: {run.stopped}", "red")
    return line


def _table(gap: int = 2, **options: Any) -> Table:
    return Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="dim", **options)


def _indented(table: RenderableType) -> Padding:
    return Padding(table, (0, 0, 0, 3))


def _figures(summary: Summary) -> RenderableType:
    table = _table(show_header=False)
    for style in ("dim", "bold", "dim", "bold"):
        table.add_column(
            style=style, justify="right" if style == "bold" else "left", min_width=9 if style == "bold" else 24
        )
    rows = [(row.name, row.show(row.value(summary))) for row in THROUGHPUT]
    if summary.good is not None and summary.goodput is not None:
        rows += [("goodput, requests/s", rate(summary.goodput)), ("within the SLO", _share(summary.good, summary.ok))]
    half = (len(rows) + 1) // 2
    for i in range(half):
        table.add_row(*rows[i], *(rows[i + half] if i + half < len(rows) else ("", "")))
    return _indented(table)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _latencies(summary: Summary) -> RenderableType:
    table = _table(gap=1)
    table.add_column("", min_width=21)
    for column in COLUMNS:
        table.add_column(column, justify="right", min_width=8, style="bold" if column in ("p50", "p99") else "")
    for name, pick in LATENCIES:
        table.add_row(name, *(duration(getattr(pick(summary), column)) for column in COLUMNS))
    return _indented(table)


def _comparison(first: TargetResult, second: TargetResult) -> RenderableType:
    table = _table()
    table.add_column("", min_width=28)
    for header, style in (("A", "bold"), ("B", "bold"), ("B / A", "cyan")):
        table.add_column(header, justify="right", style=style, min_width=9, no_wrap=True)
    one, two = first.summary, second.summary
    rows = list(THROUGHPUT)
    if one.goodput is not None:
        rows.append(Row("goodput, requests/s", lambda s: s.goodput or 0.0, rate))
    for row in rows:
        a, b = row.value(one), row.value(two)
        table.add_row(row.name, row.show(a), row.show(b), ratio(a, b))
    for name, pick in LATENCIES:
        table.add_row()
        for column in ("mean", *QUANTILES):
            a, b = getattr(pick(one), column), getattr(pick(two), column)
            table.add_row(f"{name} {column}", duration(a), duration(b), ratio(a, b))
    names = Text(f"A  {first.name}\nB  {second.name}", "dim", overflow="fold")
    return _indented(Group(names, Text(), table))


def _failures(target: TargetResult, *, named: bool) -> RenderableType:
    table = _table()
    table.add_column("failed" + (f" at {target.name}" if named else ""), style="red", min_width=24)
    table.add_column("count", justify="right", style="bold")
    table.add_column("what the first was told", style="dim", overflow="fold", max_width=58)
    for failure in target.summary.failures:
        table.add_row(Text(failure.cause), count(failure.requests), Text(failure.detail))
    checks = [Text(f"→ {CHECK[failure.cause]}", "yellow") for failure in target.summary.failures[:3]]
    return _indented(Group(table, Text(), *checks))


def notes(run: Run) -> list[str]:
    """What to know before believing the figures."""
    found = []
    for letter, target in zip("AB", run.targets, strict=False):
        summary = target.summary
        who = f"{letter}: " if len(run.targets) > 1 else ""
        if summary.uncounted:
            found.append(
                f"{who}{count(summary.uncounted)} answers came without usage: their output tokens are chunks, prompts not counted."
            )
        if run.load.get("rate"):
            late = summary.lateness
            found.append(
                f"{who}Times run from when a request was due; it was sent {duration(late.p50)} (p50), {duration(late.p99)} (p99) later."
            )
    return found


def _footnotes(run: Run) -> RenderableType:
    health = run.health
    lines: list[RenderableType] = [Text(note, "dim") for note in notes(run)]
    if not health.lag.size:
        return _indented(Group(*lines))
    lag = f"loop lag p50 {duration(health.lag.p50)}, p99 {duration(health.lag.p99)}"
    lines.append(Text(f"Load generator: {health.cpu:.0%} of one core, {lag}.", "dim"))
    if health.bottleneck:
        warning = f"The load generator itself was the bottleneck ({health.bottleneck}): figures are not to be trusted."
        lines.append(Text(warning, "bold yellow"))
    return _indented(Group(*lines))


SWEEP: Final = ("load", "failed", "req/s", "out tok/s", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "e2e p50")


def sweep_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """A line for each run and target, in the order of `SWEEP`."""
    rows = []
    for run in runs:
        for letter, target in zip("AB", run.targets, strict=False):
            s = target.summary
            label = run.label + (f" {letter}" if len(run.targets) > 1 else "") + (" *" if run.health.bottleneck else "")
            times = (s.ttft.p50, s.ttft.p99, s.itl.p50, s.itl.p99, s.e2e.p50)
            rows.append((label, count(s.failed), rate(s.request_rate), rate(s.output_rate), *map(duration, times)))
    return rows


def _sweep(runs: Sequence[Run]) -> RenderableType:
    table = _table(gap=1)
    for name in SWEEP:
        stacked = name.replace(" ", "\n") if "tok/s" in name or " p" in name else f"\n{name}"
        table.add_column(stacked, justify="left" if name == "load" else "right", no_wrap=True)
    for row in sweep_rows(runs):
        table.add_row(*row)
    parts: list[RenderableType] = [Text(), Text(" sweep", "bold"), Text(), _indented(table)]
    if any(run.health.bottleneck for run in runs):
        parts.append(_indented(Text("* the load generator itself was the bottleneck", "yellow")))
    return Group(*parts)


class Live:
    """Shows how a run goes, while it goes: a `load.Watcher`. Draws only when told to, not from a thread of its own."""

    def __init__(self, console: Console, runs: int) -> None:
        columns = (
            TextColumn(" {task.description}", style="bold"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
        )
        self._progress = Progress(*columns, console=console, auto_refresh=False, transient=True)
        self._runs = runs
        self._task: TaskID | None = None
        self._number = 0
        self._before: tuple[float, int] = (0.0, 0)

    def __enter__(self) -> "Live":
        self._progress.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._progress.stop()

    def begin(self, label: str) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        if label not in ("calibration", "warm-up"):
            self._number += 1
            label += f" ({self._number} of {self._runs})" if self._runs > 1 else ""
        self._before = (0.0, 0)
        self._task = self._progress.add_task(label, total=1.0, state="")

    def look(self, lanes: Sequence["Lane"]) -> None:
        latest = [lane.samples[-1] for lane in lanes]
        at, chunks = latest[0].time, sum(sample.chunks for sample in latest)
        before, chunks_before = self._before
        self._before = (at, chunks)
        # One chunk is one token, as good as always; the engine's own count comes with the last chunk only.
        speed = (chunks - chunks_before) / (at - before) if at > before else 0.0
        state = Text(f"{count(speed):>7} tok/s ", "cyan")
        state.append(f"{count(sum(sample.running for sample in latest)):>6} running")
        state.append(f"{count(sum(sample.ok for sample in latest)):>7} ok", "green")
        if failed := sum(sample.failed for sample in latest):
            state.append(f"{count(failed):>6} failed", "red")
        assert self._task is not None  # `begin` comes first
        self._progress.update(self._task, completed=min(lane.share for lane in lanes), state=state, refresh=True)


class Silent:
    """A `load.Watcher` that shows nothing."""

    def begin(self, label: str) -> None:
        pass

    def look(self, lanes: Sequence["Lane"]) -> None:
        pass
