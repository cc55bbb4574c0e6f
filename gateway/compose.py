"""From a config to what the rooms take: the policy, the sources of engines, the admin key."""

import math
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from engines.command import Machine, max_num_seqs
from engines.sources import ModelSource
from gateway.auth import Keyring, store_callers
from gateway.config.schema import Config, ModelConfig, grants
from gateway.drive import Event
from gateway.keys import digest
from gateway.limits.base import Limits, Price
from gateway.limits.memory import MemoryLimiter
from gateway.observe.metrics import Metrics
from gateway.policy import Model, Policy
from gateway.resilience.attempts import RetryBudget
from gateway.resilience.overload import Places
from gateway.store.base import KeyRecord, TeamRecord
from gateway.types import Caller
from gateway.usage.estimate import AnswerLengths, PromptEstimator
from gateway.usage.prompt import Counter

QUEUED_IN_ENGINES = 2  # requests at work for each one that an engine can work on: it must never wait for the next one


class Memory:
    """What is known of models beyond one policy: kept by name over reloads."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._places: dict[str, Places[Event]] = {}
        self._retries: dict[str, RetryBudget] = {}
        self._estimators: dict[str, PromptEstimator] = {}
        self._answers: dict[str, AnswerLengths] = {}
        self._counters: dict[str, Counter | None] = {}

    def prepare(self, config: Config) -> None:
        """Loads the tokenizers that a config asks for. Takes seconds: in a thread, where a loop serves."""
        for one in config.models.values():
            self._counter(tokenizer_folder(one))

    def model(self, name: str, config: ModelConfig, metrics: Metrics) -> Model:
        most, most_waiting = bounds(config, self._machine)
        return Model(
            name=name,
            failover=config.failover,
            stall_timeout=config.stall_timeout,
            request_timeout=config.request_timeout,
            failover_wait=config.failover_wait,
            max_open_requests=most,
            max_queue=most_waiting,
            queue_timeout=config.queue_timeout,
            template_kwargs=frozenset(config.chat_template_kwargs),
            counter=self._counter(tokenizer_folder(config)),
            estimator=self._estimators.setdefault(name, PromptEstimator()),
            answers=self._answers.setdefault(name, AnswerLengths()),
            metrics=metrics.model(name),
            price=price(config),
            places=self._places.setdefault(name, Places(most, most_waiting)),
            retries=self._retries.setdefault(name, RetryBudget()),
        )

    def _counter(self, folder: str | None) -> Counter | None:
        if folder is None or not Path(folder).is_dir():
            return None
        if folder not in self._counters:
            from gateway.usage.tokens import load_counter  # noqa: PLC0415 - 3 MB, for who has a tokenizer here

            self._counters[folder] = load_counter(Path(folder))
        return self._counters[folder]


def tokenizer_folder(config: ModelConfig) -> str | None:
    return config.tokenizer or (config.engine.model if config.engine else None)


def price(config: ModelConfig) -> Price | None:
    found = config.price
    if found is None:
        return None
    return Price(found.prompt, found.completion, found.prompt if found.cached is None else found.cached)


def bounds(config: ModelConfig, machine: Machine) -> tuple[float, int]:
    """Most requests of a model at work at once (infinite: no limit), and most that wait."""
    most: float = math.inf
    if config.max_open_requests is not None:
        most = config.max_open_requests
    elif config.engine is not None and not config.endpoints:
        most = QUEUED_IN_ENGINES * max_num_seqs(config.engine, machine)
    if config.max_queue is not None:
        return most, config.max_queue
    return most, 0 if most == math.inf else int(most)


def allowed(patterns: Iterable[str], models: Mapping[str, ModelConfig]) -> frozenset[str] | None:
    """The models that a key's patterns cover, by their own names or by an alias; None: all there are and will be."""
    if "*" in patterns:
        return None
    return frozenset(
        name
        for name, config in models.items()
        if any(grants(pattern, known) for pattern in patterns for known in (name, *config.aliases))
    )


class Known(Protocol):
    """What is known of the store's keys and teams."""

    @property
    def keys(self) -> Mapping[str, KeyRecord]: ...

    @property
    def teams(self) -> Mapping[str, TeamRecord]: ...

    @property
    def fresh(self) -> bool:
        """A key that is not here is in no store."""
        ...


def make_keyring(config: Config, limiter: MemoryLimiter, known: Known | None) -> Keyring:
    """The keys of the file, and those of the store that open anything now."""
    grants = partial(allowed, models=config.models)
    callers: dict[bytes, Caller] = {}
    if known is not None:
        callers = store_callers(known.keys.values(), known.teams, limiter, grants, time.time())
    for key in config.keys:
        key_id = f"config:{key.name}"
        account = limiter.account(key_id, Limits(**key.limits.model_dump()))
        callers[bytes.fromhex(key.digest())] = Caller(key.name, account, grants(key.models), key_id)
    anonymous = Caller("anonymous", limiter.account("anonymous", Limits()), None) if config.auth == "none" else None
    return Keyring(callers, anonymous, complete=known is None or known.fresh)


def make_policy(
    config: Config, memory: Memory, limiter: MemoryLimiter, metrics: Metrics, known: Known | None
) -> Policy:
    """Everything that a request is judged by. `memory` was prepared for this config: it does not block."""
    models: dict[str, Model] = {}
    for name, one in config.models.items():
        model = memory.model(name, one, metrics)
        models.update(dict.fromkeys([name, *one.aliases], model))
    server = config.server
    return Policy(
        make_keyring(config, limiter, known),
        models,
        server.max_body_bytes,
        server.body_timeout,
        server.drain_timeout,
        frozenset(server.cors_origins),
    )


def sources(config: Config) -> dict[str, ModelSource]:
    return {
        name: ModelSource(
            one.engine,
            tuple(one.endpoints),
            one.engine_api_key.get_secret_value() if one.engine_api_key else None,
            one.served_model_name,
            one.stall_timeout,
        )
        for name, one in config.models.items()
    }


def admin_digest(config: Config) -> bytes | None:
    return digest(config.admin_key.get_secret_value().encode()) if config.admin_key else None
