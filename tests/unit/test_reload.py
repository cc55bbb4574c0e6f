"""One reload after the other, off the event loop, and what becomes of one that fails."""

import asyncio
import threading

import pytest

from gateway.admin.context import ReloadFailedError
from gateway.config.load import ConfigError, Fault, parse
from gateway.config.schema import Config
from gateway.observe.metrics import Metrics
from gateway.reload import Reloader, needs_restart, overridden


def config(more: str = "") -> Config:
    return parse(f"auth: none\nmodels: {{m: {{endpoints: ['http://127.0.0.1:1']}}}}\n{more}", "it", {})


async def test_the_loop_goes_on_while_a_file_is_read_and_reloads_wait_for_one_another() -> None:
    may_end = threading.Event()
    told: list[str] = []

    def read() -> Config:
        told.append("read")
        assert may_end.wait(10)
        return config()

    def apply(_: Config) -> list[str]:
        told.append("apply")
        return ["note"]

    metrics = Metrics()
    reloader = Reloader(read, apply, metrics)
    reloads = [asyncio.create_task(reloader.reload()) for _ in range(3)]
    async with asyncio.timeout(10):
        while not told:  # noqa: ASYNC110 - a thread has no event of the loop's to offer
            await asyncio.sleep(0.001)
    may_end.set()  # which only a loop that goes on can do
    assert await asyncio.gather(*reloads) == [["note"]] * 3
    assert told == ["read", "apply"] * 3
    assert metrics.reloads == {"applied": 3, "failed": 0}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConfigError([Fault("it", 2, "a", "is wrong"), Fault("it", 1, "b", "too")]), "it:1: b: too\nit:2: a: is wrong"),
        (RuntimeError("bug"), "a fault in Penstock: RuntimeError('bug')"),
    ],
)
async def test_a_reload_that_fails_applies_nothing_says_why_and_counts(error: Exception, message: str) -> None:
    def read() -> Config:
        raise error

    metrics = Metrics()
    with pytest.raises(ReloadFailedError) as caught:
        await Reloader(read, lambda _: pytest.fail("applied"), metrics).reload()
    assert str(caught.value) == message
    assert metrics.reloads == {"applied": 0, "failed": 1}


@pytest.mark.parametrize(
    ("more", "fields"),
    [
        ("", []),
        ("server: {max_body_bytes: 5000, idle_timeout: 1}", []),
        ("server: {host: 127.0.0.2, port: 1}", ["server.host", "server.port"]),
        ("server: {admin_listen: '127.0.0.1:1'}", ["server.admin_listen"]),
        ("store: sqlite:///other.db", ["store"]),
    ],
)
def test_what_needs_a_restart(more: str, fields: list[str]) -> None:
    notes = needs_restart(config(), config(more))
    assert [note.partition(":")[0] for note in notes] == fields


def test_the_command_line_wins() -> None:
    changed = overridden(config("server: {host: 127.0.0.2, port: 1}"), {"port": 2})
    assert (changed.server.host, changed.server.port) == ("127.0.0.2", 2)
