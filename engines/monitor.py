"""Watches one engine that answers over HTTP: does it still answer, does it get anywhere, how busy is it."""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from engines import probe
from engines.lifecycle import Progress
from engines.probe import Address, Line, ProbeError
from engines.types import Load

MISSES: Final = 2  # so many wrong answers in a row, and the engine counts as silent


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds between probes."""

    starting: float = 0.25  # of an engine of ours that loads its model
    absent: float = 1.0  # of an engine that does not answer
    doubtful: float = 0.5  # after a first wrong answer
    watching: float = 2.0  # of one that is well


class HungError(Exception):
    """The engine answers, or at least its process runs, but it makes no progress."""


class Monitor:
    """The probes of one address; one at a time, whoever asks for more.

    `until_…` run for as long as it takes and may be cancelled at any time. `poke` and `suspect` only set a flag.
    """

    def __init__(
        self,
        at: Address,
        pace: Pace,
        *,
        on_load: Callable[[Load | None], None],
        stall_timeout: float | None = None,
    ) -> None:
        """`stall_timeout`: seconds without progress after which the engine counts as hung; None: never."""
        self.line = Line(at)
        self.stall_timeout = stall_timeout
        self._pace = pace
        self._on_load = on_load
        self._poked = asyncio.Event()
        self._suspected = False

    def close(self) -> None:
        """In the end, by whoever made it. Never blocks."""
        self.line.close()

    def poke(self) -> None:
        """Probe now."""
        self._poked.set()

    def suspect(self) -> None:
        """Somebody waited in vain for tokens: find out whether the engine gets anywhere."""
        self._suspected = True
        self._poked.set()

    async def until_well(self, interval: float, on_miss: Callable[[str], None] = lambda _: None) -> None:
        """Return when the engine's health check is good; probe at once, then every `interval` seconds."""
        while True:
            try:
                return await probe.health(self.line)
            except ProbeError as error:
                on_miss(str(error))
            await self._pause(interval)

    async def until_silent(self, *, model: str = "") -> str:
        """Watch an engine that is well. Returns why it no longer is, after two wrong answers in a row.

        With a `stall_timeout` (which may change meanwhile), raises `HungError` when requests run but no token has moved for so long; and when, after
        `suspect`, a trial request for `model` fails and no token moves either."""
        misses, why = 0, ""
        progress: Progress | None = None
        while misses < MISSES:
            await self._pause(self._pace.doubtful if misses else self._pace.watching)
            suspected = self._suspected  # later ones are for the next look: what is read now may be from before them
            try:
                await probe.health(self.line)
            except ProbeError as error:
                misses, why = misses + 1, str(error)
                continue
            misses, stall_timeout = 0, self.stall_timeout
            gauges = await self._gauges()
            self._on_load(gauges.load if gauges else None)
            if stall_timeout is None:
                continue
            now = time.monotonic()
            if gauges is not None:
                progress = (progress or Progress(gauges.tokens, now)).seen(gauges.tokens, gauges.load.running, now)
                if now - progress.since >= stall_timeout:
                    raise HungError(f"no token for {stall_timeout:g} s with {gauges.load.running} requests running")
            if suspected:
                self._suspected = False
                await self._try(model, stall_timeout, before=gauges.tokens if gauges else None)
        return why

    async def _try(self, model: str, timeout: float, before: float | None) -> None:
        try:
            await probe.trial(self.line, model, timeout)
        except (ProbeError, TimeoutError) as error:
            after = await self._gauges()
            if before is None or after is None or after.tokens == before:
                raise HungError(f"a trial request got no answer in {timeout:g} s") from error

    async def _gauges(self) -> probe.Gauges | None:
        try:
            return await probe.gauges(self.line)
        except ProbeError:
            return None  # load is advice; whether the engine is well is not decided here

    async def _pause(self, seconds: float) -> None:
        # Not all at the same time, as engines that started together would be. The timer pokes, too: a timeout would end
        # the wait by an exception, which takes a quarter of all the time that an engine costs.
        began, wait = time.monotonic(), seconds * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
        timer = asyncio.get_running_loop().call_later(wait, self._poked.set)
        try:
            await self._poked.wait()
        finally:
            timer.cancel()
        # A burst of pokes costs one probe every 50 ms, not one each.
        if (early := began + min(0.05, wait) - time.monotonic()) > 0:
            await asyncio.sleep(early)
        self._poked.clear()
