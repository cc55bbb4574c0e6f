"""A load test as one HTML file that needs nothing else: no network, no script. Pure."""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import pairwise
from typing import Final, NamedTuple

from gateway.bench.report import COLUMNS, LATENCIES, SWEEP, THROUGHPUT, count, duration, notes, rate, ratio, sweep_rows
from gateway.bench.results import CHECK, Report, Run, Sample, TargetResult, token_rates, tokens_per_chunk

Point = tuple[float, float]
Weighted = Sequence[tuple[float, int]]  # (value, how often), rising

_WIDE, _NARROW = 1000, 470  # pixels, as the page shows them, so that all text has one size
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 18, 12, 24
_MOST_POINTS: Final = 400  # of a line; more cannot be told apart
_BINS: Final = 48


class Axis(NamedTuple):
    """Maps values from `low` to `high` to a coordinate from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)


class Series(NamedTuple):
    name: str
    css: str  # class: a or b, and dashed
    points: Sequence[Point]
    hints: Sequence[str] = ()  # of the points, for the pointer to find
    marks: Sequence[str] = ()  # written at the points


def as_html(report: Report) -> str:
    runs = report.runs
    several = len(runs) > 1
    title = f"Load test of {report.config.get('model', 'a model')}"
    sections = [_sweep(runs)] if several else []
    sections += [_run(run, several=several, open_=not several) for run in runs]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{_CSS}</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">penstock bench</p>
<h1>{escape(title)}</h1>
<p class="where">{_targets(report)}</p>
<p class="when">{escape(report.created.replace("T", " ").replace("+00:00", " UTC"))}</p>
</header>
{"".join(sections)}
{_config(report)}
</main>
</body>
</html>
"""


def _targets(report: Report) -> str:
    names = [target.name for target in report.runs[0].targets] if report.runs else []
    if len(names) < 2:
        return "".join(f"<code>{escape(name)}</code>" for name in names)
    return " against ".join(
        f'<span class="key {css}">{css.upper()}</span> <code>{escape(name)}</code>'
        for css, name in zip("ab", names, strict=False)
    )


def _run(run: Run, *, several: bool, open_: bool) -> str:
    ok, failed = sum(t.summary.ok for t in run.targets), sum(t.summary.failed for t in run.targets)
    verdict = (
        f'<span class="{"bad" if failed or run.stopped else "good"}">{count(ok)} ok, {count(failed)} failed</span>'
    )
    heading = f"<h2>{escape(run.label)}</h2> {verdict}"
    inside = "".join(
        (_alerts(run), *((_tiles(run), _charts(run), _tables(run)) if ok else ()), _failures(run), _footnotes(run))
    )
    if several:
        return f'<details class="run"{" open" if open_ else ""}><summary>{heading}</summary>{inside}</details>'
    return f'<section class="run"><div class="heading">{heading}</div>{inside}</section>'


def _alerts(run: Run) -> str:
    alerts = []
    if run.stopped:
        alerts.append(f"Stopped before its time: {run.stopped}.")
    if run.health.bottleneck:
        alerts.append(
            f"The load generator itself was the bottleneck ({run.health.bottleneck}): figures are not to be trusted."
        )
    return "".join(f'<p class="alert">{escape(alert)}</p>' for alert in alerts)


def _tiles(run: Run) -> str:
    tiles: list[tuple[str, Callable[[TargetResult], str]]] = [
        ("output tokens/s", lambda t: rate(t.summary.output_rate)),
        ("requests/s", lambda t: rate(t.summary.request_rate)),
        ("TTFT p50", lambda t: duration(t.summary.ttft.p50)),
        ("TTFT p99", lambda t: duration(t.summary.ttft.p99)),
        ("ITL p50", lambda t: duration(t.summary.itl.p50)),
        ("ITL p99", lambda t: duration(t.summary.itl.p99)),
    ]
    if run.targets[0].summary.goodput is not None:
        tiles.append(("goodput/s", lambda t: rate(t.summary.goodput or 0.0)))
    shown = []
    for name, value in tiles:
        values = "".join(
            f'<span class="value {css if len(run.targets) > 1 else ""}">{escape(value(target))}</span>'
            for css, target in zip("ab", run.targets, strict=False)
        )
        shown.append(f'<div class="tile"><span class="name">{name}</span>{values}</div>')
    return f'<div class="tiles">{"".join(shown)}</div>'


