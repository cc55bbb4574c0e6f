"""What a good config means, and what it never shows."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gateway.config.document import Place, read
from gateway.config.load import load, parse
from gateway.config.schema import Config, grants, listen_host, suggest

CONFIGS = Path(__file__).parents[2] / "configs"
ENV = {
    "PENSTOCK_DEMO_KEY": "sk-demo-0123456789",
    "PENSTOCK_ADMIN_KEY": "sk-admin-0123456789",
    "ENGINE_KEY": "sk-engine-1",
}

SMALL = """
models:
  tiny: {endpoints: ["http://h:1"]}
keys: [{name: a, key: "${PENSTOCK_DEMO_KEY}"}]
"""


def of(text: str, **env: str) -> Config:
    return parse(text, "p.yaml", {**ENV, **env})


def with_model(fields: str) -> Any:
    return of(f"models: {{tiny: {{{fields}}}}}\nauth: none").models["tiny"]


def test_a_small_config_has_safe_defaults() -> None:
    config = of(SMALL)
    assert (config.server.host, config.server.port) == ("127.0.0.1", 8080)
    assert (config.auth, config.limiter, config.admin_key) == ("keys", "memory", None)
    tiny = config.models["tiny"]
    assert (tiny.failover, tiny.failover_wait, tiny.request_timeout, tiny.stall_timeout) == ("exact", 0, 600, 60)
    assert (tiny.max_open_requests, tiny.max_queue, tiny.queue_timeout) == (None, None, 10)
    assert (tiny.tokenizer, tiny.engine, tiny.aliases) == (None, None, [])
    assert tiny.chat_template_kwargs == ["enable_thinking", "thinking", "reasoning_effort"]
    assert config.keys[0].models == ["*"]
    assert config.keys[0].limits.requests_per_minute is None


def test_auth_none_needs_no_key() -> None:
    assert of("models: {tiny: {endpoints: [http://h]}}\nauth: none").auth == "none"


def test_an_admin_key_alone_will_do() -> None:
    config = of("models: {tiny: {endpoints: [http://h]}}\nadmin_key: ${PENSTOCK_ADMIN_KEY}")
    assert config.admin_key is not None
    assert config.admin_key.get_secret_value() == ENV["PENSTOCK_ADMIN_KEY"]


@pytest.mark.parametrize(
    ("written", "read_as"),
    [("off", "off"), ('"off"', "off"), ("False", "off"), ("exact", "exact"), ('"exact"', "exact")],
)
def test_failover_off_may_be_written_bare(written: str, read_as: str) -> None:
    assert with_model(f"endpoints: [http://h], failover: {written}").failover == read_as


@pytest.mark.parametrize(
    ("written", "read_as"),
    [
        ("http://h", "http://h"),
        ("http://h/", "http://h"),
        ("HTTPS://Host.Example:443/", "https://host.example:443"),
        ("http://10.0.0.5:8000", "http://10.0.0.5:8000"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("http://vllm_0.vllm:65535", "http://vllm_0.vllm:65535"),
    ],
)
def test_endpoints_are_brought_into_one_form(written: str, read_as: str) -> None:
    assert with_model(f'endpoints: ["{written}"]').endpoints == [read_as]


def test_engine_and_endpoints_stand_together() -> None:
    model = with_model("engine: {model: m, replicas: 2}, endpoints: [http://h], engine_api_key: k")
    assert model.engine.replicas == 2
    assert model.endpoints == ["http://h"]


def test_paths_are_kept_as_written() -> None:
    model = with_model("engine: {model: ./a/../b}, tokenizer: ../tok")
    assert (model.engine.model, model.tokenizer) == ("./a/../b", "../tok")


@pytest.mark.parametrize("name", ["a", "meta-llama/Llama-3.3-70B", "org/m:v1@2", "9b", "a" * 128])
def test_names_of_models(name: str) -> None:
    assert list(of(f"models: {{'{name}': {{endpoints: [http://h]}}}}\nauth: none").models) == [name]


@pytest.mark.parametrize(
    ("pattern", "name", "covered"),
    [
        ("*", "a/b", True),
        ("smol*", "smollm2", True),
        ("smol*", "llama", False),
        ("*-7b", "x/y-7b", True),
        ("tiny", "tiny", True),
        ("tiny", "Tiny", False),
        ("tiny", "tiny2", False),
    ],
)
def test_wildcards(pattern: str, name: str, covered: bool) -> None:
    assert grants(pattern, name) is covered


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::", "::1", "localhost", "a-b.example.com", "host_1"])
def test_hosts_to_listen_on(host: str) -> None:
    assert listen_host(host) == host


@pytest.mark.parametrize("host", ["", "a:80", "http://a", "a b", "1.2.3", "1.2.3.999", "[::1]", "-a", "a..b", "a" * 64])
def test_hosts_that_are_none(host: str) -> None:
    with pytest.raises(ValueError, match="IP address or a host name"):
        listen_host(host)


def test_a_key_by_digest_is_the_same_as_the_key() -> None:
    digest = hashlib.sha256(ENV["PENSTOCK_DEMO_KEY"].encode()).hexdigest()
    hashed = of(f"models: {{tiny: {{endpoints: [http://h]}}}}\nkeys: [{{name: a, key_sha256: {digest.upper()!r}}}]")
    assert hashed.keys[0].digest() == of(SMALL).keys[0].digest() == digest


def test_secrets_are_never_shown() -> None:
    config = load(CONFIGS / "example.yaml", ENV)
    shown = repr(config) + str(config) + json.dumps(config.model_dump(mode="json"))
    for secret in ENV.values():
        assert secret not in shown


def test_the_error_of_the_schema_itself_shows_no_values() -> None:
    with pytest.raises(ValidationError) as raised:
        Config.model_validate({"models": {"t": {"endpoints": ["http://u:hunter22@h"]}}, "admin_key": "short"})
    assert "hunter22" not in str(raised.value)
    assert "short" not in str(raised.value)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        of(SMALL).server.port = 1


def test_the_nearest_name_or_what_there_is() -> None:
    assert suggest("prot", ["port", "host"]) == "did you mean 'port'?"
    assert suggest("zzz", ["port", "host"]) == "allowed are: port, host"
    assert suggest("zzz", [f"n{i:03}" for i in range(40)]).endswith("n029, …")


# --- configs/ and the schema -------------------------------------------------------------------------------------


def fields(schema: Any, definitions: Any, place: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """Every field of the schema, with `*` for names that the user chooses and for items of lists."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    found = {(*place, name) for name in schema.get("properties", {})}
    children = [(name, child) for name, child in schema.get("properties", {}).items()]
    children += [("*", schema[key]) for key in ("items", "additionalProperties") if isinstance(schema.get(key), dict)]
    for name, child in children:
        found |= fields(child, definitions, (*place, name))
    for member in schema.get("anyOf", []):
        found |= fields(member, definitions, place)
    return found


