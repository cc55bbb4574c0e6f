"""One request, from its headers to its last byte. Knows nothing of HTTP servers: a door hands it a head, a way to
read the body, and a sink."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog

from gateway import errors
from gateway.errors import Fault, GatewayError
from gateway.limits.base import Lease, Refused, Standing
from gateway.limits.headers import limit_headers
from gateway.observe.logs import AccessRecord
from gateway.policy import Gateway, Model, Policy
from gateway.relay import ClientGone, StreamRelay, Terms, WholeRelay, relay
from gateway.routing.balance import pick
from gateway.routing.models import Plan, plan
from gateway.types import Call, Caller, Head, Headers, Outcome, Sink, Usage
from gateway.upstream.client import StaleConnectionError, Unreachable
from gateway.usage import prompt, tokens
from gateway.wire import errors as wire_errors
from gateway.wire.openai import decode, encode

log = structlog.get_logger("penstock")

MAX_ATTEMPTS = 3
CLIENT_CLOSED_REQUEST = 499  # nginx's status for it; never sent, only counted

ReadBody = Callable[[], Awaitable[bytes]]


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
        judge_head(head, policy)
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


async def attempts(gateway: Gateway, run: "Run", call: Call, plan: Plan[Model]) -> None:
    """Pick and attempt, until an answer is whole or can't be had. Free before the first byte, afterwards not at all."""
    model, terms = plan.model, run.terms(plan)
    failure: GatewayError | None = None
    while len(run.tried) < MAX_ATTEMPTS:
        replica = pick(gateway.fleet.view.of(model.name), run.tried, gateway.client.open)
        if replica is None:
            break
        run.tried.append(replica.id)
        body, fresh = encode(call, replica.served_name), False
        while True:
            run.relay = attempt = relay(call, model.name, run.sink, terms)
            try:
                connection = await gateway.client.send(replica, call.endpoint.engine_path, body, attempt, fresh=fresh)
            except Unreachable:
                gateway.fleet.report_failure(replica.id)
                model.metrics.attempts["unreachable"] += 1
                break
            attempt.connection = connection
            gateway.ticker.relays.add(attempt)
            run.sent()
            try:
                run.sink.watch(attempt)
                await attempt.done
                model.metrics.attempts["ok"] += 1
                return
            except StaleConnectionError:
                fresh = True
                continue
            except GatewayError as error:
                model.metrics.attempts[error.code or "error"] += 1
                if error.fault is not Fault.ENGINE or attempt.first_byte is not None or error.status == 504:
                    raise
                gateway.fleet.report_failure(replica.id)
                failure = error
                break
            finally:
                run.sink.watch(None)
                gateway.ticker.relays.discard(attempt)
                connection.release()
    raise failure or errors.no_healthy_engine(model.name)


def judge_head(head: Head, policy: Policy) -> None:
    """What the headers alone rule out. Raises `GatewayError`."""
    media = head.content_type.partition(b";")[0].strip().lower()
    if media != b"application/json" or head.content_encoding not in (b"", b"identity"):
        raise GatewayError(
            415,
            "unsupported_media_type",
            "The body must be JSON: send 'Content-Type: application/json', without a Content-Encoding.",
        )
    if head.content_length is not None and head.content_length > policy.max_body_bytes:
        raise too_large(policy.max_body_bytes)


def too_large(most: int) -> GatewayError:
    return GatewayError(413, "request_too_large", f"The body is too large: at most {most} bytes are accepted.")


def over_limit(refused: Refused) -> GatewayError:
    """A limiter's verdict as an answer."""
    if refused.limit == "parallel_requests":
        what = f"at most {refused.allowed} requests may be open at once"
    else:
        what = f"at most {refused.allowed} {refused.limit} per minute"
    for_good = refused.retry_after is None
    hint = "This request is larger than the limit itself." if for_good else "Please try again later."
    return GatewayError(
        429,
        "rate_limit_exceeded",
        f"Rate limit reached: {what}. {hint}",
        type="tokens" if refused.limit == "tokens" else "requests",
        retry_after=refused.retry_after,
        should_retry=False if for_good else None,
    )


