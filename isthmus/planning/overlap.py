"""How long several microbatches take together: what one computes while another's bytes travel.

Knows stages, who has to wait for whom, and a clock; knows no bytes, no FLOPs and no models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Place: TypeAlias = Literal["edge", "up", "cloud", "down", "way"]

QUEUED: Final = frozenset({"up", "cloud", "down"})
"""Places that have one microbatch at a time, first come, first served: each direction of the line, and the span.

At the edge microbatches compute in threads of one device and share it evenly; on their way they are in nobody's way.
"""


@dataclass(frozen=True)
class Stage:
    """What a microbatch does next: so many seconds at a place, if it has that for itself."""

    place: Place
    seconds: float


@dataclass
class _Under:
    """A microbatch under way: its stage, the seconds left of that, and which turn it has where it must wait."""

    stages: Sequence[Stage]
    at: int
    left: float
    turn: int = 0

    @property
    def place(self) -> Place:
        return self.stages[self.at].place


def together(stages: Sequence[Stage], microbatches: int) -> float:
    """Seconds until as many microbatches, begun at once, have each gone through `stages`."""
    stages = [stage for stage in stages if stage.seconds > 0]
    if not stages:
        return 0.0
    under = [_Under(stages, 0, stages[0].seconds) for _ in range(microbatches)]
    clock, turns = 0.0, 0
    while under:
        shares = _shares(under)
        passing = min(one.left / share for one, share in zip(under, shares, strict=True) if share)
        clock += passing
        for one, share in zip(under, shares, strict=True):
            one.left -= passing * share
        # What ends within rounding of the same moment ends at it.
        for one in [one for one, share in zip(under, shares, strict=True) if share and one.left <= 1e-12 * clock]:
            turns += 1
            one.at, one.turn = one.at + 1, turns
            if one.at == len(stages):
                under = [other for other in under if other is not one]
            else:
                one.left = stages[one.at].seconds
    return clock


def _shares(under: Sequence[_Under]) -> list[float]:
    """How fast each goes on now: 1 as if alone, 0 where it waits its turn."""
    first: dict[Place, int] = {}
    at_edge = 0
    for number, one in enumerate(under):
        at_edge += one.place == "edge"
        if one.place in QUEUED and (one.place not in first or one.turn < under[first[one.place]].turn):
            first[one.place] = number
    return [
        1 / at_edge if one.place == "edge" else float(one.place not in QUEUED or first[one.place] == number)
        for number, one in enumerate(under)
    ]
