"""A config as it may be shown: no secret in it, and nothing else missing."""

from typing import Any

import pytest

from gateway.admin.masking import MASK, masked
from gateway.config.load import parse

SECRET = "s3cr3t-value-0123456789"


@pytest.mark.parametrize(
    "config",
    [
        {"admin_key": SECRET},
        {"keys": [{"name": "a", "key": SECRET}, {"name": "b", "key_sha256": SECRET}]},
        {"models": {"m": {"engine_api_key": SECRET}}},
        {"models": {"m": {"engine": {"env": {"HF_TOKEN": SECRET, "HARMLESS": SECRET}}}}},
        {"models": {"m": {"engine": {"args": {"hf-token": SECRET, "hf_token": SECRET}}}}},
        {"models": {"m": {"engine": {"args": {"kv-transfer-config": {"password": SECRET}}}}}},
        {"models": {"m": {"engine": {"args": {"list": [{"api-key": SECRET}]}}}}},
        {"models": {"m": {"engine": {"args": {"api-keys": [SECRET]}}}}},
        {"store": f"postgresql://user:{SECRET}@host:5432/db"},
        {"store": f"postgresql://host/db?user=u&password={SECRET}"},
        {"limiter": f"rediss://:{SECRET}@host:6379/0"},
        {"models": {"m": {"endpoints": [f"http://u:{SECRET}@host"]}}},
    ],
)
def test_no_secret_is_shown(config: dict[str, Any]) -> None:
    shown = str(masked(config))
    assert SECRET not in shown
    assert MASK in shown


@pytest.mark.parametrize(
    "config",
    [
        {"admin_key": None, "store": "sqlite:///penstock.db", "auth": "keys"},
        {"keys": [{"name": "a", "models": ["*"], "limits": {"tokens_per_minute": 5}}]},
        {"models": {"m": {"engine": {"args": {"max-num-batched-tokens": 2048, "tokenizer": "x", "dtype": "float32"}}}}},
        {"models": {"m": {"tokenizer": "folder", "endpoints": ["http://host:1"], "engine_api_key": None}}},
        {"server": {"workers": 1, "header_timeout": 10.0, "cors_origins": ["https://a.example"]}},
    ],
)
def test_what_is_no_secret_is_shown(config: dict[str, Any]) -> None:
    assert masked(config) == config


def test_a_real_config() -> None:
    text = f"""\
admin_key: {SECRET}-admin
models:
  m:
    engine: {{model: x, args: {{dtype: float32}}, env: {{HF_TOKEN: {SECRET}-hf}}}}
    endpoints: ["http://h:1"]
    engine_api_key: {SECRET}-engine
keys: [{{name: a, key: {SECRET}-a}}, {{name: b, key_sha256: {"ab" * 32}}}]
"""
    shown = masked(parse(text, "f", {}).model_dump(mode="json"))
    assert SECRET not in str(shown)
    assert "ab" * 32 not in str(shown)
    assert shown["admin_key"] == shown["keys"][0]["key"] == shown["keys"][1]["key_sha256"] == MASK
    assert shown["models"]["m"]["engine"]["env"] == {"HF_TOKEN": MASK}
    assert shown["models"]["m"]["engine"]["args"] == {"dtype": "float32"}
