"""The gateway itself: is the key right, what is in force, and reload."""

import json
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from gateway import __version__
from gateway.admin.answers import listing
from gateway.admin.context import Admin, ReloadFailedError
from gateway.admin.masking import masked
from gateway.admin.shapes import Audit, AuditAsked, AuditShown, ConfigShown, Reloaded, Session, iso
from gateway.errors import GatewayError
from gateway.store.base import AuditEntry


def router(admin: Admin) -> APIRouter:
    api = APIRouter()

    @api.get("/session")
    async def session() -> Session:
        """Whether the key is right."""
        return Session(version=__version__)

    @api.get("/config")
    async def config() -> ConfigShown:
        """What is in force, defaults included; secrets are masked."""
        return ConfigShown(path=admin.config_path, config=masked(admin.config()))

    @api.post("/reload")
    async def reload() -> Reloaded:
        """Reads the config file again, as SIGHUP does. A faulty file changes nothing."""
        try:
            notes = await admin.reload()
        except ReloadFailedError as error:
            raise GatewayError(400, "invalid_config", str(error)) from None
        await admin.note("reload", admin.config_path)
        return Reloaded(notes=notes)

    @api.get("/audit", response_model=Audit)
    async def audit(asked: Annotated[AuditAsked, Query()]) -> Response:
        """Who changed what, the newest first; secrets are in none of it."""
        return await listing(map(entry_shown, await admin.store.audit(asked.limit)))

    return api


def entry_shown(entry: AuditEntry) -> AuditShown:
    return AuditShown(
        time=iso(entry.time),
        who=entry.who,
        what=entry.what,
        target=entry.target,
        before=None if entry.before is None else json.loads(entry.before),
        after=None if entry.after is None else json.loads(entry.after),
    )
