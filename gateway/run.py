"""A request's progress, and its last stage: settling, in every way out, exactly once."""

import asyncio
from time import monotonic, time

from engines.types import ReplicaState
from gateway.drive import Event
from gateway.errors import Fault, GatewayError, draining
from gateway.head import fresh_id
from gateway.limits.base import FREE, Lease, Refused, Standing
from gateway.limits.headers import limit_headers
from gateway.observe.access import AccessRecord
from gateway.observe.counters import Histogram
from gateway.policy import Gateway, Model
from gateway.relay import StreamRelay, WholeRelay
from gateway.resilience.attempts import Cause
from gateway.resilience.resume import MAX_DEATHS, obstacle
from gateway.types import Call, Caller, Head, Outcome, Sink, Usage, lines
from gateway.usage import prompt
from gateway.usage.trail import Trail
from gateway.wire import errors as wire_errors

NOTHING = Usage()
_new = tuple.__new__  # a NamedTuple's own constructor takes several times as long
MAX_MODEL = 300  # characters of a model's name that are kept for the log, which shows fewer
CLIENT_CLOSED_REQUEST = 499  # nginx's status for it; never sent, only counted


class Run:
    """One request's progress: what its last stage, settling, has to know. Is the `Terms` of its relays."""

    ttft: Histogram
    inter_token: Histogram

    def __init__(self, gateway: Gateway, head: Head, sink: Sink) -> None:
        self.gateway = gateway
        self.head = head
        self.sink = sink
        self.arrived = monotonic()
        self.request_id = head.request_id or fresh_id()
        self.tried: list[str] = []
        self.relay: StreamRelay | WholeRelay | None = None
        self.caller: Caller | None = None
        self.call: Call | None = None
        self.model: Model | None = None
        self.lease: Lease | None = None
        self.standing: Standing | None = None
        self.error: GatewayError | None = None
        self.turn: Event | None = None  # what it waits for in line
        self.cause: Cause | None = None  # why its last attempt failed
        self.failure: GatewayError | None = None  # what the client hears if no other attempt does better
        self.draws = False  # one of the model's retries under way
        self.trail: Trail | None = None
        self.prompt_tokens = 0
        self.client_gone = False
        self.status = 0  # that was sent, where the answer is an error
        self.deaths = 0  # engines that died under the stream
        self.ready = 0.0  # monotonic seconds: the body was there
        self.deadline = 0.0  # monotonic seconds
        self.stall_timeout = 0.0  # seconds
        self._sent = False  # an engine has the request

    async def admit(self, call: Call, model: Model) -> Lease:
        """Stage 4. Raises `GatewayError` rate_limit_exceeded."""
        assert self.caller is not None
        account = self.caller.account
        counter = model.counter if account.counts_tokens else None
        if counter is not None and call.size > prompt.BIG:
            self.prompt_tokens = await asyncio.to_thread(prompt.count, counter, model.estimator, call)
        else:
            self.prompt_tokens = prompt.count(counter, model.estimator, call)
        answer = call.max_tokens if call.max_tokens is not None else model.answers.expected()
        try:
            lease = await self.gateway.limiter.admit(account, self.prompt_tokens, answer, model.price or FREE)
        except Refused as refused:
            self.standing = refused.standing
            self.gateway.metrics.key(self.caller.name).rejections[refused.limit] += 1
            raise wire_errors.over_limit(refused) from None
        self.standing = lease.standing
        return lease

    def bind(self, call: Call, model: Model, deadline: float) -> None:
        """Fixes the terms of all attempts."""
        self.deadline = deadline
        self.stall_timeout = model.stall_timeout
        self.ttft, self.inter_token = model.metrics.ttft, model.metrics.inter_token
        if call.stream and model.failover == "exact" and obstacle(call) is None:
            self.trail = Trail(call.endpoint.path)

    @property
    def first_byte(self) -> float | None:
        """Monotonic seconds: when the answer began to go out."""
        return self.relay.first_byte if self.relay is not None else None

    def take(self, relay: StreamRelay | WholeRelay) -> None:
        """The next attempt's relay; what has gone out stays gone out."""
        relay.first_byte = self.first_byte
        self.relay = relay

    def better_elsewhere(self) -> bool:
        model = self.model
        assert model is not None
        replicas = self.gateway.fleet.view.of(model.name)
        return any(r.id == self.tried[-1] and r.state is ReplicaState.UNHEALTHY for r in replicas) and any(
            r.state is ReplicaState.READY and r.id not in self.tried for r in replicas
        )

    def resumable(self) -> bool:
        """Whether another engine may go on with the stream that has just been cut. Counts it."""
        failovers = self.model.metrics.failovers if self.model is not None else {}
        if self.trail is None or not self.trail.whole:
            if self.model is not None and self.model.failover == "exact":
                failovers["refused"] += 1
            return False
        self.deaths += 1
        if self.deaths > MAX_DEATHS:
            failovers["failed"] += 1
            return False
        return True

    def give_up(self) -> None:
        waits = self.relay or self.turn
        if waits is not None:
            waits.happen(draining())

    def sent(self) -> None:
        if not self._sent:
            self._sent = True
            self.gateway.metrics.overhead["admit"].observe(monotonic() - self.ready)

    def headers(self) -> bytes:
        """What every reply bears: whole lines."""
        return b"x-request-id: %b\r\nopenai-processing-ms: %d\r\n%b" % (
            self.request_id.encode(),
            int((monotonic() - self.arrived) * 1000),
            b"" if self.standing is None else limit_headers(self.standing),
        )

    def answer(self, error: GatewayError) -> None:
        """Tells the client: with a status while there has been none, else with the event that ends a stream."""
        self.error = error.with_traceback(None)  # whose frames hold this run
        sink, endpoint = self.sink, self.head.endpoint
        self.status = 200 if sink.started else error.status
        if not sink.started:
            body = wire_errors.body(error, endpoint)
            more = lines([(b"content-type", b"application/json"), *wire_errors.headers(error)])
            sink.start(error.status, self.headers() + more, len(body))
            sink.finish(body)
        else:
            sink.close_after()
            sink.finish(wire_errors.event(error, endpoint))

    def settle(self) -> None:
        """Stage 8. Runs in every way out."""
        usage, cost = self.usage(), 0
        if usage is not None and self.model is not None and self.model.price is not None:
            cost = self.model.price.cost(*usage)
        if self.draws and self.model is not None:
            self.model.retries.give_back()
        if self.lease is not None:
            self.lease.settle(None if usage is None and self.refundable else sum(usage[:2]) if usage else 0, cost)
        if usage is not None:
            self.learn(usage)
        self.record(self.outcome(usage), cost)
        self.relay = None  # whose terms this is: a cycle of references, which only a collection could undo

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
        if not usage.prompt and (usage.completion or self.client_gone):
            told = self.trail.prompt_tokens if self.trail is not None else 0
            return usage._replace(prompt=told or self.prompt_tokens)
        return usage

    def learn(self, usage: Usage) -> None:
        """What this answer teaches about the model's next ones, and the counters of tokens."""
        model, call, caller = self.model, self.call, self.caller
        assert model is not None
        assert call is not None
        assert caller is not None
        metrics, keys = model.metrics, self.gateway.metrics
        key = keys.keys.get(caller.name) or keys.key(caller.name)
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
        error, first, replica = self.error, self.first_byte, self.tried[-1] if self.tried else None
        ttft = None if first is None else first - self.arrived
        if self.client_gone:
            return Outcome(CLIENT_CLOSED_REQUEST, "client_cancelled", None, usage, replica, ttft, len(self.tried))
        if error is None:
            return Outcome(200, "completed", None, usage, replica, ttft, len(self.tried))
        state = "engine_failed" if error.fault is Fault.ENGINE else "refused" if self.lease is None else "error"
        return Outcome(self.status, state, error.code, usage, replica, ttft, len(self.tried))  # type: ignore[arg-type]

    def record(self, outcome: Outcome, cost: int) -> None:
        head, gateway = self.head, self.gateway
        seconds = monotonic() - self.arrived
        metrics = self.model.metrics if self.model is not None else gateway.metrics.other_model
        metrics.request(head.endpoint.path, outcome.status, seconds)
        usage, at = outcome.usage, time() - seconds
        prompt, completion, cached = usage or NOTHING
        if gateway.note_usage is not None and self.caller is not None:
            gateway.note_usage(
                (
                    at,
                    self.request_id,
                    self.caller.id,
                    self.caller.team,
                    self.model.name if self.model is not None else "",
                    head.endpoint.path,
                    outcome.status,
                    outcome.state,
                    outcome.error,
                    outcome.replica,
                    prompt,
                    completion,
                    cached,
                    cost,
                    outcome.ttft,
                    seconds,
                    outcome.attempts,
                )
            )
        gateway.access_log.append(
            _new(
                AccessRecord,
                (
                    at,
                    self.request_id,
                    self.caller.name if self.caller is not None else None,
                    self.call.model[:MAX_MODEL] if self.call is not None else None,
                    head.endpoint.path,
                    outcome.replica,
                    outcome.status,
                    prompt if usage else None,
                    completion if usage else None,
                    cached if usage else None,
                    outcome.ttft,
                    seconds,
                    outcome.attempts,
                    outcome.state,
                    outcome.error,
                    head.retry_count,
                    head.client,
                ),
            )
        )
