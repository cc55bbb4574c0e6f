"""Between two attempts of a request: what the failure means, and which engine is next. What may be is `resilience`'s to say."""

import asyncio
from random import random
from time import monotonic

import structlog

from engines.types import Replica
from gateway import errors
from gateway.errors import Fault, GatewayError
from gateway.policy import Gateway, Model
from gateway.relay import ClientGone
from gateway.resilience.attempts import Cause, backoff, cause_of, free
from gateway.routing.balance import pick
from gateway.run import Run
from gateway.upstream.client import Unreachable

log = structlog.get_logger("penstock")

RETURN_POLL = 0.25  # seconds


def failed(gateway: Gateway, run: Run, model: Model, replica: Replica, error: Unreachable | GatewayError) -> None:
    """Books a failed attempt. Raises `GatewayError` if no other one may follow."""
    if isinstance(error, GatewayError):
        outcome, cause, failure = error.code or "error", cause_of(error), error
    else:
        outcome, cause, failure = "unreachable", Cause.LOST, run.failure or errors.no_healthy_engine(model.name)
    model.metrics.attempts[outcome] += 1
    if failure.fault is Fault.ENGINE:
        blame(gateway, run, model, replica, cause)
        if isinstance(error, errors.EngineStalledError):
            gateway.fleet.report_stall(replica.id)
    elif failure.fault is Fault.CLIENT:
        gateway.breakers.succeeded(replica.id, monotonic())
    cut = isinstance(error, GatewayError) and run.first_byte is not None
    if cause is Cause.FINAL or (cut and not run.resumable()):
        raise failure
    run.cause, run.failure = cause, failure.with_traceback(None)  # whose frames hold the run


def blame(gateway: Gateway, run: Run, model: Model, replica: Replica, cause: Cause) -> None:
    """Has the replica looked at, and counts the failure against it."""
    if cause is not Cause.FINAL:
        gateway.fleet.report_failure(replica.id)
    elif run.first_byte is not None:
        return  # a long answer that ran out of time says nothing of the engine
    ready = [r.id for r in gateway.fleet.view.ready(model.name)]
    seconds = gateway.breakers.failed(replica.id, ready, monotonic())
    if seconds:
        log.warning("a replica fails again and again and is left out", replica=replica.id, seconds=seconds)


async def next_replica(gateway: Gateway, run: Run, model: Model, cause: Cause) -> Replica | None:
    """Where a request goes after a failure; None if it must not go anywhere. Waits: a little for jitter, and up to
    `failover_wait` for an engine to come back. Raises `ClientGone`."""
    replica = untried(gateway, run, model)
    if replica is not None and not run.deaths:
        if not allowed(gateway, run, model, replica, cause):
            return None
        pause = backoff(len(run.tried), random())  # noqa: S311 - jitter
        if monotonic() + pause >= run.deadline:
            return None
        await asyncio.sleep(pause)
        if run.sink.gone:
            raise ClientGone
        replica = untried(gateway, run, model)
    if replica is None and cause is Cause.LOST and model.failover_wait:
        replica = await returning(gateway, run, model)
    return replica


def untried(gateway: Gateway, run: Run, model: Model) -> Replica | None:
    return pick(gateway.fleet.view.of(model.name), run.tried, gateway.client.open, gateway.breakers)


def allowed(gateway: Gateway, run: Run, model: Model, replica: Replica, cause: Cause) -> bool:
    """Whether the budget has room for this request's retry; those that wait for their time count too."""
    if run.draws or free(cause, doubtful=gateway.breakers.doubtful(replica.id)):
        return True
    run.draws = model.retries.draw(model.places.open)
    if not run.draws:
        model.metrics.attempts["over_budget"] += 1
    return run.draws


async def returning(gateway: Gateway, run: Run, model: Model) -> Replica | None:
    """A replica that is ready again (or at last), whichever it is; None if there is none within `failover_wait`.
    Raises `ClientGone`."""
    deadline = min(monotonic() + model.failover_wait, run.deadline)
    await asyncio.sleep(RETURN_POLL)  # what has just died may still look alive
    while monotonic() < deadline:
        if run.sink.gone:
            raise ClientGone
        replica = pick(gateway.fleet.view.of(model.name), (), gateway.client.open, gateway.breakers)
        if replica is not None:
            return replica
        await asyncio.sleep(RETURN_POLL)
    return None
