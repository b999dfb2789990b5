"""What decoding has left: keys and values of sequences by session, within a bound.

Knows sessions and sequences by name, whose past a request continues, and bytes; runs nothing.
"""

from collections.abc import Callable, Sequence
from threading import Lock

from cloud_node.engine import Place
from cloud_node.span import DecodeState
from isthmus.errors import NotKeptError, WireError
from isthmus.rows import Rows

SEQUENCES_PER_SESSION = 16


class DecodeCaches:
    """Holds each sequence's past until its next token.

    Sessions that decode have equal shares of the bound, so that all together stay within it. Over its share a session's
    oldest sequence goes first: its client begins it again, by sending the past that it has kept.
    """

    def __init__(self, most: Callable[[], int]) -> None:
        """Hold at most so many bytes, as of now."""
        self._most = most
        self._lock = Lock()
        self._held: dict[str, dict[str, tuple[DecodeState, int]]] = {}  # the oldest first, with its size

    def take(self, session: str, sequence: str) -> DecodeState | None:
        """Remove and return a sequence's past; None if it is not there."""
        with self._lock:
            return self._held.get(session, {}).pop(sequence, (None, 0))[0]

    def resume(self, session: str, rows: Rows, place: Place) -> DecodeState:
        """Remove and return the past that `rows` continue, as it was at `place`; an empty one at a sequence's start.

        Raises:
            NotKeptError: the past that request `place.after` left, `place.start` wide, is not there.
            WireError: the rows do not continue it.
        """
        if not place.start:
            return DecodeState.empty(len(rows.lengths))
        if len(set(rows.lengths)) > 1:
            raise WireError("rows that continue a sequence must bring equally many tokens")
        state = self.take(session, place.sequence)
        if state is None or (place.after, place.start) not in state.made_by:
            raise NotKeptError(f"the cache of sequence {place.sequence} is gone; send its past again")
        if state.mask_BT.shape[0] != len(rows.lengths):
            raise WireError(f"{len(rows.lengths)} rows do not continue a sequence of {state.mask_BT.shape[0]}")
        state.truncate(place.start)
        return state

    def put(self, session: str, sequence: str, state: DecodeState) -> None:
        """Hold a sequence's past in place of what was held of it."""
        size = state.size
        with self._lock:
            mine = self._held.setdefault(session, {})
            mine.pop(sequence, None)
            mine[sequence] = state, size
            share = self._most() // len(self._held)
            for held in self._held.values():  # others may hold more than their share, from when they were fewer
                while len(held) > SEQUENCES_PER_SESSION or sum(size for _, size in held.values()) > share:
                    del held[next(iter(held))]

    def release(self, session: str, sequences: Sequence[str]) -> None:
        """Forget sequences; a session that holds none has no share."""
        with self._lock:
            mine = self._held.get(session, {})
            for sequence in sequences:
                mine.pop(sequence, None)
            if not mine:
                self._held.pop(session, None)

    def forget(self, session: str) -> None:
        """Forget everything of a session."""
        with self._lock:
            self._held.pop(session, None)

    @property
    def held_bytes(self) -> int:
        """Bytes held of all sessions."""
        with self._lock:
            return sum(size for held in self._held.values() for _, size in held.values())
