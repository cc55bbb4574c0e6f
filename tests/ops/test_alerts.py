"""configs/prometheus, judged by promtool: is it valid, does each alert fire when it must, and only then?"""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.ops.prometheus import ALERTS, CONFIG, program

RULES: Mapping[str, Mapping[str, Any]] = {
    rule["alert"]: rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
}
GATEWAY = 'instance="g:8080", job="penstock"'


def promtool(*arguments: object) -> str:
    argv = [program("promtool"), *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


class Case(NamedTuple):
    """Series in promtool's notation, a value a minute."""

    bad: Mapping[str, str]
    fires_at: str  # the first minute in which it must fire …
    not_at: str  # … and one before, in which it must not
    labels: Mapping[str, str]  # of the alert, besides its name and severity
    fine: Mapping[str, str]  # what looks like it and must not fire, up to `fires_at`


def histogram(name: str, labels: str, buckets: Mapping[str, str]) -> dict[str, str]:
    return {f'penstock_{name}_bucket{{{GATEWAY}, {labels}le="{le}"}}': values for le, values in buckets.items()}


def series(name: str, labels: str, values: str) -> dict[str, str]:
    return {f"penstock_{name}{{{GATEWAY}, {labels}}}": values}


MODEL = 'model="m"'
ENGINE = 'model="m", replica="m/0"'
OTHER_ENGINE = 'model="m", replica="m/1"'
OF_GATEWAY = {"instance": "g:8080"}
OF_SCRAPE = {"instance": "g:8080", "job": "penstock"}
OF_MODEL = {"model": "m"}
OF_ENGINE = {"instance": "g:8080", "job": "penstock", "model": "m", "replica": "m/0"}

CASES: Mapping[str, Case] = {
    "PenstockDown": Case({f"up{{{GATEWAY}}}": "1 1 0x10"}, "3m", "2m", OF_SCRAPE, {f"up{{{GATEWAY}}}": "1 0 1x10"}),
    "PenstockNoHealthyEngine": Case(
        series("engine_up", ENGINE, "1 1 0x10") | series("engine_up", OTHER_ENGINE, "0x12"),
        "3m",
        "2m",
        {"instance": "g:8080", "model": "m"},
        series("engine_up", ENGINE, "1 1 0x10") | series("engine_up", OTHER_ENGINE, "1x12"),
    ),
    "PenstockHighErrorRatio": Case(
        series("requests_total", MODEL + ', status="200"', "0+94x30")
        | series("requests_total", MODEL + ', status="502"', "0+3x30")
        | series("requests_total", MODEL + ', status="503"', "0+3x30"),
        "11m",
        "4m",
        OF_MODEL,
        series("requests_total", MODEL + ', status="200"', "0+96x30")
        | series("requests_total", MODEL + ', status="429"', "0+96x30")  # the client's fault
        | series("requests_total", MODEL + ', status="503"', "0+4x30"),
    ),
    "PenstockSlowFirstToken": Case(
        histogram("time_to_first_token_seconds", MODEL + ",", {"5": "0+90x30", "10": "0+100x30", "+Inf": "0+100x30"}),
        "16m",
        "8m",
        OF_MODEL,
        histogram("time_to_first_token_seconds", MODEL + ",", {"5": "0+96x30", "10": "0+100x30", "+Inf": "0+100x30"}),
    ),
    "PenstockEngineDown": Case(
        series("engine_up", ENGINE, "0x30") | series("engine_up", OTHER_ENGINE, "1x30"),
        "10m",
        "9m",
        OF_ENGINE,
        series("engine_up", ENGINE, "0x5 1 0x30"),
    ),
    "PenstockEngineCrashLooping": Case(
        series("engine_restarts_total", ENGINE, "0x5 1 2 3x30"),
        "9m",
        "6m",
        OF_ENGINE,
        series("engine_restarts_total", ENGINE, "0x5 1 1x30"),
    ),
    "PenstockFailoversRising": Case(
        series("failovers_total", MODEL + ', outcome="resumed"', "0+1x30"),
        "8m",
        "3m",
        OF_MODEL,
        series("failovers_total", MODEL + ', outcome="resumed"', "0x5 2x30"),
    ),
    "PenstockStreamsBroken": Case(
        series("failovers_total", MODEL + ', outcome="failed"', "0x5 1x30"),
        "7m",
        "4m",
        OF_MODEL,
        series("failovers_total", MODEL + ', outcome="resumed"', "0x5 1x30")
        | series("failovers_total", MODEL + ', outcome="failed"', "3x30"),
    ),
    "PenstockKvCacheFull": Case(
        series("engine_kv_cache_usage", ENGINE, "0.5 0.5 0.99x30"),
        "12m",
        "11m",
        OF_ENGINE,
        series("engine_kv_cache_usage", ENGINE, "0.99x5 0.9 0.99x7"),
    ),
    "PenstockEventLoopLag": Case(
        histogram("event_loop_lag_seconds", "", {"0.1": "0+237x30", "0.25": "0+240x30", "+Inf": "0+240x30"}),
        "11m",
        "4m",
        OF_GATEWAY,
        histogram("event_loop_lag_seconds", "", {"0.1": "0+239x30", "0.25": "0+240x30", "+Inf": "0+240x30"}),
    ),
    "PenstockReloadFailed": Case(
        series("config_reloads_total", 'outcome="failed"', "0x5 1x30"),
        "6m",
        "4m",
        {**OF_SCRAPE, "outcome": "failed"},
        series("config_reloads_total", 'outcome="applied"', "0+1x30")
        | series("config_reloads_total", 'outcome="failed"', "2x30"),
    ),
    "PenstockLimitRejectionsHigh": Case(
        series("limit_rejections_total", 'key="alice", limit="requests"', "0+100x40"),
        "21m",
        "14m",
        {"key": "alice", "limit": "requests"},
        series("limit_rejections_total", 'key="alice", limit="requests"', "0+30x40"),
    ),
    "PenstockBudgetUsedUp": Case(
        series("limit_rejections_total", 'key="alice", limit="budget"', "1x5 2x30"),
        "7m",
        "4m",
        {"key": "alice"},
        series("limit_rejections_total", 'key="alice", limit="requests"', "0+1x30"),
    ),
}


def test_promtool_finds_no_fault() -> None:
    promtool("check", "config", "--lint=all", "--lint-fatal", CONFIG)
    promtool("check", "rules", "--lint=all", "--lint-fatal", ALERTS)


def test_every_alert_is_tested_and_told_well() -> None:
    assert RULES.keys() == CASES.keys()
    for name, rule in RULES.items():
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}, name
        summary, description = rule["annotations"]["summary"], rule["annotations"]["description"]
        assert len(summary) < 80 < len(description), name
        used = set(re.findall(r"\$labels\.(\w+)", summary + description))
        assert used <= CASES[name].labels.keys(), f"{name}: these labels would be empty"


