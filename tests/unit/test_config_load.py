"""Broken configs, each with the exact lines that tell what is wrong with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings, strategies as st

from gateway.config.load import ConfigError, Fault, load, parse

ENV = {"KEY": "sk-demo-0123456789", "OTHER": "sk-other-0123456789", "PORT": "8080", "SHORT": "abc", "EMPTY": ""}
CONFIGS = Path(__file__).parents[2] / "configs"

MODELS = "models: {tiny: {endpoints: ['http://h:1']}}\n"  # one line, so that what follows begins in line 2
STORE = "must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
OPEN = MODELS + "auth: none\n"  # two lines, and valid
KEYS = "keys: [{name: a, key: '${KEY}'}]\n"


class Case(NamedTuple):
    id: str
    text: str
    lines: tuple[str, ...]  # without the file's name in front
    env: Mapping[str, str] = ENV


def case(id: str, text: str, *lines: str, env: Mapping[str, str] = ENV) -> Case:  # noqa: A002 - pytest's own word
    return Case(id, text, lines, env)


def tiny(fields: str) -> str:
    return f"auth: none\nmodels:\n  tiny:\n    endpoints: ['http://h:1']\n    {fields}\n"


def endpoint(url: str) -> str:
    return f"auth: none\nmodels:\n  tiny:\n    endpoints:\n    - '{url}'\n"


HOST_PORT = "write http://HOST:PORT or https://HOST:PORT"
NAME = "must be 1 to 128 of the characters A-Z a-z 0-9 . _ : / @ - and begin with a letter or digit"
SECRET = "must be 8 to 256 visible ASCII characters without spaces"
NOBODY = (
    "keys: no keys and no admin_key: nobody could use the gateway; add a key, or write 'auth: none' to let everyone in"
)

CASES = [
    # --- not YAML
    case("empty", "", "1: is empty; a config needs at least models"),
    case("only a comment", "# nothing\n\n", "1: is empty; a config needs at least models"),
    case("a tab", "server:\n\tport: 1\n", "2: a tab stands where only spaces may; indent with spaces"),
    case("a wrong indentation", "server:\n  port: 1\n host: h\n", "3: the indentation does not fit the lines above"),
    case(
        "two colons",
        OPEN + "store: a: b\n",
        "3: a ':' stands where none can; mind the indentation, or put the value in quotes",
    ),
    case("no colon", "auth: none\nmodels\nserver: {}\n", "2: a ':' is missing after a name"),
    case(
        "a list that is not closed",
        "auth: none\nmodels: {t: {endpoints: [http://h}}\n",
        "2: a [ or { is not closed, or a comma is missing; inside them put values such as ${NAME} in quotes",
    ),
    case(
        "a bare reference in braces",
        MODELS + "keys: [{name: a, key: ${KEY}}]\n",
        "2: a [ or { is not closed, or a comma is missing; inside them put values such as ${NAME} in quotes",
    ),
    case("the end in a list", "models: [1,", "1: the file ends before a value, or before its [ or { is closed"),
    case("a quote that is not closed", "auth: none\nstore: 'sqlite\nmodels: {}\n", "2: a quote is not closed"),
    case("a value that begins with @", "auth: @none\n", "1: a value cannot begin with this character; put it in quotes"),
    case(
        "a password that begins with *",
        "admin_key: *hunter22\n",
        "1: a value that begins with * must name an anchor of this file; put it in quotes if it is text",
    ),
    case(
        "a list where a value is",
        "auth: - none\n",
        "1: a '-' stands where none can; mind the indentation, or put the value in quotes",
    ),
    case("the same anchor twice", "a: &x 1\nb: &x 2\n", "2: two anchors have the same name"),
    case(
        "an unknown escape",
        'store: "a\\d"\n',
        "1: a \\ in double quotes begins an unknown escape; write \\\\, or use single quotes",
    ),
    case("an escape out of range", 'store: "\\UFFFFFFFF"\n', "1: is not valid YAML: a number is out of range"),
    case("two documents", OPEN + "---\nauth: none\n", "3: a second document begins here; a config is one document"),
    case("a control character", OPEN + "store: \x07\n", "3: holds a control character, which YAML does not allow"),
    case("an alias of itself", "a: &a [*a]\n", "1: is nested deeper than 32 levels, or holds an alias of itself"),
    case("too deep", "[" * 40, "1: is nested deeper than 32 levels, or holds an alias of itself"),
    case("too large", "#" * (4 << 20) + "\n", "1: is larger than 4 MiB"),
    # --- YAML that is none of ours
    case("a list", "- models\n", "1: must be a mapping (lines of 'name: value'), not a list"),
    case("text", "models\n", "1: must be a mapping (lines of 'name: value'), not text"),
    case(
        "a tag",
        OPEN + "store: !hunter22 x\n",
        "3: store: a value that begins with ! is a YAML tag; put it in quotes if it is text",
    ),
    case(
        "a Python object",
        OPEN + "store: !!python/object/apply:os.system [x]\n",
        "3: store: a value that begins with ! is a YAML tag; put it in quotes if it is text",
    ),
    case(
        "a mapping as a name",
        OPEN + "store: {{ password }}\n",
        "3: store: a name must be plain text; put a value that begins with { or [ in quotes",
    ),
    case(
        "the same field twice",
        OPEN + "server:\n  port: 1\n  host: h\n  port: 2\n",
        "6: server.port: stands twice, in line 4 and here; remove one",
    ),
    case(
        "the same model twice",
        "auth: none\nmodels:\n  t: {endpoints: [http://a]}\n  t: {endpoints: [http://b]}\n",
        "4: models.t: stands twice, in line 3 and here; remove one",
    ),
    case(
        "a merge of no mapping",
        "auth: none\nmodels:\n  t:\n    <<: 3\n    endpoints: [http://a]\n",
        "4: models.t: << takes the alias of a mapping, or a list of such",
    ),
    case("a number that is none", OPEN + "server: {port: !!int x}\n", "3: server.port: is not the number or switch that it claims to be"),
    case("a NUL in a name", OPEN + '"\\0": 1\n', "3: a name holds a character that is no text"),
    case("a NUL", OPEN + 'store: "sqlite:///\\0"\n', "3: store: holds a character that is no text"),
    # --- the environment
    case("an unset variable", MODELS + "keys:\n- name: a\n  key: ${NOT_SET}\n", "4: keys[0].key: the environment variable NOT_SET is not set"),
    case(
        "a broken reference",
        MODELS + "keys:\n- name: a\n  key: ${not set}\n",
        "4: keys[0].key: '${' must begin the name of an environment variable, as in ${NAME}; write $${ for the characters",
    ),
    case(
        "a variable is always text",
        OPEN + "server:\n  port: ${PORT}\n",
        "4: server.port: must be a whole number from 0 to 65535, not the text that ${PORT} gives",
    ),
    case("a short key from a variable", MODELS + "keys:\n- name: a\n  key: ${SHORT}\n", f"4: keys[0].key: {SECRET} (it comes from ${{SHORT}})"),
    case("an empty variable", OPEN + "admin_key: ${EMPTY}\n", f"3: admin_key: {SECRET} (it comes from ${{EMPTY}})"),
    case(
        "an odd environment",
        OPEN + "store: sqlite:///${ODD}\n",
        "3: store: holds a character that is no text",
        env={"ODD": "\udcff"},
    ),
    # --- fields
    case("no models", "auth: none\n", "1: models: is required, and missing"),
    case("models without any", "auth: none\nmodels: {}\n", "2: models: must be a mapping (lines of 'name: value') of at least 1 entry, not an empty one"),
    case("a typo", OPEN + "server:\n  prot: 1\n", "4: server.prot: unknown field; did you mean 'port'?"),
    case(
        "a field of nobody",
        OPEN + "zzz: 1\n",
        "3: zzz: unknown field; allowed are: server, store, retention_days, limiter, admin_key, auth, models, keys",
    ),
    case("a typo in an engine", "auth: none\nmodels:\n  t:\n    engine:\n      model: m\n      replica: 2\n", "6: models.t.engine.replica: unknown field; did you mean 'replicas'?"),
    case("a field missing in an engine", "auth: none\nmodels:\n  t:\n    engine:\n      replicas: 2\n", "4: models.t.engine.model: is required, and missing"),
    case("a section without content", OPEN + "server:\n", "3: server: must be a mapping (lines of 'name: value'), not empty; leave it out for its default"),
    # --- values
    case("a port that is text", OPEN + "server: {port: abc}\n", "3: server.port: must be a whole number from 0 to 65535, not 'abc'"),
    case("a port that is too high", OPEN + "server: {port: 70000}\n", "3: server.port: must be a whole number from 0 to 65535, not 70000"),
    case("a port in quotes", OPEN + "server: {port: '80'}\n", "3: server.port: must be a whole number from 0 to 65535, not '80'"),
    case("a port that is a switch", OPEN + "server: {port: yes}\n", "3: server.port: must be a whole number from 0 to 65535, not yes"),
    case("a port with a fraction", OPEN + "server: {port: 1.5}\n", "3: server.port: must be a whole number from 0 to 65535, not 1.5"),
    case("a long number", OPEN + f"server: {{port: {'9' * 60}}}\n", f"3: server.port: must be a whole number from 0 to 65535, not {'9' * 40}…"),
    case("a duration of zero", OPEN + "server: {idle_timeout: 0}\n", "3: server.idle_timeout: must be a number above 0 and at most 86400, not 0"),
    case("no number", OPEN + "server: {idle_timeout: .nan}\n", "3: server.idle_timeout: must be a number above 0 and at most 86400, not .nan"),
    case("for ever", OPEN + "server: {idle_timeout: .inf}\n", "3: server.idle_timeout: must be a number above 0 and at most 86400, not .inf"),
    case("a negative wait", tiny("failover_wait: -1"), "5: models.tiny.failover_wait: must be a number from 0 to 86400, not -1"),
    case("a host with a port", OPEN + "server: {host: 'h:80'}\n", "3: server.host: must be an IP address or a host name, without a port"),
    case("a host that is a number", OPEN + "server: {host: 1}\n", "3: server.host: must be text, not a number; put it in quotes"),
    case("an empty host", OPEN + "server: {host: ''}\n", "3: server.host: must be an IP address or a host name, without a port"),
    case("an origin with a path", OPEN + "server: {cors_origins: [https://a/b]}\n", f"3: server.cors_origins[0]: must end after host and port, without a path or query; {HOST_PORT}"),
    case("failover: on", tiny("failover: on"), "5: models.tiny.failover: must be exact or off, not on"),
    case("an unknown failover", tiny("failover: maybe"), "5: models.tiny.failover: must be exact or off, not 'maybe'"),
    case("an alias that is no list", tiny("aliases: x"), "5: models.tiny.aliases: must be a list, not text"),
    case("a number as an alias", tiny("aliases: [7]"), "5: models.tiny.aliases[0]: must be text, not a number; put it in quotes"),
    case("a switch as a variable", "auth: none\nmodels: {t: {engine: {model: m, env: {A: no}}}}\n", "2: models.t.engine.env.A: must be text, not true or false; put it in quotes"),
    case("lists in lists as a flag", "auth: none\nmodels: {t: {engine: {model: m, args: {a: [[1]]}}}}\n", "2: models.t.engine.args.a[0]: must be true or false, a whole number, a number or text, not a list"),
    case("a template argument", tiny("chat_template_kwargs: [a b]"), "5: models.tiny.chat_template_kwargs[0]: must be 1 to 64 letters, digits and underscores, and not begin with a digit"),
    case("a tokenizer of nothing", tiny("tokenizer: ' '"), "5: models.tiny.tokenizer: must be text on one line, without spaces around it, and not empty"),
    # --- models
    case("a model's name", "auth: none\nmodels:\n  'a b': {endpoints: [http://h]}\n", f"3: models.a b: {NAME}"),
    case("a name that steers the terminal", 'auth: none\nmodels:\n  "\\e[31m": {endpoints: [http://h]}\n', f"3: models.\\x1b[31m: {NAME}"),
    case("a model without an engine", "auth: none\nmodels:\n  t: {}\n", "3: models.t: must have an engine that Penstock starts, endpoints that run elsewhere, or both"),
    case("an engine key without endpoints", "auth: none\nmodels:\n  t:\n    engine: {model: m}\n    engine_api_key: k\n", "5: models.t.engine_api_key: is for endpoints, and there are none; remove it"),
    case("an engine key with a space", tiny("engine_api_key: hunter 22"), "5: models.tiny.engine_api_key: must be 1 to 4096 visible ASCII characters without spaces"),
    case("an alias twice in a model", tiny("aliases: [x, x]"), "5: models.tiny.aliases[1]: the same alias stands a second time; remove one"),
    case("an alias in two models", "auth: none\nmodels:\n  a: {endpoints: [http://h], aliases: [x]}\n  b: {endpoints: [http://h], aliases: [x]}\n", "4: models.b.aliases[0]: 'x' is an alias of 'a' already; an alias must lead to one model"),
    case("an alias that is a model", "auth: none\nmodels:\n  a: {endpoints: [http://h], aliases: [b]}\n  b: {endpoints: [http://h]}\n", "3: models.a.aliases[0]: 'b' is the name of a model; an alias must be another name"),
    # --- endpoints
    case("an endpoint without a scheme", endpoint("10.0.0.5:8000"), "5: models.tiny.endpoints[0]: must begin with http:// or https://"),
    case("an endpoint with /v1", endpoint("http://h/v1"), f"5: models.tiny.endpoints[0]: must end after host and port, without a path or query; {HOST_PORT}"),
    case("an endpoint with a query", endpoint("http://h?x"), f"5: models.tiny.endpoints[0]: must end after host and port, without a path or query; {HOST_PORT}"),
    case("an endpoint with a password", endpoint("http://u:hunter22@h"), f"5: models.tiny.endpoints[0]: must not hold a user name or password; {HOST_PORT}"),
    case("an endpoint with a port of none", endpoint("http://h:99999"), "5: models.tiny.endpoints[0]: must have a port from 1 to 65535"),
    case("an endpoint without a host", endpoint("http://:80"), f"5: models.tiny.endpoints[0]: holds no valid host; {HOST_PORT}"),
    case("an endpoint twice", "auth: none\nmodels:\n  t:\n    endpoints:\n    - http://h\n    - HTTP://H/\n", "6: models.t.endpoints[1]: the same endpoint stands a second time; remove one"),
    # --- keys
    case("nobody may come in", MODELS, f"1: {NOBODY}"),
    case("nobody may come in, in words", MODELS + "keys: []\n", f"2: {NOBODY}"),
    case("keys beside auth: none", OPEN + KEYS, "3: keys: keys have no effect beside 'auth: none'; remove one of the two"),
    case("an unknown auth", MODELS + KEYS + "auth: nobody\n", "3: auth: must be keys or none, not 'nobody'"),
    case("a key without a name", MODELS + "keys:\n- key: ${KEY}\n", "3: keys[0].name: is required, and missing"),
    case("a key without a key", MODELS + "keys:\n- name: a\n", "3: keys[0]: must have key or key_sha256"),
    case("a key with two", MODELS + f"keys:\n- name: a\n  key: ${{KEY}}\n  key_sha256: {'a' * 64}\n", "3: keys[0]: must have only one of key and key_sha256"),
    case("a short key", MODELS + "keys: [{name: a, key: hunter2}]\n", f"2: keys[0].key: {SECRET}"),
    case("a long key", MODELS + f"keys: [{{name: a, key: {'k' * 257}}}]\n", f"2: keys[0].key: {SECRET}"),
    case("a key with a space", MODELS + "keys: [{name: a, key: hunter 22}]\n", f"2: keys[0].key: {SECRET}"),
    case("a key that is a number", MODELS + "keys: [{name: a, key: 12345678}]\n", "2: keys[0].key: must be text, not a number; put it in quotes"),
    case("a digest that is none", MODELS + "keys: [{name: a, key_sha256: abc}]\n", "2: keys[0].key_sha256: must be a SHA-256 digest of the key: 64 hexadecimal digits"),
    case("a key twice", MODELS + "keys:\n- {name: a, key: '${KEY}'}\n- {name: b, key: '${KEY}'}\n", "4: keys[1].key: the same key as keys[0]; each entry needs a key of its own (it comes from ${KEY})"),
    case("a name twice", MODELS + "keys:\n- {name: a, key: '${KEY}'}\n- {name: a, key: '${OTHER}'}\n", "4: keys[1].name: the same name as keys[0]; each key needs a name of its own"),
    case("the admin's key as a client's", MODELS + "admin_key: ${KEY}\n" + KEYS, "3: keys[0].key: the same as admin_key; a client's key must not open the admin API (it comes from ${KEY})"),
    case("a grant for no model", MODELS + "keys: [{name: a, key: '${KEY}', models: [tinny]}]\n", "2: keys[0].models[0]: 'tinny' matches no model or alias; did you mean 'tiny'?"),
    case("a wildcard for no model", MODELS + "keys: [{name: a, key: '${KEY}', models: ['*', 'zz*']}]\n", "2: keys[0].models[1]: 'zz*' matches no model or alias; allowed are: tiny"),
    case("a grant of nothing", MODELS + "keys: [{name: a, key: '${KEY}', models: []}]\n", "2: keys[0].models: must be a list of at least 1 entry, not an empty one"),
    case("a grant with other wildcards", MODELS + "keys: [{name: a, key: '${KEY}', models: ['[a-z]?']}]\n", "2: keys[0].models[0]: must be the name of a model or an alias, in which * stands for any characters"),
    case("a limit of zero", MODELS + "keys:\n- name: a\n  key: ${KEY}\n  limits: {parallel_requests: 0}\n", "5: keys[0].limits.parallel_requests: must be a whole number of at least 1, not 0"),
    case("a limit that is a switch", MODELS + "keys:\n- name: a\n  key: ${KEY}\n  limits: {tokens_per_minute: true}\n", "5: keys[0].limits.tokens_per_minute: must be a whole number of at least 1, not true"),
    # --- not yet
    case("redis", OPEN + "limiter: redis://:hunter22@h\n", "3: limiter: redis is not supported yet; only memory is"),
    case("an unknown limiter", OPEN + "limiter: disk\n", "3: limiter: must be memory"),
    case("postgresql without a database", OPEN + "store: postgresql://u:hunter22@h\n", f"3: store: {STORE}"),
    case("postgresql nowhere", OPEN + "store: postgresql:///d\n", f"3: store: {STORE}"),
    case("postgresql on no port", OPEN + "store: postgresql://u:hunter22@h:port/d\n", f"3: store: {STORE}"),
    case("an option that postgresql has not", OPEN + "store: postgresql://u:hunter22@h/d?sslmod=require\n", "3: store: has the option 'sslmod'; allowed are: sslmode, host, port"),
    case("a store in no file", OPEN + "store: sqlite:///\n", f"3: store: {STORE}"),
    case("an unknown store", OPEN + "store: mysql://u:hunter22@h/d\n", f"3: store: {STORE}"),
    case("a negative price", "auth: none\nmodels:\n  t:\n    endpoints: ['http://h:1']\n    price: {prompt: -1, completion: 1}\n", "5: models.t.price.prompt: must be a number from 0 to 1000000, not -1"),
    case("a retention of no days", OPEN + "retention_days: 0\n", "3: retention_days: must be a whole number of at least 1, not 0"),
    case("two workers", OPEN + "server: {workers: 2}\n", "3: server.workers: more than 1 worker is not supported yet"),
    case("a port without a host", OPEN + "server: {admin_listen: ':8081'}\n", "3: server.admin_listen: must be HOST:PORT, such as 127.0.0.1:8081 or [::1]:8081; port 0 takes a free one"),
    case("a port beyond all", OPEN + "server: {admin_listen: '127.0.0.1:65536'}\n", "3: server.admin_listen: must be HOST:PORT, such as 127.0.0.1:8081 or [::1]:8081; port 0 takes a free one"),
    case("media from elsewhere", tiny("allowed_media_hosts: [h]"), "5: models.tiny.allowed_media_hosts: fetching media is not supported yet; leave it out (media come as data: URLs)"),
    # --- all at once
    case(
        "faults of every kind, by line",
        "server: {prot: 1}\nlimiter: redis://h\nmodels:\n  t: {endpoints: ['${NOT_SET}']}\n  u: {}\nkeys:\n- {name: a, key: x}\n",
        "1: server.prot: unknown field; did you mean 'port'?",
        "2: limiter: redis is not supported yet; only memory is",
        "4: models.t.endpoints[0]: the environment variable NOT_SET is not set",
        "5: models.u: must have an engine that Penstock starts, endpoints that run elsewhere, or both",
        f"7: keys[0].key: {SECRET}",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_every_fault_is_told_in_one_line(case: Case) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(case.text, "p.yaml", case.env)
    assert str(raised.value).splitlines() == [f"p.yaml:{line}" for line in case.lines]


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_no_fault_tells_a_secret(case: Case) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(case.text, "p.yaml", case.env)
    told = str(raised.value) + repr(raised.value.faults)
    assert "hunter2" not in told
    assert not any(ENV[name] in told for name in ("KEY", "OTHER"))


def test_a_fault_has_its_parts() -> None:
    with pytest.raises(ConfigError) as raised:
        parse(OPEN + "server: {port: abc}\n", "p.yaml", {})
    message = "must be a whole number from 0 to 65535, not 'abc'"
    assert raised.value.faults == [Fault("p.yaml", 3, "server.port", message)]


# --- YAML that is fine


def test_references_are_replaced_in_text_only() -> None:
    text = OPEN + "store: sqlite:///${A}-${B}/$${A}/$A # ${NOT_SET}\nserver: {port: 1}\n"
    assert parse(text, "p.yaml", {"A": "x", "B": "y"}).store == "sqlite:///x-y/${A}/$A"


def test_what_a_reference_gives_is_not_read_again() -> None:
    env = {"A": "sqlite:///${B}: [x] # y", "B": "z"}
    assert parse(OPEN + "store: ${A}\n", "p.yaml", env).store == "sqlite:///${B}: [x] # y"


def test_dates_are_text() -> None:
    assert list(parse("auth: none\nmodels: {2024-01-01: {endpoints: [http://h]}}", "p.yaml", {}).models) == [
        "2024-01-01"
    ]


def test_names_are_text_however_they_look() -> None:
    assert list(parse("auth: none\nmodels: {8080: {endpoints: [http://h]}}", "p.yaml", {}).models) == ["8080"]


def test_a_byte_order_mark_is_no_fault() -> None:
    assert parse("\ufeff" + OPEN, "p.yaml", {}).auth == "none"


def test_anchors_and_merges() -> None:
    text = """
