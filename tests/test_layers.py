"""Who may import whom, by the text of the sources. The tables below are the architecture; DESIGN's rooms and layers."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom up. A room is a module or a package with all that is in it; the longest name that fits counts.
# A room imports from the layers below its own, from itself, and from the neighbours that NEIGHBOURS allows.
LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loader", ("gateway.compiled",)),
    ("words", ("gateway.types", "gateway.errors", "gateway.limits.base", "gateway.store.base", "engines.types")),
    (
        "pure",
        (
            "gateway.beat",
            "gateway.config",
            "gateway.head",
            "gateway.keys",
            "gateway.limits",
            "gateway.resilience",
            "gateway.routing",
            "gateway.usage",
            "gateway.wire",
            "engines.command",
            "engines.lifecycle",
            "engines.rollout",
            "engines.spec",
        ),
    ),
    (
        "I/O",
        (
            "gateway.auth",
            "gateway.cork",
            "gateway.drive",
            "gateway.limits.redis",
            "gateway.observe",
            "gateway.store",
            "gateway.upstream",
            "gateway.usage.ledger",
            "engines",
        ),
    ),
    (
        "flow",
        (
            "gateway.failover",
            "gateway.policy",
            "gateway.relay",
            "gateway.retry",
            "gateway.run",
            "gateway.serve",
            "gateway.turn",
        ),
    ),
    ("doors", ("gateway.admin", "gateway.api", "gateway.edge")),
    (
        "root",
        (
            "gateway.__main__",
            "gateway.app",
            "gateway.bench",
            "gateway.books",
            "gateway.cli",
            "gateway.compose",
            "gateway.config.watch",
            "gateway.console",
            "gateway.listen",
            "gateway.reload",
            "gateway.runtime",
        ),
    ),
)

# Within a layer: who may import whom besides. No circles, which is tested too.
NEIGHBOURS: dict[str, tuple[str, ...]] = {
    "gateway.types": ("gateway.limits.base",),
    "gateway.store.base": ("gateway.limits.base",),
    "gateway.limits": ("gateway.wire",),
    "gateway.resilience": ("gateway.usage", "gateway.wire"),
    "gateway.routing": ("gateway.resilience", "gateway.wire"),
    "gateway.usage": ("gateway.wire",),
    "gateway.config": ("engines.spec",),
    "engines.command": ("engines.spec",),
    "engines.rollout": ("engines.command", "engines.spec"),
    "gateway.auth": ("gateway.store",),
    "gateway.upstream": ("gateway.cork",),
    "gateway.usage.ledger": ("gateway.store",),
    "gateway.policy": ("gateway.relay",),
    "gateway.run": ("gateway.policy", "gateway.relay"),
    "gateway.retry": ("gateway.policy", "gateway.relay", "gateway.run"),
    "gateway.turn": ("gateway.policy", "gateway.relay", "gateway.run"),
    "gateway.serve": (
        "gateway.failover",
        "gateway.policy",
        "gateway.relay",
        "gateway.retry",
        "gateway.run",
        "gateway.turn",
    ),
    "gateway.app": ("gateway.runtime",),
    "gateway.runtime": (
        "gateway.app",
        "gateway.books",
        "gateway.compose",
        "gateway.config.watch",
        "gateway.listen",
        "gateway.reload",
    ),
    "gateway.cli": ("gateway.bench", "gateway.console", "gateway.runtime"),
    "gateway.__main__": ("gateway.cli",),
}

# A room that may import no more of the project than this, whatever its layer.
ONLY: dict[str, tuple[str, ...]] = {
    "gateway.bench": ("gateway.wire.sse",),
    "gateway.console": (),
    "gateway.config": ("engines.spec", "engines.types"),
}

# Config stops at the composition root.
ONLY_FOR: dict[str, tuple[str, ...]] = {
    "gateway.config": (
        "gateway.books",
        "gateway.cli",
        "gateway.compose",
        "gateway.config.watch",
        "gateway.reload",
        "gateway.runtime",
    ),
    "gateway.bench": ("gateway.cli",),
    "gateway.console": ("gateway.cli",),
}

# Everything from outside the standard library, and the rooms that may import it. What is not here is a new dependency.
PACKAGES: dict[str, tuple[str, ...]] = {
    "aiosqlite": ("gateway.store",),
    "alembic": ("gateway.store",),
    "asyncpg": ("gateway.store",),
    "fastapi": ("gateway.admin", "gateway.api", "gateway.app"),
    "httptools": ("gateway.edge", "gateway.upstream", "gateway.bench"),
    "jinja2": ("gateway.usage.template",),
    "mypy_extensions": ("gateway.edge", "gateway.limits"),
    "orjson": ("gateway",),
    "prometheus_client": ("gateway.observe",),
    "pydantic": ("gateway.admin", "gateway.api", "gateway.config", "engines.spec"),
    "pydantic_core": ("gateway.config",),
    "redis": ("gateway.limits.redis",),
    "rich": ("gateway.bench", "gateway.cli", "gateway.console"),
    "sqlalchemy": ("gateway.store",),
    "sqlite3": ("gateway.store",),
    "sse_starlette": ("gateway.admin", "gateway.api"),
    "starlette": ("gateway.admin", "gateway.api", "gateway.app"),
    "structlog": ("gateway",),
    "tiktoken": ("gateway.usage.bpe",),
    "typer": ("gateway.bench", "gateway.cli", "gateway.console"),
    "uvicorn": ("gateway.edge", "gateway.runtime"),
    "uvloop": ("gateway.runtime", "gateway.bench"),
    "yaml": ("gateway.config",),
}

# The layers without I/O of their own: the loop, sockets and processes are not theirs.
PURE = ("words", "pure")
NOT_PURE = {
    "asyncio",
    "http",
    "multiprocessing",
    "select",
    "selectors",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "threading",
}


class Import(NamedTuple):
    line: int
    target: str  # the module, not the name that is taken from it


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {_module(path): path for top in ("gateway", "engines") for path in sorted((ROOT / top).rglob("*.py"))}
ROOMS = {room: level for level, (_, rooms) in enumerate(LAYERS) for room in rooms}


def _within(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def _within_any(module: str, rooms: tuple[str, ...]) -> bool:
    return any(_within(module, room) for room in rooms)


def _room(module: str) -> str | None:
    """The room of a module; `gateway` itself holds only the version and sets up the loader, and is nobody's room."""
    return max((room for room in ROOMS if _within(module, room)), key=len, default=None)


