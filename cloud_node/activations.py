"""What waits for its backward pass: graphs kept from forward, within a budget shared by sessions.

Knows how many bytes graphs have, and will have at a cut, and whose they are; runs nothing and knows no wire.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition

import torch

from isthmus.attached import Attached
from isthmus.cut import Cut
from isthmus.errors import LimitError
from isthmus.round_trips import RoundTrips
from isthmus.rows import Rows

SMALL_GRAPH = 32
"""Positions of a graph that a session's share must have room for: a short row."""

ROOM_WITHIN_S = 2.0
"""How long a pass waits for others to let go of what is over their share; running it again costs about as much."""


@dataclass(frozen=True)
class Kept:
    """One forward pass: its input, its output (which holds the graph), its rows and the bytes that the graph holds.

    `trips` are what its backward will ask of the edge; `attached` what came for this step and was computed with.
    """

    hidden_ND: torch.Tensor
    output_ND: torch.Tensor
    rows: Rows
    size: int
    trips: RoundTrips | None = None
    attached: Attached | None = None


class ActivationStore:
    """Keeps forward passes per session until their backward takes them.

    Each session that keeps any has an equal share of what of the budget is not held elsewhere. Over its share the
    newest is not kept: microbatches come back first in, first out, so dropping the oldest would miss every time. Within
    its share it waits a while for others that hold more than theirs, from when they were fewer. A session is refused
    where its coming would leave shares without room for one small graph each: all would then run everything twice.
    """

    def __init__(self, budget: int, sessions: Callable[[], int], elsewhere: Callable[[], int] = lambda: 0) -> None:
        """Share a budget.

        Args:
            budget: in bytes.
            sessions: counts those that keep.
            elsewhere: bytes of the budget that other things hold.
        """
        self._budget = budget
        self._sessions = sessions
        self._elsewhere = elsewhere
        self._changed = Condition()
        self._kept: dict[str, dict[int, Kept]] = {}
        self._running: dict[str, int] = {}

    def admit(self, sessions: int, small: int) -> None:
        """Say whether one session more may keep, beside `sessions` that do.

        Args:
            sessions: that keep already.
            small: bytes of one small graph; 0: not known yet.

        Raises:
            LimitError: its share would be too small.
        """
        if small <= self._budget and self._budget // (sessions + 1) < small:
            raise LimitError(
                f"{sessions} sessions that train share this node's room for activations, and no share is left; "
                "try again when one of them has ended"
            )

    def begin(self, session: str, size: int, must: bool = False, patience_s: float = 0.0) -> bool:
        """Count a pass that holds a graph of `size` bytes while it runs, if there is room or it `must`; see `end`.

        Waits up to `patience_s` seconds for what others hold over their share.
        """
        with self._changed:
            if not must and size <= self._own_room(session):
                self._changed.wait_for(lambda: size <= self._room(session), patience_s)
            if size > self._room(session) and not must:
                return False
            self._running[session] = self._running.get(session, 0) + size
            return True

    def end(self, session: str, size: int) -> None:
        """What was counted by `begin` is over."""
        with self._letting_go():
            left = self._running.pop(session, 0) - size
            if left:
                self._running[session] = left

    def share(self) -> int:
        """Bytes that each session may hold."""
        return max(0, self._budget - self._elsewhere()) // max(1, self._sessions())

    def _room(self, session: str) -> int:
        return min(self._own_room(session), self._budget - self._elsewhere() - self._held())

    def _own_room(self, session: str) -> int:
        mine = sum(kept.size for kept in self._kept.get(session, {}).values()) + self._running.get(session, 0)
        return self.share() - mine

    def _held(self) -> int:
        kept = sum(kept.size for mine in self._kept.values() for kept in mine.values())
        return kept + sum(self._running.values())

    @contextmanager
    def _letting_go(self) -> Iterator[None]:
        with self._changed:
            yield
            self._changed.notify_all()

    def keep(self, session: str, microbatch: int, kept: Kept) -> bool:
        """Keep a forward pass if the session's share has room; tells whether it did."""
        with self._changed:
            mine = self._kept.setdefault(session, {})
            mine.pop(microbatch, None)  # a repeated forward replaces its first answer
            if kept.size > self._room(session):
                return False
            mine[microbatch] = kept
            return True

    def take(self, session: str, microbatch: int) -> Kept | None:
        """Remove and return a kept pass; None if it is not there."""
        with self._letting_go():
            return self._kept.get(session, {}).pop(microbatch, None)

    def forget(self, session: str) -> None:
        """Drop everything of a session."""
        with self._letting_go():
            self._kept.pop(session, None)

    @property
    def held_bytes(self) -> int:
        """Bytes kept, and held by passes that run, over all sessions."""
        with self._changed:
            return self._held()


class GraphSizes:
    """How many bytes graphs will hold, by the last one that was kept of the same cut."""

    def __init__(self) -> None:
        self._bytes_per_position: dict[Cut, float] = {}

    def note(self, cut: Cut, kept: Kept, depth: float) -> None:
        """Learn from a graph that goes through this share of the span's blocks."""
        if depth:
            self._bytes_per_position[cut] = kept.size / (len(kept.rows.lengths) * kept.rows.longest * depth)

    def expected(self, cut: Cut, rows: Rows, depth: float) -> int:
        """Of a graph of `rows` that goes through this share of the span's blocks; 0 before there was any."""
        whole = self._bytes_per_position.get(cut, 0.0) * len(rows.lengths) * rows.longest
        return math.ceil(whole * depth)

    def small(self, cut: Cut) -> int:
        """Of one small graph; 0 before there was any."""
        return math.ceil(SMALL_GRAPH * self._bytes_per_position.get(cut, 0.0))


class SavedBytes:
    """Bytes that a graph holds besides the span's own weights, each storage counted once."""

    def __init__(self, weights: dict[int, int]) -> None:
        """Count all but storages at these addresses."""
        self._weights = weights
        self._seen: dict[int, int] = {}

    @property
    def total(self) -> int:
        """What was counted."""
        return sum(self._seen.values())

    def counting(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Count what autograd saves in here."""
        return torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that kept its history here would hold its own graph for ever
