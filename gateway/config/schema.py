"""What a config file may say. Every check that needs no more than the file itself stands here.

Messages never repeat a value that may be a secret: they say what is wrong and what is allowed. `load` adds the place.
"""

import difflib
import hashlib
import ipaddress
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Final, Literal, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from engines.spec import EngineSpec
from gateway.config.document import Place

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")
_WILDCARD: Final = re.compile(r"[A-Za-z0-9*][A-Za-z0-9._:/@*-]{0,127}")
_IDENTIFIER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_SECRET: Final = re.compile(r"[!-~]{8,256}")
_TOKEN: Final = re.compile(r"[!-~]{1,4096}")
_SHA256: Final = re.compile(r"[0-9A-Fa-f]{64}")
_LABEL: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_ORIGIN: Final = re.compile(r"https?://(?P<host>\[[^\]%]+\]|[^\[\]:]+)(:(?P<port>[0-9]{1,5}))?")
_ADDRESS: Final = re.compile(r"(?P<host>\[[^\]%]+\]|[^\[\]:]+):(?P<port>[0-9]{1,5})")

_LISTED: Final = 30  # known names in a message


def suggest(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, else what there is."""
    near = difflib.get_close_matches(name[:128], known, n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"allowed are: {', '.join(list(known)[:_LISTED])}" + (", …" if len(known) > _LISTED else "")


def grants(pattern: str, name: str) -> bool:
    """Whether an entry of a key's `models` covers a model or alias; `*` stands for any characters, `/` too."""
    return fnmatchcase(name, pattern)


def _refuse(problems: Iterable[tuple[Place, str]]) -> None:
    """Raises one error for all problems, each at its own place below what is being validated."""
    details = [
        InitErrorDetails(type=PydanticCustomError("config", "{message}", {"message": message}), loc=place, input=None)
        for place, message in problems
    ]
    if details:
        raise ValidationError.from_exception_data("config", details)


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("must be 1 to 128 of the characters A-Z a-z 0-9 . _ : / @ - and begin with a letter or digit")
    return value


def _wildcard(value: str) -> str:
    if not _WILDCARD.fullmatch(value):
        raise ValueError("must be the name of a model or an alias, in which * stands for any characters")
    return value


def _identifier(value: str) -> str:
    if not _IDENTIFIER.fullmatch(value):
        raise ValueError("must be 1 to 64 letters, digits and underscores, and not begin with a digit")
    return value


def _secret(value: SecretStr) -> SecretStr:
    if not _SECRET.fullmatch(value.get_secret_value()):
        raise ValueError("must be 8 to 256 visible ASCII characters without spaces")
    return value


def _token(value: SecretStr) -> SecretStr:
    if not _TOKEN.fullmatch(value.get_secret_value()):
        raise ValueError("must be 1 to 4096 visible ASCII characters without spaces")
    return value


def _sha256(value: str) -> str:
    if not _SHA256.fullmatch(value):
        raise ValueError("must be a SHA-256 digest of the key: 64 hexadecimal digits")
    return value.lower()


def _text(value: str) -> str:
    if not value or value != value.strip() or not value.isprintable():
        raise ValueError("must be text on one line, without spaces around it, and not empty")
    return value


def _is_host(value: str) -> bool:
    """Whether it is an IP address (IPv6 without brackets) or a host name."""
    try:
        ipaddress.ip_address(value)
    except ValueError:
        labels = value.removesuffix(".").split(".")
        return len(value) <= 253 and all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdigit()
    return True


def listen_host(value: str) -> str:
    if not _is_host(value):
        raise ValueError("must be an IP address or a host name, without a port")
    return value


def _origin(value: str) -> str:
    """`scheme://host[:port]` in lower case, without the one slash that is tolerated at the end."""
    origin = value.lower().removesuffix("/")
    if not origin.startswith(("http://", "https://")):
        raise ValueError("must begin with http:// or https://")
    if "@" in origin:
        raise ValueError("must not hold a user name or password; write http://HOST:PORT or https://HOST:PORT")
    if any(character in origin.partition("://")[2] for character in "/?#"):
        raise ValueError(
            "must end after host and port, without a path or query; write http://HOST:PORT or https://HOST:PORT"
        )
    match = _ORIGIN.fullmatch(origin)
    if not match or not _is_host(match["host"].strip("[]")):
        raise ValueError("holds no valid host; write http://HOST:PORT or https://HOST:PORT")
    if match["port"] and not 1 <= int(match["port"]) <= 65535:
        raise ValueError("must have a port from 1 to 65535")
    return origin


def _cors_origin(value: str) -> str:
    return value if value == "*" else _origin(value)


def _one_worker(value: int) -> int:
    if value > 1:
        raise ValueError("more than 1 worker is not supported yet")
    return value


def listen_address(value: str) -> tuple[str, int]:
    """Host (IPv6 without brackets) and port of HOST:PORT. Raises ValueError."""
    match = _ADDRESS.fullmatch(value)
    if not match or not _is_host(match["host"].strip("[]")) or int(match["port"]) > 65535:
        raise ValueError("must be HOST:PORT, such as 127.0.0.1:8081 or [::1]:8081; port 0 takes a free one")
    return match["host"].strip("[]"), int(match["port"])


def _admin_listen(value: str | None) -> str | None:
    if value is not None:
        listen_address(value)
    return value


def _no_media_hosts(value: list[str]) -> list[str]:
    if value:
        raise ValueError("fetching media is not supported yet; leave it out (media come as data: URLs)")
    return value


def _store(value: str) -> str:
    wanted = "must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
    if value.startswith("sqlite:///") and value != "sqlite:///" and "?" not in value:
        return value
    if not value.startswith(("postgresql://", "postgres://")):
        raise ValueError(wanted)
    try:
        parts = urlsplit(value)
        options = parse_qs(parts.query, strict_parsing=True) if parts.query else {}
        host = parts.hostname or options.get("host")
        valid = host and parts.path.strip("/") and "/" not in parts.path[1:] and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(wanted)
    if unknown := sorted(options.keys() - {"sslmode", "host", "port"}):
        raise ValueError(f"has the option '{unknown[0]}'; allowed are: sslmode, host, port")
    return value


def _limiter(value: str) -> str:
    if value.startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("redis is not supported yet; only memory is")
    if value != "memory":
        raise ValueError("must be memory")
    return value


def _off_is_a_word(value: object) -> object:
    """YAML reads a bare `off` as False."""
    return "off" if value is False else value


Name = Annotated[str, AfterValidator(_name)]
Secret = Annotated[SecretStr, AfterValidator(_secret)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
SecondsOrNone = Annotated[float, Field(ge=0, le=86_400)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class ServerConfig(_Section):
    """The socket that clients reach, and how patient it is."""

    host: Annotated[str, AfterValidator(listen_host)] = Field(
        default="127.0.0.1", description="Address to listen on; 0.0.0.0 or :: for every interface."
    )
    port: int = Field(default=8080, ge=0, le=65_535, description="Port to listen on; 0 takes a free one.")
    workers: Annotated[int, AfterValidator(_one_worker)] = Field(
        default=1, ge=1, description="Processes that share the port. Only 1 for now."
    )
    max_body_bytes: int = Field(
        default=33_554_432,
        ge=1024,
        le=1_073_741_824,
        description="Largest request body in bytes; a larger one is refused with 413.",
    )
    header_timeout: Seconds = Field(
        default=10,
        description="Seconds from a request's first byte (from connect, for the first) to the end of its headers.",
    )
    body_timeout: Seconds = Field(
        default=30, description="Seconds for the whole body to come in, plus one for each 100 KB of it."
    )
    idle_timeout: Seconds = Field(
        default=75, description="Seconds that a connection is kept open between two requests."
    )
    drain_timeout: Seconds = Field(
        default=30, description="Seconds that open requests may still take after SIGTERM, before they are cut off."
    )
    admin_listen: Annotated[str | None, AfterValidator(_admin_listen)] = Field(
        default=None,
        description="HOST:PORT that /admin and /metrics move to; null: they share the public port.",
    )
    cors_origins: list[Annotated[str, AfterValidator(_cors_origin)]] = Field(
        default=[],
        description="Web pages from these origins (https://HOST[:PORT], or * for all) may call the API. Empty: CORS is off.",
    )


class LimitsConfig(_Section):
    """What a key may use. A limit that is absent is no limit."""

    requests_per_minute: Count | None = Field(default=None, description="Most requests in any 60 seconds.")
    tokens_per_minute: Count | None = Field(
        default=None, description="Most tokens, prompt and completion, in any 60 seconds."
    )
    parallel_requests: Count | None = Field(
        default=None, description="Most requests open at the same time; a stream is open until its last byte."
    )


class PriceConfig(_Section):
    """What tokens cost, in whatever money: it is only added up, and compared with budgets."""

    prompt: float = Field(ge=0, le=1_000_000, description="For a million prompt tokens.")
    completion: float = Field(ge=0, le=1_000_000, description="For a million tokens of answers.")
    cached: float | None = Field(
        default=None,
        ge=0,
        le=1_000_000,
        description="For a million prompt tokens that were found in the prefix cache; null: as other prompt tokens.",
    )


class ModelConfig(_Section):
    """One name that clients may ask for, and the engines that answer. Needs `engine`, `endpoints`, or both."""

    aliases: list[Name] = Field(default=[], description="Further names for the same model.")
    engine: EngineSpec | None = Field(
        default=None, description="An engine that Penstock starts on this machine, watches and restarts."
    )
    endpoints: list[Annotated[str, AfterValidator(_origin)]] = Field(
        default=[], description="Engines that run elsewhere: http://HOST:PORT or https://HOST:PORT, without a path."
    )
    engine_api_key: Annotated[SecretStr, AfterValidator(_token)] | None = Field(
        default=None, description="What the endpoints want as their bearer token. Engines of our own get a random one."
    )
    served_model_name: Annotated[str, AfterValidator(_text)] | None = Field(
        default=None, description="What the endpoints call the model; null: as it is called here."
    )
    tokenizer: Annotated[str, AfterValidator(_text)] | None = Field(
        default=None,
        description="Folder with the model's tokenizer.json, by which prompt tokens are counted for remote endpoints; "
        "null: the engine's model folder, else an estimate.",
    )
    failover: Annotated[Literal["exact", "off"], BeforeValidator(_off_is_a_word)] = Field(
        default="exact",
        description="When an engine dies in mid-stream: exact continues on another replica where that can be done without "
        "changing the answer; off ends the stream with an error.",
    )
    failover_wait: SecondsOrNone = Field(
        default=0,
        description="Seconds that a request waits for a restarted engine where no other replica is left; 0: not at all.",
    )
    stall_timeout: Seconds = Field(
        default=60, description="Seconds without a byte from the engine after which it counts as hung."
    )
    request_timeout: Seconds = Field(
        default=600, description="Seconds that a whole request may take, the last byte included."
    )
    max_open_requests: Count | None = Field(
        default=None,
        description="Most requests at work on this model at the same time; more wait in a queue. null: twice what its "
        "engines take at once (max-num-seqs), where Penstock starts all of them; no limit where some run elsewhere.",
    )
    max_queue: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Most requests that wait for a place; more are refused with 503 at once. "
        "null: as many as max_open_requests.",
    )
    queue_timeout: Seconds = Field(
        default=10, description="Seconds that a request waits for a place, before it is refused with 503."
    )
    price: PriceConfig | None = Field(
        default=None, description="What the model's tokens cost, for usage and for budgets in money; null: nothing."
    )
    allowed_media_hosts: Annotated[list[str], AfterValidator(_no_media_hosts)] = Field(
        default=[], description="Hosts from which media may be fetched. Only empty for now: media come as data: URLs."
    )
    chat_template_kwargs: list[Annotated[str, AfterValidator(_identifier)]] = Field(
        default=["enable_thinking", "thinking", "reasoning_effort"],
        description="Names that clients may set in chat_template_kwargs; any other is refused.",
    )

    @field_validator("aliases")
    @classmethod
    def _aliases_differ(cls, aliases: list[str]) -> list[str]:
        _refuse(_repeats(aliases, "the same alias"))
        return aliases

    @field_validator("endpoints")
    @classmethod
    def _endpoints_differ(cls, endpoints: list[str]) -> list[str]:
        _refuse(_repeats(endpoints, "the same endpoint"))
        return endpoints

    @model_validator(mode="after")
    def _has_an_engine(self) -> Self:
        _refuse(self._engine_problems())
        return self

    def _engine_problems(self) -> Iterator[tuple[Place, str]]:
        if self.endpoints:
            return
        if self.engine is None:
            yield (), "must have an engine that Penstock starts, endpoints that run elsewhere, or both"
        if self.engine_api_key is not None:
            yield ("engine_api_key",), "is for endpoints, and there are none; remove it"


class KeyConfig(_Section):
    """One API key that is fixed in the file. Needs `key` or `key_sha256`."""

    name: Name = Field(description="Names the key in metrics, logs and usage.")
    key: Secret | None = Field(
        default=None,
        description="The key itself, 8 to 256 visible ASCII characters; best as ${NAME} from the environment.",
    )
    key_sha256: Annotated[str, AfterValidator(_sha256)] | None = Field(
        default=None, description="Instead of the key: its SHA-256 digest, 64 hexadecimal digits."
    )
    models: list[Annotated[str, AfterValidator(_wildcard)]] = Field(
        default=["*"], min_length=1, description="Models and aliases that the key may use; * stands for any characters."
    )
    limits: LimitsConfig = Field(
        default=LimitsConfig(), description="What the key may use; an absent limit is no limit."
    )

    @model_validator(mode="after")
    def _has_one_key(self) -> Self:
        if self.key is None and self.key_sha256 is None:
            raise ValueError("must have key or key_sha256")
        if self.key is not None and self.key_sha256 is not None:
            raise ValueError("must have only one of key and key_sha256")
        return self

    def digest(self) -> str:
        """The key's SHA-256 in lower-case hexadecimal, however the key was given."""
        return _digest(self.key) if self.key else str(self.key_sha256)


class Config(_Section):
    """A Penstock config file."""

    server: ServerConfig = Field(default=ServerConfig(), description="The socket that clients reach.")
    store: Annotated[str, AfterValidator(_store)] = Field(
        default="sqlite:///penstock.db",
        description="Database for keys and usage: sqlite:///FILE (made if it is not there) or "
        "postgresql://USER:PASSWORD@HOST/DATABASE. Used only if there is an admin_key, or if this is written in the file.",
    )
    retention_days: Count | None = Field(
        default=90,
        description="Days that the store keeps single requests. Their sums by hour are kept for good. null: for good too.",
    )
    limiter: Annotated[str, AfterValidator(_limiter)] = Field(
        default="memory", description="Where limits are counted. Only memory for now: exact within this process."
    )
    admin_key: Secret | None = Field(
        default=None, description="Opens the dashboard and the admin API (/admin/); null: both are off."
    )
    auth: Literal["keys", "none"] = Field(
        default="keys",
        description="keys: every request needs a key. none: anyone who reaches the port may use every model.",
    )
    models: dict[Name, ModelConfig] = Field(min_length=1, description="The models, by the name that clients send.")
    keys: list[KeyConfig] = Field(
        default=[],
        validate_default=True,
        description="API keys that are fixed in the file; more live in the store (admin API).",
    )

    @field_validator("models")
    @classmethod
    def _aliases_are_free(cls, models: dict[str, ModelConfig]) -> dict[str, ModelConfig]:
        _refuse(_alias_problems(models))
        return models

    @field_validator("keys")
    @classmethod
    def _keys_fit(cls, keys: list[KeyConfig], info: ValidationInfo) -> list[KeyConfig]:
        # What is faulty itself is absent from info.data: then only the rest is judged.
        problems: list[tuple[Place, str]] = []
        if {"auth", "admin_key"} <= info.data.keys():
            problems += _access_problems(keys, info.data["auth"], info.data["admin_key"])
        if "models" in info.data:
            problems += _grant_problems(keys, info.data["models"])
        _refuse(problems)
        return keys


def _digest(key: SecretStr) -> str:
    return hashlib.sha256(key.get_secret_value().encode()).hexdigest()


def _repeats(values: list[str], what: str) -> Iterator[tuple[Place, str]]:
    first: dict[str, int] = {}
    for index, value in enumerate(values):
        if first.setdefault(value, index) != index:
            yield (index,), f"{what} stands a second time; remove one"


def _alias_problems(models: Mapping[str, ModelConfig]) -> Iterator[tuple[Place, str]]:
    owners: dict[str, str] = {}
    for name, model in models.items():
        for index, alias in enumerate(model.aliases):
            if alias in models:
                yield (name, "aliases", index), f"'{alias}' is the name of a model; an alias must be another name"
            elif owners.setdefault(alias, name) != name:
                yield (
                    (name, "aliases", index),
                    f"'{alias}' is an alias of '{owners[alias]}' already; an alias must lead to one model",
                )


def _access_problems(keys: list[KeyConfig], auth: str, admin_key: SecretStr | None) -> Iterator[tuple[Place, str]]:
    if auth == "none" and keys:
        yield (), "keys have no effect beside 'auth: none'; remove one of the two"
    if auth == "keys" and not keys and admin_key is None:
        yield (
            (),
            "no keys and no admin_key: nobody could use the gateway; add a key, or write 'auth: none' to let everyone in",
        )
    names: dict[str, int] = {}
    digests: dict[str, int] = {}
    admin_digest = _digest(admin_key) if admin_key else None
    for index, key in enumerate(keys):
        field = "key" if key.key else "key_sha256"
        if names.setdefault(key.name, index) != index:
            yield (index, "name"), f"the same name as keys[{names[key.name]}]; each key needs a name of its own"
        if key.digest() == admin_digest:
            yield (index, field), "the same as admin_key; a client's key must not open the admin API"
        if digests.setdefault(key.digest(), index) != index:
            yield (index, field), f"the same key as keys[{digests[key.digest()]}]; each entry needs a key of its own"


def _grant_problems(keys: list[KeyConfig], models: Mapping[str, ModelConfig]) -> Iterator[tuple[Place, str]]:
    names = [*models, *(alias for model in models.values() for alias in model.aliases)]
    for index, key in enumerate(keys):
        for position, pattern in enumerate(key.models):
            if not any(grants(pattern, name) for name in names):
                yield (index, "models", position), f"'{pattern}' matches no model or alias; {suggest(pattern, names)}"
