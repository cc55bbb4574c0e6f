#!/usr/bin/env python3
"""Makes machine code of the request path with mypyc: a third to a half less CPU per request, the same behaviour.

    scripts/compile.py [--force]   needs mypy; scripts/setup-gateway brings it, and calls this
    scripts/compile.py --check     ends well if there is something to compile and a way to do it, else says what is missing
    scripts/compile.py --name      prints the folder that the code is in, or would be

A part of every `pip install` from the sources, too. Needs a C compiler and Python's headers (on Debian and Ubuntu: apt
install gcc python3-dev); without them, or with PENSTOCK_COMPILED=0, nothing is made and the sources run as they are.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand
    BuildHookInterface = object

ROOT = Path(__file__).resolve().parents[1]

# In a process of its own: mypyc ends it when it finds a fault, and the C compiler's words belong to its output.
BUILD = """
import sys
from mypyc.build import mypycify
from setuptools import Distribution
from setuptools.command.build_ext import build_ext

# No package may be missing: of a base class that it can't see mypyc makes code that is wrong. Untyped ones are no bases.
flags = ["--config-file=", "--disable-error-code=import-untyped"]
extensions = mypycify([*flags, *sys.argv[3:]], opt_level="2", debug_level="0", group_name=sys.argv[2], target_dir="c")
build = build_ext(Distribution({"name": "gateway", "ext_modules": extensions}))
build.build_lib, build.build_temp = sys.argv[1], "o"
build.ensure_finalized()
build.run()
"""


def load_compiled() -> ModuleType:
    """`gateway.compiled` alone: importing the package might load what is about to be replaced."""
    spec = importlib.util.spec_from_file_location("compiled", ROOT / "gateway" / "compiled.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wanting() -> str | None:
    """What must be there first."""
    if os.environ.get("PENSTOCK_COMPILED") == "0":
        return "PENSTOCK_COMPILED=0"
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        return f"there is no C compiler ({compiler}); on Debian and Ubuntu: apt install gcc python3-dev"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are missing; on Debian and Ubuntu: apt install python3-dev"
    return None


def can_compile() -> bool:
    """If not, it has said why."""
    why = wanting()
    if why is not None:
        print(f"compile: the request path is not compiled, and runs slower: {why}", file=sys.stderr)
    return why is None


def compile_path(*, force: bool = False) -> Path | None:
    """The folder with the code for this interpreter; None, with a word of why, if it can't be made. Blocks for a minute."""
    compiled = load_compiled()
    folder: Path = compiled.folder()
    if folder.exists() and not force:
        return folder
    if not can_compile():
        return None
    start = time.monotonic()
    print(f"compile: {len(compiled.MODULES)} modules of the request path …", flush=True)
    with tempfile.TemporaryDirectory(prefix="penstock-compile-") as name:
        work = Path(name)
        # A copy: mypyc takes a module's name from the path that it is given.
        for package in ("gateway", "engines"):
            shutil.copytree(ROOT / package, work / package, ignore=shutil.ignore_patterns(".compiled", "__pycache__"))
        sources = [str(compiled.source(module).relative_to(ROOT)) for module in compiled.MODULES]
        argv = [sys.executable, "-c", BUILD, str(work / "lib"), compiled.GROUP, *sources]
        done = subprocess.run(argv, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            print(done.stdout, file=sys.stderr)
            print("compile: the request path is not compiled, and runs slower: see above", file=sys.stderr)
            return None
        for old in folder.parent.glob(f"{sysconfig.get_config_var('SOABI')}-*"):
            shutil.rmtree(old)
        new = folder.with_name("new")
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(work / "lib", new)
        new.rename(folder)  # all of it or nothing
    print(f"compile: done in {time.monotonic() - start:.0f} s")
    return folder


class CustomBuildHook(BuildHookInterface):
    """What pyproject.toml has hatchling call."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        folder = compile_path()
        if folder is not None and version == "standard":
            build_data["force_include"][str(folder)] = str(folder.relative_to(ROOT))
            build_data["pure_python"] = False
            build_data["infer_tag"] = True


def main(arguments: list[str]) -> int:
    match arguments:
        case ["--name"]:
            print(load_compiled().folder())
            return 0
        case ["--check"]:
            if load_compiled().folder().exists():
                return 1
            return int(not can_compile())
        case [] | ["--force"]:
            return int(compile_path(force=bool(arguments)) is None)
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
