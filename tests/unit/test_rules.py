"""The alphabet of field rules."""

from typing import Any

import pytest
from hypothesis import given, strategies as st

from gateway.errors import GatewayError
from gateway.wire.rules import (
    Rule,
    array,
    boolean,
    decimal,
    either,
    integer,
    integers,
    mapping,
    one_of,
    refused,
    shown,
    small_json,
    string,
)

WHOLE = integer(1, 10)
SAME = object()  # the rule has nothing against it

TABLE: list[tuple[str, Rule, Any, object]] = [
    ("integer", WHOLE, 1, SAME),
    ("integer", WHOLE, 10, SAME),
    ("integer", WHOLE, None, SAME),
    ("integer", WHOLE, 0, "integer_below_min_value"),
    ("integer", WHOLE, 11, "integer_above_max_value"),
    ("integer", WHOLE, 1.0, "invalid_type"),
    ("integer", WHOLE, 1e400, "invalid_type"),
    ("integer", WHOLE, 1e30, "integer_above_max_value"),  # how an integer of more than 64 bits comes
    ("integer", WHOLE, -1e30, "integer_below_min_value"),
    ("integer", WHOLE, True, "invalid_type"),
    ("integer", WHOLE, "1", "invalid_type"),
    ("integer", WHOLE, [1], "invalid_type"),
    ("integer", integer(1, 10, null=False), None, "invalid_type"),
    ("decimal", decimal(0, 2), 0, SAME),
    ("decimal", decimal(0, 2), 2.0, SAME),
    ("decimal", decimal(0, 2), None, SAME),
    ("decimal", decimal(0, 2), -0.1, "decimal_below_min_value"),
    ("decimal", decimal(0, 2), 2.1, "decimal_above_max_value"),
    ("decimal", decimal(0, 2), 10**30, "decimal_above_max_value"),
    ("decimal", decimal(0, 2), True, "invalid_type"),
    ("decimal", decimal(0, 2), "1", "invalid_type"),
    ("decimal", decimal(0, 2, above=0), 0, "decimal_below_min_value"),
    ("decimal", decimal(0, 2, above=0), 1e-9, SAME),
    ("boolean", boolean, True, SAME),
    ("boolean", boolean, None, SAME),
    ("boolean", boolean, 1, "invalid_type"),
    ("boolean", boolean, "true", "invalid_type"),
    ("string", string(3), "abc", SAME),
    ("string", string(3), "", SAME),
    ("string", string(3), None, SAME),
    ("string", string(3), "abcd", "string_above_max_length"),
    ("string", string(3), 5, "invalid_type"),
    ("string", string(3, minimum=1), "", "invalid_value"),
    ("string", string(3, null=False), None, "invalid_type"),
    ("one_of", one_of("a", "b"), "a", SAME),
    ("one_of", one_of("a", "b"), None, SAME),
    ("one_of", one_of("a", "b"), "c", "invalid_value"),
    ("one_of", one_of("a", "b"), 5, "invalid_type"),
    ("array", array(WHOLE, 2), [1, 2], SAME),
    ("array", array(WHOLE, 2), [], SAME),
    ("array", array(WHOLE, 2), None, SAME),
    ("array", array(None, 2), [object(), "x"], SAME),
    ("array", array(WHOLE, 2), [1, 2, 3], "array_above_max_length"),
    ("array", array(WHOLE, 2, minimum=1), [], "empty_array"),
    ("array", array(WHOLE, 2), {}, "invalid_type"),
    ("array", array(WHOLE, 2), "ab", "invalid_type"),
    ("array", array(WHOLE, 2, null=False), None, "invalid_type"),
    ("integers", integers(1, 10, 2), [1, 10], SAME),
    ("integers", integers(1, 10, 2), [], SAME),
    ("integers", integers(1, 10, 2), None, SAME),
    ("integers", integers(1, 10, 2), [1, 2, 3], "array_above_max_length"),
    ("integers", integers(1, 10, 2, minimum=1), [], "empty_array"),
    ("integers", integers(1, 10, 2), {}, "invalid_type"),
    ("integers", integers(1, 10, 2, null=False), None, "invalid_type"),
    ("mapping", mapping({"a": WHOLE}), {"a": 1, "b": object()}, SAME),
    ("mapping", mapping({"a": WHOLE}), None, SAME),
    ("mapping", mapping({}, null=False), None, "invalid_type"),
    ("mapping", mapping({}), [], "invalid_type"),
    ("either", either("x", str=string(3), list=array(None, 1)), "abc", SAME),
    ("either", either("x", str=string(3), list=array(None, 1)), None, SAME),
    ("either", either("x", str=string(3), list=array(None, 1)), "abcd", "string_above_max_length"),
    ("either", either("x", str=string(3), list=array(None, 1)), [1, 2], "array_above_max_length"),
    ("either", either("x", str=string(3)), 5, "invalid_type"),
    ("either", either("x", int=WHOLE), True, "invalid_type"),
    ("refused", refused, None, "unsupported_parameter"),
    ("refused", refused, 5, "unsupported_parameter"),
    ("small_json", small_json(3), {"a": [1, 2]}, SAME),
    ("small_json", small_json(3), {"a": [1, 2, 3]}, "array_above_max_length"),
    ("small_json", small_json(3), [[[[1]]]], "array_above_max_length"),
    ("small_json", small_json(3), "x" * 1000, SAME),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rule", "value", "verdict"), TABLE)
def test_rules(name: str, rule: Rule, value: Any, verdict: object) -> None:
    if verdict is SAME:
        rule(value, "field")
        return
    with pytest.raises(GatewayError) as refusal:
        rule(value, "field")
    error = refusal.value
    assert (error.status, error.code, error.param) == (400, verdict, "field")
    assert "'field'" in error.message


@pytest.mark.parametrize(
    ("rule", "value", "code", "param"),
    [
        (array(WHOLE, 5), [1, 2, "x"], "invalid_type", "f[2]"),
        (mapping({"a": WHOLE}), {"a": 0}, "integer_below_min_value", "f.a"),
        (mapping({}, required=("a",)), {}, "missing_required_parameter", "f.a"),
        (mapping({}, required=("a",)), {"a": None}, "missing_required_parameter", "f.a"),
        (array(mapping({"a": array(WHOLE, 2)}), 5), [{}, {"a": [1, 11]}], "integer_above_max_value", "f[1].a[1]"),
    ],
)
def test_the_place_is_named(rule: Rule, value: Any, code: str, param: str) -> None:
    with pytest.raises(GatewayError) as refusal:
        rule(value, "f")
    assert (refusal.value.code, refusal.value.param) == (code, param)


def outcome(rule: Rule, value: Any) -> object:
    try:
        rule(value, "f")
    except GatewayError as refusal:
        return refusal.code, refusal.param, refusal.message
    return SAME


NUMBERS = st.integers(-1, 12) | st.sampled_from([True, False, None, 1.0, 1e30, -1e30, 10**30, "1", [1]])


@given(st.lists(NUMBERS, max_size=4), st.booleans(), st.integers(0, 2))
def test_integers_is_an_array_of_integer(values: list[Any], null: bool, minimum: int) -> None:
    quick = integers(1, 10, 3, minimum=minimum, null=null)
    slow = array(integer(1, 10, null=False), 3, minimum=minimum, null=null)
    assert outcome(quick, values) == outcome(slow, values)


def test_messages_say_what_is_allowed_and_repeat_little() -> None:
    with pytest.raises(GatewayError) as refusal:
        one_of("auto", "none")("x" * 5000, "tool_choice")
    assert "'auto', 'none'" in refusal.value.message
    assert len(refusal.value.message) < 300
    with pytest.raises(GatewayError) as refusal:
        integer(1, 128)(10**400, "n")
    assert "<= 128" in refusal.value.message
    assert len(refusal.value.message) < 300
    assert shown("x" * 80) == "x" * 80
    assert shown("x" * 81) == "x" * 80 + "…"
    assert shown(5) == "5"
