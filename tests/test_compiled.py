"""What may be compiled, and that the tests run what users run."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

import gateway
from gateway import compiled
from tests.served import ROOT

# mypyc lays out a class by what it knows of its bases: of these it knows all.
SAFE = {"object", "Exception", "ValueError", "dict", "NamedTuple", "Protocol", "Generic", "Enum", "IntEnum"}


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for module in compiled.MODULES:
        for node in ast.walk(ast.parse(compiled.source(module).read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                yield module, node


def test_no_compiled_class_has_a_base_that_is_laid_out_by_python() -> None:
    """That would overwrite what Python keeps in the base's instances, and crash the process now and then."""
    ours = {node.name for _, node in classes()}
    wrong = [
        f"{module}: {node.name} inherits from {base}; that needs @mypyc_attr(native_class=False)"
        for module, node in classes()
        if not any("native_class=False" in ast.unparse(one) for one in node.decorator_list)
        for base in (ast.unparse(one).partition("[")[0] for one in node.bases)
        if base not in SAFE | ours
    ]
    assert not wrong, "\n".join(wrong)


def test_compiled_classes_set_in_init_what_mypyc_would_forget() -> None:
    """Of an exception every default in the class; else a None whose type is a union of more than two or has a protocol in
    it. Python would find them in the class, compiled code does not."""
    wrong = []
    for module, node in classes():
        bases = {ast.unparse(base).partition("[")[0] for base in node.bases}
        if bases & {"NamedTuple", "Protocol", "Enum", "IntEnum"} or any(
            "dataclass" in ast.unparse(one) for one in node.decorator_list
        ):
            continue
        none = {ast.unparse(a.target) for a in node.body if isinstance(a, ast.AnnAssign) and is_none(a.value)}
        any_ = {ast.unparse(a.targets[0]) for a in node.body if isinstance(a, ast.Assign)}
        forgotten = none | any_ if bases & {"Exception", "ValueError", "GatewayError"} else none
        wrong += [f"{module}: {node.name}.{name}" for name in sorted(forgotten - {"__slots__"})]
    assert not wrong, ", ".join(wrong)


def is_none(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


def in_python(code: str, **variables: str) -> str:
    env = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


SHOW = "import gateway, gateway.serve; print(gateway.COMPILED, gateway.serve.__file__.endswith('.py'))"


HEADERS = Path(sysconfig.get_path("include")) / "Python.h"


@pytest.mark.skipif(
    shutil.which("cc") is None or not HEADERS.exists(), reason="no C compiler, or no headers of Python's"
)
def test_the_tests_run_what_users_run() -> None:
    if os.environ.get("PENSTOCK_COMPILED") == "0":
        pytest.skip("PENSTOCK_COMPILED=0")
    assert gateway.COMPILED, "run scripts/setup-gateway: the request path has changed and is not compiled"
    assert in_python(SHOW) == "True False"


def test_the_sources_run_as_they_are_if_asked() -> None:
    assert in_python(SHOW, PENSTOCK_COMPILED="0") == "False True"


def test_one_edited_character_is_enough_for_the_sources_to_be_run(tmp_path: object) -> None:
    assert compiled.folder() == compiled.folder()
    code = """
from pathlib import Path
from gateway import compiled
before = compiled.folder()
real = Path.read_bytes
Path.read_bytes = lambda path: real(path) + (b"#" if path.name == "relay.py" else b"")
print(compiled.folder() != before, compiled.use())
"""
    assert in_python(code) == "True False"
