"""How long a step takes: either side's computing, the line, the round trips, and what hides behind what.

Knows figures of a plan, links and devices; builds no model. docs/planning.md has how near these come to what
is measured where devices are calibrated with the model at hand; a device of the table is a guess.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, NamedTuple

from pydantic import BaseModel, ConfigDict

from isthmus.planning.figures import Leg, SideFlops, Step
from isthmus.planning.links import Link
from isthmus.planning.machines import Machine, Seconds
from isthmus.planning.overlap import Stage, together


class Handling(BaseModel):
    """What both sides do with a message beside computing: `request_s` a round trip, `byte_s` a byte.

    Checking, encoding, copying and handing over between threads; the line's own time is apart.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    request_s: Seconds
    byte_s: Seconds


ASSUMED: Final = Handling(request_s=2e-3, byte_s=2e-9)
"""Where nothing was measured: about what docs/benchmarks.md has of one machine."""


PLAIN: Final = (Leg(1.0, 1.0, 1.0), Leg(1.0, 1.0, 1.0, backward=True))
"""Legs where none are told: a forward and a backward, alike."""


@dataclass(frozen=True)
class Passes:
    """What a step goes through beside its FLOPs; see `isthmus.planning.passes`.

    Attributes:
        calls: models that each microbatch goes through on the edge: a side network is one of its own.
        edge_blocks, edge_blocks_back: that each microbatch goes through on the edge, forward and backward.
        below: of these, those below the span; below_back: of those of the backward.
        cloud_blocks, cloud_blocks_back: the same in the span.
        head: of the edge's FLOPs, those of the output layer.
        trained: values that the optimizer updates; tensors: how many parameters these are in.
        legs: of a microbatch. Its bytes and its way through the span are shared out as theirs are; at each port the
            edge takes as long for a question as for a block with few tokens.
    """

    calls: float = 1.0
    edge_blocks: float = 0.0
    edge_blocks_back: float = 0.0
    below: float = 0.0
    below_back: float = 0.0
    cloud_blocks: float = 0.0
    cloud_blocks_back: float = 0.0
    head: SideFlops = field(default_factory=SideFlops)
    trained: float = 0.0
    tensors: int = 0
    legs: tuple[Leg, ...] = ()


@dataclass(frozen=True)
class StepSeconds:
    """Where a step's seconds go.

    Attributes:
        edge: computing there, the optimizer's update among it.
        cloud: computing there.
        wire: bytes at the line's rates, both ways.
        latency: round trips.
        handling: of messages, on both sides.
        hidden: of all these together, what passes while something else does.
    """

    edge: float
    cloud: float
    wire: float
    latency: float
    handling: float
    hidden: float

    @property
    def total(self) -> float:
        """By the clock."""
        return self.edge + self.cloud + self.wire + self.latency + self.handling - self.hidden


def step_seconds(
    step: Step,
    link: Link,
    edge: Machine,
    cloud: Machine,
    microbatches: int = 1,
    passes: Passes | None = None,
    handling: Handling = ASSUMED,
) -> StepSeconds:
    """How long a step takes.

    A microbatch computes on the edge and goes its legs: it is sent, computed with on the cloud and received. One
    microbatch hides nothing. Of several, one travels or is on the cloud while another computes.

    Args:
        step: bytes, round trips and FLOPs of all its microbatches.
        link: between the sides.
        edge: the device here.
        cloud: the device there.
        microbatches: in flight at once.
        passes: blocks on either side; None: FLOPs alone are reckoned with.
        handling: of messages.
    """
    passes = passes or Passes()
    here, there = _edge_seconds(step, edge, microbatches, passes), _cloud_seconds(step, cloud, microbatches, passes)
    crossing = step.crossing
    up, down = crossing.up_bytes / link.up, crossing.down_bytes / link.down
    latency = crossing.round_trips * link.round_trip_s
    handed = crossing.round_trips * handling.request_s
    handed += (crossing.up_bytes + crossing.down_bytes) * handling.byte_s
    apart = here.computing + sum(there) + up + down + latency + handed
    clock = apart
    if microbatches > 1:
        legs = passes.legs or (PLAIN if crossing.round_trips else ())
        clock = together(_way(here, there, up, down, latency + handed, microbatches, legs), microbatches)
    return StepSeconds(here.computing + here.update, sum(there), up + down, latency, handed, max(0.0, apart - clock))


