"""Whatever the admin API's own description allows, and much that it does not: no answer is a fault of the gateway's."""

import asyncio
import contextlib
import itertools
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from tests.flow.admin import ADMIN, ask
from tests.served import Penstock, bearer

EXAMPLES = 30  # of each operation


@pytest.mark.parametrize("mode", list(GenerationMode))
async def test_the_description_is_true_and_nothing_is_a_fault(admin: Penstock, door: str, mode: GenerationMode) -> None:
    if door != "edge":
        pytest.skip("the application is the same")
    document = (await ask(admin, "/openapi.json")).json
    there = {
        "key_id": (await ask(admin, "/keys", "POST", {"name": f"fuzzed-{mode.value}"})).json["id"],
        "team_id": (await ask(admin, "/teams", "POST", {"name": f"fuzzed-{mode.value}"})).json["id"],
        "engine_id": "tiny/0",
    }
    await asyncio.to_thread(fuzz, admin, document, mode, there)
    assert (await ask(admin, "/session")).status == 200
    assert not [line for line in admin.log if line.get("level") in ("error", "critical")]


def fuzz(gateway: Penstock, document: Any, mode: GenerationMode, there: dict[str, str]) -> None:
    """`there`: ids that something stands behind, by the name of the parameter; every other request takes them."""
    turns = itertools.count()
    schema = schemathesis.openapi.from_dict(document)
    for found in schema.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        if operation.path == "/events":
            continue  # an endless one

        @given(operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        def judge(case: Any) -> None:
            if next(turns) % 2:
                case.path_parameters = {name: there.get(name, value) for name, value in case.path_parameters.items()}
            answer = case.call(base_url=f"{gateway.url}/admin/api", headers=bearer(ADMIN))
            assert answer.status_code < 500, (case.as_curl_command(), answer.text)
            case.validate_response(answer, checks=[content_type_conformance, response_schema_conformance])

        with contextlib.suppress(Unsatisfiable):  # what takes nothing takes nothing wrong
            judge()
