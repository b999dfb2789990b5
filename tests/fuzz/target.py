"""One thing that inputs are thrown at: which inputs, how many of all, and what must hold of each."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

Feed: TypeAlias = Callable[[Any], None]
"""Takes an input; raises AssertionError where the outcome is none that is allowed."""

GROWTH_BYTES = 64 << 20
"""No input, and no number of them, may cost more memory than this."""


LONGEST = 2000


@dataclass(frozen=True)
class Target:
    """What is fed, and how; `share` weighs targets against each other."""

    name: str
    share: float
    inputs: st.SearchStrategy[Any]
    feed: Feed

    def attack(self, count: int, number: int) -> None:
        """Feed so many inputs, always the same ones for a number; the first bad outcome is made small and raised."""
        phases = (Phase.generate, Phase.shrink)
        limits = settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        seed(number)(limits(given(self.inputs)(lambda given_input: self.feed(given_input))))()


def said(error: Exception) -> None:
    """An error that a user is shown is one line, and not an endless one."""
    assert "\n" not in str(error), str(error)[:LONGEST]
    assert 0 < len(str(error)) < LONGEST, str(error)[:LONGEST]


class Memory:
    """How much more a process has held than when this was made, in bytes: Linux's high-water mark."""

    def __init__(self, process: int) -> None:
        self._status = Path(f"/proc/{process}/status")
        Path(f"/proc/{process}/clear_refs").write_text("5")  # the mark begins anew
        self._before = self._figure("VmRSS")

    def grown(self) -> int:
        """The most since then."""
        return self._figure("VmHWM") - self._before

    def _figure(self, name: str) -> int:
        (line,) = (line for line in self._status.read_text().splitlines() if line.startswith(f"{name}:"))
        return int(line.split()[1]) << 10
