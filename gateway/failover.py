"""Taking up a stream that its engine has left: the questions to the next engine. What they mean is `resilience.resume`."""

import asyncio
from typing import Final, NamedTuple

import orjson

from engines.types import Replica
from gateway import errors
from gateway.resilience.resume import MAX_ROLL_BACK, Cut, ResumedMeter, continuation, ending, finished, fits, straddle
from gateway.types import Call
from gateway.upstream.client import EngineClient
from gateway.usage.trail import Trail

CONTEXT: Final = (
    16  # ids of the prompt that are decoded along, so that the answer's first id is decoded as in its place
)
PATIENCE: Final = 10.0  # seconds for one question


class Resumption(NamedTuple):
    call: Call  # what the next engine is asked
    meter: ResumedMeter
    ending: bytes  # the rest of the stream, if nothing is left to ask for; else empty


async def take_up(client: EngineClient, replica: Replica, call: Call, trail: Trail) -> Resumption:
    """Raises `GatewayError` engine_failed if the next engine can't go on exactly, `Unreachable`."""
    cut = await find_cut(client, replica, trail, straddle(call))
    head = trail.head()
    rest = ending(call, cut, head) if finished(call, cut) else b""
    body = call.body if rest else continuation(call, cut)
    return Resumption(call.with_body(body), ResumedMeter(call, trail, cut, head), rest)


async def find_cut(client: EngineClient, replica: Replica, trail: Trail, straddle: int) -> Cut:
    """The most ids of the answer that can be kept: asks the engine what they say, and drops one after the other."""
    try:
        prompt_ids = trail.prompt_ids
    except ValueError:
        raise errors.engine_failed() from None
    ids, sent, context = trail.token_ids(), trail.text(), prompt_ids[-CONTEXT:]

    async def decode(tokens: list[int]) -> str:
        body = orjson.dumps({"model": replica.served_name, "tokens": tokens})
        async with asyncio.timeout(PATIENCE):
            status, answer = await client.ask(replica, "/detokenize", body)
        if status != 200:
            raise errors.engine_failed()
        text = orjson.loads(answer)["prompt"]
        return text if isinstance(text, str) else ""

    try:
        prompt_text = await decode(context)
        for kept in range(len(ids), max(0, len(ids) - MAX_ROLL_BACK) - 1, -1):
            overlap = fits(prompt_text, await decode(context + ids[:kept]), sent, straddle)
            if overlap is not None:
                return Cut(prompt_ids, ids[:kept], overlap, len(ids) - kept)
    except (TimeoutError, orjson.JSONDecodeError, KeyError):
        pass
    raise errors.engine_failed()
