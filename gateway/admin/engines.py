"""Models, and the engines that answer for them."""

import asyncio
from collections.abc import Iterable
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from engines.types import Replica
from gateway.admin.answers import listing
from gateway.admin.context import Admin
from gateway.admin.errors import not_found
from gateway.admin.shapes import Engines, EngineShown, LogAsked, LogTail, Models, ModelShown, PriceShown
from gateway.errors import GatewayError
from gateway.policy import Model


def find(admin: Admin, engine_id: str) -> Replica:
    """Raises `GatewayError` not_found."""
    for replicas in admin.fleet.view.replicas.values():
        for replica in replicas:
            if replica.id == engine_id:
                return replica
    raise not_found("engine", engine_id)


def engine(admin: Admin, replica: Replica) -> EngineShown:
    load = replica.load
    return EngineShown(
        id=replica.id,
        model=replica.model,
        state=replica.state.value,
        reason=replica.reason,
        managed=replica.managed,
        url=replica.url,
        open_requests=admin.gateway.client.open(replica),
        running=load.running if load else None,
        waiting=load.waiting if load else None,
        kv_cache_usage=load.kv_cache_usage if load else None,
        restarts=replica.restarts,
        max_model_len=replica.max_model_len,
    )


def model(admin: Admin, one: Model, names: Iterable[str]) -> ModelShown:
    gateway, metrics, price = admin.gateway, one.metrics, one.price
    return ModelShown(
        name=one.name,
        aliases=[name for name in names if name != one.name],
        failover=one.failover,
        ready=bool(gateway.fleet.view.ready(one.name)),
        replicas=len(gateway.fleet.view.of(one.name)),
        open_requests=metrics.inflight,
        price=None if price is None else PriceShown(**price._asdict()),
        requests=sum(metrics.requests.values()),
        prompt_tokens=metrics.prompt_tokens,
        completion_tokens=metrics.completion_tokens,
    )


def router(admin: Admin) -> APIRouter:
    api = APIRouter()
    working: set[asyncio.Task[None]] = set()  # restarts that are under way

    @api.get("/models", response_model=Models)
    async def models() -> Response:
        """The models of the config, in its order."""
        named: dict[Model, list[str]] = {}
        for name, one in admin.gateway.policy.models.items():
            named.setdefault(one, []).append(name)
        return await listing(model(admin, one, names) for one, names in named.items())

    @api.get("/engines", response_model=Engines)
    async def engines() -> Response:
        """All replicas of all models."""
        return await listing(engine(admin, one) for of in admin.fleet.view.replicas.values() for one in of)

    @api.get("/engines/{engine_id:path}/log")
    async def log(engine_id: str, asked: Annotated[LogAsked, Query()]) -> LogTail:
        """The last lines that an engine of ours printed; none for one that runs elsewhere."""
        replica = find(admin, engine_id)
        return LogTail(lines=await asyncio.to_thread(admin.fleet.log_tail, replica.id, asked.lines))

    @api.post("/engines/{engine_id:path}/restart", status_code=202)
    async def restart(engine_id: str) -> EngineShown:
        """Stops it at once, whatever it is doing, and starts it again: streams move to another replica or fail."""
        replica = find(admin, engine_id)
        if not replica.managed:
            raise GatewayError(
                409, "not_managed", f"The engine '{replica.id}' runs elsewhere: only whoever runs it can restart it."
            )
        task = asyncio.create_task(admin.fleet.restart(replica.id))
        working.add(task)
        task.add_done_callback(working.discard)
        await admin.note("restart_engine", replica.id)
        return engine(admin, find(admin, replica.id))

    @api.post("/engines/{engine_id:path}/drain", status_code=202)
    async def drain(engine_id: str) -> EngineShown:
        """Takes nothing new until it is resumed; what is open on it ends in its time."""
        replica = find(admin, engine_id)
        admin.fleet.drain(replica.id)
        await admin.note("drain_engine", replica.id)
        return engine(admin, find(admin, replica.id))

    @api.post("/engines/{engine_id:path}/resume", status_code=202)
    async def resume(engine_id: str) -> EngineShown:
        """Takes requests again. Does nothing to one that was not drained."""
        replica = find(admin, engine_id)
        admin.fleet.resume(replica.id)
        await admin.note("resume_engine", replica.id)
        return engine(admin, find(admin, replica.id))

    return api
