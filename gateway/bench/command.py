"""The options of `penstock bench`, and what they add up to. Rooms are imported when the command runs."""
# ruff: noqa: PLC0415 - `penstock --help` shall be quick

import sys
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from gateway.bench.load import Plan
    from gateway.bench.prompts import Dataset, Lengths, Synthetic
    from gateway.bench.results import Report, Slo


class Arrivals(StrEnum):
    POISSON = "poisson"
    CONSTANT = "constant"


class Endpoint(StrEnum):
    CHAT = "chat"
    COMPLETIONS = "completions"


_LOAD = "Load"
_PROMPTS = "Prompts"
_REQUEST = "Request"
_COMPARE = "Comparison"
_OUTPUT = "Output"


def bench(
    *,
    url: Annotated[str, typer.Option(envvar="OPENAI_BASE_URL", metavar="URL", help="The server, with or without /v1.")],
    model: Annotated[str, typer.Option(metavar="NAME", help="The model, as the server calls it.")],
    key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True, metavar="KEY", help="API key.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            metavar="R", min=1e-6, max=1e6, rich_help_panel=_LOAD, help="Open loop: requests per second, come what may."
        ),
    ] = None,
    arrivals: Annotated[
        Arrivals, typer.Option(rich_help_panel=_LOAD, help="How the requests of an open loop are spaced.")
    ] = Arrivals.POISSON,
    concurrency: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, rich_help_panel=_LOAD, show_default="8", help="Closed loop: requests at a time."
        ),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(metavar="S", min=0.1, rich_help_panel=_LOAD, show_default="30", help="Seconds to send for."),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(metavar="N", min=1, rich_help_panel=_LOAD, help="Or: how many requests to send.")
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(metavar="…", rich_help_panel=_LOAD, help="One run each: rate=1,2,4 or concurrency=1,2,4,8."),
    ] = None,
    warmup: Annotated[
        int, typer.Option(metavar="N", min=0, rich_help_panel=_LOAD, help="Requests sent before, in no result.")
    ] = 0,
    prompt_tokens: Annotated[
        str,
        typer.Option(
            metavar="LENGTH",
            rich_help_panel=_PROMPTS,
            help="Random words: 128, 64..256 or mean=512,std=64[,min=…,max=…].",
        ),
    ] = "128",
    output_tokens: Annotated[
        str, typer.Option(metavar="LENGTH", rich_help_panel=_PROMPTS, help="max_tokens of each request, likewise.")
    ] = "128",
    dataset: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            rich_help_panel=_PROMPTS,
            help='JSON lines of {"prompt"} or {"messages"} (and "max_tokens"), or a ShareGPT-shaped JSON list.',
        ),
    ] = None,
    prefix_tokens: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, rich_help_panel=_PROMPTS, help="Further tokens that prompts begin with alike."
        ),
    ] = 0,
    prefixes: Annotated[
        int, typer.Option(metavar="K", min=1, rich_help_panel=_PROMPTS, help="How many different such beginnings.")
    ] = 1,
    turns: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, rich_help_panel=_PROMPTS, help="Turns of a conversation; answers are fed back."
        ),
    ] = 1,
    seed: Annotated[int, typer.Option(metavar="N", rich_help_panel=_PROMPTS, help="Of prompts and arrivals.")] = 0,
    endpoint: Annotated[Endpoint, typer.Option(rich_help_panel=_REQUEST, help="Which API to call.")] = Endpoint.CHAT,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", rich_help_panel=_REQUEST, help="Ask vLLM for max_tokens tokens, no fewer.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", min=0, rich_help_panel=_REQUEST, show_default=False)
    ] = None,
    extra: Annotated[
        str | None,
        typer.Option(metavar="JSON", rich_help_panel=_REQUEST, help="Fields laid over each body; null takes one away."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="S", min=0.1, rich_help_panel=_REQUEST, help="Seconds for one whole answer.")
    ] = 600,
    insecure: Annotated[
        bool, typer.Option("--insecure", rich_help_panel=_REQUEST, help="Do not check TLS certificates.")
    ] = False,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            rich_help_panel=_COMPARE,
            help="A second server: the same requests, interleaved, each at full load.",
        ),
    ] = None,
    compare_key: Annotated[
        str | None, typer.Option(metavar="KEY", rich_help_panel=_COMPARE, show_default="--key", help="Its key.")
    ] = None,
    compare_model: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel=_COMPARE, show_default="--model", help="Its model."),
    ] = None,
    slo: Annotated[
        str | None,
        typer.Option(
            metavar="…",
            rich_help_panel=_OUTPUT,
            help="Goodput counts requests within ttft=200ms,itl=50ms,tpot=…,e2e=…,stall=… (itl: the mean, stall: the longest gap).",
        ),
    ] = None,
    json: Annotated[
        str | None, typer.Option(metavar="FILE", rich_help_panel=_OUTPUT, help="All results as JSON; - is stdout.")
    ] = None,
    json_requests: Annotated[
        bool, typer.Option("--json-requests", rich_help_panel=_OUTPUT, help="With every request and chunk time in it.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, rich_help_panel=_OUTPUT, help="A report with plots, in one file."),
    ] = None,
    no_progress: Annotated[
        bool, typer.Option("--no-progress", rich_help_panel=_OUTPUT, help="Show nothing until the end.")
    ] = False,
) -> None:
    """Measure a server under load: tokens per second, and how long requests and tokens take.

    Works with any server that streams as OpenAI's API does. Tokens are the engine's own count.
    Exit code 0, or 1 if any request failed: the table says how many and why.
    """
    import uvloop
    from rich.console import Console

    from gateway.bench import load, report
    from gateway.bench.client import Target
    from gateway.bench.results import Report

    config = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in locals().copy().items()
        if name in bench.__annotations__ and name not in ("return", "key", "compare_key", "json", "html", "no_progress")
    }
    path = "chat/completions" if endpoint is Endpoint.CHAT else "completions"
    chat = endpoint is Endpoint.CHAT
    extra_fields = _json_object(extra)
    targets = [(url, key, model, "--url"), (compare, compare_key or key, compare_model or model, "--compare")]
    spec = load.Spec(
        targets=[
            (
                _checked(option, Target.parse, base, path, secret, insecure=insecure),
                load.Body(name, chat, ignore_eos, temperature, extra_fields),
            )
            for base, secret, name, option in targets
            if base is not None
        ],
        source=_source(
            prompt_tokens, output_tokens, dataset,
            seed=seed, turns=turns, prefix_tokens=prefix_tokens, prefixes=prefixes,
        ),
        plans=_plans(rate=rate, poisson=arrivals is Arrivals.POISSON, concurrency=concurrency, duration=duration, requests=requests, sweep=sweep),
        warmup=warmup,
        timeout=timeout,
        slo=_slo(slo),
        keep_times=json_requests,
    )  # fmt: skip
    console = Console(stderr=json == "-", highlight=False)
    load.lift_file_limit()
    created = datetime.now(UTC).isoformat(timespec="seconds")
    with _watcher(console, len(spec.plans), shown=not no_progress) as watcher:
        runs = uvloop.run(load.bench(spec, watcher))
    result = Report(created, config, tuple(runs), spec.slo)
    report.render(result, console)
    _write(result, json, html, requests=json_requests, console=console)
    raise typer.Exit(int(result.failed))