class _Edge(NamedTuple):
    """Seconds of a step on the edge.

    Attributes:
        below, below_back: of either pass, below the span.
        above: of both, above it.
        at_ports: answering in the middle of the span.
        update: the optimizer's, once all are through.
    """

    below: float
    above: float
    below_back: float
    at_ports: float
    update: float

    @property
    def computing(self) -> float:
        """All but the update."""
        return self.below + self.above + self.below_back + self.at_ports


def _way(
    here: _Edge,
    there: tuple[float, float],
    up: float,
    down: float,
    travel: float,
    microbatches: int,
    legs: Sequence[Leg],
) -> list[Stage]:
    """What each of a step's microbatches goes through: its legs, and its computing on the edge in between."""
    each = 1 / microbatches
    if not legs:
        return [Stage("edge", each * here.computing)]
    found = [Stage("edge", each * here.below)]
    ups, downs = sum(leg.up_bytes for leg in legs), sum(leg.down_bytes for leg in legs)
    ends_of_legs = 2 * len(legs)
    blocks = [sum(leg.blocks for leg in legs if leg.backward is backward) for backward in (False, True)]
    ends = [leg.backward is not after.backward for leg, after in pairwise(legs)]
    ports = max(1, len(ends) - sum(ends))
    for leg, ends_pass in zip(legs, [*ends, True], strict=True):
        found += [
            Stage("up", each * up * leg.up_bytes / (ups or 1)),
            Stage("way", each * travel / ends_of_legs),
            Stage("cloud", each * there[leg.backward] * leg.blocks / (blocks[leg.backward] or 1)),
            Stage("down", each * down * leg.down_bytes / (downs or 1)),
            Stage("way", each * travel / ends_of_legs),
        ]
        if not ends_pass:
            found.append(Stage("edge", each * here.at_ports / ports))
        elif not leg.backward:
            found.append(Stage("edge", each * here.above))
    return [*found, Stage("edge", each * here.below_back)]


def _edge_seconds(step: Step, edge: Machine, microbatches: int, passes: Passes) -> _Edge:
    """Both passes of all microbatches, and the update after them."""
    speed, flops, head = edge.speed, step.edge, passes.head
    times = float(microbatches)
    calls = times * passes.calls
    forward = speed.forward.seconds(calls, times * passes.edge_blocks, flops.forward, head.forward)
    backward = speed.backward.seconds(calls, times * passes.edge_blocks_back, flops.backward, head.backward)
    update = speed.update_s + passes.tensors * speed.tensor_s + passes.trained * speed.value_s
    below = (forward - head.forward / speed.forward.head_flops) * _share(passes.below, passes.edge_blocks)
    below_back = backward - head.backward / speed.backward.head_flops
    below_back *= _share(passes.below_back, passes.edge_blocks_back)
    questions = max(0.0, step.crossing.round_trips - 2 * times) if len(passes.legs) > 2 else 0.0
    at_ports = questions * (speed.forward.block_s + speed.backward.block_s) / 2
    return _Edge(below, forward + backward - below - below_back, below_back, at_ports, update)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _cloud_seconds(step: Step, cloud: Machine, microbatches: int, passes: Passes) -> tuple[float, float]:
    """Of the forward, and of the backward."""
    speed, flops, calls = cloud.speed, step.cloud, float(microbatches)
    forward = backward = 0.0
    if flops.forward:
        forward = speed.forward.seconds(calls, calls * passes.cloud_blocks, flops.forward)
    if flops.backward:
        backward = speed.backward.seconds(calls, calls * passes.cloud_blocks_back, flops.backward)
    return forward, backward
