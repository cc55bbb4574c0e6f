"""From YAML text to plain values that remember where they stand.

The text is read as YAML's node graph, which keeps line numbers, and never builds anything but plain values.
`${NAME}` is replaced in text values only, and what it gives is text, never YAML again.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple, TypeAlias

import yaml
from yaml.constructor import SafeConstructor
from yaml.reader import ReaderError

Place: TypeAlias = tuple[str | int, ...]  # ("models", "tiny", "endpoints", 0)

_MAX_BYTES: Final = 4 << 20
_MAX_DEPTH: Final = 32
_MAX_VALUES: Final = 200_000  # every alias counted as if it were written out

_TAG: Final = "tag:yaml.org,2002:"
_TEXT_TAGS: Final = {_TAG + kind for kind in ("str", "timestamp", "value", "merge")}  # no date type: 2024-01-01 is text
_REFERENCE: Final = re.compile(r"(?P<escaped>\$\$\{)|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)\}|(?P<broken>\$\{)")
_NOT_TEXT: Final = re.compile(r"[\x00\ud800-\udfff]")

_UNUSABLE: Final = object()  # stands for a value that has a problem already; no schema accepts it

# PyYAML's words → ours, and whether its context (where the unfinished thing began) is the better line.
# None of ours repeats a name from the text: an unquoted password may begin with * or !.
_SYNTAX: Final = (
    ("'\\t'", False, "a tab stands where only spaces may; indent with spaces"),
    ("cannot start any token", False, "a value cannot begin with this character; put it in quotes"),
    (
        "mapping values are not allowed",
        False,
        "a ':' stands where none can; mind the indentation, or put the value in quotes",
    ),
    ("entries are not allowed", False, "a '-' stands where none can; mind the indentation, or put the value in quotes"),
    ("could not find expected ':'", True, "a ':' is missing after a name"),
    ("expected <block end>", False, "the indentation does not fit the lines above"),
    (
        "expected ',' or",
        True,
        "a [ or { is not closed, or a comma is missing; inside them put values such as ${NAME} in quotes",
    ),
    ("but found '<stream end>'", False, "the file ends before a value, or before its [ or { is closed"),
    ("unexpected end of stream", True, "a quote is not closed"),
    ("unknown escape", False, "a \\ in double quotes begins an unknown escape; write \\\\, or use single quotes"),
    (
        "undefined alias",
        False,
        "a value that begins with * must name an anchor of this file; put it in quotes if it is text",
    ),
    (
        "alphabetic or numeric",
        False,
        "a value that begins with * or & is a YAML alias or anchor; put it in quotes if it is text",
    ),
    ("second occurrence", False, "two anchors have the same name"),
    ("tag", False, "a value that begins with ! is a YAML tag; put it in quotes if it is text"),
    ("another document", False, "a second document begins here; a config is one document"),
)
_TOO_DEEP: Final = f"is nested deeper than {_MAX_DEPTH} levels, or holds an alias of itself"


class Spot(NamedTuple):
    """Where a value stands."""

    line: int  # of its name, or of itself in a list
    text: str | None  # a scalar as it was written; None for lists and mappings
    variable: str | None  # the environment variable that it came from, in whole or in part


class Problem(NamedTuple):
    """What is wrong with the text itself, whatever the schema says."""

    line: int
    place: Place
    message: str


class Document(NamedTuple):
    """All that the text says. Values with a problem are replaced by something that no schema accepts."""

    values: object
    spots: Mapping[Place, Spot]
    problems: list[Problem]


class UnreadableError(Exception):
    """The text is no YAML that could be read to its end."""

    def __init__(self, line: int, message: str, place: Place = ()) -> None:
        super().__init__(message)
        self.problem = Problem(line, place, message)


def read(text: str, env: Mapping[str, str]) -> Document:
    """Raises `UnreadableError`, and nothing else."""
    if len(text) > _MAX_BYTES:
        raise UnreadableError(1, f"is larger than {_MAX_BYTES >> 20} MiB")
    root = _compose(text.removeprefix("\ufeff"))
    if root is None:
        raise UnreadableError(1, "is empty; a config needs at least models")
    reader = _Reader(env)
    return Document(reader.value(root, (), _line(root)), reader.spots, reader.problems)


class _Loader(yaml.SafeLoader):
    """PyYAML's loader, which by itself recurses as deep as the text likes."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise UnreadableError(self.line + 1, _TOO_DEEP)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _compose(text: str) -> yaml.Node | None:
    try:
        loader = _Loader(text)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UnreadableError(line, "holds a control character, which YAML does not allow") from None
    try:
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise _syntax(error) from None
    except (ValueError, OverflowError):  # PyYAML's slips: "\UFFFFFFFF", a %YAML version of 5000 digits
        raise UnreadableError(loader.line + 1, "is not valid YAML: a number is out of range") from None


