"""How long several microbatches take together: what one computes while another's bytes travel.

Knows stages, who has to wait for whom, and a clock; knows no bytes, no FLOPs and no models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Place: TypeAlias = Literal["edge", "up", "cloud", "down", "way"]

QUEUED: Final = frozenset({"edge", "up", "cloud", "down"})
"""Places that have one microbatch at a time, first come, first served: either device, and each direction of the line.

On their way microbatches are in nobody's way.
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
        going = _going(under)
        passing = min(one.left for one in going)
        clock += passing
        for one in going:
            one.left -= passing
        # What ends within rounding of the same moment ends at it.
        for one in [one for one in going if one.left <= 1e-12 * clock]:
            turns += 1
            one.at, one.turn = one.at + 1, turns
            if one.at == len(stages):
                under = [other for other in under if other is not one]
            else:
                one.left = stages[one.at].seconds
    return clock


def _going(under: Sequence[_Under]) -> list[_Under]:
    """Those that do not wait for their turn now."""
    first: dict[Place, _Under] = {}
    for one in under:
        if one.place not in first or one.turn < first[one.place].turn:
            first[one.place] = one
    return [one for one in under if one.place not in QUEUED or first[one.place] is one]
