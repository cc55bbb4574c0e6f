"""What happens now: recent requests, and figures as a stream of events."""

import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated

from fastapi import APIRouter, Query, Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response

from gateway.admin.accounts import money
from gateway.admin.answers import listing
from gateway.admin.context import Admin, Held
from gateway.admin.errors import printable
from gateway.admin.figures import Look, look, rates
from gateway.admin.pulse import Pulse
from gateway.admin.recent import Entry
from gateway.admin.shapes import (
    EngineFigures,
    Figures,
    History,
    ModelFigures,
    Percentiles,
    Requests,
    RequestsAsked,
    RequestShown,
    iso,
    iso_milliseconds,
)
from gateway.observe.access import AccessRecord
from gateway.policy import Model


def make_pulse(admin: Admin) -> Pulse[Figures]:
    gateway = admin.gateway

    def now(before: Look, after: Look) -> Figures:
        return figures(admin, before, after)

    def then(before: Look, after: Look) -> Figures:
        """A plot has no use for engines or idle models, and an hour of them would be long in coming."""
        point = figures(admin, before, after)
        busy = [m for m in point.models if m.requests_per_second or m.output_tokens_per_second or m.open_requests]
        return point.model_copy(update={"models": busy, "engines": []})

    return Pulse(lambda: look(gateway.metrics, time.monotonic()), now, then)


def figures(admin: Admin, before: Look, after: Look) -> Figures:
    gateway, happened = admin.gateway, rates(before, after)
    models = dict.fromkeys(gateway.policy.models.values())
    return Figures(
        time=iso(time.time()),
        requests_per_second=round(happened.requests, 3),
        output_tokens_per_second=round(happened.output_tokens, 3),
        prompt_tokens_per_second=round(happened.prompt_tokens, 3),
        errors_per_second=round(happened.errors, 3),
        open_requests=len(gateway.requests),
        ttft_ms=Percentiles(p50=happened.ttft_p50, p95=happened.ttft_p95),
        itl_ms=Percentiles(p50=happened.itl_p50, p95=happened.itl_p95),
        loop_lag_ms=happened.loop_lag,
        models=[
            ModelFigures(
                name=model.name,
                requests_per_second=round(happened.models.get(model.name, (0.0, 0.0))[0], 3),
                output_tokens_per_second=round(happened.models.get(model.name, (0.0, 0.0))[1], 3),
                open_requests=model.metrics.inflight,
            )
            for model in models
        ],
        engines=[
            EngineFigures(
                id=replica.id,
                state=replica.state.value,
                running=replica.load.running if replica.load else None,
                waiting=replica.load.waiting if replica.load else None,
                kv_cache_usage=replica.load.kv_cache_usage if replica.load else None,
                restarts=replica.restarts,
                open_requests=gateway.client.open(replica),
            )
            for replicas in gateway.fleet.view.replicas.values()
            for replica in replicas
        ],
    )


def wanted(asked: RequestsAsked, record: AccessRecord) -> bool:
    status = asked.status
    return (
        (asked.key is None or record.key == asked.key)
        and (asked.model is None or record.model == asked.model)
        and (asked.outcome is None or record.outcome == asked.outcome)
        and (
            status is None
            or (record.status // 100 == int(status[0]) if status.endswith("xx") else record.status == int(status))
        )
    )


def cost(model: Model | None, record: AccessRecord) -> float | None:
    """In money; None where no price is known, or no engine worked on it."""
    if model is None or model.price is None or record.prompt_tokens is None:
        return None
    return money(model.price.cost(record.prompt_tokens, record.completion_tokens or 0, record.cached_tokens or 0))


def teams_of_keys(held: Held) -> dict[str, str]:
    """The teams' names by the keys' names; of keys that have one name, the newest counts."""
    return {
        key.name: held.teams[key.team_id].name
        for key in sorted(held.keys.values(), key=lambda key: key.created_at)
        if key.team_id is not None and key.team_id in held.teams
    }


def shown(entry: Entry, models: Mapping[str, Model], teams: Mapping[str, str]) -> RequestShown:
    record = entry.record
    return RequestShown(
        seq=entry.seq,
        id=record.request_id,
        time=iso_milliseconds(record.time),
        key=record.key,
        team=teams.get(record.key or ""),
        model=None if record.model is None else printable(record.model, 256),
        endpoint=record.endpoint,
        replica=record.replica,
        status=record.status,
        outcome=record.outcome,
        error=record.code,
        prompt_tokens=record.prompt_tokens,
        completion_tokens=record.completion_tokens,
        cached_tokens=record.cached_tokens,
        ttft_ms=None if record.ttft is None else round(record.ttft * 1000, 3),
        duration_ms=round(record.duration * 1000, 3),
        attempts=record.attempts,
        cost=cost(models.get(record.model or ""), record),
    )


def router(admin: Admin, pulse: Pulse[Figures]) -> APIRouter:
    api = APIRouter()

    @api.get("/requests", response_model=Requests)
    async def requests(asked: Annotated[RequestsAsked, Query()]) -> Response:
        """The newest requests first; never what they said. `before`: the `seq` to go on from."""
        admin.gateway.access_log.show()
        found = admin.recent.select(lambda record: wanted(asked, record), asked.limit, asked.before)
        models, teams = admin.gateway.policy.models, teams_of_keys(admin.held)
        return await listing(shown(entry, models, teams) for entry in found)

    @api.get(
        "/events",
        response_class=EventSourceResponse,
        responses={
            200: {"content": {"text/event-stream": {}}, "description": "`history` once, then `figures` each second"}
        },
    )
    async def events(request: Request) -> Response:
        """The last hour, then what happens, once a second."""
        if request.scope.get("penstock.head"):
            return Response(media_type="text/event-stream")
        return EventSourceResponse(stream(pulse), sep="\n")

    return api


async def stream(pulse: Pulse[Figures]) -> AsyncIterator[ServerSentEvent]:
    history = History(interval=pulse.interval, points=list(pulse.history))
    yield ServerSentEvent(history.model_dump_json(), event="history", sep="\n")
    async for point in pulse.watch():
        yield ServerSentEvent(point.model_dump_json(), event="figures", sep="\n")
