"""Tests by name, `tests/flow/test_errors.py::test_curl`: pages and tables that say which test proves a thing are held to it."""

import ast
from functools import cache

from tests.served import ROOT


@cache
def tests_in(path: str) -> frozenset[str]:
    """The tests of a file, those of a class as `Class::test`. Raises OSError if there is no such file."""
    found = set()
    for node in ast.parse((ROOT / path).read_text("utf-8")).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        functions = [one for one in inner if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
        found |= {prefix + one.name for one in functions if one.name.startswith("test_")}
    return frozenset(found)


def exists(test_id: str) -> bool:
    path, _, name = test_id.partition("::")
    return (ROOT / path).is_file() and name in tests_in(path)