def _watcher(console: "Console", runs: int, *, shown: bool) -> Any:
    from contextlib import nullcontext

    from gateway.bench import report

    return report.Live(console, runs) if shown and console.is_terminal else nullcontext(report.Silent())


def _write(result: "Report", json: str | None, html: Path | None, *, requests: bool, console: "Console") -> None:
    from gateway.bench import report
    from gateway.bench.html import as_html

    data = report.as_json(result, requests=requests)
    try:
        if json == "-":
            sys.stdout.buffer.write(data)
        elif json is not None:
            Path(json).write_bytes(data)
        if html is not None:
            html.write_text(as_html(result), encoding="utf-8")
            console.print(f"\n   report: {html}", style="dim", markup=False, soft_wrap=True)
    except OSError as error:
        console.print(
            f"\n   cannot write {error.filename}: {error.strerror}", style="red", markup=False, soft_wrap=True
        )
        raise typer.Exit(1) from None


def _checked(option: str, parse: Any, *args: Any, **kwargs: Any) -> Any:
    """What `parse` makes of the option's value; its `ValueError` becomes a usage error."""
    try:
        return parse(*args, **kwargs)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _json_object(text: str | None) -> dict[str, Any] | None:
    import orjson

    if text is None:
        return None
    value = _checked("--extra", orjson.loads, text)
    if not isinstance(value, dict):
        raise typer.BadParameter("expected a JSON object", param_hint="--extra")
    return value


def _slo(text: str | None) -> "Slo | None":
    from gateway.bench.results import parse_slo

    result: Slo | None = None if text is None else _checked("--slo", parse_slo, text)
    return result


def _lengths(option: str, text: str) -> "Lengths":
    from gateway.bench.prompts import Lengths

    result: Lengths = _checked(option, Lengths.parse, text)
    return result


def _source(
    prompt: str, output: str, dataset: Path | None, *, seed: int, turns: int, prefix_tokens: int, prefixes: int
) -> "Synthetic | Dataset":
    from gateway.bench.prompts import Dataset, Synthetic, parse_dataset

    answer = _lengths("--output-tokens", output)
    if dataset is None:
        return Synthetic(_lengths("--prompt-tokens", prompt), answer, seed, turns, prefix_tokens, prefixes)
    items = _checked("--dataset", parse_dataset, dataset.read_bytes())
    return Dataset(items, answer, seed, turns, prefix_tokens, prefixes)


def _plans(
    *,
    rate: float | None,
    poisson: bool,
    concurrency: int | None,
    duration: float | None,
    requests: int | None,
    sweep: str | None,
) -> "list[Plan]":
    from gateway.bench.load import Plan, parse_sweep

    if (rate is not None) + (concurrency is not None) + (sweep is not None) > 1:
        raise typer.BadParameter("give one of them only", param_hint="--rate, --concurrency, --sweep")
    if duration is not None and requests is not None:
        raise typer.BadParameter("give one of them only", param_hint="--duration, --requests")
    base = Plan(poisson=poisson, duration=None if requests else duration or 30.0, requests=requests)
    if sweep is not None:
        return [base._replace(**load) for load in _checked("--sweep", parse_sweep, sweep)]
    return [base._replace(rate=rate) if rate else base._replace(concurrency=concurrency or 8)]
