"""What may happen to a run that is killed and goes on, as a small model: a history that it does not allow is a bug.

Knows steps, checkpoints and ends; knows no processes. After Jepsen and etcd's robustness tests: everything that was
seen is written down, and judged afterwards.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Began:
    """A process began; what it found was of this step, 0 where there was nothing."""

    step: int


@dataclass(frozen=True)
class Stepped:
    """A step was committed: its line stands in the metrics."""

    step: int


@dataclass(frozen=True)
class Died:
    """The process was killed, or gave up; its newest whole checkpoint was then of this step, 0 where there was none."""

    saved: int


@dataclass(frozen=True)
class Ended:
    """The process ended by itself."""

    code: int


Event: TypeAlias = Began | Stepped | Died | Ended


class NotAllowedError(AssertionError):
    """Something happened that may not."""


def judge(history: Iterable[Event], steps: int, checkpoint_every: int) -> int:
    """Follow a history to its end; returns how many processes there were.

    Raises:
        NotAllowedError: an event has no place where it stands; the message names it.
    """
    done, saved, running, processes = 0, 0, False, 0
    for place, event in enumerate(history):
        match event:
            case Began(step):
                # A line may be written after the last checkpoint; whoever goes on takes it back.
                _must(not running and step == saved, place, event, f"{saved} was saved")
                running, done, processes = True, step, processes + 1
            case Stepped(step):
                _must(running and step == done + 1, place, event, f"{done} were done")
                done = step
            case Died(kept):
                _must(running and saved <= kept <= done, place, event, f"{saved} was saved and {done} were done")
                _must(done - kept <= checkpoint_every, place, event, f"{done} were done")
                running, saved = False, kept
            case Ended(code):
                _must(running and code == 0 and done == steps, place, event, f"{done} were done")
                running = False
    _must(processes > 0 and not running and done == steps, -1, Ended(-1), "the history has no end")
    return processes


def _must(holds: bool, place: int, event: Event, known: str) -> None:
    if not holds:
        raise NotAllowedError(f"event {place}, {event}, though {known}")
