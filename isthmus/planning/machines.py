"""Devices to plan for: how fast they go through a model's blocks, and what memory they have.

Knows vendors' figures, what is assumed of them, and how a device's seconds come from FLOPs and from fixed costs;
measures nothing. What was measured comes from `isthmus.planning.calibration`, in the same form.
"""

from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from isthmus.errors import UsageError

USABLE: Final = 0.3
"""Of a vendor's peak, what passes through blocks are assumed to reach. Edges on paper in docs/devices.md have 0.32:
what large products reached of two boards' peaks, times what a step reached of a product on one machine."""

BLOCK_S: Final = 1e-3
"""Assumed of devices in this table: seconds that a block takes in one pass however few its tokens are."""

HEADLESS, DESKTOP, PHONE = 0.3e9, 2e9, 3e9
"""Bytes that an operating system keeps for itself: Linux without a desktop and with one, Android. Assumed."""

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PassSpeed(BaseModel):
    """How long one pass takes: `call_s`, and `block_s` for each block, and FLOPs over their rate.

    `flops` is of blocks and `head_flops` of the output layer and the loss, both in FLOP/s.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    flops: Rate
    head_flops: Rate
    block_s: Seconds
    call_s: Seconds

    def seconds(self, calls: float, blocks: float, flops: float, head_flops: float = 0.0) -> float:
        """Seconds of passes.

        Args:
            calls: how many.
            blocks: that all of them go through together.
            flops: of all of them, the output layer's among them.
            head_flops: of these, the output layer's.
        """
        fixed = calls * self.call_s + blocks * self.block_s
        return fixed + max(0.0, flops - head_flops) / self.flops + head_flops / self.head_flops


class Speed(BaseModel):
    """A device's speed: of both passes, and of the optimizer's update.

    An update takes `update_s`, and `tensor_s` for each trained tensor, and `value_s` for each value in them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    forward: PassSpeed
    backward: PassSpeed
    update_s: Seconds = 0.0
    tensor_s: Seconds = 0.0
    value_s: Seconds = 0.0

    @classmethod
    def of(cls, flops: float, block_s: float = BLOCK_S) -> "Speed":
        """One rate for everything."""
        one = PassSpeed(flops=flops, head_flops=flops, block_s=block_s, call_s=block_s)
        return cls(forward=one, backward=one, update_s=block_s)


@dataclass(frozen=True)
class Machine:
    """A device.

    Attributes:
        name: what it is called.
        speed: as measured or assumed.
        memory_bytes: that are left for this work; None: not known.
        source: where both come from.
    """

    name: str
    speed: Speed
    memory_bytes: float | None
    source: str

    @property
    def flops(self) -> float:
        """FLOP/s of a forward through blocks, fixed costs apart."""
        return self.speed.forward.flops

    @classmethod
    def by_hand(cls, flops: float, memory_bytes: float | None = None) -> "Machine":
        """A device that reaches so many FLOP/s."""
        return cls(f"{flops / 1e12:g} TFLOP/s", Speed.of(flops), memory_bytes, "as told")


@dataclass(frozen=True)
class Board:
    """A device as its vendor describes it.

    Attributes:
        peak: FLOP/s in float32.
        memory: bytes; system: what its operating system keeps of them.
        bfloat16: FLOP/s in that, where it has more.
    """

    name: str
    cores: str
    peak: float
    memory: float
    source: str
    system: float = HEADLESS
    bfloat16: float = 0.0

    @property
    def room(self) -> float:
        """Bytes that are left for an edge."""
        return self.memory - self.system

    def machine(self, dtype: str = "float32") -> Machine:
        """As plans take it, computing in `float32` or `bfloat16`."""
        source = f"{self.source}; vendor's peak x assumed {USABLE:.0%}"
        peak = max(self.peak, self.bfloat16) if dtype == "bfloat16" else self.peak
        return Machine(self.name, Speed.of(USABLE * peak), self.room, source)


ARM = "Arm's optimisation guide"
BOARDS = (
    Board("Raspberry Pi 4", "4 Cortex-A72 at 1.5 GHz, 8 FLOP a cycle", 4 * 1.5e9 * 8, 4e9, f"raspberrypi.com; {ARM}"),
    Board("Raspberry Pi 5", "4 Cortex-A76 at 2.4 GHz, 16", 4 * 2.4e9 * 16, 8e9, f"raspberrypi.com; {ARM}"),
    Board(
        "Phone, Snapdragon 8 Gen 2", "1 at 3.2, 4 at 2.8 GHz, 16", (3.2e9 + 4 * 2.8e9) * 16, 8e9, "qualcomm.com", PHONE
    ),
    Board("Laptop of 2017, Core i5-8250U", "4 at 1.6 GHz, 32", 4 * 1.6e9 * 32, 8e9, "ark.intel.com", DESKTOP),
    Board("Jetson Orin Nano, its GPU", "1,024 CUDA cores at 625 MHz, 2", 1024 * 625e6 * 2, 8e9, "NVIDIA's data sheet"),
)
"""Edges, in float32."""

SERVERS = (
    Board("A100 SXM, 80 GB", "CUDA cores, dense", 19.5e12, 80e9, "NVIDIA's data sheet", bfloat16=312e12),
    Board("H100 SXM", "CUDA cores, dense", 67e12, 80e9, "NVIDIA's data sheet", bfloat16=989e12),
)
"""Clouds: bfloat16 is for tensor cores, which take no float32 unless torch is told to round it (it is not)."""

NAMED: Final[dict[str, Board]] = dict(
    zip(("pi-4", "pi-5", "phone", "laptop", "jetson-orin-nano"), BOARDS, strict=True)
) | dict(zip(("a100", "h100"), SERVERS, strict=True))
"""Every device by the name that a command line has for it."""


def machine_of(name: str, dtype: str = "float32") -> Machine:
    """A device of the table, computing in `float32` or `bfloat16`.

    Raises:
        UsageError: it is not in there.
    """
    if name not in NAMED:
        raise UsageError(f"no device is called {name!r:.40}; take one of {', '.join(NAMED)}, or say how fast it is")
    return NAMED[name].machine(dtype)
