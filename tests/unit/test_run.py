"""A request's progress: what its log line says of an answer that went wrong."""

from typing import cast

from gateway import errors
from gateway.run import MAX_MODEL, Run
from gateway.types import Call, Head, Sink, Watcher
from gateway.wire.openai import ENDPOINTS
from tests.bare import bare_gateway

HEAD = Head(ENDPOINTS[0], "r", (), (), b"", b"", None, None, "")


class Client:
    """A sink that remembers the status line, and may have sent it already."""

    def __init__(self, status: int) -> None:
        self.gone = False
        self.status = status

    @property
    def started(self) -> bool:
        return self.status > 0

    def start(self, status: int, headers: bytes, length: int | None) -> None:
        assert not self.started
        self.status = status

    def write(self, data: bytes) -> None: ...
    def finish(self, last: bytes = b"") -> None: ...
    def close_after(self) -> None: ...
    def abort(self) -> None: ...
    def watch(self, watcher: Watcher | None) -> None: ...


async def test_the_status_that_is_logged_is_the_one_that_was_sent() -> None:
    for sent, status in ((0, 502), (200, 200)):  # 200 has gone out with a keep-alive before any event came
        client = Client(sent)
        run = Run(bare_gateway(), HEAD, cast(Sink, client))
        run.answer(errors.engine_failed())
        assert client.status == status
        outcome = run.outcome(None)
        assert (outcome.status, outcome.error) == (status, "engine_failed")


async def test_a_name_of_a_megabyte_is_not_kept_for_the_log() -> None:
    run = Run(bare_gateway(), HEAD, cast(Sink, Client(0)))
    run.call = Call(ENDPOINTS[0], "m" * 10**6, {}, 10**6, False, False, None)
    run.answer(errors.no_healthy_engine("m"))
    run.settle()
    (record,) = run.gateway.access_log._records
    assert len(record.model or "") == MAX_MODEL
