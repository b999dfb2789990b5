"""Whose turn it is at the device: tenants take turns by what they have used, and nobody waits busily.

Knows tenants, sessions by name, and what a turn costs; knows no tensors and no spans. Method: start-time fair queueing
(Goyal, Vin and Cheng, SIGCOMM 1996). A tenant's tag is what it has used; the lowest tag is served next, and virtual
time is the tag served last. A tenant that begins to wait starts at virtual time at least: idling earns no credit.
So whoever waits comes after the turn under way and at most one of each other tenant, however many and large theirs are.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Any, Generic, TypeVar

from isthmus.errors import NotKeptError

LEAST_COST = 64
"""Positions that any request is charged at least: weights are read once for it, however few its tokens."""

Job = TypeVar("Job")


class _Outcome(Enum):
    WAITS = 0
    ITS_TURN = 1
    ANSWERED = 2
    DISMISSED = 3


@dataclass(eq=False)
class Ticket(Generic[Job]):
    """A request's place in the queue.

    Attributes:
        tenant: whose it is.
        session: of the tenant.
        cost: what each of its turns is charged, in positions of tokens; see `cost_of`.
        job: what another's turn may do along with its own; None: nothing.
    """

    tenant: str
    session: str
    cost: float
    job: Job | None = None
    number: int = 0
    outcome: _Outcome = _Outcome.WAITS
    woken: threading.Event = field(default_factory=threading.Event)

    def wake(self, outcome: _Outcome) -> None:
        """Let its thread go on."""
        self.outcome = outcome
        self.woken.set()


@dataclass
class _Line:
    """A tenant's tickets, first come, first served; passes that go on after a pause come before those that begin."""

    tag: float
    paused: deque[Ticket[Any]] = field(default_factory=deque)
    fresh: deque[Ticket[Any]] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self.paused) + len(self.fresh)

    @property
    def place(self) -> tuple[float, int]:
        """Where among the tenants it stands; only where somebody waits."""
        return self.tag, (self.paused or self.fresh)[0].number

    def pop(self) -> Ticket[Any]:
        """The next, which is charged."""
        ticket = (self.paused or self.fresh).popleft()
        self.tag += ticket.cost
        return ticket


class Turns(Generic[Job]):
    """One device's queue. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._lines: dict[str, _Line] = {}
        self._time = 0.0  # virtual: the tag served last
        self._numbers = count()

    @property
    def waiting(self) -> int:
        """How many wait."""
        with self._lock:
            return sum(map(len, self._lines.values()))

    @contextmanager
    def turn(self, ticket: Ticket[Job]) -> Iterator[bool]:
        """Wait, and have the device in here; False: another's turn has done the job, and the device is not held.

        Raises:
            NotKeptError: its session was dismissed.
        """
        self._wait(ticket, paused=False)
        if ticket.outcome is _Outcome.ANSWERED:
            yield False
            return
        try:
            yield True
        finally:
            self._leave()

    @contextmanager
    def pause(self, ticket: Ticket[Job]) -> Iterator[None]:
        """In the middle of a turn, let others have the device in here; then wait to go on."""
        self._leave()
        try:
            yield
        finally:
            self._wait(ticket, paused=True)

    @contextmanager
    def join(self, take: Callable[[Job], bool]) -> Iterator[list[Ticket[Job]]]:
        """Within a turn, do others' jobs too: those at the heads of the lines that `take` takes, in fair order.

        They are answered when this ends; where it fails they wait again, each to be done by itself.
        """
        joined = self._join(take)
        try:
            yield joined
        except BaseException:
            self._return(joined)
            raise
        for ticket in joined:
            ticket.wake(_Outcome.ANSWERED)

    def dismiss(self, session: str) -> None:
        """Let a session's requests that have not begun wait no longer; those that have go on to their end."""
        with self._lock:
            for line in self._lines.values():
                for ticket in [one for one in line.fresh if one.session == session]:
                    line.fresh.remove(ticket)
                    ticket.wake(_Outcome.DISMISSED)

    def _wait(self, ticket: Ticket[Job], paused: bool) -> None:
        with self._lock:
            ticket.outcome, ticket.woken = _Outcome.WAITS, threading.Event()
            ticket.number = next(self._numbers)
            line = self._line(ticket.tenant)
            (line.paused if paused else line.fresh).append(ticket)
            self._serve()
        ticket.woken.wait()
        if ticket.outcome is _Outcome.DISMISSED:
            raise NotKeptError("the session was closed; open it again")

    def _line(self, tenant: str) -> _Line:
        line = self._lines.setdefault(tenant, _Line(self._time))
        if not len(line):
            line.tag = max(line.tag, self._time)
        return line

    def _leave(self) -> None:
        with self._lock:
            self._taken = False
            for tenant in [name for name, line in self._lines.items() if not len(line) and line.tag <= self._time]:
                del self._lines[tenant]
            self._serve()

    def _serve(self) -> None:
        """Give the device, if it is free, to whoever is next."""
        if self._taken:
            return
        line = min((line for line in self._lines.values() if len(line)), key=lambda line: line.place, default=None)
        if line is None:
            self._lines.clear()  # the device is idle: nobody has kept another waiting
            return
        self._taken, self._time = True, line.tag
        line.pop().wake(_Outcome.ITS_TURN)

    def _join(self, take: Callable[[Job], bool]) -> list[Ticket[Job]]:
        joined: list[Ticket[Job]] = []
        with self._lock:
            order = [(*line.place, tenant) for tenant, line in self._lines.items() if len(line)]
            heapify(order)
            while order:
                line = self._lines[heappop(order)[-1]]
                job = (line.paused or line.fresh)[0].job
                if job is None or not take(job):
                    continue
                joined.append(line.pop())
                if len(line):
                    heappush(order, (*line.place, joined[-1].tenant))
        return joined

    def _return(self, joined: list[Ticket[Job]]) -> None:
        with self._lock:
            for ticket in reversed(joined):
                ticket.job, ticket.cost = None, 0.0  # was charged
                self._line(ticket.tenant).fresh.appendleft(ticket)


def cost_of(positions: int, passes: int, turns: int = 1) -> float:
    """What each of a request's turns is charged.

    Args:
        positions: of tokens, padding included.
        passes: how often the span is gone through; a backward counts twice.
        turns: that the request takes, waiting for the edge between them.
    """
    return max(LEAST_COST, positions) * passes / turns
