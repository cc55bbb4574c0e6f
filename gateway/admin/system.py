"""The gateway itself: is the key right, what is in force, and reload."""

from fastapi import APIRouter

from gateway import __version__
from gateway.admin.context import Admin, ReloadFailedError
from gateway.admin.masking import masked
from gateway.admin.shapes import ConfigShown, Reloaded, Session
from gateway.errors import GatewayError


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
            return Reloaded(notes=await admin.reload())
        except ReloadFailedError as error:
            raise GatewayError(400, "invalid_config", str(error)) from None

    return api
