"""An OpenAPI document of the endpoints, made from the tables that bodies are judged by.

Rules are closures: what `integer(1, 128)` was called with is read back from them. Rules that are written out by hand, as
functions of their own, have their schema here.
"""

import inspect
import json
import os
import subprocess
import sys
from typing import Any

from gateway.wire import fields, rules
from gateway.wire.openai import ENDPOINTS
from tests.served import ROOT

Schema = dict[str, Any]

POOLING = ("/v1/embeddings", "/v1/rerank", "/v1/score", "/v1/classify")
TEXT: Schema = {"type": "string"}
NULL: Schema = {"type": "null"}
PART: Schema = {
    "type": "object",
    "properties": {"type": {"enum": ["text"]}, "text": TEXT},
    "required": ["type", "text"],
}
CONTENT: Schema = {"anyOf": [TEXT, {"type": "array", "items": PART, "maxItems": 4}]}
MESSAGE: Schema = {
    "type": "object",
    "properties": {"role": {"enum": ["system", "user", "assistant"]}, "content": CONTENT},
    "required": ["role", "content"],
}
MESSAGES: Schema = {"type": "array", "items": MESSAGE, "minItems": 1, "maxItems": 4}
TOKENS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 1000}, "minItems": 1}
TEXTS: Schema = {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 4}
FUNCTION: Schema = {
    "type": "object",
    "properties": {"name": {"enum": ["f", "g-h"]}, "parameters": {"type": "object"}},
    "required": ["name"],
}
TOOL: Schema = {
    "type": "object",
    "properties": {"type": {"enum": ["function"]}, "function": FUNCTION},
    "required": ["type", "function"],
}
FORMAT: Schema = {
    "type": "object",
    "properties": {
        "type": {"enum": ["text", "json_object", "json_schema"]},
        "json_schema": {
            "type": "object",
            "properties": {"name": TEXT, "schema": {"type": "object"}},
            "required": ["schema"],
        },
    },
    "required": ["type", "json_schema"],
}

BY_HAND: dict[Any, Schema] = {
    rules.boolean: {"type": ["boolean", "null"]},
    fields._message: MESSAGE,
    fields._anthropic_message: MESSAGE,
    fields._messages: MESSAGES,
    fields._tool: TOOL,
    fields._tool_name: FUNCTION["properties"]["name"],
    fields._schema: {"type": "object"},
    fields._response_format: {"anyOf": [FORMAT, NULL]},
    fields._bounded_pattern: {"enum": ["[a-z]+", "a|b"]},
    fields._logit_bias: {
        "type": ["object", "null"],
        "propertyNames": {"pattern": "^[0-9]{1,5}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    fields._metadata: {
        "type": ["object", "null"],
        "additionalProperties": {"type": "string", "maxLength": 512},
        "maxProperties": 16,
    },
    fields._modalities: {"enum": [["text"], [], None]},
    fields._prompt: {"anyOf": [TEXT, TEXTS, TOKENS]},
    fields._input: {"anyOf": [{"type": "string", "minLength": 1}, TEXTS, TOKENS]},
    fields._content: {"anyOf": [TEXT, {"type": "object", "properties": {"content": {"type": "array", "items": PART}}}]},
    fields._responses_input: {"anyOf": [TEXT, MESSAGES]},
    fields._no_stored_response: NULL,
    fields._no_background: {"enum": [False, None]},
    fields._no_suffix: NULL,
    fields._stream_options: {"type": ["object", "null"], "properties": {"include_usage": {"type": "boolean"}}},
}


def schema(rule: Any) -> Schema:
    """What a rule lets pass. Raises KeyError for one that is not known here."""
    if rule in BY_HAND:
        return BY_HAND[rule]
    given = inspect.getclosurevars(rule).nonlocals
    nullable = ["null"] if given.get("null", True) else []
    match rule.__qualname__.partition(".")[0]:
        case "integer":
            return {"type": ["integer", *nullable], "minimum": given["low"], "maximum": given["high"]}
        case "decimal":
            low = {"minimum": given["low"]} if given["above"] is None else {"exclusiveMinimum": given["above"]}
            return {"type": ["number", "null"], **low, "maximum": given["high"]}
        case "string":
            return {"type": ["string", *nullable], "minLength": given["minimum"], "maxLength": given["maximum"]}
        case "one_of":
            return {"enum": [*given["allowed"], None]}
        case "array":
            items = {} if given["item"] is None else schema(given["item"])
            return {
                "type": ["array", *nullable],
                "items": items,
                "minItems": given["minimum"],
                "maxItems": given["maximum"],
            }
        case "integers":
            return schema(given["each"])
        case "mapping":
            properties = {name: schema(inner) for name, inner in given["fields"].items()}
            return {
                "type": ["object", *nullable],
                "properties": properties,
                "required": list(given.get("required", ())),
            }
        case "either":
            return {"anyOf": [*map(schema, given["by_type"].values()), NULL]}
        case "small_json":
            return {"type": "object"}
    raise KeyError(rule)


ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": TEXT,
                "type": TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
        }
    },
    "required": ["error"],
    "additionalProperties": False,
}
ANTHROPIC_ERROR: Schema = {
    "type": "object",
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "properties": {"type": TEXT, "message": TEXT},
            "required": ["type", "message"],
        },
    },
    "required": ["type", "error"],
}


def answers(error: Schema) -> Schema:
    fault = {"description": "an error", "content": {"application/json": {"schema": error}}}
    return {"200": {"description": "an answer"}, "default": fault}


def document() -> Schema:
    """In a process of its own: closures can be looked into only where the sources run as they are."""
    argv = [sys.executable, "-m", "tests.flow.openapi"]
    env = {**os.environ, "PENSTOCK_COMPILED": "0"}
    made: Schema = json.loads(subprocess.run(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, check=True).stdout)
    return made


def make_document() -> Schema:
    paths: dict[str, Schema] = {}
    for endpoint in ENDPOINTS:
        model = "vec" if endpoint.path in POOLING else "tiny"
        body = {
            "type": "object",
            "properties": {
                "model": {"enum": [model]},
                **{name: schema(rule) for name, rule in endpoint.rules.items() if rule is not rules.refused},
            },
            "required": ["model", *endpoint.required],
        }
        paths[endpoint.path] = {
            "post": {
                "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
                "responses": answers(ANTHROPIC_ERROR if endpoint.dialect == "anthropic" else ERROR),
            }
        }
    for path in ("/v1/models", "/health", "/health/live", "/health/ready"):
        paths[path] = {"get": {"responses": answers(ERROR)}}
    name = {"name": "name", "in": "path", "required": True, "schema": TEXT}
    paths["/v1/models/{name}"] = {"get": {"parameters": [name], "responses": answers(ERROR)}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Penstock", "version": "1"},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}],
    }


if __name__ == "__main__":
    print(json.dumps(make_document()))
