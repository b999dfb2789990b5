"""What `edge_client calibrate` measured, as a small JSON file that plans read.

Knows the file and how a speed at one number of threads follows from those at others; measures nothing.
"""

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from isthmus.errors import UsageError
from isthmus.planning.links import Link
from isthmus.planning.machines import Machine, PassSpeed, Rate, Seconds, Speed
from isthmus.planning.seconds import Handling

SCHEMA: Final = "isthmus-calibration/1"

GAINED: Final = 0.85
"""Assumed where one number of threads was measured: rates grow with this power of the threads, fixed costs stay."""

MOST_BYTES: Final = 1 << 20

Threads = Annotated[int, Field(ge=1, le=4096)]


class Part(BaseModel):
    """A part of the file: nothing in it is unknown, and nothing changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Line(Part):
    """A link as it was measured: seconds of a round trip, bytes a second each way."""

    round_trip_s: Seconds
    up: Rate
    down: Rate


class Measured(Part):
    """What was measured with: a model's shape, and a precision."""

    model_type: str
    hidden_size: Annotated[int, Field(ge=1)]
    dtype: str


class Calibration(Part):
    """A device, a line, and the cloud behind it, as far as each was measured.

    Attributes:
        device: the processor and its memory, in words.
        memory_bytes: of the device, all of it.
        model: whose blocks ran on it.
        speeds: of the device, by threads.
        line: to the server.
        cloud_speed: of the server's span, as it is.
        handling: of messages, the line's own time apart.
    """

    schema_: Literal["isthmus-calibration/1"] = Field(SCHEMA, alias="schema")
    device: str
    memory_bytes: Annotated[int, Field(ge=1)] | None
    model: Measured | None
    speeds: dict[Threads, Speed]
    line: Line | None
    cloud_speed: Speed | None
    handling: Handling

    @property
    def edge(self) -> Machine | None:
        """The device with as many threads as it was measured with at most."""
        return self.edge_at(max(self.speeds)) if self.speeds else None

    def edge_at(self, threads: int) -> Machine | None:
        """The device with so many threads; None where it was not measured."""
        if not self.speeds:
            return None
        how = "measured" if threads in self.speeds else f"from {_counts(self.speeds)}"
        source = f"edge_client calibrate: {threads} threads, {how}"
        return Machine(self.device, speed_at(self.speeds, threads), self.memory_bytes, source)

    @property
    def link(self) -> Link | None:
        """The line, as plans take it."""
        return Link(self.line.round_trip_s, self.line.up, self.line.down) if self.line is not None else None

    @property
    def cloud(self) -> Machine | None:
        """The server's device, as plans take it."""
        if self.cloud_speed is None:
            return None
        return Machine("the server that was measured", self.cloud_speed, None, "edge_client calibrate")

    def to_json(self) -> str:
        """The file's content."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"


def read(path: Path) -> Calibration:
    """What was measured, from its file.

    Raises:
        UsageError: the file cannot be read, or is none of `edge_client calibrate`.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        return Calibration.model_validate_json(content)
    except OSError as error:
        raise UsageError(f"--calibration {path} cannot be read ({error.strerror}); check the path") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(
            f"--calibration {path} is no calibration ({where}: {first['msg']}); make one with `edge_client calibrate`"
        ) from None


def speed_at(speeds: dict[int, Speed], threads: int) -> Speed:
    """A device's speed with so many threads.

    Between measured numbers, each cost is a part that threads share and a part that they do not (Amdahl, 1967), as the
    two next to it say. Beyond the most it is that of the most, for whether more would help is not known; below the
    fewest, that of the fewest. From a single number others follow by `GAINED`, which is assumed.
    """
    if threads in speeds:
        return speeds[threads]
    if len(speeds) == 1:
        (measured, speed), *_ = speeds.items()
        return _scaled(speed, (threads / measured) ** GAINED)
    fewer = max((count for count in speeds if count < threads), default=min(speeds))
    more = min((count for count in speeds if count > threads), default=max(speeds))
    if fewer == more:
        return speeds[fewer]
    share = (1 / fewer - 1 / threads) / (1 / fewer - 1 / more)
    return _between(speeds[fewer], speeds[more], share)


def _scaled(speed: Speed, times: float) -> Speed:
    def scaled(one: PassSpeed) -> PassSpeed:
        return one.model_copy(update={"flops": one.flops * times, "head_flops": one.head_flops * times})

    return speed.model_copy(update={"forward": scaled(speed.forward), "backward": scaled(speed.backward)})


def _between(one: Speed, other: Speed, share: float) -> Speed:
    """Costs, which are one over rates, at `share` of the way from one to the other."""

    def cost(first: float, second: float) -> float:
        return first + share * (second - first)

    def rate(first: float, second: float) -> float:
        return 1 / cost(1 / first, 1 / second)

    def passed(first: PassSpeed, second: PassSpeed) -> PassSpeed:
        return PassSpeed(
            flops=rate(first.flops, second.flops),
            head_flops=rate(first.head_flops, second.head_flops),
            block_s=cost(first.block_s, second.block_s),
            call_s=cost(first.call_s, second.call_s),
        )

    return Speed(
        forward=passed(one.forward, other.forward),
        backward=passed(one.backward, other.backward),
        update_s=cost(one.update_s, other.update_s),
        tensor_s=cost(one.tensor_s, other.tensor_s),
        value_s=cost(one.value_s, other.value_s),
    )


def _counts(speeds: dict[int, Speed]) -> str:
    return " and ".join(map(str, sorted(speeds)))
