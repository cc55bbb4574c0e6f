"""Where a model's engines come from: processes of ours (engines.supervisor), or endpoints that run elsewhere."""

import asyncio
from dataclasses import dataclass
from typing import Final

from engines import probe
from engines.lifecycle import Happening
from engines.monitor import Monitor, Pace
from engines.probe import Address, ProbeError
from engines.record import Record
from engines.spec import EngineSpec
from engines.types import EventKind

DEFAULT_STALL_TIMEOUT: Final = 60.0


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What serves one model. `engine` and `endpoints` may stand together."""

    engine: EngineSpec | None = None
    endpoints: tuple[str, ...] = ()  # "http://10.0.0.5:8000"
    endpoint_api_key: str | None = None
    served_model_name: str | None = None  # what the endpoints call the model, if not by its name in the config
    stall_timeout: float = DEFAULT_STALL_TIMEOUT  # seconds without progress after which an engine of ours is killed


class RemoteEngine:
    """Watches an engine that somebody else runs."""

    def __init__(self, record: Record, served_model_name: str | None, pace: Pace) -> None:
        self.record = record
        self._served_model_name = served_model_name
        self._pace = pace
        replica = record.replica
        self._monitor = Monitor(
            Address(replica.url, replica.api_key), pace, on_load=lambda load: record.change(load=load)
        )

    def poke(self) -> None:
        self._monitor.poke()

    def suspect(self) -> None:
        # What hangs there is theirs to restart; we can only look.
        self._monitor.poke()

    async def run(self) -> None:
        """Watch until cancelled."""
        record = self.record
        record.happened(Happening.LAUNCHED)
        try:
            while True:
                await self._until_usable()
                record.tell(EventKind.READY, f"{record.replica.url} answers")
                why = await self._monitor.until_silent()
                record.happened(Happening.SILENT, reason=why, load=None)
                record.tell(EventKind.UNHEALTHY, f"{record.replica.url} does not answer: {why}")
        finally:
            self._monitor.close()
            record.happened(Happening.ENDED, reason=None, load=None)

    async def _until_usable(self) -> None:
        record = self.record
        while True:
            await self._monitor.until_well(self._pace.absent, on_miss=lambda why: record.change(reason=why))
            try:
                cards = await probe.cards(self._monitor.line)
            except ProbeError as error:
                if error.status in {401, 403}:
                    # Every request would be refused as this one was.
                    record.change(reason=f"it refuses engine_api_key: {error}")
                    await asyncio.sleep(self._pace.absent)
                    continue
                cards = []  # not every engine lists its models; it may serve all the same
            pick = probe.pick_card(cards, model=record.replica.model, served_model_name=self._served_model_name)
            record.happened(Happening.ANSWERED, served_name=pick.name, card=pick.card, reason=None)
            if pick.note is not None:
                record.tell(EventKind.NOTE, pick.note)
            return
