"""The README as data: its fenced blocks, its tables, and the commands in its shell examples."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()


class Block(NamedTuple):
    """A fenced block."""

    section: str  # the heading above it
    line: int  # of its opening fence
    language: str
    tag: str  # what follows the language on the fence
    text: str

    @property
    def id(self) -> str:
        return f"{self.language} in line {self.line}"


def _blocks() -> list[Block]:
    found: list[Block] = []
    section, opened, inside = "", 0, ["", ""]
    lines: list[str] = []
    for number, line in enumerate(TEXT.splitlines(), 1):
        if line.startswith("```") and not opened:
            language, _, tag = line.removeprefix("```").partition(" ")
            opened, inside, lines = number, [language, tag], []
        elif line == "```":
            found.append(Block(section, opened, inside[0], inside[1], "\n".join(lines) + "\n"))
            opened = 0
        elif opened:
            lines.append(line)
        elif line.startswith("#"):
            section = line.strip("# ")
    assert not opened, f"the block of line {opened} is not closed"
    return found


BLOCKS = _blocks()


def blocks(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def after(block: Block) -> Block | None:
    """The next block of the same section."""
    index = BLOCKS.index(block) + 1
    return BLOCKS[index] if index < len(BLOCKS) and BLOCKS[index].section == block.section else None


def section(name: str) -> str:
    """The text below a heading, up to the next one of its level or above."""
    match = re.search(rf"^(#+) {re.escape(name)}\n(.*?)(?=^#{{1,2}} |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert match is not None, f"there is no section {name!r}"
    return match[2]


def rows(text: str) -> list[list[str]]:
    """The rows of all tables in a text, as cells; without their heads."""
    found = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in re.findall(r"^\|.*\|$", text, re.MULTILINE)
    ]
    heads = {i - 1 for i, row in enumerate(found) if set("".join(row)) <= set("|- ")}
    return [row for i, row in enumerate(found) if i not in heads and i - 1 not in heads]


def quoted(text: str) -> list[str]:
    """What stands in backquotes."""
    return re.findall(r"`([^`\n]+)`", text)


def commands(script: str) -> list[str]:
    """The commands of a shell script, without comments and empty lines; one may be several lines long."""
    found: list[str] = []
    part = ""
    for line in script.splitlines():
        part += line + "\n"
        if line.endswith("\\") or not _is_whole(part):
            continue
        if words(part):
            found.append(part.strip())
        part = ""
    assert not part, f"this command does not end: {part}"
    return found


def _is_whole(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError:  # a quotation is still open
        return False
    return True


def words(command: str) -> list[str]:
    return shlex.split(command, comments=True)
