"""When and how often what failed is tried again: patience since the last progress, growing pauses, and a budget.

Knows clocks, chance and what an error says of itself; opens no connection. Three things end it: nothing has moved for
as long as the patience; the line broke `MOST_BREAKS` times with no request answered in between (a request that kills
its server would else be sent for ever); the error says that trying again cannot help. A bucket of attempts bounds how
many there are in a minute whatever happens, as the retry budgets of gRPC (gRFC A6) and Finagle do.
"""

import random
import time
from collections.abc import Callable
from threading import Condition
from typing import Final

from isthmus.errors import IsthmusError, UnreachableError

PATIENCE_S: Final = 120.0
"""How long a session that was open waits for a server to come back."""

BACKOFF_S: Final = (0.2, 5.0)
"""First and longest pause between attempts, each jittered by half."""

BURST: Final = 10
EACH_S: Final = 3.0
"""Attempts that may follow each other as pauses allow; after these, one in so many seconds."""

MOST_BREAKS: Final = 20
LATER: Final = (1.0, 1.25)
"""Who is told when to come again comes no sooner, and not with all others at once."""

SOONEST_S: Final = 0.5
"""Whatever the server says."""


def retry_after(error: IsthmusError) -> float | None:
    """Seconds after which the server says that this would be taken; None where it does not say."""
    told = getattr(error, "retry_after_s", None)
    return float(told) if told is not None else None


class Budget:
    """A bucket of attempts, filled by time alone."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._left, self._counted = float(BURST), clock()

    def take(self, not_before_s: float = 0.0) -> float:
        """Take the next attempt; returns in how many seconds it may be, `not_before_s` at least."""
        now = self._clock()
        self._left = min(float(BURST), self._left + (now - self._counted) / EACH_S) - 1
        self._counted = now
        return max(not_before_s, -self._left * EACH_S)


class Retrying:
    """What one session, or one fetch, knows of its attempts."""

    def __init__(
        self,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """Have patience for `patience_s` seconds without progress, on this clock; `draw` gives the jitter."""
        self.patience_s = patience_s
        self._clock, self._draw = clock, draw
        self._moved = clock()
        self._pause_s = BACKOFF_S[0]
        self._breaks = 0
        self._budget = Budget(clock)

    def began(self) -> None:
        """There is work again after there was none: patience counts from here."""
        self._moved = self._clock()

    def broke(self, moved: float) -> None:
        """An open line was lost, on which something last moved at `moved`."""
        self._moved = max(self._moved, moved)
        self._breaks += 1

    def progressed(self) -> None:
        """Something was finished: pauses are short again."""
        self._moved = self._clock()
        self._pause_s, self._breaks = BACKOFF_S[0], 0

    def pause(self, error: IsthmusError) -> float | None:
        """Seconds until the next attempt after this error; None: there is none."""
        left, told = self._left(), retry_after(error)
        if told is not None:
            wait_s = self.delay(error)
            return self._budget.take(wait_s) if wait_s is not None else None
        if not error.retryable or left <= 0 or self._breaks > MOST_BREAKS:
            return None
        wait_s = self._budget.take(min(left, self._pause_s * self._draw(0.5, 1.5)))
        self._pause_s = min(2 * self._pause_s, BACKOFF_S[1])
        return wait_s if wait_s <= left else None

    def delay(self, error: IsthmusError, since: float | None = None) -> float | None:
        """When to send again what the server would take later, in seconds; None: not, or later than patience lasts.

        Patience counts from `since`, of the same clock, where that is given: when a request was first refused.
        """
        told, left = retry_after(error), self._left() if since is None else since + self.patience_s - self._clock()
        return max(SOONEST_S, told) * self._draw(*LATER) if told is not None and told <= left else None

    def now(self) -> float:
        """The time of its clock."""
        return self._clock()

    def wait(self, lock: Condition, until: Callable[[], bool], seconds: float) -> None:
        """Wait with the lock until something is so, at most `seconds`."""
        lock.wait_for(until, seconds)

    def given_up(self, error: IsthmusError) -> IsthmusError:
        """What to say in the end."""
        if not error.retryable:
            return error
        if self._breaks > MOST_BREAKS:
            why = f"the line broke {self._breaks} times, and no request was answered in between"
            return UnreachableError(f"{why} ({error}); the server's log may say why, resume when it is well")
        return UnreachableError(f"no answer for {self.patience_s:.0f} s ({error}); resume when it is back")

    def _left(self) -> float:
        return self._moved + self.patience_s - self._clock()
