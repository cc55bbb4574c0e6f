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
