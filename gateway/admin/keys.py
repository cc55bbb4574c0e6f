"""Keys: made, changed, rotated, revoked. Each change takes effect in this process before it is answered."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import ConfigDict, Field
from starlette.responses import Response

from gateway.admin.accounts import (
    FROM_CONFIG,
    KeyAsked,
    KeyMade,
    KeyRotated,
    Keys,
    KeyShown,
    LimitsShown,
    NewKey,
    NewTeam,
    RotationAsked,
    TeamAsked,
    Teams,
    TeamShown,
    UsedNow,
    blank_key,
    blank_team,
    budget_use,
    changed_key,
    changed_team,
    judge_models,
    key_shown,
    team_shown,
)
from gateway.admin.answers import listing
from gateway.admin.context import WHO, Admin
from gateway.admin.errors import not_found, printable
from gateway.admin.shapes import Asked, iso
from gateway.errors import GatewayError
from gateway.keys import Status, make_key, make_secret, revoked, rotated, status
from gateway.limits.base import Limits
from gateway.limits.memory import BudgetUse
from gateway.store.base import KeyRecord, Owner, Period, Spent, TeamRecord


class KeysAsked(Asked):
    model_config = ConfigDict(strict=False)  # a query holds text alone

    team: Annotated[str, Field(max_length=128)] | None = None
    status: Status | None = None


def _counted(admin: Admin, owner: str) -> bool:
    use = admin.use(owner)
    return use is not None and bool(use.budgets)


class Book:
    """Keys and teams at one moment."""

    def __init__(self, admin: Admin, spent: Mapping[Owner, Mapping[Period, Spent]]):
        self.keys = admin.held.keys
        self.teams = admin.held.teams
        self.now = time.time()
        self._admin = admin
        self._spent = spent
        self._working = Counter(key.team_id for key in self.keys.values() if status(key, self.now) == "active")
        self._recently = admin.recent.minute(self.now)

    @classmethod
    async def read(cls, admin: Admin) -> "Book":
        """With what anybody has changed by now. Raises `StoreError`."""
        await admin.held.refresh()
        keys, teams = admin.held.keys.values(), admin.held.teams.values()
        # The limiter knows best, but only of those who may still use something.
        asked: list[Owner] = [("key", one.id) for one in keys if one.budgets and not _counted(admin, one.id)]
        asked += [("team", one.id) for one in teams if one.budgets and not _counted(admin, one.id)]
        return cls(admin, await admin.store.spent(asked, time.time()) if asked else {})

    def key(self, key_id: str) -> KeyRecord:
        """One that may be changed. Raises `GatewayError`."""
        if key_id.startswith(FROM_CONFIG):
            self.config_key(key_id)
            raise GatewayError(
                409, "read_only_key", "This key stands in the gateway's config file; change it there, and reload."
            )
        record = self.keys.get(key_id)
        if record is None:
            raise not_found("key", key_id)
        return record

    def live_key(self, key_id: str) -> KeyRecord:
        record = self.key(key_id)
        if status(record, self.now) == "revoked":
            raise GatewayError(409, "key_revoked", f"The key '{record.id}' is revoked for good; make a new one.")
        return record

    def team(self, team_id: str) -> TeamRecord:
        record = self.teams.get(team_id)
        if record is None:
            raise not_found("team", team_id)
        return record

    def team_id(self, name: str | None) -> str | None:
        """Of a team by its name. Raises `GatewayError`."""
        if name is None:
            return None
        for team in self.teams.values():
            if team.name == name:
                return team.id
        raise GatewayError(
            400, "invalid_value", f"Invalid value for 'team': there is no team '{printable(name)}'.", param="team"
        )

    def config_key(self, key_id: str) -> KeyShown:
        for one in self._admin.config()["keys"]:
            if FROM_CONFIG + one["name"] == key_id:
                return self._from_config(one)
        raise not_found("key", key_id)

    def config_keys(self) -> Iterator[KeyShown]:
        return map(self._from_config, self._admin.config()["keys"])

    def _from_config(self, one: Mapping[str, Any]) -> KeyShown:
        return KeyShown(
            id=FROM_CONFIG + one["name"],
            name=one["name"],
            team=None,
            owner=None,
            note=None,
            models=one["models"],
            limits=LimitsShown(**one["limits"]),
            budgets=[],
            last4=None,
            created_at=None,
            expires_at=None,
            revoked_at=None,
            status="active",
            source="config",
            now=self._used(f"{FROM_CONFIG}{one['name']}", one["name"], Limits(**one["limits"])),
        )

    def show(self, record: KeyRecord) -> KeyShown:
        team = self.teams.get(record.team_id or "")
        return key_shown(
            record,
            team.name if team else None,
            self._budgets("key", record),
            self._used(record.id, record.name, record.limits),
            self.now,
        )

    def show_team(self, record: TeamRecord) -> TeamShown:
        return team_shown(record, self._budgets("team", record), self._working[record.id])

    def _budgets(self, kind: Literal["key", "team"], record: KeyRecord | TeamRecord) -> list[BudgetUse]:
        use = self._admin.use(record.id)
        if use is not None and [one.budget for one in use.budgets] == list(record.budgets):
            return list(use.budgets)
        return budget_use(record.budgets, self._spent.get((kind, record.id), {}), self.now)

    def _used(self, account: str, name: str, limits: Limits) -> UsedNow:
        use = self._admin.use(account)
        if use is not None and limits != Limits():
            return UsedNow(requests=use.requests, tokens=use.tokens, parallel=use.parallel)
        requests, tokens = self._recently.get(name, (0, 0))
        return UsedNow(requests=requests, tokens=tokens, parallel=None)


def judge_name(name: str, config_keys: Iterable[Mapping[str, Any]]) -> None:
    """Raises `GatewayError` for the name of a key in the config: one name is one key in metrics and logs."""
    if any(one["name"] == name for one in config_keys):
        raise GatewayError(409, "name_taken", "A key in the gateway's config file has this name.", param="name")


async def written(change: Awaitable[None], what: str, name: str) -> None:
    """Raises `GatewayError` not_found if another gateway was quicker to delete it."""
    try:
        await change
    except KeyError:
        raise not_found(what, name) from None


def router(admin: Admin) -> APIRouter:
    api = APIRouter()
    turn = asyncio.Lock()  # a change is read, made and written by one at a time

    def known_models() -> set[str]:
        return set(admin.gateway.policy.models)

    async def answer(key_id: str) -> KeyShown:
        book = await Book.read(admin)
        return book.show(book.keys[key_id])

    # ---- keys

    @api.get("/keys", response_model=Keys)
    async def list_keys(asked: Annotated[KeysAsked, Query()]) -> Response:
        """Those of the config first, then the newest."""
        book = await Book.read(admin)
        stored = sorted(book.keys.values(), key=lambda record: record.created_at, reverse=True)
        return await listing(
            one
            for one in chain(book.config_keys(), map(book.show, stored))
            if (asked.team is None or one.team == asked.team) and (asked.status is None or one.status == asked.status)
        )

    @api.post("/keys", status_code=201)
    async def add_key(asked: NewKey) -> KeyMade:
        """Makes a key, which works at once. The whole key is in this answer and nowhere else."""
        async with turn:
            book = await Book.read(admin)
            judge_name(asked.name, admin.config()["keys"])
            judge_models(asked.models or (), known_models())
            key = make_key()
            record = changed_key(blank_key(key, book.now), asked, book.team_id(asked.team), book.now)
            await admin.store.add_key(record, WHO)
            shown = await answer(record.id)
        return KeyMade(**shown.model_dump(), key=key)

    @api.get("/keys/{key_id:path}")
    async def one_key(key_id: str) -> KeyShown:
        book = await Book.read(admin)
        return book.config_key(key_id) if key_id.startswith(FROM_CONFIG) else book.show(book.key(key_id))

    @api.patch("/keys/{key_id:path}")
    async def change_key(key_id: str, asked: KeyAsked) -> KeyShown:
        """Sets the fields that are given; null clears one."""
        async with turn:
            book = await Book.read(admin)
            before = book.live_key(key_id)
            if "name" in asked.model_fields_set and asked.name != before.name:
                judge_name(asked.name, admin.config()["keys"])
            judge_models(asked.models or (), known_models())
            await written(
                admin.store.change_key(changed_key(before, asked, book.team_id(asked.team), book.now), WHO),
                "key",
                key_id,
            )
            return await answer(before.id)

    @api.delete("/keys/{key_id:path}")
    async def revoke_key(key_id: str) -> KeyShown:
        """Revokes it, for good. What has been used stays known."""
        async with turn:
            book = await Book.read(admin)
            record = book.key(key_id)
            if status(record, book.now) != "revoked":
                await written(admin.store.change_key(revoked(record, book.now), WHO), "key", key_id)
            return await answer(record.id)

    @api.post("/keys/{key_id:path}/rotate")
    async def rotate_key(key_id: str, asked: RotationAsked | None = None) -> KeyRotated:
        """A new key for the same id. The old one works on for `overlap_seconds`."""
        overlap = asked.overlap_seconds if asked is not None else 0
        async with turn:
            book = await Book.read(admin)
            before = book.live_key(key_id)
            key = make_key()
            await written(
                admin.store.change_key(rotated(before, make_secret(key), book.now, overlap), WHO), "key", key_id
            )
            shown = await answer(before.id)
        until = iso(book.now + overlap) if overlap else None
        return KeyRotated(**shown.model_dump(), key=key, old_valid_until=until)

    # ---- teams

    @api.get("/teams", response_model=Teams)
    async def list_teams() -> Response:
        book = await Book.read(admin)
        return await listing(map(book.show_team, sorted(book.teams.values(), key=lambda one: one.name)))

    async def team_answer(team_id: str) -> TeamShown:
        book = await Book.read(admin)
        return book.show_team(book.teams[team_id])

    @api.post("/teams", status_code=201)
    async def add_team(asked: NewTeam) -> TeamShown:
        """Makes a team: its limits and budgets hold for all of its keys together."""
        async with turn:
            judge_models(asked.models or (), known_models())
            record = changed_team(blank_team(time.time()), asked)
            await admin.store.add_team(record, WHO)
            return await team_answer(record.id)

    @api.get("/teams/{team_id}")
    async def one_team(team_id: str) -> TeamShown:
        book = await Book.read(admin)
        return book.show_team(book.team(team_id))

    @api.patch("/teams/{team_id}")
    async def change_team(team_id: str, asked: TeamAsked) -> TeamShown:
        """Sets the fields that are given; null clears one."""
        async with turn:
            book = await Book.read(admin)
            before = book.team(team_id)
            judge_models(asked.models or (), known_models())
            await written(admin.store.change_team(changed_team(before, asked), WHO), "team", team_id)
            return await team_answer(before.id)

    @api.delete("/teams/{team_id}")
    async def delete_team(team_id: str) -> TeamShown:
        """Deletes a team that no working key is in."""
        async with turn:
            book = await Book.read(admin)
            shown = book.show_team(book.team(team_id))
            if shown.keys:
                raise GatewayError(
                    409, "team_in_use", f"The team has {shown.keys} working keys; revoke them or move them first."
                )
            await written(admin.store.delete_team(team_id, WHO), "team", team_id)
            await admin.held.refresh()
        return shown

    return api
