"""When a stream on which nothing moves asks for a sign of life, and when it is given up.

Knows times only. gRPC's own pings find a peer that is gone; this finds one whose process answers pings and nothing
else. What counts is what moves, either way: neither a long upload nor a long computation is silence.
"""

import time
from collections.abc import Callable
from typing import Literal

SILENCE_S = 15.0
"""A stream on which nothing moves for so long asks for a sign of life."""

ANSWER_WITHIN_S = 2 * SILENCE_S
"""A sign of life comes within this time of the question's leaving."""

STUCK_S = 12 * SILENCE_S
"""A stream that takes nothing and brings nothing for so long is given up: a chunk of 1 MiB at 47 kbit/s takes that."""

Due = Literal["nothing", "ask", "give up"]


class Silence:
    """Told what moves on a stream; says what is due.

    Attributes:
        moved: when a frame last left or came that was no sign of life.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """A stream begins."""
        self._clock = clock
        self.moved = self._heard = clock()
        self._queued = False
        self._asked: float | None = None

    def heard(self, life_only: bool) -> None:
        """A frame came; `life_only` where it says nothing else."""
        self._heard, self._asked = self._clock(), None
        if not life_only:
            self.moved = self._heard

    def left(self, life_only: bool) -> None:
        """The line took a frame."""
        if life_only:
            self._queued, self._asked = False, self._clock()
        else:
            self.moved = self._clock()

    def due(self) -> Due:
        """What to do now; who is told to ask has asked."""
        now = self._clock()
        quiet = now - max(self.moved, self._heard)
        if self._asked is not None:
            return "give up" if now - max(self._asked, self.moved) >= ANSWER_WITHIN_S else "nothing"
        if quiet >= STUCK_S:
            return "give up"
        if quiet >= SILENCE_S and not self._queued:
            self._queued = True
            return "ask"
        return "nothing"
