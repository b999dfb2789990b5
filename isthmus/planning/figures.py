"""What a run would cost: the figures of a plan, before any second is known.

Knows numbers and their names; how they are found stands in `edge_client.planned`, and what they take of a link and
of a device's time in `isthmus.planning.seconds`.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Trained:
    """Parameters that train.

    Attributes:
        adapter: of the method itself.
        head: of a classifier's head, which trains along with it. Papers add it to some figures and leave it out of
            others, so it is always apart here.
    """

    adapter: int
    head: int = 0

    @property
    def total(self) -> int:
        """Both."""
        return self.adapter + self.head


@dataclass(frozen=True)
class Crossing:
    """What crosses the wire: bytes as serialised, gRPC's 5-byte prefixes included, and requests answered."""

    up_bytes: float = 0.0
    down_bytes: float = 0.0
    round_trips: float = 0.0

    def __add__(self, other: "Crossing") -> "Crossing":
        return Crossing(
            self.up_bytes + other.up_bytes, self.down_bytes + other.down_bytes, self.round_trips + other.round_trips
        )

    def __mul__(self, times: float) -> "Crossing":
        return Crossing(self.up_bytes * times, self.down_bytes * times, self.round_trips * times)


@dataclass(frozen=True)
class SideFlops:
    """Floating-point operations of one side; a backward that runs its forward again counts it under forward."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: "SideFlops") -> "SideFlops":
        return SideFlops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> "SideFlops":
        return SideFlops(self.forward * times, self.backward * times)


@dataclass(frozen=True)
class Step:
    """One optimizer step, all of its microbatches; a mean where steps differ, as with ports that rest."""

    crossing: Crossing = field(default_factory=Crossing)
    edge: SideFlops = field(default_factory=SideFlops)
    cloud: SideFlops = field(default_factory=SideFlops)

    def __add__(self, other: "Step") -> "Step":
        return Step(self.crossing + other.crossing, self.edge + other.edge, self.cloud + other.cloud)

    def __mul__(self, times: float) -> "Step":
        return Step(self.crossing * times, self.edge * times, self.cloud * times)


@dataclass(frozen=True)
class Storage:
    """Bytes on the edge's disk: what is fetched, what is saved, and outputs that are kept."""

    fetched: int = 0
    adapter: int = 0
    checkpoint: int = 0
    cache: int = 0


@dataclass(frozen=True)
class Leg:
    """From when a microbatch leaves the edge until it is back: a request, or an answer at a port.

    Attributes:
        up_bytes, down_bytes: what it carries away, and what it brings back.
        blocks: of the span, that it goes through in between.
        backward: in which pass.
    """

    up_bytes: float
    down_bytes: float
    blocks: float
    backward: bool = False


@dataclass(frozen=True)
class Costs:
    """What a run costs, from a configuration alone.

    Attributes:
        trained: parameters that train.
        fetch: once, before the first step: the ends, or an emulator.
        first: a step of the first epoch.
        later: a step after it: the same, unless the edge keeps what crossed.
        edge_peak_tensor_bytes, cloud_peak_tensor_bytes: live tensors, weights included.
        storage: on the edge's disk.
        tensors: how many parameters the values that train are in.
        legs: of a microbatch of the first step, as most steps have them.
    """

    trained: Trained
    fetch: Crossing
    first: Step
    later: Step
    edge_peak_tensor_bytes: int
    cloud_peak_tensor_bytes: int
    storage: Storage
    tensors: int = 0
    legs: tuple[Leg, ...] = ()

    def training(self, steps: int, steps_per_epoch: float) -> Step:
        """All steps of a run together."""
        fresh = min(float(steps), steps_per_epoch)
        return self.first * fresh + self.later * (steps - fresh)
