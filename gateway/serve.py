"""One request, from its headers to its last byte. Knows nothing of HTTP servers: a door hands it a head, a way to
read the body, and a sink."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog

from engines.types import Replica
from gateway import errors
from gateway.errors import Fault, GatewayError
from gateway.head import judge_head
from gateway.policy import Gateway, Model
from gateway.relay import ClientGone, Terms, relay
from gateway.routing.balance import pick
from gateway.routing.models import Plan, plan
from gateway.run import Run
from gateway.types import Call, Head, Sink
from gateway.upstream.client import StaleConnectionError, Unreachable
from gateway.wire.openai import decode, encode

log = structlog.get_logger("penstock")

MAX_ATTEMPTS = 3

ReadBody = Callable[[], Awaitable[bytes | bytearray]]


async def serve(gateway: Gateway, head: Head, read_body: ReadBody, sink: Sink) -> None:
    """Answers one request. Never raises; settles in every way out, exactly once. When cancelled, it ends what it has begun
    with an error."""
    policy, run = gateway.policy, Run(gateway, head, sink)
    task = asyncio.current_task()
    assert task is not None
    gateway.requests.add(task)
    try:
        if gateway.draining:
            raise errors.draining()
        run.caller = policy.keyring.identify(head.authorization, head.api_key)
        judge_head(head, policy.max_body_bytes)
        call = run.call = decode(head.endpoint, await read_body())
        run.ready = time.monotonic()
        made = plan(call, run.caller, policy.models, run.ready)
        run.model = made.model
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
        log.exception("a fault in the gateway", request_id=head.request_id)
        run.answer(errors.internal())
    finally:
        run.settle()
        gateway.requests.discard(task)


async def attempts(gateway: Gateway, run: Run, call: Call, plan: Plan[Model]) -> None:
    """Pick and attempt, until an answer is whole or can't be had. Free before the first byte, afterwards not at all."""
    model, terms = plan.model, run.terms(plan)
    failure: GatewayError | None = None
    while len(run.tried) < MAX_ATTEMPTS:
        replica = pick(gateway.fleet.view.of(model.name), run.tried, gateway.client.open)
        if replica is None:
            break
        run.tried.append(replica.id)
        try:
            await attempt(gateway, run, call, replica, terms)
        except Unreachable:
            model.metrics.attempts["unreachable"] += 1
        except GatewayError as error:
            model.metrics.attempts[error.code or "error"] += 1
            if isinstance(error, errors.EngineStalledError):
                gateway.fleet.report_stall(replica.id)
            if error.fault is not Fault.ENGINE or error.status == 504 or run.first_byte is not None:
                raise
            failure = error
        else:
            model.metrics.attempts["ok"] += 1
            return
        gateway.fleet.report_failure(replica.id)
    raise failure or errors.no_healthy_engine(model.name)


async def attempt(gateway: Gateway, run: Run, call: Call, replica: Replica, terms: Terms) -> None:
    """One replica. Returns when the answer is whole. Raises `Unreachable`, `GatewayError`, `ClientGone`."""
    body = encode(call, replica.served_name, with_ids=terms.trail is not None)
    for fresh in (False, True):
        receiver = run.relay = relay(call, replica.model, run.sink, terms)
        connection = await gateway.client.send(replica, call.endpoint.engine_path, body, receiver, fresh=fresh)
        receiver.connection = connection
        gateway.ticker.relays.add(receiver)
        run.sent()
        answered = False
        try:
            run.sink.watch(receiver)
            await receiver.done
            answered = True
            return
        except StaleConnectionError:
            continue  # the engine had closed it before it read the request
        finally:
            run.sink.watch(None)
            gateway.ticker.relays.discard(receiver)
            connection.release(answered=answered)
    raise Unreachable("a fresh connection was closed at once")