def running_over(samples: Sequence[Sample]) -> list[Point]:
    """(from when on, how many at most). A sample tells of the time before it."""
    spans = [(before.time, float(after.running)) for before, after in pairwise(samples)]
    return spans + [(last.time, float(last.running)) for last in samples[-1:]]


def _charts(run: Run) -> str:
    targets = list(zip("ab", run.targets, strict=False))
    speed, running = [], []
    for css, target in targets:
        rates = token_rates(target.samples, tokens_per_chunk(target.summary), width=_sample_width(target))
        speed.append(Series(target.name, css, rates, [f"{rate(y)} tokens/s at {duration(x)}" for x, y in rates]))
        running.append(Series(target.name, css, thinned(running_over(target.samples))))
    legend = _legend(run)
    return "".join((
        '<div class="charts">',
        _card("Output tokens per second", line_chart(speed, _number, _seconds, area=len(targets) == 1), legend, wide=True),
        _card("Requests running", line_chart(running, _number, _seconds, height=130, steps=True), legend, wide=True),
        _card(
            "Time to first token",
            distribution([(css, [(v, 1) for v in sorted(r.ttft for r in t.records if r.cause is None)]) for css, t in targets]),
            legend,
        ),
        _card("Time between tokens", distribution([(css, t.gaps.buckets()) for css, t in targets]), legend),
        "</div>",
    ))  # fmt: skip


def _sample_width(target: TargetResult) -> float:
    """Seconds for a point of a line over time: a second, or more where the line would get too many."""
    return max(1.0, target.samples[-1].time / _MOST_POINTS) if target.samples else 1.0


def _legend(run: Run) -> str:
    if len(run.targets) < 2:
        return ""
    return "".join(f'<span class="key {css}">{css.upper()}</span> ' for css, _ in zip("ab", run.targets, strict=False))


def _card(title: str, chart: str, legend: str = "", *, wide: bool = False, note: str = "") -> str:
    caption = f'<figcaption><span>{escape(title)}</span><span class="legend">{legend}{escape(note)}</span></figcaption>'
    return f'<figure class="card{" wide" if wide else ""}">{caption}{chart}</figure>'


def _tables(run: Run) -> str:
    two = len(run.targets) > 1
    first, second = run.targets[0].summary, run.targets[-1].summary
    rows = []
    for row in THROUGHPUT:
        a, b = row.value(first), row.value(second)
        rows.append([row.name, row.show(a), *([row.show(b), ratio(a, b)] if two else [])])
    throughput = table(["", *(["A", "B", "B / A"] if two else [""])], rows)
    rows = []
    for name, pick in LATENCIES:
        for i, summary in enumerate((first, second) if two else (first,)):
            label = name + (f" {'AB'[i]}" if two else "")
            rows.append([label, *(duration(getattr(pick(summary), column)) for column in COLUMNS)])
        if two:
            values = ((getattr(pick(first), column), getattr(pick(second), column)) for column in COLUMNS)
            rows.append(["B / A", *(ratio(a, b) for a, b in values)])
    latencies = table(["", *COLUMNS], rows)
    return f'<div class="tables"><div class="card {"pair" if two else ""}">{throughput}</div><div class="card grow">{latencies}</div></div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column is text, the others are figures."""
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for first, *cells in rows
    )
    header = f"<thead><tr>{heads}</tr></thead>" if any(head) else ""
    return f'<div class="scroll"><table>{header}<tbody>{lines}</tbody></table></div>'


def _failures(run: Run) -> str:
    rows = [
        f"<tr><th>{escape(failure.cause)}{f' ({escape(target.name)})' if len(run.targets) > 1 else ''}</th>"
        f"<td>{count(failure.requests)}</td>"
        f'<td class="text">{escape(failure.detail)}<br><span class="dim">{escape(CHECK[failure.cause])}</span></td></tr>'
        for target in run.targets
        for failure in target.summary.failures
    ]
    if not rows:
        return ""
    head = (
        '<thead><tr><th>failed because</th><th>requests</th><th class="text">what the first was told</th></tr></thead>'
    )
    return f'<div class="card failures"><div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div></div>'


def _footnotes(run: Run) -> str:
    lag = run.health.lag
    lines = notes(run)
    if lag.size:
        lines.append(
            f"Load generator: {run.health.cpu:.0%} of one core, loop lag p50 {duration(lag.p50)}, p99 {duration(lag.p99)}."
        )
    return f'<p class="notes">{"<br>".join(map(escape, lines))}</p>'


