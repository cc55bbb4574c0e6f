"""A coroutine driven by what it waits for: no task, and no turn of the event loop between an event and what follows it.

Nor does it leave a cycle of references, which only a collection could undo: what has happened forgets who waited for it,
and what has ended, what it waited for.

A task costs a callback at its start and one at each wake-up, and each of those a turn of the loop. A request waits once
as a rule, for the end of its answer: here it runs at once up to there, and goes on in the very callback that ends it.
Not for code that needs a task around it (`asyncio.timeout`): that asks for one of its own.
"""

import asyncio
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any, Final

_running: "Drive | None" = None  # the one whose coroutine is running now


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Event:
    """Happens once, well or with an error; one coroutine may wait for it, in a `Drive` or in a task."""

    def __init__(self) -> None:
        self.happened = False
        self.error: Exception | None = None
        self._wake: Callable[[], object] | None = None

    def happen(self, error: Exception | None = None) -> None:
        """The first call counts. Runs what waits, and returns when that waits again or has ended."""
        if self.happened:
            return
        self.happened = True
        self.error = error
        wake, self._wake = self._wake, None
        if wake is not None:
            wake()

    def __await__(self) -> Generator[Any, None, None]:
        """Raises `error`. May be cancelled."""
        if not self.happened:
            if _running is not None:
                yield self
            else:
                future = asyncio.get_running_loop().create_future()
                self._wake = partial(_resolve, future)
                yield from future
        if self.error is not None:
            raise self.error


class _End:
    """What a driven coroutine waits for in the end, and nobody wakes it: to end by `StopIteration` costs as much as two
    waits, since compiled code makes a traceback of it."""

    def __await__(self) -> Generator[Any, None, None]:
        yield self


_END: Final = _End()


async def _to_its_end(coroutine: Coroutine[Any, None, None]) -> None:
    await coroutine
    await _END


class Drive:
    """Runs a coroutine that never raises, from its first step on. Stands for its task in a set of tasks."""

    __slots__ = ("_coroutine", "_on_end", "_waits")

    def __init__(self, coroutine: Coroutine[Any, None, None], on_end: "Callable[[Drive], object]") -> None:
        self._coroutine = _to_its_end(coroutine)
        self._on_end = on_end
        self._waits: Any = None

    def step(self, _: object = None) -> None:
        self._run(self._coroutine.send, None)

    def cancel(self, msg: object = None) -> None:
        """Raises `CancelledError` where the coroutine waits."""
        waits = self._waits
        if isinstance(waits, Event):
            waits._wake = None
            self._run(self._coroutine.throw, asyncio.CancelledError())
        elif waits is not None:
            waits.cancel()

    def _run(self, resume: Callable[[Any], Any], value: object) -> None:
        global _running  # noqa: PLW0603 - which coroutine is running is a fact about the thread
        before, _running = _running, self
        try:
            waits = self._waits = resume(value)
        finally:
            _running = before
        if isinstance(waits, Event):
            waits._wake = self.step
        elif waits is _END:
            self._waits = None
            self._on_end(self)
        elif waits is None:  # asyncio.sleep(0)
            asyncio.get_running_loop().call_soon(self.step)
        else:
            waits._asyncio_future_blocking = False  # what a task does with a future, too
            waits.add_done_callback(self.step)
