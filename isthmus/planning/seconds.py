"""How long a step takes: either side's computing, the line, the round trips, and what hides behind what.

Knows figures of a plan, links and devices; builds no model. Promised within 20 % of what is measured where devices are
calibrated with the model at hand (`python -m benchmarks.seconds` compares); a device of the table is a guess.
"""

from dataclasses import dataclass, field, fields
from typing import Final

from pydantic import BaseModel, ConfigDict

from isthmus.planning.figures import SideFlops, Step
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


@dataclass(frozen=True)
class Passes:
    """What a step goes through beside its FLOPs; see `isthmus.planning.passes`.

    Attributes:
        edge_blocks, edge_blocks_back: that each microbatch goes through on the edge, forward and backward.
        cloud_blocks, cloud_blocks_back: the same in the span.
        head: of the edge's FLOPs, those of the output layer.
        trained: values that the optimizer updates; tensors: how many parameters these are in.
        up_first, down_first: share of either direction's bytes that cross in the forward. With ports they differ: there
            inputs go down and adapters' outputs up, and gradients the other way round.
    """

    edge_blocks: float = 0.0
    edge_blocks_back: float = 0.0
    cloud_blocks: float = 0.0
    cloud_blocks_back: float = 0.0
    head: SideFlops = field(default_factory=SideFlops)
    trained: float = 0.0
    tensors: int = 0
    up_first: float = 0.5
    down_first: float = 0.5


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

    A microbatch computes on the edge, sends, is computed with on the cloud and received, once for each round trip; edge
    and cloud spread their work evenly over them. One microbatch hides nothing. Of several, one travels or is on the
    cloud while another computes.

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
    computing, update = _edge_seconds(step, edge, microbatches, passes)
    there = _cloud_seconds(step, cloud, microbatches, passes)
    crossing = step.crossing
    up, down = crossing.up_bytes / link.up, crossing.down_bytes / link.down
    latency = crossing.round_trips * link.round_trip_s
    handed = crossing.round_trips * handling.request_s
    handed += (crossing.up_bytes + crossing.down_bytes) * handling.byte_s
    apart = computing + there + up + down + latency + handed
    clock = apart
    if microbatches > 1:
        trips = max(1, round(crossing.round_trips / microbatches))
        parts = _Parts(computing, up, there, down, latency + handed).each(1 / microbatches)
        clock = together(parts.stages(trips, passes), microbatches)
    return StepSeconds(computing + update, there, up + down, latency, handed, max(0.0, apart - clock))


@dataclass(frozen=True)
class _Parts:
    """Seconds at each place, of a step or of one of its microbatches."""

    edge: float
    up: float
    cloud: float
    down: float
    way: float

    def each(self, share: float) -> "_Parts":
        """A share of all."""
        return _Parts(*(share * getattr(self, one.name) for one in fields(self)))

    def stages(self, trips: int, passes: Passes) -> list[Stage]:
        """What a microbatch goes through: trips of its forward, then of its backward, with computing in between."""
        piece, way = Stage("edge", self.edge / (trips + 1)), Stage("way", self.way / (2 * trips))
        forward = (trips + 1) // 2
        found = [piece]
        for trip in range(trips):
            of_pass = forward if trip < forward else trips - forward
            up, down = (
                1.0 if trips == 1 else first if trip < forward else 1 - first
                for first in (passes.up_first, passes.down_first)
            )
            found += [Stage("up", up * self.up / of_pass), way, Stage("cloud", self.cloud / trips)]
            found += [Stage("down", down * self.down / of_pass), way, piece]
        return found


def _edge_seconds(step: Step, edge: Machine, microbatches: int, passes: Passes) -> tuple[float, float]:
    """Both passes of all microbatches, and the update after them."""
    speed, flops, head = edge.speed, step.edge, passes.head
    calls = float(microbatches)
    forward = speed.forward.seconds(calls, calls * passes.edge_blocks, flops.forward, head.forward)
    backward = speed.backward.seconds(calls, calls * passes.edge_blocks_back, flops.backward, head.backward)
    update = speed.update_s + passes.tensors * speed.tensor_s + passes.trained * speed.value_s
    return forward + backward, update


def _cloud_seconds(step: Step, cloud: Machine, microbatches: int, passes: Passes) -> float:
    speed, flops, calls = cloud.speed, step.cloud, float(microbatches)
    total = 0.0
    if flops.forward:
        total += speed.forward.seconds(calls, calls * passes.cloud_blocks, flops.forward)
    if flops.backward:
        total += speed.backward.seconds(calls, calls * passes.cloud_blocks_back, flops.backward)
    return total
