"""The request path as machine code, where there is some: mypyc makes it of the very sources (scripts/compile.py).

It lies in a folder that is named by what it was made of. So it can't be stale: from the first edited character on, the
sources run as they are, in Python, until they are compiled again. They also do with PENSTOCK_COMPILED=0, and where
nothing could be compiled. Either way the gateway does the same, at another speed.
"""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Final

PACKAGE: Final = Path(__file__).parent
# All or none of them: compiled code knows how the objects of the others are laid out.
MODULES: Final = (
    "auth",
    "beat",
    "cork",
    "drive",
    "edge.guard",
    "edge.protocol",
    "edge.sink",
    "errors",
    "head",
    "limits.base",
    "limits.budgets",
    "limits.headers",
    "limits.memory",
    "observe.access",
    "observe.counters",
    "policy",
    "relay",
    "resilience.breaker",
    "resilience.overload",
    "retry",
    "routing.balance",
    "routing.models",
    "run",
    "serve",
    "store.journal",
    "store.sums",
    "turn",
    "types",
    "upstream.client",
    "usage.estimate",
    "usage.meter",
    "usage.prompt",
    "usage.trail",
    "wire.chunked",
    "wire.fields",
    "wire.openai",
    "wire.rules",
    "wire.sse",
)
GROUP: Final = (
    "gateway_path"  # all of the code is in one library, `gateway_path__mypyc`; each module's file points to it
)


def source(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


def folder() -> Path:
    """Where the code lies that was made of the sources as they are now, for this interpreter. Raises OSError."""
    found = hashlib.sha256()
    for module in MODULES:
        text = source(module).read_bytes()
        found.update(b"%b %d\n%b" % (module.encode(), len(text), text))
    return PACKAGE / ".compiled" / f"{sysconfig.get_config_var('SOABI')}-{found.hexdigest()[:16]}"


class _Finder(MetaPathFinder):
    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        file = self._files.get(fullname)
        return None if file is None else spec_from_file_location(fullname, file)


def use() -> bool:
    """From now on the modules of the request path are imported as compiled, if they are, and none is imported yet."""
    if os.environ.get("PENSTOCK_COMPILED") == "0":
        return False
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    try:
        here = folder()
    except OSError:  # an installation without sources
        return False
    library = f"{GROUP}__mypyc"
    files = {f"gateway.{module}": here.joinpath("gateway", *module.split(".")) for module in MODULES}
    files[library] = here / library
    files = {name: file.with_name(file.name + suffix) for name, file in files.items()}
    if not all(map(Path.exists, files.values())):
        return False
    sys.meta_path.insert(0, _Finder(files))
    return True
