"""Passes that wait for the edge in the middle of their turn, and the seconds that they spend computing.

Knows turns, the way to the edge, and clocks; knows no modules and no wire.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cloud_node.engine import Work
from cloud_node.turns import Ticket, Turns
from isthmus.round_trips import Edge, Question


class PausingEdge:
    """An edge before whose answers others may use the device."""

    def __init__(self, edge: Edge, turns: Turns[Any], ticket: Ticket[Any], work: Work) -> None:
        """Ask `edge`, within the turn that `ticket` has; `work` is told of the waiting."""
        self._edge = edge
        self._turns = turns
        self._ticket = ticket
        self._work = work

    def ask(self, question: Question) -> list[torch.Tensor]:
        """See `isthmus.round_trips.Edge`."""
        began = answered = time.perf_counter()
        try:
            with self._turns.pause(self._ticket):
                try:
                    return self._edge.ask(question)
                finally:
                    answered = time.perf_counter()
        finally:
            self._work.queue_s += time.perf_counter() - answered
            self._work.port_s += answered - began


@contextmanager
def timed(work: Work, figure: str) -> Iterator[None]:
    """Add up the seconds in here, but for those in which the pass waited at a port or for the device after it."""
    began, waited = time.perf_counter(), work.port_s + work.queue_s
    yield
    spent = time.perf_counter() - began - (work.port_s + work.queue_s - waited)
    setattr(work, figure, getattr(work, figure) + max(0.0, spent))
