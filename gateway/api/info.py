"""Models, health and metrics."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from engines.types import FleetView
from gateway.errors import GatewayError
from gateway.head import fresh_id, request_id
from gateway.observe.metrics import CONTENT_TYPE
from gateway.policy import Gateway, Model
from gateway.routing.models import not_found
from gateway.types import Caller
from gateway.wire import errors as wire_errors

Handler = Callable[[Request], Awaitable[Response]]


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


def error_response(error: GatewayError, headers: Mapping[str, str] | None = None) -> Response:
    response = Response(wire_errors.body(error), error.status, headers, media_type="application/json")
    response.raw_headers += wire_errors.headers(error)
    return response


def card(name: str, view: FleetView, created: int) -> dict[str, Any]:
    """A model as `/v1/models` shows it: the engine's own entry, under the name that clients send."""
    known = next((dict(r.card) for r in view.of(name) if r.card), {})
    return {"object": "model", "created": created, "owned_by": "vllm", **known, "id": name}


def _visible(gateway: Gateway, caller: Caller) -> dict[str, Model]:
    """The models that a key may use, by name and by alias."""
    return {
        name: model
        for name, model in gateway.policy.models.items()
        if caller.models is None or model.name in caller.models
    }


def _identify(gateway: Gateway, request: Request) -> Caller:
    def values(name: str) -> tuple[bytes, ...]:
        return tuple(value for key, value in request.scope["headers"] if key == name.encode())

    return gateway.policy.keyring.identify(values("authorization"), values("x-api-key"))


def routes(gateway: Gateway, started: int) -> list[tuple[str, Handler]]:
    """The paths to GET, in order. `started` is seconds since the epoch: when models without an engine were `created`."""

    def guarded(handler: Callable[[Request, Caller], Response]) -> Handler:
        async def checked(request: Request) -> Response:
            given = request.headers.get("x-request-id")
            own = {"x-request-id": request_id(given.encode("latin-1") if given is not None else None) or fresh_id()}
            try:
                response = handler(request, _identify(gateway, request))
                response.headers.update(own)
                return response
            except GatewayError as error:
                return error_response(error, own)

        return checked

    @guarded
    def list_models(request: Request, caller: Caller) -> Response:
        view = gateway.fleet.view
        names = dict.fromkeys(model.name for model in _visible(gateway, caller).values())
        return json_response({"object": "list", "data": [card(name, view, started) for name in names]})

    @guarded
    def one_model(request: Request, caller: Caller) -> Response:
        name = request.path_params["name"]
        model = _visible(gateway, caller).get(name)
        if model is None:
            raise not_found(name)
        return json_response({**card(model.name, gateway.fleet.view, started), "id": name})

    async def live(request: Request) -> Response:
        return json_response({"status": "ok"})

    async def ready(request: Request) -> Response:
        if gateway.ready:
            return json_response({"status": "ready"})
        why = "draining" if gateway.draining else "no model has a healthy engine"
        return json_response({"status": "unavailable", "reason": why}, 503, {"retry-after": "1"})

    async def metrics(request: Request) -> Response:
        gateway.metrics.fleet(gateway.fleet.view)
        return Response(await asyncio.to_thread(gateway.metrics.render), media_type=CONTENT_TYPE)

    return [
        ("/v1/models", list_models),
        ("/v1/models/{name:path}", one_model),
        ("/health/live", live),
        ("/health/ready", ready),
        ("/health", ready),
        ("/metrics", metrics),
    ]
