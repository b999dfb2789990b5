"""One device: a request has it by itself, or along with others that are joined to it, when its turn comes.

Knows turns, batches and memory that is not there; knows no budget, no caches and no wire.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from cloud_node.batching import Batch, Request
from cloud_node.engine import Asked, Work
from cloud_node.opened import OpenSession
from cloud_node.pausing import PausingEdge
from cloud_node.turns import Ticket, Turns, cost_of
from isthmus.errors import IsthmusError, LimitError
from isthmus.rows import Rows

FAILS = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, IsthmusError)
"""What one request among others may make of a run: memory that is not there, a position that is not."""


class Device:
    """Runs requests, one at a time or several joined.

    Attributes:
        batches: how often it ran so many requests at once, by that number; changed by whoever has the turn.
    """

    def __init__(self, turns: Turns[Request], joined_rows: int) -> None:
        """Let those in `turns` have it, and join requests of at most so many rows together; 1: none."""
        self._turns = turns
        self._joined_rows = joined_rows
        self.batches: Counter[int] = Counter()

    @contextmanager
    def turn(self, opened: OpenSession, rows: Rows, passes: int, asked: Asked, work: Work) -> Iterator[Asked]:
        """Wait, and have the device in here, alone; others use it while what is given, in place of `asked`, asks.

        Args:
            opened: whose turn it is.
            rows: that run.
            passes: how often the span is gone through; see `cost_of`.
            asked: what the request asks of the edge.
            work: is told of the waiting.

        Raises:
            NotKeptError: the session was closed meanwhile.
            LimitError: the device's memory did not do.
        """
        cost = cost_of(len(rows.lengths) * rows.longest, passes, opened.turns(asked))
        ticket: Ticket[Request] = Ticket(opened.opening.tenant, opened.name, cost)
        edge = None if asked.edge is None else PausingEdge(asked.edge, self._turns, ticket, work)
        began = time.perf_counter()
        with self._turns.turn(ticket), _telling_of_memory():
            work.queue_s += time.perf_counter() - began
            self.batches[1] += 1
            yield replace(asked, edge=edge)

    def run(self, opened: OpenSession, request: Request) -> torch.Tensor:
        """A request's output [K, D]: computed with those that wait and fit, or along with another whose turn it is.

        Raises:
            NotKeptError: the session was closed meanwhile.
            LimitError: the device's memory did not do.
        """
        joins = request.span.joins and not opened.opening.alone and self._joined_rows > 1
        cost = cost_of(request.positions, 1)
        ticket = Ticket(opened.opening.tenant, opened.name, cost, request if joins else None)
        with self._turns.turn(ticket) as ours:
            if ours and not (joins and self._ran_with_others(request)):
                self.batches[1] += 1
                with _telling_of_memory():
                    request.run()
        return request.output_KD

    def _ran_with_others(self, request: Request) -> bool:
        """Whether it was run along with others; if that fails, each is to be run by itself."""
        batch = Batch(request, self._joined_rows)
        try:
            with self._turns.join(batch.take) as joined:
                if joined:
                    self.batches[1 + len(joined)] += 1
                    batch.run()
                return bool(joined)
        except FAILS:
            return False


@contextmanager
def _telling_of_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise LimitError("the cloud's device is out of memory for this request; send smaller batches") from None
