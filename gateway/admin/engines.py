"""Models, and the engines that answer for them."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query

from engines.types import Replica
from gateway.admin.context import Admin
from gateway.admin.errors import not_found
from gateway.admin.shapes import Engines, EngineShown, LogAsked, LogTail, Models, ModelShown, Price
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


def model(admin: Admin, one: Model) -> ModelShown:
    gateway, metrics, prices = admin.gateway, one.metrics, admin.prices(one.name)
    return ModelShown(
        name=one.name,
        aliases=[name for name, known in gateway.policy.models.items() if known is one and name != one.name],
        failover=one.failover,
        ready=bool(gateway.fleet.view.ready(one.name)),
        replicas=len(gateway.fleet.view.of(one.name)),
        open_requests=metrics.inflight,
        price=None if prices is None else Price(**prices._asdict()),
        requests=sum(metrics.requests.values()),
        prompt_tokens=metrics.prompt_tokens,
        completion_tokens=metrics.completion_tokens,
    )


def router(admin: Admin) -> APIRouter:
    api = APIRouter()
    working: set[asyncio.Task[None]] = set()  # restarts that are under way

    @api.get("/models")
    async def models() -> Models:
        """The models of the config, in its order."""
        return Models(data=[model(admin, one) for one in dict.fromkeys(admin.gateway.policy.models.values())])

    @api.get("/engines")
    async def engines() -> Engines:
        """All replicas of all models."""
        view = admin.fleet.view
        return Engines(data=[engine(admin, one) for replicas in view.replicas.values() for one in replicas])

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
        await asyncio.sleep(0)
        return engine(admin, find(admin, replica.id))

    return api