def _syntax(error: yaml.MarkedYAMLError) -> UnreadableError:
    problem = error.problem or "cannot be read"
    known = ((context, message) for words, context, message in _SYNTAX if words in problem)
    use_context, message = next(known, (False, f"is not valid YAML: {problem}"))
    mark = (error.context_mark if use_context else None) or error.problem_mark or error.context_mark
    return UnreadableError(mark.line + 1 if mark else 1, message)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


class _Reader:
    """One walk over the nodes: collects where each value stands and what is wrong with it."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.spots: dict[Place, Spot] = {}
        self.problems: list[Problem] = []
        self._env = env
        self._left = _MAX_VALUES

    def value(self, node: yaml.Node, place: Place, line: int) -> object:
        self._spend(line, place)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, place, line)
        self.spots[place] = Spot(line, None, None)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.value(item, (*place, index), _line(item)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            pairs = self._pairs(node, place, 0)
            return {name: self.value(child, (*place, name), at) for name, (at, child) in pairs.items()}
        return self._tagged(place, line)

    def _spend(self, line: int, place: Place) -> None:
        self._left -= 1
        if self._left < 0:
            raise UnreadableError(line, f"holds more than {_MAX_VALUES} values, aliases written out", place)
        if len(place) > _MAX_DEPTH:
            raise UnreadableError(line, _TOO_DEEP)

    def _problem(self, line: int, place: Place, message: str) -> object:
        self.problems.append(Problem(line, place, message))
        return _UNUSABLE

    def _tagged(self, place: Place, line: int) -> object:
        return self._problem(line, place, "a value that begins with ! is a YAML tag; put it in quotes if it is text")

    def _pairs(self, node: yaml.MappingNode, place: Place, depth: int) -> dict[str, tuple[int, yaml.Node]]:
        """Names with their lines and values; what `<<` brings in stands behind what is written out."""
        written: dict[str, tuple[int, yaml.Node]] = {}
        merged: dict[str, tuple[int, yaml.Node]] = {}
        for key, child in node.value:
            line = _line(key)
            if not isinstance(key, yaml.ScalarNode):
                self._problem(line, place, "a name must be plain text; put a value that begins with { or [ in quotes")
            elif key.tag == _TAG + "merge":
                for source in self._sources(child, place, line):
                    self._spend(line, (*place, *([0] * depth)))
                    merged = {**self._pairs(source, place, depth + 1), **merged}
            elif key.value in written:
                first = written[key.value][0]
                self._problem(line, (*place, key.value), f"stands twice, in line {first} and here; remove one")
            elif _NOT_TEXT.search(key.value):
                self._problem(line, place, "a name holds a character that is no text")
            else:
                self._spend(line, place)
                written[key.value] = (line, child)
        return {**merged, **written}

    def _sources(self, node: yaml.Node, place: Place, line: int) -> Iterator[yaml.MappingNode]:
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if isinstance(source, yaml.MappingNode):
                yield source
            else:
                self._problem(line, place, "<< takes the alias of a mapping, or a list of such")

    def _scalar(self, node: yaml.ScalarNode, place: Place, line: int) -> object:
        self.spots[place] = Spot(line, node.value, None)
        if node.tag in _TEXT_TAGS:
            return self._text(node.value, place, line)
        build = _SCALARS.get(node.tag)
        if build is None:
            return self._tagged(place, line)
        try:
            return build(_CONSTRUCTOR, node)
        except (ValueError, LookupError):  # `!!int abc`, `!!bool abc`, `!!int ""`, a number of 5000 digits
            return self._problem(line, place, "is not the number or switch that it claims to be")

    def _text(self, written: str, place: Place, line: int) -> object:
        parts: list[str] = []
        end = 0
        for match in _REFERENCE.finditer(written):
            parts.append(written[end : match.start()])
            end = match.end()
            name = match["name"]
            if match["broken"]:
                message = (
                    "'${' must begin the name of an environment variable, as in ${NAME}; write $${ for the characters"
                )
                return self._problem(line, place, message)
            if match["escaped"]:
                parts.append("${")
            elif name in self._env:
                parts.append(self._env[name])
                self.spots[place] = Spot(line, written, name)
            else:
                return self._problem(line, place, f"the environment variable {name} is not set")
        text = "".join((*parts, written[end:]))
        if _NOT_TEXT.search(text):
            return self._problem(line, place, "holds a character that is no text")
        return text


_CONSTRUCTOR: Final = SafeConstructor()
_SCALARS: Final = {
    _TAG + "null": SafeConstructor.construct_yaml_null,
    _TAG + "bool": SafeConstructor.construct_yaml_bool,
    _TAG + "int": SafeConstructor.construct_yaml_int,
    _TAG + "float": SafeConstructor.construct_yaml_float,
}
