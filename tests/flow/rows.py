"""The rows of data/bad_inputs.json.

In them {"times": [n, x]} is x n times over, {"concat": [...]} texts put together (with "json": true a piece of JSON as it
stands), {"$keys": n} stands for n fields, {"$long": n} for one with a name so long. KEY is a good key.
"""

import json
from pathlib import Path
from typing import Any

ROWS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "data/bad_inputs.json").read_text())
LITERAL = "literal:"


def expand(value: Any) -> Any:
    match value:
        case {"times": [count, one]}:
            return expand(one) * count
        case {"concat": parts, "json": True}:
            return LITERAL + "".join(map(expand, parts)) + LITERAL
        case {"concat": parts}:
            return "".join(map(expand, parts))
        case dict():
            made: dict[str, Any] = {}
            for name, inner in value.items():
                if name == "$keys":
                    made |= {str(i): 1 for i in range(inner)}
                elif name == "$long":
                    made["k" * inner] = 1
                else:
                    made[name] = expand(inner)
            return made
        case list():
            return [expand(one) for one in value]
        case _:
            return value


def encode(body: dict[str, Any]) -> bytes:
    return json.dumps(body).replace(f'"{LITERAL}', "").replace(f'{LITERAL}"', "").encode()


# ---- the facts that the rows come from: data/bad-inputs.jsonl

FACTS: list[dict[str, Any]] = [
    json.loads(line) for line in (Path(__file__).parent / "data/bad-inputs.jsonl").read_text().splitlines()
]

_ERRORS = "tests/flow/test_errors.py::"
_BAD = "tests/flow/test_bad_inputs.py::"

# Rows of the facts that take more than one request to play, or that some other test plays: by whom.
ELSEWHERE: dict[int, tuple[str, ...]] = {
    11: (_ERRORS + "TestGuard::test_headers_too_large", _BAD + "test_a_header_of_16_mb_costs_no_memory"),
    12: (_ERRORS + "TestGuard::test_url_too_long",),
    13: (_BAD + "test_bytes_that_are_no_http",),
    14: (_ERRORS + "TestGuard::test_expectation_failed", "tests/flow/test_streams.py::test_expect_continue"),
    15: ("tests/flow/test_slow_clients.py::test_500_slow_clients", _ERRORS + "TestGuard::test_too_slow"),
    16: ("tests/flow/test_slow_clients.py::test_500_slow_clients", _ERRORS + "TestGuard::test_too_slow"),
    17: (_ERRORS + "test_every_bad_key_gets_the_same_answer",),
    18: (_ERRORS + "test_every_bad_key_gets_the_same_answer", _ERRORS + "test_good_keys"),
    19: (_ERRORS + "test_every_bad_key_gets_the_same_answer",),
    20: (_ERRORS + "test_credentials_that_differ",),
    21: (_ERRORS + "test_unknown_and_forbidden_models_get_the_same_answer",),
    24: (_BAD + "test_what_a_client_calls_itself_is_not_believed",),
    26: (_BAD + "test_cors_is_off", _ERRORS + "test_wrong_method"),
    27: (_ERRORS + "test_what_is_no_json_object",),
    28: (_ERRORS + "test_what_is_no_json_object",),
    29: (_ERRORS + "test_what_is_no_json_object",),
    31: (_ERRORS + "test_wrong_media",),
    32: (_ERRORS + "test_body_over_the_cap",),
    35: (_ERRORS + "test_unknown_and_forbidden_models_get_the_same_answer",),
    36: (_BAD + "test_odd_model_names_make_no_series_and_no_lines",),
    37: (_ERRORS + "test_fields_are_judged",),
    41: (_BAD + "test_prompts_of_a_size_that_no_model_takes", _ERRORS + "test_body_over_the_cap"),
    42: (_ERRORS + "test_prompt_too_long",),
    67: (_ERRORS + "test_messages_too_large_speak_anthropic",),
    69: ("tests/flow/test_disconnects.py::test_1000_leave_at_any_moment",),
    70: (
        "tests/flow/test_slow_clients.py::test_a_reader_that_takes_nothing_is_cut_off",
        "tests/flow/test_slow_clients.py::test_what_waits_for_a_reader_is_bounded",
    ),
    71: (_ERRORS + "test_engine_fails_before_the_first_byte",),
    72: (_ERRORS + "test_over_a_limit",),
    73: (
        _ERRORS + "test_no_healthy_engine",
        _ERRORS + "test_draining",
        _ERRORS + "test_engine_too_slow",
        "tests/flow/test_failover.py::test_more_open_requests_than_allowed_are_refused_at_once",
    ),
}

# Rows about what is not there yet: why there is nothing to test.
NOT_YET: dict[int, str] = {
    74: "limits live in the gateway's own memory: there is no limiter store that could be down",
}