class Run:
    """One request's progress: what its last stage, settling, has to know."""

    __slots__ = (
        "_sent",
        "call",
        "caller",
        "client_gone",
        "error",
        "gateway",
        "head",
        "lease",
        "model",
        "prompt_tokens",
        "ready",
        "relay",
        "sink",
        "standing",
        "tried",
    )

    def __init__(self, gateway: Gateway, head: Head, sink: Sink) -> None:
        self.gateway = gateway
        self.head = head
        self.sink = sink
        self.caller: Caller | None = None
        self.call: Call | None = None
        self.model: Model | None = None
        self.lease: Lease | None = None
        self.standing: Standing | None = None
        self.relay: StreamRelay | WholeRelay | None = None
        self.error: GatewayError | None = None
        self.tried: list[str] = []
        self.prompt_tokens = 0
        self.client_gone = False
        self.ready = 0.0  # monotonic seconds: the body was there
        self._sent = False  # an engine has the request

    async def admit(self, call: Call, model: Model) -> Lease:
        """Stage 4. Raises `GatewayError` rate_limit_exceeded."""
        assert self.caller is not None
        account = self.caller.account
        if model.counter is not None and call.size > tokens.BIG:
            self.prompt_tokens = await asyncio.to_thread(prompt.count, model.counter, model.estimator, call)
        else:
            self.prompt_tokens = prompt.count(model.counter, model.estimator, call)
        answer = call.max_tokens if call.max_tokens is not None else model.answers.expected()
        try:
            lease = await self.gateway.limiter.admit(account, self.prompt_tokens, answer)
        except Refused as refused:
            self.standing = refused.standing
            self.gateway.metrics.key(self.caller.name).rejections[refused.limit] += 1
            raise over_limit(refused) from None
        self.standing = lease.standing
        return lease

    def terms(self, plan: Plan[Model]) -> Terms:
        model = plan.model
        return Terms(
            self.head.arrived,
            plan.deadline,
            model.stall_timeout,
            self.headers,
            model.metrics.ttft,
            model.metrics.inter_token,
        )

    def sent(self) -> None:
        if not self._sent:
            self._sent = True
            self.gateway.metrics.overhead["admit"].observe(time.monotonic() - self.ready)

    def headers(self) -> Headers:
        """What every reply bears."""
        found: Headers = [
            (b"x-request-id", self.head.request_id.encode()),
            (b"openai-processing-ms", b"%d" % ((time.monotonic() - self.head.arrived) * 1000)),
        ]
        return found if self.standing is None else found + limit_headers(self.standing)

    def answer(self, error: GatewayError) -> None:
        """Tells the client: with a status while there has been none, else with the event that ends a stream."""
        self.error = error
        sink, endpoint = self.sink, self.head.endpoint
        if not sink.started:
            body = wire_errors.body(error, endpoint)
            headers = [*self.headers(), (b"content-type", b"application/json"), *wire_errors.headers(error)]
            sink.start(error.status, headers, len(body))
            sink.finish(body)
        else:
            sink.finish(wire_errors.event(error, endpoint))

    def settle(self) -> None:
        """Stage 8. Runs in every way out."""
        usage = self.usage()
        if self.lease is not None:
            self.lease.settle(None if usage is None and self.refundable else sum(usage[:2]) if usage else 0)
        if usage is not None:
            self.learn(usage)
        self.record(self.outcome(usage))

    @property
    def refundable(self) -> bool:
        """It failed, and not by the client's fault: as if it had never been."""
        return self.error is not None and self.error.fault is not Fault.CLIENT

    def usage(self) -> Usage | None:
        """What is charged: the engine's own count, else what was delivered and the prompt as counted before."""
        if self.relay is None:
            return None
        usage = self.relay.usage
        if usage is None:
            # A client that leaves has had its prompt worked on.
            return Usage(self.prompt_tokens) if self.client_gone and self._sent else None
        if usage.completion and not usage.prompt:
            return usage._replace(prompt=self.prompt_tokens)
        return usage

    def learn(self, usage: Usage) -> None:
        """What this answer teaches about the model's next ones, and the counters of tokens."""
        model, call, caller = self.model, self.call, self.caller
        assert model is not None
        assert call is not None
        assert caller is not None
        metrics, key = model.metrics, self.gateway.metrics.key(caller.name)
        metrics.prompt_tokens += usage.prompt
        metrics.completion_tokens += usage.completion
        metrics.cached_tokens += usage.cached
        key.prompt += usage.prompt
        key.completion += usage.completion
        key.cached += usage.cached
        if self.error is None and not self.client_gone and usage.prompt:
            model.estimator.observe(call.size, usage.prompt)
            if call.endpoint.generates:
                model.answers.observe(usage.completion)

    def outcome(self, usage: Usage | None) -> Outcome:
        error, replica = self.error, self.tried[-1] if self.tried else None
        first = self.relay.first_byte if self.relay is not None else None
        ttft = None if first is None else first - self.head.arrived
        if self.client_gone:
            return Outcome(CLIENT_CLOSED_REQUEST, "client_cancelled", None, usage, replica, ttft, len(self.tried))
        if error is None:
            return Outcome(200, "completed", None, usage, replica, ttft, len(self.tried))
        status = 200 if first is not None else error.status
        state = "engine_failed" if error.fault is Fault.ENGINE else "refused" if self.lease is None else "error"
        return Outcome(status, state, error.code, usage, replica, ttft, len(self.tried))  # type: ignore[arg-type]

    def record(self, outcome: Outcome) -> None:
        head, gateway = self.head, self.gateway
        seconds = time.monotonic() - head.arrived
        metrics = self.model.metrics if self.model is not None else gateway.metrics.other_model
        metrics.request(head.endpoint.path, outcome.status, seconds)
        usage = outcome.usage
        gateway.access_log.append(
            AccessRecord(
                time.time() - seconds,
                head.request_id,
                self.caller.name if self.caller is not None else None,
                self.call.model if self.call is not None else None,
                head.endpoint.path,
                outcome.replica,
                outcome.status,
                usage.prompt if usage else None,
                usage.completion if usage else None,
                usage.cached if usage else None,
                outcome.ttft,
                seconds,
                outcome.attempts,
                outcome.state,
                outcome.error,
                head.retry_count,
                head.client,
            )
        )
