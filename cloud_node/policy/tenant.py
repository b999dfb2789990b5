"""What a node remembers of one tenant while it runs: its pace, what is in flight, what it has gradients of.

Knows numbers, clocks and hashes of rows; knows no policy file and no session. All of it is bounded, and gone when the
node stops: only daily budgets outlive that.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Final

from cloud_node.policy.room import Room
from isthmus.errors import LimitError, NotKeptError

INPUTS: Final = 1 << 16
"""Rows of hidden states whose gradients are counted; those not seen for longest are forgotten first."""

OFTEN: Final = 16
"""A row with so many is kept apart from those with fewer, so that it is not forgotten for a crowd of new ones."""

REQUESTS: Final = 1 << 14
"""Backwards that are known not to be counted twice, and forwards whose backward may follow."""

ROWS: Final = 1 << 18
"""Rows of all forwards whose backward may follow."""

BURST_S: Final = 1.0
"""What was not used for so long may be used at once."""


class Pace:
    """Bytes in a second. It may be overdrawn by the last that was taken, so that no request is too large for it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rate: float | None = None
        self._owed, self._counted = 0.0, clock()

    def wait_s(self, rate: float | None) -> float:
        """Seconds until something may be taken at this rate; 0: now. Without a rate nothing is counted."""
        self._rate = rate
        self._advance()
        return max(0.0, self._owed / rate) if rate is not None else 0.0

    def take(self, size: int) -> None:
        """Count bytes, at the rate that was asked about last."""
        self._advance()
        if self._rate is not None:
            self._owed += size

    def _advance(self) -> None:
        """Pay off what time has paid; a rate that is new begins with nothing owed."""
        now = self._clock()
        paid = (now - self._counted) * self._rate if self._rate is not None else self._owed
        self._owed = max(-BURST_S * (self._rate or 0.0), self._owed - paid)
        self._counted = now


class Gradients:
    """How many backward passes each row of hidden states was given; any thread may use it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: OrderedDict[bytes, int] = OrderedDict()
        self._often: OrderedDict[bytes, int] = OrderedDict()
        self._counted: OrderedDict[bytes, None] = OrderedDict()
        self._forwards: OrderedDict[tuple[str, int], Sequence[bytes]] = OrderedDict()
        self._rows = 0

    def ran(self, session: str, microbatch: int, rows: Sequence[bytes]) -> None:
        """A forward over these rows ran, whose backward may follow."""
        with self._lock:
            self._rows += len(rows) - len(self._forwards.pop((session, microbatch), ()))
            self._forwards[session, microbatch] = rows
            while len(self._forwards) > REQUESTS or (self._rows > ROWS and len(self._forwards) > 1):
                _, oldest = self._forwards.popitem(last=False)
                self._rows -= len(oldest)

    def rows_of(self, session: str, microbatch: int) -> Sequence[bytes]:
        """The rows of a forward.

        Raises:
            NotKeptError: it is forgotten; the client sends its input again.
        """
        found = self.find(session, microbatch)
        if found is None:
            raise NotKeptError("the forward of this backward is no longer known here; send its input again")
        return found

    def find(self, session: str, microbatch: int) -> Sequence[bytes] | None:
        """The same; None where it is forgotten, or never ran."""
        with self._lock:
            return self._forwards.get((session, microbatch))

    def count(self, request: bytes, rows: Sequence[bytes], most: int) -> None:
        """Count a backward over these rows; the same request again counts for nothing.

        Raises:
            LimitError: one of them has been given `most`.
        """
        with self._lock:
            if request in self._counted:
                return
            more = Counter(rows)
            if any(self._given(row) + count > most for row, count in more.items()):
                raise LimitError(
                    f"one row of hidden states was given {most:,} gradients, which is what the policy grants; "
                    "ask the model owner for more `gradients_per_input` if this is training"
                )
            self._counted[request] = None
            for row, count in more.items():
                self._add(row, count)
            for known, room in ((self._counts, INPUTS), (self._often, INPUTS), (self._counted, REQUESTS)):
                while len(known) > room:
                    known.popitem(last=False)

    def _given(self, row: bytes) -> int:
        return self._often.get(row) or self._counts.get(row, 0)

    def _add(self, row: bytes, count: int) -> None:
        given = self._given(row) + count
        known, other = (self._often, self._counts) if given >= OFTEN else (self._counts, self._often)
        other.pop(row, None)
        known[row] = given
        known.move_to_end(row)


class Tenant:
    """One tenant's."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.pace = Pace(clock)
        self.gradients = Gradients()
        self.room = Room(clock)
