"""Whatever the tables of fields allow, and much that they do not: no answer is a fault of the gateway's, and none is late."""

import asyncio
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from tests.flow.openapi import document
from tests.flow.talk import Served
from tests.served import KEY, Penstock, bearer

EXAMPLES = 20  # of each operation
PATIENCE = 10.0  # seconds that an answer may take
SHAPES = ({"message", "type", "param", "code"}, {"message", "type"})  # OpenAI's, Anthropic's


@pytest.mark.parametrize("mode", list(GenerationMode))
async def test_nothing_is_a_fault_of_the_gateways(served: Served, door: str, mode: GenerationMode) -> None:
    if door != "edge":
        pytest.skip("the same judge")
    # The engines refuse all that reaches them: what they would make of it is theirs.
    for engine in (served.engine, served.pooling):
        await engine.script([{"status": 400}] * 2000)
    passed = await asyncio.to_thread(fuzz, served.gateway, mode)
    assert (await served.gateway.get("/health/ready")).status == 200
    assert [line for line in served.gateway.log if line.get("level") in ("error", "critical")] == []
    if mode is GenerationMode.POSITIVE:
        assert passed > 50


def fuzz(gateway: Penstock, mode: GenerationMode) -> int:
    """Returns how many requests an engine has answered."""
    passed = 0
    for found in schemathesis.openapi.from_dict(document()).get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue  # nothing of it can be wrong

        @given(operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def judge(case: Any) -> None:
            nonlocal passed
            answer = case.call(base_url=gateway.url, headers=bearer(KEY), timeout=PATIENCE)
            assert answer.status_code < 500, (case.as_curl_command(), answer.text)
            if answer.status_code >= 400:
                error = answer.json()["error"]
                assert error.keys() in SHAPES, answer.text
                passed += error["message"] == "scripted"

        judge()
    return passed
