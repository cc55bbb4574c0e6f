"""From a name and a caller to a plan."""

from typing import Any, NamedTuple

import pytest

from gateway.errors import GatewayError
from gateway.limits.base import Limits
from gateway.limits.memory import MemoryLimiter
from gateway.routing.models import plan
from gateway.types import Call, Caller
from gateway.wire.openai import ENDPOINTS


class Model(NamedTuple):
    name: str
    request_timeout: float = 600
    template_kwargs: frozenset[str] = frozenset({"enable_thinking"})


TINY, OTHER = Model("tiny"), Model("other", 5)
MODELS = {"tiny": TINY, "default": TINY, "other": OTHER}


def asked(model: str, **body: Any) -> Call:
    return Call(ENDPOINTS[0], model, body, 10, False, False, None)


def caller(*models: str) -> Caller:
    account = MemoryLimiter().account("x", Limits())
    return Caller("x", account, frozenset(models) if models else None)


@pytest.mark.parametrize(
    ("name", "may_use", "found"),
    [
        ("tiny", (), TINY),
        ("default", (), TINY),
        ("default", ("tiny",), TINY),
        ("other", ("tiny", "other"), OTHER),
    ],
)
def test_found(name: str, may_use: tuple[str, ...], found: Model) -> None:
    model, deadline = plan(asked(name), caller(*may_use), MODELS, now=100)
    assert model is found
    assert deadline == 100 + found.request_timeout


@pytest.mark.parametrize(
    ("name", "may_use"), [("nobody", ()), ("other", ("tiny",)), ("Tiny", ()), ("", ()), ("x" * 9999, ())]
)
def test_not_found(name: str, may_use: tuple[str, ...]) -> None:
    with pytest.raises(GatewayError) as refused:
        plan(asked(name), caller(*may_use), MODELS, now=0)
    error = refused.value
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert len(error.message) < 200


@pytest.mark.parametrize("given", [None, {}, {"enable_thinking": True}])
def test_allowed_template_kwargs(given: Any) -> None:
    assert plan(asked("tiny", chat_template_kwargs=given), caller(), MODELS, now=0)[0] is TINY


@pytest.mark.parametrize("allowed", [frozenset({"enable_thinking"}), frozenset()])
def test_refused_template_kwargs(allowed: frozenset[str]) -> None:
    models = {"tiny": Model("tiny", 1, allowed)}
    with pytest.raises(GatewayError) as refused:
        plan(asked("tiny", chat_template_kwargs={"tokenize": True}), caller(), models, now=0)
    error = refused.value
    assert (error.status, error.code, error.param) == (400, "unsupported_parameter", "chat_template_kwargs")
    assert ", ".join(sorted(allowed)) or "none" in error.message
