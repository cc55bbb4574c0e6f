"""How an operator talks to a gateway."""

import json
from typing import Any

from tests.served import JSON_TYPE, KEY, Answer, Penstock, bearer

ADMIN = "sk-admin-0123456789"
ENGINE_KEY = "sk-engine-0123456789"
PROMPT = "what nobody but the engine may read"


def config(*urls: str, server: str = "{}", admin: str = ADMIN, store: str = "sqlite:///penstock.db") -> str:
    return f"""\
server: {server}
store: {store}
admin_key: {admin}
models:
  tiny:
    aliases: [default]
    endpoints: [{", ".join(f'"{url}"' for url in urls)}]
    engine_api_key: {ENGINE_KEY}
    price: {{prompt: 100000, completion: 200000}}
  org/other: {{endpoints: ["{urls[0]}"], failover: "off", engine_api_key: {ENGINE_KEY}}}
keys:
  - {{name: test, key: {KEY}, models: ["*"]}}
"""


async def ask(gateway: Penstock, path: str, method: str = "GET", body: Any = None, key: str | None = ADMIN) -> Answer:
    headers = bearer(key) | (JSON_TYPE if body is not None else {})
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    return await gateway.request(method, f"/admin/api{path}", headers, data)


def judge(answer: Answer, status: int, code: str, param: str | None = None) -> str:
    assert answer.status == status, answer.body
    error = answer.error
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param), error
    return str(error["message"])
