"""A request's objects are gone with it: none waits for a collection, which would hold up all streams by milliseconds."""

from typing import Any

import pytest

from tests.fake_engine import FakeEngine
from tests.flow.talk import CHAT, connect
from tests.served import Penstock, chat_body, http_post, simple_config

REQUESTS = 50

WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "stream": {"stream": True, "max_tokens": 5},
    "stream with usage": {"stream": True, "max_tokens": 5, "stream_options": {"include_usage": True}},
    "stream that no other engine could continue": {"stream": True, "max_tokens": 5, "n": 2},
    "unknown model": {"model": "none"},
    "wrong field": {"temperature": 9},
    "refused by the engine": {"fake": {"status": 400}},
    "nonsense from the engine": {"fake": {"garbage": True}},
}


@pytest.mark.parametrize("way", WAYS)
async def test_nothing_waits_for_a_collection(way: str) -> None:
    asked = http_post(CHAT, chat_body(**WAYS[way]))
    async with FakeEngine(replicas=2) as engine, Penstock(simple_config(*engine.urls), "watched") as gateway:
        await gateway.ready()
        async with connect(gateway) as client:
            # Connections, caches and breakers have what they need.
            for _ in range(5):
                await client.send(asked)
                await client.answer()
            await gateway.in_cycles()
            for _ in range(REQUESTS):
                await client.send(asked)
                await client.answer()
            assert await gateway.in_cycles() < REQUESTS
