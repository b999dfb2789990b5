"""The legs of a microbatch's way: from each time that it leaves the edge until it is back.

Knows messages' sizes and which blocks of the span stand between them; knows no seconds, no model and no codec.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.planning.figures import Crossing, Leg
from isthmus.planning.questions import PortQuestion


@dataclass(frozen=True)
class Asked:
    """One question at ports, and what it and its answer move."""

    question: PortQuestion
    crossing: Crossing


def legs_of(span: range, forward: Crossing, backward: Crossing | None, asked: Sequence[Asked] = ()) -> tuple[Leg, ...]:
    """A microbatch's legs, in their order.

    Args:
        span: the blocks that the cloud runs.
        forward: what a forward and its answer move, but for its questions.
        backward: likewise; None: none follows.
        asked: what either pass asks.
    """
    upwards = sorted((one for one in asked if not one.question.backward), key=lambda one: one.question.block)
    places = [one.question.block - span.start for one in upwards]
    legs = _of_pass(len(span), forward, upwards, places, backward=False)
    if backward is not None:
        downwards = sorted((one for one in asked if one.question.backward), key=lambda one: -one.question.block)
        places = [span.stop - one.question.block for one in downwards]
        legs += _of_pass(len(span), backward, downwards, places, backward=True)
    return legs


def _of_pass(
    blocks: int, whole: Crossing, asked: Sequence[Asked], places: Sequence[int], backward: bool
) -> tuple[Leg, ...]:
    ups = [whole.up_bytes, *(one.crossing.up_bytes for one in asked)]
    downs = [*(one.crossing.down_bytes for one in asked), whole.down_bytes]
    between = [after - before for before, after in zip((0, *places), (*places, blocks), strict=True)]
    return tuple(Leg(*leg, backward=backward) for leg in zip(ups, downs, between, strict=True))
