"""Who of one tenant has requests under way, and who was refused for want of room and waits.

Knows tokens, keys and a clock; knows no session and no policy file. A tenant's own sessions compete for its room, and
who holds some asks again the moment it has its answer, long before who was refused does: without a turn the latter
might never be served. Who has waited for `LONG_S` goes before whoever has waited for less.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

LONG_S: Final = 5.0
"""How long a refused request waits before room is held free for it; until then whoever comes first is served."""

GONE_S: Final = 5.0
"""Who has not asked again for so long does not wait any more."""

WAITING: Final = 1024
"""Requests that are known to wait; those beyond take their chance."""


@dataclass
class _Waiting:
    tokens: int
    since: float
    seen: float


class Room:
    """Tokens that a tenant may have unanswered; asked and told from one thread.

    Attributes:
        tokens: that are unanswered.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.tokens = 0
        self._clock = clock
        self._waiting: dict[bytes, _Waiting] = {}

    def has(self, key: bytes, tokens: int, most: int) -> bool:
        """Whether a request of so many tokens may begin beside the others; one that may not is waiting from here."""
        now = self._clock()
        self._waiting = {known: each for known, each in self._waiting.items() if now - each.seen < GONE_S}
        mine = self._waiting.get(key) or _Waiting(tokens, now, now)
        before = sum(
            each.tokens
            for each in self._waiting.values()
            if each is not mine and each.since < mine.since and now - each.since >= LONG_S
        )
        if self.tokens + before + tokens <= most:
            return True
        mine.seen = now
        if len(self._waiting) < WAITING:
            self._waiting[key] = mine
        return False

    def take(self, key: bytes, tokens: int) -> None:
        """A request begins."""
        self._waiting.pop(key, None)
        self.tokens += tokens

    def give(self, tokens: int) -> None:
        """A request has its answer, or will have none."""
        self.tokens -= tokens
