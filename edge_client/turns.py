"""One microbatch computes at a time; who waits for the cloud lets the others go on.

Knows threads and who goes before whom; knows no tensors and no wire. Two that compute side by side would take more
threads than were asked for, and hold twice the activations, for nothing: the device is one.
"""

import heapq
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

BEGINNING: Final = 0
GOING_ON: Final = 1


class Turns:
    """The device of an edge, which one thread has at a time.

    Those that begin go before those that go on, so that the cloud has work as early as can be; among equals it is first
    come, first served. A thread that never took a turn is in nobody's way.
    """

    def __init__(self) -> None:
        """Let nobody have it yet."""
        self._freed = threading.Condition()
        self._taken = False
        self._waiting: list[tuple[int, int]] = []
        self._tickets = itertools.count()
        self._here = threading.local()

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._waiting)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Compute in here, once it is this thread's turn."""
        self._take(BEGINNING)
        try:
            yield
        finally:
            self._give()

    @contextmanager
    def given_up(self) -> Iterator[None]:
        """Wait for something in here while others compute; at the end wait for the turn that was given up, if any."""
        if not getattr(self._here, "computes", False):
            yield
            return
        self._give()
        try:
            yield
        finally:
            self._take(GOING_ON)

    def _take(self, order: int) -> None:
        with self._freed:
            mine = (order, next(self._tickets))
            heapq.heappush(self._waiting, mine)
            self._freed.wait_for(lambda: not self._taken and self._waiting[0] == mine)
            heapq.heappop(self._waiting)
            self._taken = self._here.computes = True

    def _give(self) -> None:
        with self._freed:
            self._taken = self._here.computes = False
            self._freed.notify_all()
