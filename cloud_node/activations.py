"""What waits for its backward pass: graphs kept from forward, within a budget shared by sessions.

Knows byte counts and keys; knows no model and no wire.
"""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

import torch

from cloud_node.round_trips import RoundTrips
from isthmus.rows import Rows


@dataclass(frozen=True)
class Kept:
    """One forward pass: its input, its output (which holds the graph), its rows and the bytes that the graph holds.

    `trips` are what its backward will ask of the edge.
    """

    hidden_ND: torch.Tensor
    output_ND: torch.Tensor
    rows: Rows
    size: int
    trips: RoundTrips | None = None


class ActivationStore:
    """Keeps forward passes per session until their backward takes them.

    Each session that is open has an equal share of the budget. Over its share the newest is not kept:
    microbatches come back first in, first out, so dropping the oldest would miss every time.
    """

    def __init__(self, budget: int, sessions: Callable[[], int]) -> None:
        self._budget = budget
        self._sessions = sessions
        self._lock = Lock()
        self._kept: dict[str, dict[int, Kept]] = {}

    def room(self, session: str) -> int:
        """Bytes that `session` may still keep."""
        with self._lock:
            return self._room(session)

    def _room(self, session: str) -> int:
        mine = sum(kept.size for kept in self._kept.get(session, {}).values())
        # Others may still hold more than their share, from when they were fewer.
        return min(self._budget // max(1, self._sessions()) - mine, self._budget - self._held())

    def _held(self) -> int:
        return sum(kept.size for mine in self._kept.values() for kept in mine.values())

    def keep(self, session: str, microbatch: int, kept: Kept) -> bool:
        """Keep a forward pass if the session's share has room; tells whether it did."""
        with self._lock:
            mine = self._kept.setdefault(session, {})
            mine.pop(microbatch, None)  # a repeated forward replaces its first answer
            if kept.size > self._room(session):
                return False
            mine[microbatch] = kept
            return True

    def take(self, session: str, microbatch: int) -> Kept | None:
        """Remove and return a kept pass; None if it is not there."""
        with self._lock:
            return self._kept.get(session, {}).pop(microbatch, None)

    def forget(self, session: str) -> None:
        """Drop everything of a session."""
        with self._lock:
            self._kept.pop(session, None)

    @property
    def held_bytes(self) -> int:
        """Bytes kept over all sessions."""
        with self._lock:
            return self._held()
