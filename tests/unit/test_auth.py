"""Credentials: one key or none, and never a guess."""

import pytest

from gateway.auth import MAX_KEY, MAX_KNOWN, MAX_KNOWN_LENGTH, Keyring, credential
from gateway.errors import GatewayError
from gateway.keys import digest
from gateway.limits.base import Limits
from gateway.limits.memory import MemoryLimiter
from gateway.types import Caller

KEY = b"sk-good"


@pytest.mark.parametrize(
    ("authorization", "api_key", "found"),
    [
        ((), (), None),
        ((b"Bearer sk-good",), (), KEY),
        ((b"bearer sk-good",), (), KEY),
        ((b"BEARER   sk-good  ",), (), KEY),
        ((), (KEY,), KEY),
        ((b"Bearer sk-good",), (KEY,), KEY),
        ((b"Bearer sk-good", b"bearer sk-good"), (KEY, KEY), KEY),
        ((b"Bearer",), (), None),
        ((b"Bearer ",), (), None),
        ((b"",), (), None),
        ((b"sk-good",), (), None),
        ((b"Basic sk-good",), (), None),
        ((b"Bearersk-good",), (), None),
        ((b"Bearer\tsk-good",), (), None),
        ((), (b"",), None),
    ],
)
def test_credential(authorization: tuple[bytes, ...], api_key: tuple[bytes, ...], found: bytes | None) -> None:
    assert credential(authorization, api_key) == found


@pytest.mark.parametrize(
    ("authorization", "api_key"),
    [
        ((b"Bearer a", b"Bearer b"), ()),
        ((b"Bearer a",), (b"b",)),
        ((), (b"a", b"b")),
        ((b"Basic a",), (b"a",)),
        ((b"Bearer a",), (b"",)),
        ((b"Bearer a", b"nonsense"), ()),
    ],
)
def test_two_that_differ(authorization: tuple[bytes, ...], api_key: tuple[bytes, ...]) -> None:
    with pytest.raises(GatewayError) as refused:
        credential(authorization, api_key)
    assert (refused.value.status, refused.value.code) == (400, "ambiguous_credentials")


def caller(name: str) -> Caller:
    return Caller(name, MemoryLimiter().account(name, Limits()), None)


def test_keyring() -> None:
    known, long = caller("known"), caller("long")
    ring = Keyring({digest(KEY): known, digest(b"k" * (MAX_KEY + 1)): long})
    assert ring.identify((b"Bearer sk-good",), ()) is known
    refusals = []
    for given in ((b"Bearer sk-bad",), (b"Bearer",), (), (b"Bearer " + b"k" * (MAX_KEY + 1),), (b"Bearer \xff\0",)):
        with pytest.raises(GatewayError) as refused:
            ring.identify(given, ())
        error = refused.value
        refusals.append((error.status, error.code, error.message, error.headers))
    assert len(set(refusals)) == 1
    assert refusals[0][:2] == (401, "invalid_api_key")
    assert refusals[0][3] == (("www-authenticate", "Bearer"),)


def test_what_a_keyring_remembers_is_bounded() -> None:
    """A client that pads its key in ever other ways fills no memory."""
    known = caller("known")
    ring = Keyring({digest(KEY): known})
    for blanks in (1, 10, MAX_KNOWN_LENGTH, 60_000):
        for _ in range(2):
            assert ring.identify((b"Bearer" + b" " * blanks + KEY,), ()) is known
    assert len(ring._known) == 2
    for n in range(MAX_KNOWN + 10):
        assert ring.identify((b"Bearer " + KEY + b" " * (n % 400), b"bearer " + KEY + b" " * (n // 400)), ()) is known
        assert len(ring._known) <= MAX_KNOWN


def test_without_keys_everybody_is_the_same() -> None:
    nobody = caller("anonymous")
    ring = Keyring({}, anonymous=nobody)
    assert ring.identify((), ()) is ring.identify((b"Bearer a", b"Bearer b"), ()) is nobody