def _imports(path: Path) -> Iterator[Import]:
    """Every import, those for type checkers and those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole name: no relative imports"
            base = node.module or ""
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield Import(node.lineno, submodule if submodule in SOURCES else base)


def _may_import(module: str, target: str) -> bool:
    """Whether one module of the project may import another one."""
    if target == "gateway":
        return _within(module, "gateway")
    if module == "gateway":
        return target == "gateway.compiled"
    room, other = _room(module), _room(target)
    if room is None or other is None:
        return False
    if _within(module, "engines") and _within(target, "gateway"):
        return False
    if room != other and any(_within(module, key) and not _within_any(target, rooms) for key, rooms in ONLY.items()):
        return False
    if room != other and any(
        _within(target, key) and not _within_any(module, rooms) for key, rooms in ONLY_FOR.items()
    ):
        return False
    return room == other or ROOMS[other] < ROOMS[room] or _within_any(target, NEIGHBOURS.get(room, ()))


def _may_use(module: str, package: str) -> bool:
    """Whether a module may import something from outside the project."""
    if package in PACKAGES:
        return _within_any(module, PACKAGES[package])
    room = _room(module)
    pure = room is not None and LAYERS[ROOMS[room]][0] in PURE
    return package in sys.stdlib_module_names and not (pure and package in NOT_PURE)


@pytest.mark.parametrize("module", [module for module in SOURCES if module != "gateway"])
def test_every_module_has_a_room(module: str) -> None:
    assert _room(module), f"{module} is in no row of LAYERS"


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_downwards_and_stay_in_their_rooms(module: str) -> None:
    wrong = [
        f"{SOURCES[module].relative_to(ROOT)}:{line}: {module} must not import {target}"
        for line, target in _imports(SOURCES[module])
        if not (
            _may_import(module, target)
            if _within_any(target, ("gateway", "engines"))
            else _may_use(module, target.partition(".")[0])
        )
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {
        module: {target for _, target in _imports(path) if target in SOURCES and target != module}
        for module, path in SOURCES.items()
        if module != "gateway"
    }
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("module", "target", "allowed"),
    [
        ("gateway.serve", "gateway.wire.sse", True),
        ("gateway.wire.sse", "gateway.serve", False),
        ("gateway.wire.openai", "gateway.wire.rules", True),
        ("gateway.upstream.client", "gateway.store.db", False),
        ("gateway.auth", "gateway.store.keys", True),
        ("engines.fleet", "engines.types", True),
        ("engines.fleet", "gateway.errors", False),
        ("gateway.bench.load", "gateway.wire.sse", True),
        ("gateway.bench.load", "gateway.wire.openai", False),
        ("gateway.bench.load", "gateway.bench.report", True),
        ("gateway.routing.models", "gateway.config.schema", False),
        ("gateway.serve", "gateway.config.schema", False),
        ("gateway.runtime", "gateway.config.schema", True),
        ("gateway.utils", "gateway.errors", False),
    ],
)
def test_the_rule_for_imports(module: str, target: str, allowed: bool) -> None:
    assert _may_import(module, target) is allowed


@pytest.mark.parametrize(
    ("module", "package", "allowed"),
    [
        ("gateway.app", "fastapi", True),
        ("gateway.serve", "fastapi", False),
        ("engines.process", "vllm", False),
        ("gateway.usage.tokens", "torch", False),
        ("gateway.upstream.client", "httpx", False),
        ("gateway.upstream.client", "socket", True),
        ("gateway.wire.sse", "socket", False),
        ("gateway.wire.sse", "re", True),
    ],
)
def test_the_rule_for_packages(module: str, package: str, allowed: bool) -> None:
    assert _may_use(module, package) is allowed
