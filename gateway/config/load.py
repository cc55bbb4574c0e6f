"""The way from a file to a checked `Config`, or to one line for each fault.

load → parse → `document` (YAML to values and their places) → pydantic → `explain` (its errors in plain words)
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from pydantic import ValidationError

from gateway.config.document import Place, Problem, Spot, UnreadableError, read
from gateway.config.explain import explain
from gateway.config.schema import Config

_MAX_BYTES: Final = 4 << 20
_PART: Final = 64  # characters shown of a name


class Fault(NamedTuple):
    """One thing that is wrong. str() is its one line."""

    file: str
    line: int  # from 1; 0 where the file could not be read at all
    where: str  # "models.tiny.endpoints[0]"; empty where no field is meant
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return _one_line(": ".join(part for part in (place, self.where, self.message) if part))


class ConfigError(Exception):
    """A config that cannot be used. `faults` is never empty and sorted by line; str() has one line for each."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = sorted(dict.fromkeys(faults), key=lambda fault: fault.line)
        super().__init__("\n".join(map(str, self.faults)))


def load(path: Path, env: Mapping[str, str]) -> Config:
    """Reads and checks a file. Raises `ConfigError` and nothing else. Blocks."""
    name = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError([Fault(name, 0, "", "there is no such file")]) from None
    except IsADirectoryError:
        raise ConfigError([Fault(name, 0, "", "is a directory; name the YAML file in it")]) from None
    except OSError as error:
        raise ConfigError([Fault(name, 0, "", f"cannot be read: {error.strerror}")]) from None
    if len(data) > _MAX_BYTES:
        raise ConfigError([Fault(name, 0, "", f"is larger than {_MAX_BYTES >> 20} MiB")])
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError([Fault(name, line, "", "is not UTF-8 text; save it as UTF-8")]) from None
    return parse(text, name, env)


def parse(text: str, name: str, env: Mapping[str, str]) -> Config:
    """Checks a text. `name` stands for the file in faults; `${NAME}` is read from `env`.

    Raises `ConfigError` and nothing else.
    """
    try:
        document = read(text, env)
    except UnreadableError as unreadable:
        raise ConfigError([_fault(name, unreadable.problem)]) from None
    problems = list(document.problems)
    try:
        config = Config.model_validate(document.values)
    except ValidationError as error:
        known = {problem.place for problem in problems}
        problems += [
            Problem(_line(place, document.spots), place, message)
            for place, message in explain(error, document.spots)
            if place not in known
        ]
    else:
        if not problems:
            return config
    raise ConfigError(_fault(name, problem) for problem in problems)


def _fault(name: str, problem: Problem) -> Fault:
    return Fault(name, problem.line, _where(problem.place), problem.message)


def _line(place: Place, spots: Mapping[Place, Spot]) -> int:
    """The line of a place, or of the nearest mapping around it if it is not in the file."""
    while place not in spots:
        place = place[:-1]
    return spots[place].line


def _where(place: Place) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part[:_PART]}" for part in place)
    return "".join(parts).removeprefix(".")


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