def _sweep(runs: Sequence[Run]) -> str:
    charts = []
    for title, pick in LATENCIES[:2]:
        series = []
        for i, css in enumerate("ab"[: len(runs[0].targets)]):
            of_target = [(run, run.targets[i].summary) for run in runs if run.targets[i].summary.ok]
            for quantile, dash in (("p50", ""), ("p99", " dashed")):
                points = [(summary.output_rate, getattr(pick(summary), quantile)) for _, summary in of_target]
                labels = [
                    f"{run.label}: {rate(x)} tokens/s, {quantile} {duration(y)}"
                    for (run, _), (x, y) in zip(of_target, points, strict=True)
                ]
                marks = [_load(run) for run, _ in of_target] if dash else []
                series.append(Series(quantile, css + dash, points, labels, marks))
        chart = line_chart(series, _brief, _number, width=_NARROW, height=260, dots=True, x_title="output tokens/s")
        charts.append(_card(title.capitalize(), chart, _legend(runs[0]), note="against throughput; p99 dashed"))
    late = '<p class="notes">* the load generator itself was the bottleneck</p>'
    footnote = late if any(run.health.bottleneck for run in runs) else ""
    summary = f'<div class="card">{table(SWEEP, sweep_rows(runs))}{footnote}</div>'
    return f'<section class="run"><div class="heading"><h2>Sweep</h2></div><div class="charts">{"".join(charts)}</div>{summary}</section>'


def _load(run: Run) -> str:
    return _number(float(run.load.get("rate") or run.load.get("concurrency") or 0))


def _config(report: Report) -> str:
    rows = "".join(
        f"<dt>{escape(name.replace('_', '-'))}</dt><dd>{escape(str(value))}</dd>"
        for name, value in report.config.items()
        if value not in (None, False)
    )
    return f'<details class="config"><summary>Options</summary><dl>{rows}</dl></details>'


