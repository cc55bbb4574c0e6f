"""What is shown of a load test: complete for machines, readable in 80 columns, and one safe HTML file."""

import io
import re
from html.parser import HTMLParser
from typing import Any

import orjson
import pytest
from rich.console import Console

from gateway.bench import report as shown
from gateway.bench.html import as_html, bins, line_chart, running_over, ticks, weighted_quantile
from gateway.bench.results import (
    CHECK,
    Cause,
    Health,
    Histogram,
    Record,
    Report,
    Run,
    Sample,
    Slo,
    Spread,
    TargetResult,
    summarise,
)

EVIL = "</title><script>alert(1)</script>&\"'[bold]"
CALM = Spread(100, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001)


def target(
    name: str = "http://a", *, failed: Cause | None = None, answers: int = 30, counted: bool = True
) -> TargetResult:
    gaps = Histogram()
    records = []
    for i in range(answers):
        first, last = i + 0.1 + i / 500, i + 1.1 + i / 100
        gaps.add([first + n * (last - first) / 9 for n in range(10)])
        records.append(Record(i, 0, i - 0.01, i, first, last, 10, 0.2, 20, 12, counted, None, ""))
    if failed:
        records.append(Record(answers, 0, 1, 1, 0, 0, 0, 0, 0, 0, False, failed, EVIL))
    samples = tuple(Sample(t / 2, t * 5, 3, t // 2, 0) for t in range(2 * answers))
    return TargetResult(name, summarise(records, gaps, samples, Slo(ttft=0.13)), tuple(records), gaps, samples)


def run(
    *targets: TargetResult, rate: float | None = 4, health: Health | None = None, stopped: str | None = None
) -> Run:
    load: dict[str, float | str | None] = {"rate": rate, "concurrency": None if rate else 8}
    return Run(f"rate {rate:g}/s" if rate else "concurrency 8", load, targets, health or Health(0.1, CALM), stopped)


def report(*runs: Run) -> Report:
    return Report("2026-01-02T03:04:05+00:00", {"model": EVIL, "rate": 4, "extra": EVIL}, runs, Slo(ttft=0.13))


REPORTS = {
    "one": report(run(target())),
    "closed": report(run(target(counted=False), rate=None)),
    "two": report(run(target(), target("http://b", failed=Cause.CUT))),
    "sweep": report(run(target(), rate=1), run(target(), rate=2, health=Health(0.99, CALM))),
    "sweep of two": report(run(target(), target("http://b")), run(target(), target("http://b", answers=0), rate=9)),
    "failed": report(run(target(failed=Cause.REFUSED, answers=0), stopped="every request so far failed", health=Health(1, CALM._replace(size=0)))),
    "nothing": report(),
    "one answer": report(run(target(answers=1))),
}  # fmt: skip


def text(of: Report, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    shown.render(of, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_tables_fit_and_say_the_same_at_any_width(name: str, width: int) -> None:
    said = text(REPORTS[name], width)
    assert all(len(line) <= width for line in said.splitlines())
    assert "…" not in said
    assert said.split() == text(REPORTS[name], 1000).split()


def test_the_table_of_one_run() -> None:
    said = text(REPORTS["one"])
    for part in (
        "rate 4/s",
        "30 ok",
        "0 failed",
        "output tokens/s",
        "time to first token",
        "p99",
        "within the SLO",
        "Load generator: 10%",
    ):
        assert part in said
    assert "it was sent 10.0 ms (p50)" in said
    assert "without usage" in text(REPORTS["closed"])


def test_failures_come_with_what_the_server_said_and_what_to_check() -> None:
    said = text(REPORTS["failed"])
    assert "connection refused" in said
    assert "[bold]" in said  # not taken for markup
    assert "stopped: every request so far failed" in said
    assert "Is the server running" in said
    assert "output tokens/s" not in said
    assert set(CHECK) == set(Cause) - {Cause.ABANDONED}


def test_a_comparison_has_ratios_and_a_sweep_a_line_for_each_run() -> None:
    assert "1.00×" in text(REPORTS["two"])
    said = text(REPORTS["sweep"])
    assert "the load generator itself was the bottleneck" in said
    assert "rate 2/s *" in said


class Going:
    """As much of a lane as progress is shown of."""

    def __init__(self, share: float, *samples: Sample) -> None:
        self.share = share
        self.samples = samples


def test_progress_shows_the_current_speed() -> None:
    console = Console(file=io.StringIO(), width=100, highlight=False, force_terminal=True, color_system=None)
    lanes: Any = [Going(0.25, Sample(1, 100, 3, 5, 0)), Going(0.5, Sample(1, 100, 4, 6, 2))]
    with shown.Live(console, runs=2) as live:
        live.begin("warm-up")
        live.look(lanes)
        live.begin("rate 4/s")
        live.look(lanes)
        live.look([Going(1, Sample(3, 1000, 3, 5, 0))])  # type: ignore[list-item]
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    for part in ("warm-up", "rate 4/s (1 of 2)", "200 tok/s", "400 tok/s", "7 running", "11 ok", "2 failed"):
        assert part in said


def test_json_is_complete_and_holds_requests_on_demand() -> None:
    whole = orjson.loads(shown.as_json(REPORTS["two"]))
    assert whole["schema"] == shown.SCHEMA
    assert whole["ok"] is False
    (one,) = whole["runs"]
    assert one["generator"]["bottleneck"] is None
    first, second = one["targets"]
    assert first["url"] == "http://a"
    assert first["summary"]["ok"] == 30
    assert first["summary"]["ttft"].keys() == {"size", "mean", "p50", "p90", "p95", "p99", "max"}
    assert second["summary"]["failures"] == [{"cause": "stream cut off", "requests": 1, "detail": EVIL}]
    assert "requests" not in first
    detailed = orjson.loads(shown.as_json(REPORTS["two"], requests=True))["runs"][0]["targets"][1]["requests"]
    assert detailed[0]["ttft"] == pytest.approx(0.11)
    assert detailed[-1]["ttft"] is None


@pytest.mark.parametrize(
    ("name", "failed"), [("one", False), ("two", True), ("failed", True), ("nothing", True), ("sweep", False)]
)
def test_a_report_has_failed_when_any_request_has(name: str, failed: bool) -> None:
    assert REPORTS[name].failed is failed


class Outline(HTMLParser):
    """Checks that elements are closed as they were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.values: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.values += [value or "" for _, value in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.values += [value or "" for _, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def outline(page: str) -> Outline:
    parser: Any = Outline()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", REPORTS)
def test_html_is_well_formed_escaped_and_needs_no_network(name: str) -> None:
    page = as_html(REPORTS[name])
    found = outline(page)
    assert not {"script", "link", "img", "iframe"} & set(found.seen)
    assert not re.search(r"url\(|@import|\ssrc=|\shref=|\son\w+=", page)
    assert "alert(1)" in page  # shown, as text
    assert not any("nan" in value or "inf" in value for value in found.values)
    assert "prefers-color-scheme: dark" in page


def test_what_runs_is_shown_for_the_time_in_which_it_ran() -> None:
    samples = [Sample(0, 0, 0, 0, 0), Sample(0.5, 9, 4, 0, 0), Sample(0.8, 9, 2, 4, 0)]
    assert running_over(samples) == [(0, 4), (0.5, 2), (0.8, 2)]
    assert running_over([]) == []


def test_html_plots_what_was_measured() -> None:
    assert outline(as_html(REPORTS["one"])).seen.count("svg") == 4
    assert outline(as_html(REPORTS["sweep"])).seen.count("svg") == 2 + 2 * 4
    assert "the load generator itself was the bottleneck" in as_html(REPORTS["sweep"])
    assert "Stopped before its time" in as_html(REPORTS["failed"])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.95, 1.06, [0.95, 0.975, 1.0, 1.025, 1.05, 1.075])],
)  # fmt: skip
def test_ticks_are_round_and_span_the_values(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_bins_and_quantiles_by_weight() -> None:
    values = [(0.5, 3), (1.5, 1), (99.0, 1)]
    assert bins(values, 0, 4, 4) == [3, 1, 0, 1]
    assert weighted_quantile(values, 0.5) == 0.5
    assert weighted_quantile(values, 0.8) == 1.5
    assert weighted_quantile(values, 1.0) == 99.0
    assert "too short to plot" in line_chart([], str, str)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0"),
        (0.0000123, "12 µs"),
        (0.00123, "1.23 ms"),
        (0.0123, "12.3 ms"),
        (0.123, "123 ms"),
        (1.234, "1.23 s"),
        (123.4, "123 s"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert shown.duration(seconds) == said
