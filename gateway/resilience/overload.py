"""How many requests of a model are open at once, and who waits for a place, in which order. Pure.

What the engines cannot begin within reason is better refused at once: a client that hears it in a few milliseconds can go
elsewhere, and the engines' work goes into answers that somebody still waits for.
"""

from collections import OrderedDict
from typing import Generic, TypeVar

W = TypeVar("W")


class Places(Generic[W]):
    """The places of one model, and the queue for them. `W` stands for a request that waits; it must be hashable.

    While anybody waits, every place is taken: a place that comes free goes to the first of the queue at once. So whether
    there is one is a single comparison, `open < most`.
    """

    __slots__ = ("most", "most_waiting", "open", "waiting")

    def __init__(self, most: float, most_waiting: int) -> None:
        self.most = most  # places; infinite without a cap
        self.most_waiting = most_waiting
        self.open = 0  # requests that have a place
        self.waiting: OrderedDict[W, None] = OrderedDict()  # in the order in which they came

    @property
    def full(self) -> bool:
        """No place is free, and none to wait for one either."""
        return self.open >= self.most and len(self.waiting) >= self.most_waiting

    def queue(self, request: W) -> None:
        """It waits from now on. Only while no place is free."""
        self.waiting[request] = None

    def leave(self, request: W) -> bool:
        """It waits no longer. False: it has a place already."""
        if request not in self.waiting:
            return False
        del self.waiting[request]
        return True

    def release(self) -> W | None:
        """A place comes free. Returns the request that has it now, if one waited."""
        if self.waiting and self.open <= self.most:
            return self.waiting.popitem(last=False)[0]
        self.open -= 1
        return None

    def resize(self, most: float, most_waiting: int) -> list[W]:
        """Other bounds. Returns the requests that have a place now; what is open or waits beyond them stays."""
        self.most, self.most_waiting = most, most_waiting
        served: list[W] = []
        while self.waiting and self.open < most:
            self.open += 1
            served.append(self.waiting.popitem(last=False)[0])
        return served
