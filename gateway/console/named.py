"""What a person calls a key, a team or an engine: its id, or its name. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final

from gateway.console.problem import Problem

_LISTED: Final = 8  # names that a message holds


def find(what: str, rows: Sequence[Mapping[str, Any]], wanted: str) -> Mapping[str, Any]:
    """The row with this id, or else with this name. A name that was used again means the one that is still active.
    Raises `Problem` where there is none, with the nearest name, or more than one."""
    found = [row for row in rows if row["id"] == wanted] or [row for row in rows if row.get("name") == wanted]
    alive = [row for row in found if row.get("status", "active") == "active"]
    if len(alive) == 1:
        return alive[0]
    if not found:
        names = [str(row.get("name") or row["id"]) for row in rows]
        raise Problem(f"there is no {what} {wanted!r}; {hint(what, wanted, names)}")
    if len(found) > 1:
        ids = ", ".join(str(row["id"]) for row in found)
        raise Problem(f"{len(found)} {what}s are called {wanted!r}; give the id of the one you mean: {ids}")
    return found[0]


def hint(what: str, wanted: str, names: Iterable[str]) -> str:
    """What to type instead."""
    known = sorted(set(names))
    lower = {name.lower(): name for name in known}
    if near := get_close_matches(wanted.lower(), lower, n=1, cutoff=0.5):
        return f"did you mean {lower[near[0]]!r}?"
    if not known:
        return f"there are no {what}s at all"
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return f"there are: {', '.join(known[:_LISTED])}{more}"
