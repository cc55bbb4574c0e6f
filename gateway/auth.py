"""Stage 1: from credentials to a caller, before the body is read."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NoReturn

from gateway.errors import GatewayError, store_unavailable
from gateway.keys import digest, valid_secrets
from gateway.limits.base import Limiter
from gateway.store.base import KeyRecord, TeamRecord
from gateway.types import Caller

# Headers that a keyring remembers, rather than hash their keys again. The look-up is by a hash of the whole, with a secret of
# the process's: as with digests, no time tells how much of a guess is right.
MAX_KNOWN: Final = 10_000
MAX_KNOWN_LENGTH: Final = 512  # bytes: a key may stand among many blanks
MAX_KEY: Final = 256  # bytes; keeps a megabyte key from being hashed


def refuse() -> NoReturn:
    """One and the same answer for no key, a malformed, an unknown, a revoked and an expired one."""
    raise GatewayError(
        401,
        "invalid_api_key",
        "Incorrect or missing API key. Send it as 'Authorization: Bearer KEY'.",
        headers=(("www-authenticate", "Bearer"),),
    )


def credential(authorization: tuple[bytes, ...], api_key: tuple[bytes, ...]) -> bytes | None:
    """The one key that the headers hold; None if they hold none or a malformed one.

    Raises `GatewayError` ambiguous_credentials when two differ: picking one silently could pick the wrong one.
    """
    if len(authorization) == 1 and not api_key and authorization[0].startswith(b"Bearer "):  # what nearly all send
        return authorization[0][7:].strip(b" ") or None
    found = set(api_key)
    for value in authorization:
        scheme, _, key = value.partition(b" ")
        found.add(key.strip(b" ") if scheme.lower() == b"bearer" else b"")
    if len(found) > 1:
        raise GatewayError(400, "ambiguous_credentials", "The request holds two credentials that differ. Send one.")
    return next(iter(found), b"") or None


class Keyring:
    """The keys of a policy, by digest: a look-up costs the same for ten keys and for ten thousand."""

    def __init__(
        self, callers: Mapping[bytes, Caller], anonymous: Caller | None = None, *, complete: bool = True
    ) -> None:
        self._callers = callers
        self.anonymous = anonymous  # who everybody is under `auth: none`
        self._complete = complete  # False: there may be keys that could not be read from the store
        self._known: dict[tuple[tuple[bytes, ...], tuple[bytes, ...]], Caller] = {}  # by the headers that were right

    def identify(self, authorization: tuple[bytes, ...], api_key: tuple[bytes, ...]) -> Caller:
        """Raises `GatewayError` invalid_api_key, ambiguous_credentials or store_unavailable."""
        if self.anonymous is not None:
            return self.anonymous
        headers = (authorization, api_key)
        known = self._known.get(headers)
        if known is not None:
            return known
        key = credential(authorization, api_key)
        if key is None or len(key) > MAX_KEY:
            refuse()
        caller = self._callers.get(digest(key))
        if caller is None:
            if not self._complete:
                raise store_unavailable()
            refuse()
        if sum(map(len, authorization + api_key)) <= MAX_KNOWN_LENGTH:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[headers] = caller
        return caller


Grants = Callable[[Sequence[str]], frozenset[str] | None]  # from patterns to the models that they cover; None: all


def store_callers(
    keys: Iterable[KeyRecord], teams: Mapping[str, TeamRecord], limiter: Limiter, grants: Grants, now: float
) -> dict[bytes, Caller]:
    """Who the store's keys stand for at `now`, by digest. A key whose team is gone stands for nobody."""
    found: dict[bytes, Caller] = {}
    covered: dict[tuple[str, ...], frozenset[str] | None] = {}

    def models(patterns: tuple[str, ...]) -> frozenset[str] | None:
        if patterns not in covered:
            covered[patterns] = grants(patterns)
        return covered[patterns]

    accounts = {team.id: limiter.account(team.id, team.limits, team.budgets) for team in teams.values()}
    for key in keys:
        secrets = valid_secrets(key, now)
        if not secrets or (key.team_id is not None and key.team_id not in teams):
            continue
        own, team = models(key.models), None
        if key.team_id is not None:
            team = accounts[key.team_id]
            own = _both(own, models(teams[key.team_id].models))
        account = limiter.account(key.id, key.limits, key.budgets, team)
        caller = Caller(key.name, account, own, key.id, key.team_id)
        for secret in secrets:
            found[secret.digest] = caller
    return found


def _both(one: frozenset[str] | None, other: frozenset[str] | None) -> frozenset[str] | None:
    if one is None or other is None:
        return other if one is None else one
    return one & other