auth: none
models:
  a: &a
    engine: &engine {model: m, replicas: 2}
    failover: off
  b:
    <<: *a
    failover: exact
  c:
    engine: {<<: [*engine, {python: p, replicas: 3}], model: n}
"""
    models = parse(text, "p.yaml", {}).models
    assert models["b"].engine == models["a"].engine
    assert (models["a"].failover, models["b"].failover) == ("off", "exact")
    engine = models["c"].engine
    assert engine is not None
    assert (engine.model, engine.replicas, engine.python) == ("n", 2, "p")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)),
        "a: &a {x: 1}\n"
        + "".join(
            f"{b}: &{b} {{<<: [{','.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
        ),
    ],
    ids=["lists", "merges"],
)
def test_a_text_that_explodes_is_stopped(text: str) -> None:
    with pytest.raises(ConfigError, match="more than 200000 values"):
        parse(text, "p.yaml", {})


# --- files


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(OPEN)
    assert load(path, {}).auth == "none"


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path / "p.yaml", {})
    assert str(raised.value) == f"{tmp_path}/p.yaml: there is no such file"
    assert raised.value.faults[0].line == 0


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, {})
    assert str(raised.value) == f"{tmp_path}: is a directory; name the YAML file in it"


def test_a_path_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(ConfigError) as raised:
        load(tmp_path / "a" / "b", {})
    assert str(raised.value) == f"{tmp_path}/a/b: cannot be read: Not a directory"


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_bytes(b"auth: none\nstore: caf\xe9\n")
    with pytest.raises(ConfigError) as raised:
        load(path, {})
    assert str(raised.value) == f"{path}:2: is not UTF-8 text; save it as UTF-8"


def test_an_endless_file() -> None:
    with pytest.raises(ConfigError) as raised:
        load(Path("/dev/zero"), {})
    assert str(raised.value) == "/dev/zero: is larger than 4 MiB"


# --- anything at all

SIGNS = "\t\n\0{}[]\"'|@`#~"
PIECES = st.sampled_from(
    [*SIGNS, "\n  ", ": ", "- ", ", ", "> ", "? ", "---", "...", "&a ", "*a", "<<: ", "!x ", "!!int ", "!!bool "]
) | st.sampled_from(
    [
        "%YAML 1.1\n",
        "\\U99999999",
        "\\ud800",
        "${",
        "${KEY}",
        "null",
        "9" * 21,
        "1e9",
        "http://h",
        "models",
        "tiny",
        "keys",
    ]
)
JUNK = st.one_of(st.text(), st.lists(PIECES, max_size=40).map("".join))
EXAMPLE = (CONFIGS / "example.yaml").read_text()


def check_faults(text: str) -> None:
    try:
        parse(text, "p.yaml", ENV)
    except ConfigError as error:
        faults = error.faults
    else:
        return
    assert faults
    assert all(fault.line >= 1 for fault in faults)
    assert all(str(fault).isprintable() for fault in faults)
    assert [fault.line for fault in faults] == sorted(fault.line for fault in faults)


@given(JUNK)
@settings(max_examples=300, deadline=None)
def test_junk_gives_nothing_but_faults(text: str) -> None:
    check_faults(text)


@given(st.integers(0, len(EXAMPLE)), st.integers(0, 12), JUNK)
@settings(max_examples=60, deadline=None)
def test_a_damaged_example_gives_nothing_but_faults(start: int, length: int, junk: str) -> None:
    check_faults(EXAMPLE[:start] + junk + EXAMPLE[start + length :])


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///penstock.db",
        "sqlite:////var/lib/penstock.db",
        "postgresql://u:p@h/d",
        "postgres://u@h:5433/d?sslmode=require",
        "postgresql://u@/d?host=/run/postgresql",
    ],
)
def test_stores(url: str) -> None:
    assert parse(OPEN + f"store: {url}\n", "p.yaml", {}).store == url
