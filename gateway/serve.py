"""One request, from its headers to its last byte. Knows nothing of HTTP servers: a door hands it a head, a way to
read the body, and a sink."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog

from engines.types import Replica
from gateway import errors
from gateway.errors import Fault, GatewayError
from gateway.failover import take_up
from gateway.head import judge_head
from gateway.policy import Gateway, Model
from gateway.relay import ClientGone, relay
from gateway.routing.balance import pick
from gateway.routing.models import Plan, plan
from gateway.run import Run
from gateway.types import Call, Head, Sink
from gateway.upstream.client import StaleConnectionError, Unreachable
from gateway.wire.openai import decode, encode

log = structlog.get_logger("penstock")

MAX_ATTEMPTS = 3
RETURN_POLL = 0.25  # seconds

Body = bytes | Callable[[], Awaitable[bytes | bytearray]]  # what is there, or a way to wait for it


async def serve(gateway: Gateway, head: Head, body: Body, sink: Sink) -> None:
    """Answers one request. Never raises; settles in every way out, exactly once. When cancelled, it ends what it has begun
    with an error."""
    policy, run = gateway.policy, Run(gateway, head, sink)
    gateway.requests.add(run)
    try:
        if gateway.refusing:
            raise errors.draining()
        run.caller = policy.keyring.identify(head.authorization, head.api_key)
        judge_head(head, policy.max_body_bytes)
        call = run.call = decode(head.endpoint, body if isinstance(body, bytes) else await body())
        run.ready = time.monotonic()
        made = plan(call, run.caller, policy.models, run.ready)
        run.model = made.model
        judge_load(made.model)
        run.lease = await run.admit(call, made.model)
        made.model.metrics.inflight += 1
        try:
            await attempts(gateway, run, call, made)
        finally:
            made.model.metrics.inflight -= 1
    except GatewayError as error:
        run.answer(error)
    except ClientGone:
        run.client_gone = True
    except asyncio.CancelledError:
        run.answer(errors.draining())
    except Exception:
        log.exception("a fault in the gateway", request_id=run.request_id)
        run.answer(errors.internal())
    finally:
        run.settle()
        gateway.requests.discard(run)


async def attempts(gateway: Gateway, run: Run, call: Call, plan: Plan[Model]) -> None:
    """Pick and attempt, until an answer is whole or can't be had. Free before the first byte, afterwards only by resuming."""
    model = plan.model
    run.bind(call, plan)
    outcomes, failovers = model.metrics.attempts, model.metrics.failovers
    failure: GatewayError | None = None
    while len(run.tried) < MAX_ATTEMPTS + run.deaths:
        replica = pick(gateway.fleet.view.of(model.name), run.tried, gateway.client.open)
        if replica is None and run.deaths and model.failover_wait:
            replica = await returning(gateway, model)
        if replica is None:
            break
        run.tried.append(replica.id)
        try:
            await attempt(gateway, run, call, replica)
        except Unreachable:
            outcomes["unreachable"] += 1
        except GatewayError as error:
            outcomes[error.code or "error"] += 1
            if isinstance(error, errors.EngineStalledError):
                gateway.fleet.report_stall(replica.id)
            if error.fault is not Fault.ENGINE or error.status == 504:
                raise
            if run.first_byte is not None and not run.resumable():
                raise
            failure = error
        else:
            outcomes["ok"] += 1
            failovers["resumed"] += run.deaths
            return
        gateway.fleet.report_failure(replica.id)
    failovers["failed"] += run.deaths > 0
    raise failure or errors.no_healthy_engine(model.name)


def judge_load(model: Model) -> None:
    """Raises `GatewayError` overloaded: a request that would wait too long is better off elsewhere."""
    if model.max_open_requests is not None and model.metrics.inflight >= model.max_open_requests:
        raise errors.overloaded(model.name)


async def returning(gateway: Gateway, model: Model) -> Replica | None:
    """A replica that is ready again (or at last), whichever it is; None if there is none within `failover_wait`."""
    deadline = time.monotonic() + model.failover_wait
    await asyncio.sleep(RETURN_POLL)  # what has just died may still look alive
    while time.monotonic() < deadline:
        replica = pick(gateway.fleet.view.of(model.name), (), gateway.client.open)
        if replica is not None:
            return replica
        await asyncio.sleep(RETURN_POLL)
    return None


async def attempt(gateway: Gateway, run: Run, call: Call, replica: Replica) -> None:
    """One replica. Returns when the answer is whole. Raises `Unreachable`, `GatewayError`, `ClientGone`."""
    resumed, trail = None, run.trail
    if run.deaths and trail is not None:
        # A task of its own, because it has deadlines.
        call, resumed, rest = await asyncio.create_task(take_up(gateway.client, replica, call, trail))
        if rest:
            receiver = relay(call, replica.model, run.sink, run, resumed)
            run.take(receiver)
            receiver.data(rest)
            return await receiver
    body = encode(call, replica.served_name, with_ids=trail is not None)
    for fresh in (False, True):
        receiver = relay(call, replica.model, run.sink, run, resumed)
        run.take(receiver)
        connection = await gateway.client.send(replica, call.endpoint.engine_path, body, receiver, fresh=fresh)
        receiver.connection = connection
        gateway.ticker.relays.add(receiver)
        run.sent()
        answered = False
        try:
            run.sink.watch(receiver)
            await receiver
            answered = True
            return None
        except StaleConnectionError:
            continue  # the engine had closed it before it read the request
        finally:
            run.sink.watch(None)
            gateway.ticker.relays.discard(receiver)
            connection.release(answered=answered)
    raise Unreachable("a fresh connection was closed at once")
