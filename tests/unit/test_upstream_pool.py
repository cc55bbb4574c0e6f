"""Connections that an engine closes when nobody expects it."""

import asyncio
from typing import cast

import pytest

from gateway.cork import Cork
from gateway.upstream.client import Connection, Pool, Unreachable


class Closed(asyncio.Transport):
    """A transport whose peer has gone."""


async def test_a_connection_that_is_lost_before_anything_is_sent_is_none() -> None:
    pool = Pool("http://127.0.0.1:9", None, None, Cork())

    async def accepted_and_closed() -> tuple[asyncio.Transport, Connection]:
        transport, connection = Closed(), Connection(pool)
        connection.connection_made(transport)
        asyncio.get_running_loop().call_soon(connection.connection_lost, None)
        return transport, connection

    pool._connect = cast("type", accepted_and_closed)
    with pytest.raises(Unreachable):
        await pool.connect()
    assert pool.open == 0
