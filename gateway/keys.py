"""Keys as they are made, and what a key's record says at a given time. Pure, but for the randomness."""

import hashlib
import secrets
import zlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Final, Literal

from gateway.store.base import KeyRecord, Secret

PREFIX: Final = "sk-ps-"
_DIGITS: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

Status = Literal["active", "expired", "revoked"]


def make_key() -> str:
    """A new full key: `sk-ps-`, 32 random base62 characters (190 bits), and 6 of their CRC32."""
    body = "".join(secrets.choice(_DIGITS) for _ in range(32))
    return PREFIX + body + _checksum(body)


def _checksum(body: str) -> str:
    left, found = zlib.crc32(body.encode()), ""
    for _ in range(6):
        left, digit = divmod(left, 62)
        found = _DIGITS[digit] + found
    return found


def digest(key: bytes) -> bytes:
    """What stands for a key everywhere but in the client's hands. A fast hash: keys are random (facts: security.md §3)."""
    return hashlib.sha256(key).digest()


def make_id(kind: Literal["key", "team"]) -> str:
    """A new record's id."""
    return f"{kind}_{secrets.token_hex(8)}"


def make_secret(key: str, expires_at: float | None = None) -> Secret:
    """What the store keeps of a full key."""
    return Secret(digest(key.encode()), key[-4:], expires_at)


def status(record: KeyRecord, now: float) -> Status:
    """`now` in seconds since the epoch, as all times here."""
    if record.revoked_at is not None and record.revoked_at <= now:
        return "revoked"
    if record.expires_at is not None and record.expires_at <= now:
        return "expired"
    return "active"


def valid_secrets(record: KeyRecord, now: float) -> tuple[Secret, ...]:
    """Those by which the key may be used now."""
    if status(record, now) != "active":
        return ()
    return tuple(secret for secret in record.secrets if secret.expires_at is None or secret.expires_at > now)


def next_change(records: Iterable[KeyRecord], now: float) -> float | None:
    """When the passing of time alone next changes what a key may do; None: never."""
    times = (
        time
        for record in records
        for time in (record.expires_at, record.revoked_at, *(secret.expires_at for secret in record.secrets))
        if time is not None and time > now
    )
    return min(times, default=None)


def rotated(record: KeyRecord, secret: Secret, now: float, overlap: float) -> KeyRecord:
    """The record with a new secret; those before it stay valid for `overlap` seconds more at most."""
    until = now + overlap
    kept = tuple(
        old._replace(expires_at=until if old.expires_at is None else min(old.expires_at, until))
        for old in valid_secrets(record, now)
        if overlap > 0
    )
    return replace(record, secrets=(secret, *kept))


def revoked(record: KeyRecord, now: float) -> KeyRecord:
    return record if record.revoked_at is not None else replace(record, revoked_at=now)
