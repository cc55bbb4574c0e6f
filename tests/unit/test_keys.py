"""Making keys, and what their records say as time passes."""

import hashlib
import re
import zlib
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from gateway import keys
from gateway.limits.base import Limits
from gateway.store.base import KeyRecord, Secret

NOW = 1_000_000.0
OLD, NEW = keys.make_secret("sk-ps-old"), keys.make_secret("sk-ps-new")
RECORD = KeyRecord("key_1", "a", (OLD,), None, "", "", ("*",), Limits(), (), 0.0, None, None)


def test_a_made_key_has_the_promised_form_and_checksum() -> None:
    made = {keys.make_key() for _ in range(300)}
    assert len(made) == 300
    digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    for key in made:
        match = re.fullmatch(r"sk-ps-([0-9A-Za-z]{32})([0-9A-Za-z]{6})", key)
        assert match
        value = 0
        for digit in match[2]:
            value = value * 62 + digits.index(digit)
        assert value == zlib.crc32(match[1].encode())


def test_ids_name_their_kind() -> None:
    assert re.fullmatch(r"key_[0-9a-f]{16}", keys.make_id("key"))
    assert re.fullmatch(r"team_[0-9a-f]{16}", keys.make_id("team"))


def test_of_a_key_only_digest_and_last_four_are_kept() -> None:
    key = keys.make_key()
    secret = keys.make_secret(key)
    assert secret == Secret(hashlib.sha256(key.encode()).digest(), key[-4:], None)
    assert key[6:-4] not in repr(secret)


@pytest.mark.parametrize(
    ("expires_at", "revoked_at", "wanted"),
    [
        (None, None, "active"),
        (NOW + 1, None, "active"),
        (NOW, None, "expired"),
        (None, NOW, "revoked"),
        (NOW - 5, NOW - 1, "revoked"),
        (None, NOW + 1, "active"),
    ],
)
def test_what_a_key_is_at_a_time(expires_at: float | None, revoked_at: float | None, wanted: str) -> None:
    record = replace(RECORD, expires_at=expires_at, revoked_at=revoked_at)
    assert keys.status(record, NOW) == wanted
    assert bool(keys.valid_secrets(record, NOW)) == (wanted == "active")


def test_a_rotation_leaves_the_old_key_valid_for_the_overlap() -> None:
    record = keys.rotated(RECORD, NEW, NOW, overlap=60)
    assert record.secrets[0] == NEW
    assert [secret.digest for secret in keys.valid_secrets(record, NOW + 59)] == [NEW.digest, OLD.digest]
    assert [secret.digest for secret in keys.valid_secrets(record, NOW + 60)] == [NEW.digest]


def test_a_rotation_without_overlap_ends_the_old_key_at_once() -> None:
    assert keys.rotated(RECORD, NEW, NOW, overlap=0).secrets == (NEW,)


def test_a_second_rotation_does_not_prolong_the_first() -> None:
    record = keys.rotated(RECORD, NEW, NOW, overlap=60)
    third = keys.make_secret("sk-ps-third")
    again = keys.rotated(record, third, NOW + 50, overlap=600)
    assert [secret.digest for secret in keys.valid_secrets(again, NOW + 61)] == [third.digest, NEW.digest]
    much_later = keys.rotated(again, OLD, NOW + 5000, overlap=10)
    assert [secret.digest for secret in much_later.secrets] == [OLD.digest, third.digest]


def test_a_revoked_key_stays_revoked_since_then() -> None:
    record = keys.revoked(RECORD, NOW)
    assert keys.status(record, NOW) == "revoked"
    assert keys.revoked(record, NOW + 9) == record


def test_the_next_moment_at_which_time_alone_changes_something() -> None:
    assert keys.next_change([RECORD], NOW) is None
    rotating = keys.rotated(RECORD, NEW, NOW, overlap=60)
    expiring = replace(RECORD, expires_at=NOW + 30)
    gone = replace(RECORD, expires_at=NOW - 1, revoked_at=NOW)
    assert keys.next_change([rotating, gone], NOW) == NOW + 60
    assert keys.next_change([rotating, expiring, gone], NOW) == NOW + 30
    assert keys.next_change([rotating, expiring, gone], NOW + 30) == NOW + 60


MOMENTS = st.one_of(st.none(), st.floats(0, 100))


@given(st.lists(st.tuples(MOMENTS, MOMENTS, MOMENTS), max_size=5), st.floats(0, 100), st.floats(0, 100))
def test_nothing_changes_before_the_next_change(
    times: list[tuple[float | None, float | None, float | None]], now: float, later: float
) -> None:
    records = [
        replace(RECORD, expires_at=expires, revoked_at=revoked, secrets=(OLD, NEW._replace(expires_at=ends)))
        for expires, revoked, ends in times
    ]
    change = keys.next_change(records, now)
    if later >= now and (change is None or later < change):
        for record in records:
            assert keys.valid_secrets(record, later) == keys.valid_secrets(record, now)