@pytest.mark.parametrize("name", CASES)
def test_alert(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    labels = {"alertname": name, "alertstate": "firing", **RULES[name]["labels"], **case.labels}
    firing = "ALERTS{" + ", ".join(f'{key}="{value}"' for key, value in labels.items()) + "}"
    expression = f'ALERTS{{alertname="{name}", alertstate="firing"}}'

    def test(given: Mapping[str, str], fires: Mapping[str, bool]) -> dict[str, Any]:
        return {
            "interval": "1m",
            "input_series": [{"series": series, "values": values} for series, values in given.items()],
            "promql_expr_test": [
                {"expr": expression, "eval_time": at, "exp_samples": [{"labels": firing, "value": 1}] if does else []}
                for at, does in fires.items()
            ],
        }

    tests = [test(case.bad, {case.not_at: False, case.fires_at: True}), test(case.fine, {case.fires_at: False})]
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": tests}))
    promtool("test", "rules", file)


def test_a_gateway_that_is_not_even_configured_is_down(tmp_path: Path) -> None:
    labels = {"job": "penstock", "severity": "critical"}
    summary = {"summary": "Penstock (no gateway at all) does not answer"}
    description = {"description": re.sub(r"\{\{.*?\}\}", "", RULES["PenstockDown"]["annotations"]["description"])}
    expected = {"exp_labels": labels, "exp_annotations": summary | description}
    test = {
        "interval": "1m",
        "input_series": [{"series": 'up{job="another"}', "values": "1x9"}],
        "alert_rule_test": [{"eval_time": "2m", "alertname": "PenstockDown", "exp_alerts": [expected]}],
    }
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": [test]}))
    promtool("test", "rules", file)
