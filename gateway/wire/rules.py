"""The alphabet of the field tables in `wire.openai`: small checks that combine.

A rule takes a value and its path ("messages[0].content") and raises `GatewayError` when the value is not allowed.
Codes and wording follow OpenAI's, so that what SDKs and people know stays true.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from gateway.errors import GatewayError

type_name = {
    bool: "a boolean",
    int: "an integer",
    float: "a decimal",
    str: "a string",
    list: "an array",
    dict: "an object",
    type(None): "null",
}

Rule = Callable[[object, str], None]

SHOWN = 80  # characters of a client's own value that a message repeats at most


def shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def fail(code: str, path: str, message: str) -> NoReturn:
    raise GatewayError(400, code, message, param=path)


def wrong_type(value: object, path: str, expected: str) -> NoReturn:
    fail(
        "invalid_type",
        path,
        f"Invalid type for '{path}': expected {expected}, but got {type_name.get(type(value), 'something else')} instead.",
    )


def invalid(path: str, message: str) -> NoReturn:
    fail("invalid_value", path, f"Invalid value for '{path}': {message}")


def missing(path: str) -> NoReturn:
    fail("missing_required_parameter", path, f"Missing required parameter: '{path}'.")


def too_deep() -> NoReturn:
    """The writer of JSON goes less deep than its reader: what cannot be written must not be accepted."""
    raise GatewayError(400, "invalid_json", "The JSON body of your request is nested too deeply.")


def too_long(path: str, maximum: int, length: int) -> NoReturn:
    fail(
        "string_above_max_length",
        path,
        f"Invalid '{path}': string too long. Expected at most {maximum} characters, but got {length} instead.",
    )


def integer(low: int, high: int, *, null: bool = True) -> Rule:
    def rule(value: object, path: str) -> None:
        if value is None and null:
            return
        if isinstance(value, float) and abs(value) >= 2**63 and value.is_integer():
            value = int(value)  # how the parser hands over integers of more than 64 bits
        if not isinstance(value, int) or isinstance(value, bool):
            wrong_type(value, path, "an integer")
        if value < low:
            fail(
                "integer_below_min_value",
                path,
                f"Invalid '{path}': integer below minimum value. Expected a value >= {low}, but got {shown(value)} instead.",
            )
        if value > high:
            fail(
                "integer_above_max_value",
                path,
                f"Invalid '{path}': integer above maximum value. Expected a value <= {high}, but got {shown(value)} instead.",
            )

    return rule


def decimal(low: int, high: int, *, above: int | None = None) -> Rule:
    """A number in [low, high]; with `above`, it must also be greater than that (open lower end)."""

    def rule(value: object, path: str) -> None:
        if value is None:
            return
        if not isinstance(value, int | float) or isinstance(value, bool):
            wrong_type(value, path, "a decimal")
        if value < low or (above is not None and value <= above):
            bound = f"> {above}" if above is not None else f">= {low}"
            fail(
                "decimal_below_min_value",
                path,
                f"Invalid '{path}': decimal below minimum value. Expected a value {bound}, but got {value} instead.",
            )
        if value > high:
            fail(
                "decimal_above_max_value",
                path,
                f"Invalid '{path}': decimal above maximum value. Expected a value <= {high}, but got {value} instead.",
            )

    return rule


def boolean(value: object, path: str) -> None:
    if value is not None and not isinstance(value, bool):
        wrong_type(value, path, "a boolean")


def string(maximum: int, *, minimum: int = 0, null: bool = True) -> Rule:
    def rule(value: object, path: str) -> None:
        if value is None and null:
            return
        if not isinstance(value, str):
            wrong_type(value, path, "a string")
        if len(value) > maximum:
            too_long(path, maximum, len(value))
        if len(value) < minimum:
            invalid(path, "it must not be empty.")

    return rule


def one_of(*allowed: str) -> Rule:
    def rule(value: object, path: str) -> None:
        if value is None:
            return
        if not isinstance(value, str):
            wrong_type(value, path, "a string")
        if value not in allowed:
            invalid(path, f"expected one of {', '.join(repr(a) for a in allowed)}, but got '{shown(value)}' instead.")

    return rule


def array(item: Rule | None, maximum: int, *, minimum: int = 0, null: bool = True) -> Rule:
    def rule(value: object, path: str) -> None:
        if value is None and null:
            return
        if not isinstance(value, list):
            wrong_type(value, path, "an array")
        bounded(value, path, maximum, minimum)
        if item is not None:
            for i, one in enumerate(value):
                item(one, f"{path}[{i}]")

    return rule


def integers(low: int, high: int, maximum: int, *, minimum: int = 0, null: bool = True) -> Rule:
    """An array of integers: what `array(integer(low, high))` says, for the many that a prompt in ids has."""
    each = array(integer(low, high, null=False), maximum, minimum=minimum, null=null)

    def rule(value: object, path: str) -> None:
        if not isinstance(value, list) or not minimum <= len(value) <= maximum or not all_within(value, low, high):
            each(value, path)

    return rule


def all_within(values: list[Any], low: int, high: int) -> bool:
    """Whether all are integers from `low` to `high`. A large array holds up whoever waits: nothing is called for each."""
    return all(isinstance(one, int) and not isinstance(one, bool) and low <= one <= high for one in values)


def bounded(value: Sequence[object], path: str, maximum: int, minimum: int = 0) -> None:
    if len(value) < minimum:
        fail(
            "empty_array",
            path,
            f"Invalid '{path}': empty array. Expected an array with minimum length {minimum}, but got an empty array instead.",
        )
    if len(value) > maximum:
        fail(
            "array_above_max_length",
            path,
            f"Invalid '{path}': array too long. Expected an array with maximum length {maximum}, "
            f"but got an array with length {len(value)} instead.",
        )


def mapping(fields: Mapping[str, Rule], required: Sequence[str] = (), *, null: bool = True) -> Rule:
    """An object. Its known fields are judged, unknown ones pass through."""

    def rule(value: object, path: str) -> None:
        if value is None and null:
            return
        if not isinstance(value, dict):
            wrong_type(value, path, "an object")
        for name in required:
            if value.get(name) is None:
                missing(f"{path}.{name}")
        for name, one in value.items():
            known = fields.get(name)
            if known is not None:
                known(one, f"{path}.{name}")

    return rule


def either(expected: str, **by_type: Rule) -> Rule:
    """Different rules for different JSON types; names are those of Python's types (str, list, dict, bool)."""

    def rule(value: object, path: str) -> None:
        if value is None:
            return
        known = by_type.get(type(value).__name__)
        if known is None:
            wrong_type(value, path, expected)
        known(value, path)

    return rule


def refused(value: object, path: str) -> None:
    """A field that only the gateway may set, or one that is dangerous (facts: CVE-2025-62164, -62426, CVE-2024-6587 …)."""
    raise GatewayError(
        400,
        "unsupported_parameter",
        f"Unsupported parameter: '{path}' is not supported through this API.",
        param=path,
    )


def small_json(maximum: int) -> Rule:
    """Any JSON of at most `maximum` values in all (nested ones counted)."""

    def rule(value: object, path: str) -> None:
        todo, seen = [value], 0
        while todo:
            one = todo.pop()
            children: Sequence[object] = (
                list(one.values()) if isinstance(one, dict) else one if isinstance(one, list) else ()
            )
            seen += len(children)
            if seen > maximum:
                fail(
                    "array_above_max_length",
                    path,
                    f"Invalid '{path}': too large. Expected at most {maximum} values in all.",
                )
            todo.extend(children)

    return rule
