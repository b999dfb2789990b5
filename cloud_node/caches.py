"""What decoding has left: keys and values of sequences by session, within a bound.

Knows sessions and sequences by name, and bytes; knows no model and no device.
"""

from collections.abc import Callable, Sequence
from threading import Lock

from cloud_node.span import DecodeState

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
