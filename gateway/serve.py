"""One request, from its headers to its last byte. Knows nothing of HTTP servers: a door hands it a head, a way to
read the body, and a sink."""

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic

import structlog

from engines.types import Replica
from gateway import errors
from gateway.errors import GatewayError
from gateway.failover import take_up
from gateway.head import judge_head
from gateway.policy import Gateway, Model
from gateway.relay import ClientGone, relay
from gateway.resilience.attempts import MAX_ATTEMPTS
from gateway.retry import failed, next_replica
from gateway.routing.balance import pick
from gateway.routing.models import plan
from gateway.run import Run
from gateway.turn import hand_over, wait_in_line
from gateway.types import Call, Head, Sink
from gateway.upstream.client import StaleConnectionError, Unreachable
from gateway.wire.openai import decode, encode

log = structlog.get_logger("penstock")

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
        body = b""  # it would take its room for as long as the answer takes, beside what was read of it
        run.ready = monotonic()
        model, deadline = plan(call, run.caller, policy.models, run.ready)
        run.model = model
        places = model.places
        if places.full:
            raise errors.overloaded(model.name)
        run.lease = await run.admit(call, model)
        if places.open < places.most:
            places.open += 1
        else:
            await wait_in_line(run, model, deadline)
        model.metrics.inflight += 1
        try:
            run.bind(call, model, deadline)
            await attempts(gateway, run, call, model)
        finally:
            model.metrics.inflight -= 1
            if places.waiting:
                hand_over(places)
            else:
                places.open -= 1
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


async def attempts(gateway: Gateway, run: Run, call: Call, model: Model) -> None:
    """Pick and attempt, until an answer is whole or can't be had. Free before the first byte, afterwards only by resuming."""
    breakers, outcomes, failovers = gateway.breakers, model.metrics.attempts, model.metrics.failovers
    while len(run.tried) < MAX_ATTEMPTS + run.deaths:
        if run.cause is None:
            replica = pick(gateway.fleet.view.of(model.name), (), gateway.client.open, breakers)
        else:
            replica = await next_replica(gateway, run, model, run.cause)
        if replica is None:
            break
        run.tried.append(replica.id)
        if breakers.troubled:
            breakers.picked(replica.id, run, monotonic())
        try:
            await attempt(gateway, run, call, replica)
        except (Unreachable, GatewayError) as error:
            failed(gateway, run, model, replica, error)
        except ClientGone:
            outcomes["client_gone"] += 1
            raise
        else:
            outcomes["ok"] += 1
            failovers["resumed"] += run.deaths
            if breakers.troubled:
                breakers.succeeded(replica.id, monotonic())
            return
    failovers["failed"] += run.deaths > 0
    raise run.failure or errors.no_healthy_engine(model.name)


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
    for fresh in (False, True):
        receiver = relay(call, replica.model, run.sink, run, resumed)
        run.take(receiver)
        # Encoded for each try, as it must not stay for as long as the answer takes: orjson gives 4 KB to the smallest.
        body = encode(call, replica.served_name, with_ids=trail is not None)
        connection = await gateway.client.send(replica, call.endpoint.engine_path, body, receiver, fresh=fresh)
        del body
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
            pass  # the engine had closed it before it read the request
        finally:
            run.sink.watch(None)
            gateway.ticker.relays.discard(receiver)
            connection.release(answered=answered)
    raise Unreachable("a fresh connection was closed at once")
