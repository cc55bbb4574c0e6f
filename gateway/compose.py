"""From a config to what the rooms take: the policy, the sources of engines, the admin key."""

from collections.abc import Mapping
from pathlib import Path

from engines.sources import ModelSource
from gateway.auth import Keyring, digest
from gateway.config.schema import Config, ModelConfig, grants
from gateway.limits.base import Limits
from gateway.limits.memory import MemoryLimiter
from gateway.observe.metrics import Metrics
from gateway.policy import Model, Policy
from gateway.types import Caller
from gateway.usage.estimate import AnswerLengths, PromptEstimator
from gateway.usage.tokens import TokenCounter, load_counter


class Memory:
    """What is known of models beyond one policy: kept by name over reloads."""

    def __init__(self) -> None:
        self._estimators: dict[str, PromptEstimator] = {}
        self._answers: dict[str, AnswerLengths] = {}
        self._counters: dict[str, TokenCounter | None] = {}

    def prepare(self, config: Config) -> None:
        """Loads the tokenizers that a config asks for. Takes seconds: in a thread, where a loop serves."""
        for one in config.models.values():
            self._counter(tokenizer_folder(one))

    def model(self, name: str, config: ModelConfig, metrics: Metrics) -> Model:
        return Model(
            name=name,
            failover=config.failover,
            stall_timeout=config.stall_timeout,
            request_timeout=config.request_timeout,
            failover_wait=config.failover_wait,
            max_open_requests=config.max_open_requests,
            template_kwargs=frozenset(config.chat_template_kwargs),
            counter=self._counter(tokenizer_folder(config)),
            estimator=self._estimators.setdefault(name, PromptEstimator()),
            answers=self._answers.setdefault(name, AnswerLengths()),
            metrics=metrics.model(name),
        )

    def _counter(self, folder: str | None) -> TokenCounter | None:
        if folder is None or not Path(folder).is_dir():
            return None
        if folder not in self._counters:
            self._counters[folder] = load_counter(Path(folder))
        return self._counters[folder]


def tokenizer_folder(config: ModelConfig) -> str | None:
    return config.tokenizer or (config.engine.model if config.engine else None)


def allowed(patterns: list[str], models: Mapping[str, ModelConfig]) -> frozenset[str] | None:
    """The models that a key's patterns cover, by their own names or by an alias; None: all there are and will be."""
    if "*" in patterns:
        return None
    return frozenset(
        name
        for name, config in models.items()
        if any(grants(pattern, known) for pattern in patterns for known in (name, *config.aliases))
    )


def make_policy(config: Config, memory: Memory, limiter: MemoryLimiter, metrics: Metrics) -> Policy:
    """Everything that a request is judged by. `memory` was prepared for this config: it does not block."""
    models: dict[str, Model] = {}
    for name, one in config.models.items():
        model = memory.model(name, one, metrics)
        models.update(dict.fromkeys([name, *one.aliases], model))
    callers = {}
    for key in config.keys:
        account = limiter.account(key.name, Limits(**key.limits.model_dump()))
        callers[bytes.fromhex(key.digest())] = Caller(key.name, account, allowed(key.models, config.models))
    anonymous = Caller("anonymous", limiter.account("anonymous", Limits()), None) if config.auth == "none" else None
    server = config.server
    return Policy(
        Keyring(callers, anonymous),
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
