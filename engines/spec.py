"""What an operator says about an engine that Penstock is to run."""

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

Scalar = bool | int | float | str
# A list is one flag with several values, a mapping is one flag with a JSON object as its value.
ArgValue = Scalar | list[Scalar] | dict[str, JsonValue] | None

_FLAG = re.compile(r"[A-Za-z][A-Za-z0-9]*([-.][A-Za-z0-9_]+)*")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# Flags by which an engine could be reached, named or configured otherwise than the supervisor knows.
OWNED_FLAGS: Mapping[str, str] = {
    "model": "write it as `model`",
    "model-tag": "write it as `model`",
    "served-model-name": "the engine is asked for under the model's name in this file",
    "host": "engines listen on the loopback address only",
    "port": "each start takes a free port",
    "uds": "engines are reached over a loopback port",
    "api-key": "each start makes a random key",
    "root-path": "engines are reached directly",
    "config": "write its flags here",
    "headless": "an engine must answer HTTP",
    "grpc": "an engine must answer HTTP",
    "grpc-port": "an engine must answer HTTP",
    "enable-ssl-refresh": "engines listen on the loopback address only, without TLS",
}
_SSL_FLAG = "engines listen on the loopback address only, without TLS"

OWNED_ENV: Mapping[str, str] = {
    "VLLM_API_KEY": "each start makes a random key",
    "VLLM_SERVER_DEV_MODE": "it opens endpoints that control the engine to anyone who reaches it",
}


class EngineSpec(BaseModel):
    """One kind of engine process. Strict: an unknown field or a value of another type is an error."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    model: Annotated[str, Field(min_length=1)] = Field(
        description="A folder (or file) with the model, relative to the working directory, or a name on the model hub."
    )
    replicas: int = Field(default=1, ge=1, le=64, description="How many of these engines run side by side.")
    python: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="The Python interpreter that has vLLM. Default: `.venv-engine/bin/python` in the working directory "
        "(scripts/setup-engine makes it), else the interpreter that runs Penstock.",
    )
    args: dict[str, ArgValue] = Field(
        default_factory=dict,
        description="Flags of `vllm serve`, without the leading dashes. `true` gives `--flag`, `false` gives "
        "`--no-flag`, a list gives one flag several values, a mapping is passed as JSON, and null leaves the flag out.",
    )
    env: dict[str, str] = Field(
        default_factory=dict,
        description="Environment variables of the engine; they win over Penstock's. Of the gateway's own environment "
        "an engine inherits only what describes the machine (PATH, HOME, proxies, CUDA_*, HF_*, VLLM_* and the like).",
    )
    start_timeout: float = Field(
        default=600.0,
        gt=0,
        description="Seconds from launch to the first generated token. A slower engine is stopped and started again.",
    )
    stop_timeout: float = Field(
        default=5.0,
        ge=0,
        description="Seconds an engine gets to end by itself after SIGTERM. After that it is killed.",
    )

    @field_validator("args")
    @classmethod
    def _check_args(cls, args: dict[str, ArgValue]) -> dict[str, ArgValue]:
        seen: dict[str, str] = {}
        for written in args:
            flag = written.replace("_", "-") if "." not in written else written
            if written.startswith("-"):
                raise ValueError(f"write flags without leading dashes: {written.lstrip('-')!r} instead of {written!r}")
            if not _FLAG.fullmatch(flag):
                raise ValueError(f"{written!r} is not the name of a flag (letters, digits, dashes and dots)")
            bare = flag.removeprefix("no-").partition(".")[0]
            why = _SSL_FLAG if bare.startswith("ssl-") else OWNED_FLAGS.get(bare)
            if why is not None:
                raise ValueError(f"{written!r} is set by Penstock: {why}")
            if flag in seen:
                raise ValueError(f"{written!r} and {seen[flag]!r} are the same flag")
            seen[flag] = written
        return args

    @field_validator("env")
    @classmethod
    def _check_env(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            if not _ENV_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of an environment variable (letters, digits and _)")
            if name in OWNED_ENV:
                raise ValueError(f"{name} is set by Penstock: {OWNED_ENV[name]}")
            if "\0" in value:
                raise ValueError(f"the value of {name} holds a NUL character")
        return env
