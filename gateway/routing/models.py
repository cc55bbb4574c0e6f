"""Stage 3: from a name and a caller to a plan."""

from collections.abc import Mapping
from typing import Protocol, TypeVar

from gateway.errors import GatewayError
from gateway.types import Call, Caller
from gateway.wire.rules import shown


class Routed(Protocol):
    """What planning needs to know of a model."""

    @property
    def name(self) -> str: ...
    @property
    def request_timeout(self) -> float:
        """Seconds."""
        ...

    @property
    def template_kwargs(self) -> frozenset[str]:
        """Keys of chat_template_kwargs that clients may set."""
        ...


M = TypeVar("M", bound=Routed)


def not_found(name: str) -> GatewayError:
    """One answer for a model that is not there and one that the key may not use."""
    return GatewayError(
        404,
        "model_not_found",
        f"The model '{shown(name)}' does not exist or you do not have access to it.",
        param="model",
    )


def plan(call: Call, caller: Caller, models: Mapping[str, M], now: float) -> tuple[M, float]:
    """The model that answers, and until when (monotonic seconds). `models` is by name and by alias. Raises `GatewayError` model_not_found, or what this model does not allow."""
    model = models.get(call.model)
    if model is None or (caller.models is not None and model.name not in caller.models):
        raise not_found(call.model)
    for name in call.body.get("chat_template_kwargs") or ():
        if name not in model.template_kwargs:
            allowed = ", ".join(sorted(model.template_kwargs)) or "none"
            raise GatewayError(
                400,
                "unsupported_parameter",
                f"Unsupported parameter: 'chat_template_kwargs.{shown(name)}'. Allowed for this model: {allowed}.",
                param="chat_template_kwargs",
            )
    return model, now + model.request_timeout
