"""SECURITY.md promises nothing that no test proves."""

import re

from tests.docs.readme import ROOT, quoted
from tests.named import exists

TEXT = (ROOT / "SECURITY.md").read_text("utf-8")
THREATS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("|") and not re.match(r"\|-|\| threat ", line)
]


def test_every_threat_has_a_test_that_exists() -> None:
    assert len(THREATS) > 15
    for threat, promise, proof in THREATS:
        named = quoted(proof)
        assert promise
        assert named, threat
        assert [one for one in named if not exists(one)] == [], threat


def test_the_bounds_are_those_of_the_code() -> None:
    from gateway.edge import guard, protocol

    assert (guard.MAX_HEAD, guard.MAX_FIELDS, guard.MAX_URL) == (64 * 1024, 100, 8 * 1024)
    assert (protocol.HIGH_WATER, protocol.WRITE_TIMEOUT) == (256 * 1024, 60)


def test_the_readme_leads_here() -> None:
    assert "SECURITY.md" in (ROOT / "README.md").read_text("utf-8")