# ---- charts


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` on, the last at or beyond `high`."""
    if high <= low:
        high = low + 1
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    return [i * step for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def thinned(points: Sequence[Point]) -> Sequence[Point]:
    return points[:: len(points) // _MOST_POINTS + 1]


def _seconds(value: float) -> str:
    return f"{value:g} s"


def _frame(x: Axis, y: Axis, x_ticks: Iterable[tuple[float, str]], y_ticks: Iterable[tuple[float, str]]) -> str:
    """Grid and labels. Ticks are (value, label)."""
    rows = "".join(
        f'<line class="grid" x1="{x.start:.0f}" x2="{x.end:.0f}" y1="{y.at(value):.1f}" y2="{y.at(value):.1f}"/>'
        + _text(x.start - 8, y.at(value) + 4, label, "end")
        for value, label in y_ticks
    )
    return rows + "".join(_text(x.at(value), y.start + 18, label, "middle") for value, label in x_ticks)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: int, height: int, inside: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img">{inside}</svg>'


def _empty(width: int, height: int) -> str:
    return _svg(width, height, _text(width / 2, height / 2, "too short to plot", "middle"))


def line_chart(
    series: Sequence[Series],
    show_y: Callable[[float], str],
    show_x: Callable[[float], str],
    *,
    width: int = _WIDE,
    height: int = 220,
    area: bool = False,
    steps: bool = False,
    dots: bool = False,
    x_title: str = "",
) -> str:
    points = [point for one in series for point in one.points]
    if not points:
        return _empty(width, height)
    x_ticks = ticks(0, max(x for x, _ in points), 5 if dots else 10)
    y_ticks = ticks(0, max(y for _, y in points), 4)
    foot = height - _BOTTOM - (18 if x_title else 0)
    x = Axis(0, x_ticks[-1] if dots else max(*(x for x, _ in points), 1e-9), _LEFT, width - _RIGHT)
    y = Axis(0, y_ticks[-1], foot, _TOP)
    parts = [_frame(x, y, [(t, show_x(t)) for t in x_ticks if t <= x.high], [(t, show_y(t)) for t in y_ticks])]
    if x_title:
        parts.append(_text(x.end, height - 4, x_title, "end"))
    for one in series:
        if not one.points:
            continue
        corners = [(x.at(a), y.at(b)) for a, b in one.points]
        path = _path(corners, steps=steps)
        if area:
            (left, _), (right, _) = corners[0], corners[-1]
            parts.append(f'<path class="area {one.css}" d="{path}L{right:.1f},{foot}L{left:.1f},{foot}Z"/>')
        parts.append(f'<path class="line {one.css}" d="{path}"/>')
        dot = f"dot {one.css}" if dots or len(corners) == 1 else f"hover {one.css}"
        parts += [
            f'<circle class="{dot}" cx="{a:.1f}" cy="{b:.1f}" r="4.5"><title>{escape(hint)}</title></circle>'
            for (a, b), hint in zip(corners, one.hints, strict=False)
        ]
        parts += [_text(a, b - 9, mark, "middle") for (a, b), mark in zip(corners, one.marks, strict=False)]
    return _svg(width, height, "".join(parts))


def _path(points: Sequence[Point], *, steps: bool) -> str:
    (a, b), *others = points
    parts = [f"M{a:.1f},{b:.1f}"]
    parts += [f"H{a:.1f}V{b:.1f}" if steps else f"L{a:.1f},{b:.1f}" for a, b in others]
    return "".join(parts)


def bins(values: Weighted, low: float, high: float, number: int = _BINS) -> list[int]:
    """How many of the values lie in each of so many equal parts; what lies outside is counted in the outermost."""
    counts = [0] * number
    for value, weight in values:
        counts[min(max(int((value - low) / (high - low) * number), 0), number - 1)] += weight
    return counts


def weighted_quantile(values: Weighted, q: float) -> float:
    rank = q * (sum(weight for _, weight in values) - 1)
    seen = 0
    for value, weight in values:
        seen += weight
        if seen > rank:
            return value
    return values[-1][0]


def distribution(series: Sequence[tuple[str, Weighted]], width: int = _NARROW, height: int = 220) -> str:
    """Bars for how many, a line for the share that is at most so long. The slowest 0.5 % are in the last bar."""
    filled = [(css, values) for css, values in series if values]
    if not filled:
        return _empty(width, height)
    high = max(weighted_quantile(values, 0.995) for _, values in filled)
    low = min(weighted_quantile(values, 0.001) for _, values in filled)
    x_ticks = ticks(0.0 if low < 0.4 * high else low, max(high, low + 1e-6), 5)
    x = Axis(x_ticks[0], x_ticks[-1], _LEFT - 18, width - _RIGHT)
    y = Axis(0, 1, height - _BOTTOM, _TOP)
    shares = (0, 0.25, 0.5, 0.75, 1)
    parts = [_frame(x, y, [(t, _brief(t)) for t in x_ticks], [(share, f"{share:.0%}") for share in shares])]
    for css, values in filled:
        parts.append(_bars(css, bins(values, x.low, x.high), x, y))
        for name, q, level in (("p50", 0.5, 0.9), ("p99", 0.99, 0.8)):  # apart, since the two may be close
            at = x.at(min(weighted_quantile(values, q), x.high))
            parts.append(f'<line class="mark {css}" x1="{at:.1f}" x2="{at:.1f}" y1="{y.end}" y2="{y.start}"/>')
            if len(filled) == 1:
                parts.append(_text(at + 4, y.at(level), name))
    return _svg(width, height, "".join(parts))


def _bars(css: str, counts: Sequence[int], x: Axis, y: Axis) -> str:
    width, step = (x.end - x.start) / len(counts), (x.high - x.low) / len(counts)
    tallest, total, seen = max(counts), sum(counts), 0
    corners = [(x.start, y.at(0))]
    parts = []
    for i, n in enumerate(counts):
        seen += n
        left, top = x.start + i * width, y.at(0.94 * n / tallest)
        corners.append((left + width, y.at(seen / total)))
        hint = (
            f"{duration(x.low + i * step)} to {duration(x.low + (i + 1) * step)}: {count(n)}, {seen / total:.1%} so far"
        )
        box = f'x="{left + 0.6:.1f}" y="{top:.1f}" width="{width - 1.2:.1f}" height="{y.start - top:.1f}" rx="1.5"'
        if n:
            parts.append(f'<rect class="bar {css}" {box}><title>{escape(hint)}</title></rect>')
    return "".join(parts) + f'<path class="line thin {css}" d="{_path(corners, steps=False)}"/>'


def _number(value: float) -> str:
    return count(value) if value == int(value) else f"{value:g}"


def _brief(seconds: float) -> str:
    """A tick's label: `2.5 ms`, not `2.50 ms`."""
    number, _, unit = duration(seconds).partition(" ")
    return f"{float(number):g} {unit}".rstrip()


_CSS: Final = """
:root { --back: #f6f7f9; --card: #fff; --ink: #16191f; --dim: #667085; --rule: #e4e7ec; --a: #2563eb; --b: #d9730d;
  --good: #067647; --bad: #c01048; --warn-back: #fffaeb; --warn: #93370d; }
@media (prefers-color-scheme: dark) { :root { --back: #0e1116; --card: #171b22; --ink: #e8ebf0; --dim: #98a2b3;
  --rule: #272d38; --a: #6ea0ff; --b: #f5a25b; --good: #47cd89; --bad: #fd6f8e; --warn-back: #2b2410; --warn: #fec84b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
header { margin-bottom: 28px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.02em; margin: 2px 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 19px; letter-spacing: -.01em; margin: 0; display: inline; }
.eyebrow { margin: 0; color: var(--dim); font-size: 13px; letter-spacing: .04em; }
.where, .when { margin: 0; color: var(--dim); }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, monospace; overflow-wrap: anywhere; }
.run { margin: 0 0 28px; }
.heading, summary { margin-bottom: 14px; }
summary { cursor: pointer; } details.run { margin: 0 0 6px; } details.run[open] { margin-bottom: 28px; }
.heading .good, .heading .bad, summary .good, summary .bad { margin-left: 10px; font-size: 14px; }
.good { color: var(--good); } .bad { color: var(--bad); }
.alert { background: var(--warn-back); color: var(--warn); border-radius: 10px; padding: 10px 16px; margin: 0 0 14px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(126px, 1fr)); gap: 14px; margin-bottom: 14px; }
.tile, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; }
.tile { padding: 14px 16px; display: flex; flex-direction: column; }
.tile .name { color: var(--dim); font-size: 13px; }
.tile .value { font-size: 24px; font-weight: 600; letter-spacing: -.02em; line-height: 1.3; white-space: nowrap; }
.value.a, .key.a { color: var(--a); } .value.b, .key.b { color: var(--b); }
.key { font-weight: 700; }
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; margin-bottom: 14px; }
.card { padding: 16px 18px; margin: 0; min-width: 0; }
.wide { grid-column: 1 / -1; }
figcaption { display: flex; justify-content: space-between; gap: 12px; font-weight: 600; margin-bottom: 8px; }
.legend { color: var(--dim); font-weight: 400; font-size: 13px; white-space: nowrap; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
.grid { stroke: var(--rule); stroke-width: 1; }
svg text { fill: var(--dim); font-size: 12px; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.thin { stroke-width: 1.6; } .dashed { stroke-dasharray: 5 5; } circle.dashed { stroke-dasharray: none; }
.line.a, .mark.a { stroke: var(--a); } .line.b, .mark.b { stroke: var(--b); }
.area { opacity: .13; } .bar { opacity: .38; } .bar:hover { opacity: .8; }
.area.a, .bar.a, .dot.a, .hover.a { fill: var(--a); } .area.b, .bar.b, .dot.b, .hover.b { fill: var(--b); }
.dot { stroke: var(--card); stroke-width: 2; } .hover { opacity: 0; } .hover:hover { opacity: 1; }
.mark { stroke-width: 1; stroke-dasharray: 2 3; opacity: .8; }
.tables { display: flex; flex-wrap: wrap; gap: 14px; margin-bottom: 14px; align-items: start; }
.tables > .card { flex: 1 1 250px; } .tables > .grow { flex: 4 1 650px; } .tables > .pair { flex: 1 1 100%; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 6px 0 6px 18px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
tbody tr:last-child > * { border-bottom: 0; }
th { font-weight: 400; color: var(--dim); } th:first-child { text-align: left; padding-left: 0; }
tbody th { color: var(--ink); }
td.text, th.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.failures { margin-bottom: 14px; } .failures tbody th { color: var(--bad); }
.dim, .notes { color: var(--dim); font-size: 13px; } .notes { margin: 0; }
.config { color: var(--dim); font-size: 14px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 20px; margin: 0; } dd { margin: 0; color: var(--ink);
  overflow-wrap: anywhere; }
@media (max-width: 760px) { .charts { grid-template-columns: 1fr; } }
@media print { details.run { break-inside: avoid; } }
"""
