"""Which part of the span each stage runs, and what of a session concerns it.

Knows cuts, ports and block numbers; knows no tensors, no model and no Ray.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from cloud_node.engine import Opening
from isthmus.cut import Cut
from isthmus.errors import UsageError
from isthmus.linears import Site


def shares(cuts: Iterable[Cut], blocks: int, stages: int) -> list[range]:
    """The blocks that each of `stages` holds: consecutive, as equal as can be, and those that any cut needs.

    Raises:
        UsageError: there are more stages than blocks.
    """
    needed = sorted({block for cut in cuts for block in cut.span(blocks)})
    if stages > len(needed):
        raise UsageError(f"--stages {stages} is more than the span's {len(needed)} blocks; give at most that many")
    bounds = [len(needed) * number // stages for number in range(stages + 1)]
    return [range(needed[first], needed[end - 1] + 1) for first, end in pairwise(bounds)]


def part_of(cut: Cut, share: range, blocks: int) -> Cut | None:
    """What of a cut's span a stage runs, itself a cut of the model; None if nothing."""
    span = cut.span(blocks)
    start, stop = max(span.start, share.start), min(span.stop, share.stop)
    return Cut(start, blocks - stop) if start < stop else None


@dataclass(frozen=True)
class Leg:
    """One stage's part in a session: which stage, and what the session is opened for there."""

    stage: int
    opening: Opening
    blocks: range

    def sites(self, sites: Iterable[Site]) -> frozenset[Site]:
        """Those that are in its blocks."""
        return frozenset(site for site in sites if site[0] in self.blocks)


def legs(opening: Opening, held: Sequence[range], blocks: int) -> list[Leg]:
    """The stages that a session runs through, from the first to the last."""
    found = []
    for stage, share in enumerate(held):
        part = part_of(opening.cut, share, blocks)
        if part is not None:
            ports = tuple(port for port in opening.ports if port.block in part.span(blocks))
            found.append(Leg(stage, replace(opening, cut=part, ports=ports), part.span(blocks)))
    return found
