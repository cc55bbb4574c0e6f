"""How a model's replicas change over to a new configuration without a gap. Pure: what there is goes in, what to do next
comes out. Asked again after each change, so it holds no state and a further reload may come at any moment."""

from collections.abc import Sequence
from typing import Final, NamedTuple

from engines.command import Machine, Placement, world_size
from engines.spec import EngineSpec

# What an engine can take up while it runs; a change of anything else needs another process.
_ADJUSTABLE: Final = ("replicas", "start_timeout", "stop_timeout")
_HEADROOM: Final = 1.25  # times the memory that the old engine takes


class Seat(NamedTuple):
    """One replica of a model, as far as a change-over cares."""

    id: str
    local: bool  # a process of ours
    leaving: bool  # the configuration no longer has it
    launched: bool
    ready: bool
    proven: bool  # has been ready at some time
    fits: bool = True  # there is room for it beside all that runs now; of no meaning once it is launched


class Steps(NamedTuple):
    """Replicas by id."""

    launch: list[str]
    retire: list[str]  # take nothing new, and stop when their open requests have ended


def same_process(one: EngineSpec, other: EngineSpec) -> bool:
    """Whether an engine that runs as `one` says need not be started anew to be what `other` says."""
    exclude = set(_ADJUSTABLE)
    return one.model_dump(exclude=exclude) == other.model_dump(exclude=exclude)


def next_steps(seats: Sequence[Seat], *, room_to_come: bool = False) -> Steps:
    """What to do now for one model. `seats`: all but those that are being retired. `room_to_come`: something on this
    machine is on its way out, so what does not fit now may soon.

    A replica that leaves serves until as many others are ready as the configuration wants, or until no new one could
    still become ready. Only where the new engine does not fit beside the old ones, one of them goes first; the next one
    when that one's successor has shown that it works.
    """
    staying = [seat for seat in seats if not seat.leaving]
    leaving = [seat for seat in seats if seat.leaving]
    waiting = [seat for seat in staying if not seat.launched]
    retire = [seat.id for seat in leaving if not seat.ready]
    serving = [seat for seat in leaving if seat.ready]
    new = [seat for seat in staying if not seat.proven]
    spare = len(serving) + sum(seat.ready for seat in staying) - len(staying)
    dispensable = len(serving) if not new else max(0, min(spare, len(serving)))
    # Engines of ours first: they hold the room that others wait for.
    serving.sort(key=lambda seat: not seat.local)
    retire += [seat.id for seat in serving[:dispensable]]
    launch = [seat.id for seat in waiting if seat.fits]
    cramped = [seat for seat in waiting if not seat.fits]
    if cramped and not room_to_come and not any(seat.local and seat.id in retire for seat in leaving):
        on_trial = any(seat.local and seat.launched for seat in new)
        held = [seat.id for seat in serving[dispensable:] if seat.local]
        if not held:
            launch.append(cramped[0].id)  # there is no room to wait for
        elif not on_trial:
            retire.append(held[0])
    return Steps(launch, retire)


def room_beside(
    spec: EngineSpec, planned: Placement, others: Sequence[tuple[EngineSpec, Placement]], machine: Machine
) -> Placement | None:
    """Where one more engine can run beside `others`: where it was `planned`, or on GPUs that nobody uses. None where
    it would have to share GPUs. Cores can be shared."""
    if not machine.gpus:
        return planned
    used = {gpu for other, placement in others for gpu in (placement.gpus or _chosen(other))}
    chosen = _chosen(spec)
    if chosen:
        return None if used & set(chosen) else planned
    if planned.gpus and not used & set(planned.gpus):
        return planned
    free = [gpu for gpu in machine.gpus if gpu not in used]
    count = min(world_size(spec), len(machine.gpus))
    return Placement(gpus=tuple(free[:count])) if len(free) >= count else None


def _chosen(spec: EngineSpec) -> list[str]:
    return [gpu.strip() for gpu in spec.env.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu.strip()]


def memory_allows(available: int, old: int) -> bool:
    """Whether an engine like one that takes `old` bytes of main memory can run besides."""
    return available >= old * _HEADROOM
