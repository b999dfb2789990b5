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
        self._running: dict[str, int] = {}

    def begin(self, session: str, size: int, must: bool = False) -> bool:
        """Count a pass that holds a graph of `size` bytes while it runs, if there is room or it `must`; see `end`."""
        with self._lock:
            if size > self._room(session) and not must:
                return False
            self._running[session] = self._running.get(session, 0) + size
            return True

    def end(self, session: str, size: int) -> None:
        """What was counted by `begin` is over."""
        with self._lock:
            left = self._running.pop(session, 0) - size
            if left:
                self._running[session] = left

    def share(self) -> int:
        """Bytes that each session may hold."""
        return self._budget // max(1, self._sessions())

    def _room(self, session: str) -> int:
        mine = sum(kept.size for kept in self._kept.get(session, {}).values()) + self._running.get(session, 0)
        # Others may still hold more than their share, from when they were fewer.
        return min(self.share() - mine, self._budget - self._held())

    def _held(self) -> int:
        kept = sum(kept.size for mine in self._kept.values() for kept in mine.values())
        return kept + sum(self._running.values())

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
        """Bytes kept, and held by passes that run, over all sessions."""
        with self._lock:
            return self._held()
