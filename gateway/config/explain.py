"""From pydantic's errors to plain words: what is wrong, and what is allowed.

What is allowed is read from the JSON schema, the one that `penstock schema` prints. What a field holds is repeated only
where a number, a switch or one of a few words is expected, and never if it came from the environment: it may be a secret.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, Final, TypeAlias

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from gateway.config.document import Place, Spot
from gateway.config.schema import Config, suggest

_Schema: TypeAlias = Mapping[str, Any]

_SHOWN: Final = 40  # characters of a wrong value


def explain(error: ValidationError, spots: Mapping[Place, Spot]) -> list[tuple[Place, str]]:
    """The place and the message of each fault; the same one may come more than once."""
    details = [(_place(detail, spots), detail) for detail in error.errors()]
    around = {place[:end] for place, _ in details for end in range(len(place))}
    return [
        (place, _message(detail, place, spots.get(place)))
        for place, detail in details
        # A union complains once for each of its members: what is meant is the fault inside the one that fits.
        if place not in around or _in_our_words(detail)
    ]


def _place(detail: ErrorDetails, spots: Mapping[Place, Spot]) -> Place:
    """Where the fault stands in the file. Pydantic adds parts of its own: "[key]", and the members of a union."""
    if detail["type"] == "missing" or "url" not in detail:
        return detail["loc"]
    place: Place = ()
    for part in detail["loc"]:
        if (*place, part) in spots:
            place = (*place, part)
    return place


def _in_our_words(detail: ErrorDetails) -> bool:
    return detail["type"] == "value_error" or "url" not in detail


def _message(detail: ErrorDetails, place: Place, spot: Spot | None) -> str:
    kind = detail["type"]
    if kind == "missing":
        return "is required, and missing"
    if kind == "extra_forbidden":
        return f"unknown field; {suggest(str(place[-1]), _fields(_schema_at(place[:-1])))}"
    if _in_our_words(detail):
        words = str(detail["ctx"]["error"]) if kind == "value_error" else detail["msg"]
        return f"{words} (it comes from ${{{spot.variable}}})" if spot and spot.variable else words
    expected = _schema_at(place)
    return f"must be {_allowed(expected)}, not {_found(detail['input'], spot, expected)}"


@cache
def _root() -> _Schema:
    return Config.model_json_schema()


def _variants(schema: _Schema) -> list[_Schema]:
    """What a value may be, null aside, with references followed."""
    if "$ref" in schema:
        schema = _root()["$defs"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        return [variant for member in schema["anyOf"] for variant in _variants(member) if variant.get("type") != "null"]
    return [schema]


def _schema_at(place: Place) -> _Schema:
    """The schema of a place; an empty one, which allows everything, where the schema says nothing."""
    schema = _root()
    for part in place:
        schema = next((child for variant in _variants(schema) if (child := _below(variant, part)) is not None), {})
    return schema


def _below(schema: _Schema, part: str | int) -> _Schema | None:
    if isinstance(part, int):
        child = schema.get("items")
    else:
        child = schema.get("properties", {}).get(part, schema.get("additionalProperties"))
    return child if isinstance(child, dict) else None


def _fields(schema: _Schema) -> list[str]:
    return [name for variant in _variants(schema) for name in variant.get("properties", {})]


def _allowed(schema: _Schema) -> str:
    *most, last = dict.fromkeys(map(_words, _variants(schema)))
    return f"{', '.join(most)} or {last}" if most else last


def _words(schema: _Schema) -> str:
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    match schema.get("type"):
        case "integer":
            return "a whole number" + _range(schema)
        case "number":
            return "a number" + _range(schema)
        case "boolean":
            return "true or false"
        case "array":
            return "a list" + (" of at least 1 entry" if schema.get("minItems") else "")
        case "object":
            return "a mapping (lines of 'name: value')" + (
                " of at least 1 entry" if schema.get("minProperties") else ""
            )
        case _:
            return "text"


def _range(schema: _Schema) -> str:
    low, above, high = (schema.get(bound) for bound in ("minimum", "exclusiveMinimum", "maximum"))
    if low is not None and high is not None:
        return f" from {low} to {high}"
    if above is not None:
        return f" above {above}" + (f" and at most {high}" if high is not None else "")
    return f" of at least {low}" if low is not None else ""


def _found(value: object, spot: Spot | None, expected: _Schema) -> str:
    if spot and spot.variable:
        return f"the text that ${{{spot.variable}}} gives"
    default = "; leave it out for its default" if "default" in expected else ""
    match value:
        case None | "":
            return "empty" + default
        case dict():
            return "a mapping" if value else "an empty one"
        case list():
            return "a list" if value else "an empty one"
    harmless = all("enum" in v or v.get("type") in {"integer", "number", "boolean"} for v in _variants(expected))
    if harmless and spot and spot.text is not None:
        shown = spot.text if len(spot.text) <= _SHOWN else spot.text[:_SHOWN] + "…"
        return f"'{shown}'" if isinstance(value, str) else shown
    if isinstance(value, str):
        return "text"
    kind = "true or false" if isinstance(value, bool) else "a number"
    return kind + ("; put it in quotes" if _allowed(expected) == "text" else "")
