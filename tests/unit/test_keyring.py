"""Who the store's keys stand for, and what an unknown key is told."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from gateway import keys
from gateway.auth import Keyring, store_callers
from gateway.errors import GatewayError
from gateway.keys import digest
from gateway.limits.base import Budget, Limits, Refused
from gateway.limits.memory import MemoryLimiter
from gateway.store.base import KeyRecord, TeamRecord
from gateway.types import Caller
from tests.unit.test_limits_memory import run

NOW = 1000.0
MODELS = {"llama-8b", "llama-70b", "tiny"}
OLD, NEW = "sk-ps-old", "sk-ps-new"
KEY = KeyRecord("key_1", "batch", (keys.make_secret(OLD),), None, "", "", ("llama-*",), Limits(), (), 0.0, None, None)
TEAM = TeamRecord("team_1", "research", "", ("*",), Limits(), (), 0.0)


def grants(patterns: Sequence[str]) -> frozenset[str] | None:
    return None if "*" in patterns else frozenset(m for m in MODELS for p in patterns if m.startswith(p.rstrip("*")))


def callers(
    *records: KeyRecord, teams: Sequence[TeamRecord] = (), now: float = NOW, limiter: MemoryLimiter | None = None
) -> dict[bytes, Caller]:
    by_id = {team.id: team for team in teams}
    return store_callers(records, by_id, limiter or MemoryLimiter(), grants, now)


def test_a_key_is_known_by_its_digest() -> None:
    found = callers(KEY)
    assert list(found) == [digest(OLD.encode())]
    caller = found[digest(OLD.encode())]
    assert (caller.name, caller.id, caller.team) == ("batch", "key_1", None)
    assert caller.models == frozenset({"llama-8b", "llama-70b"})


def test_both_secrets_of_a_rotation_open_the_same_account() -> None:
    rotating = keys.rotated(KEY, keys.make_secret(NEW), NOW, overlap=10)
    old, new = callers(rotating)[digest(OLD.encode())], callers(rotating)[digest(NEW.encode())]
    assert old.id == new.id
    found = callers(rotating)
    assert found[digest(OLD.encode())] is found[digest(NEW.encode())]
    assert list(callers(rotating, now=NOW + 10)) == [digest(NEW.encode())]


@pytest.mark.parametrize("gone", [replace(KEY, revoked_at=NOW), replace(KEY, expires_at=NOW)])
def test_a_revoked_or_expired_key_stands_for_nobody(gone: KeyRecord) -> None:
    assert callers(gone) == {}


def test_a_key_may_use_what_its_team_may_too() -> None:
    key = replace(KEY, team_id="team_1")
    models = [
        next(iter(callers(replace(key, models=own), teams=[replace(TEAM, models=team)]).values())).models
        for own, team in ((("*",), ("*",)), (("llama-*",), ("*",)), (("*",), ("tiny",)), (("llama-*",), ("llama-8b",)))
    ]
    assert models == [None, {"llama-8b", "llama-70b"}, {"tiny"}, {"llama-8b"}]


def test_a_key_whose_team_is_gone_stands_for_nobody() -> None:
    assert callers(replace(KEY, team_id="team_1")) == {}


def test_keys_of_a_team_share_its_limits() -> None:
    limiter = MemoryLimiter()
    members = [
        replace(KEY, id=f"key_{n}", name=f"n{n}", team_id="team_1", secrets=(keys.make_secret(f"sk-ps-{n}"),))
        for n in range(2)
    ]
    team = replace(TEAM, limits=Limits(parallel_requests=1), budgets=(Budget(100, "tokens", "day"),))
    first, second = callers(*members, teams=[team], limiter=limiter).values()
    run(limiter.admit(first.account, 1, 1))
    with pytest.raises(Refused) as caught:
        run(limiter.admit(second.account, 1, 1))
    assert caught.value.of_team


def identify(keyring: Keyring, key: str) -> Caller | tuple[int, str | None]:
    try:
        return keyring.identify((f"Bearer {key}".encode(),), ())
    except GatewayError as error:
        return error.status, error.code


def test_an_unknown_key_is_401_only_where_all_keys_are_known() -> None:
    found = callers(KEY)
    whole, partial = Keyring(found), Keyring(found, complete=False)
    assert identify(whole, NEW) == (401, "invalid_api_key")
    assert identify(partial, NEW) == (503, "store_unavailable")
    for keyring in (whole, partial):
        assert isinstance(identify(keyring, OLD), Caller)
    with pytest.raises(GatewayError) as caught:
        partial.identify((), ())
    assert caught.value.status == 401