def generic(place: Place, known: set[tuple[str, ...]]) -> tuple[str, ...]:
    result: tuple[str, ...] = ()
    for part in place:
        result = (*result, part) if isinstance(part, str) and (*result, part) in known else (*result, "*")
    return result


def test_the_example_shows_every_field() -> None:
    schema = Config.model_json_schema()
    known = fields(schema, schema["$defs"])
    assert ("models", "*", "engine", "start_timeout") in known  # the walk walks
    spots = read((CONFIGS / "example.yaml").read_text(), ENV).spots
    assert known - {generic(place, known) for place in spots} == set()


def test_every_field_has_a_description() -> None:
    schema = Config.model_json_schema()
    sections = [schema, *(d for d in schema["$defs"].values() if "properties" in d)]
    lacking = [
        (s["title"], name) for s in sections for name, field in s["properties"].items() if "description" not in field
    ]
    assert lacking == []


def test_values_of_the_example_that_are_called_defaults_are() -> None:
    example = load(CONFIGS / "example.yaml", ENV)
    small = of(SMALL)
    assert example.server == small.server
    assert (example.store, example.limiter, example.auth) == (small.store, small.limiter, small.auth)
    timeouts = ("failover_wait", "stall_timeout", "request_timeout", "queue_timeout")
    for name in ("failover", *timeouts, "max_open_requests", "max_queue", "tokenizer"):
        assert getattr(example.models["smollm2"], name) == getattr(small.models["tiny"], name)


def test_the_quick_start_serves_two_models() -> None:
    config = load(CONFIGS / "quickstart.yaml", ENV)
    assert list(config.models) == ["smollm2", "minilm"]
    assert config.models["smollm2"].aliases == ["default"]
    assert config.keys[0].limits.model_dump() == {
        "requests_per_minute": 600,
        "tokens_per_minute": 200_000,
        "parallel_requests": 32,
    }
