"""A request's wait for one of its model's places (`resilience.overload`)."""

import asyncio
from time import monotonic

from gateway import errors
from gateway.drive import Event
from gateway.policy import Model
from gateway.relay import ClientGone
from gateway.resilience.overload import Places
from gateway.run import Run


class Turn(Event):
    """Comes when the request has a place; it fails when the client has left, or has waited for too long."""

    def client_gone(self) -> None:
        self.happen(ClientGone())

    def pause(self) -> None:
        """There is nothing to read yet."""

    def resume(self) -> None:
        """There is nothing to read yet."""


async def wait_in_line(run: Run, model: Model, deadline: float) -> None:
    """Returns with a place. `deadline` is the request's, in monotonic seconds.

    Raises `GatewayError` overloaded, `ClientGone`. May be cancelled."""
    places = model.places
    if places.full:
        raise errors.overloaded(model.name)
    turn = run.turn = Turn()
    places.queue(turn)
    model.metrics.queued += 1
    began = monotonic()
    patience = min(model.queue_timeout, deadline - began)
    timer = asyncio.get_running_loop().call_later(patience, turn.happen, errors.overloaded(model.name))
    run.sink.watch(turn)
    try:
        await turn
    except BaseException:
        if not places.leave(turn):
            hand_over(places)  # its turn had come, but it did not hear of it any more
        raise
    finally:
        timer.cancel()
        run.sink.watch(None)
        model.metrics.queued -= 1
        run.ready += monotonic() - began  # that the engines are busy is not the gateway's own time


def hand_over(places: Places[Event]) -> None:
    """Gives a place back: to the next in line, if there is one."""
    following = places.release()
    if following is not None:
        wake(following)


def wake(turn: Event) -> None:
    """Not within this call: one that fails at once would wake the next one from there, and so on down the whole line."""
    asyncio.get_running_loop().call_soon(turn.happen)
