"""What a plan is made for beside the model: the line, the device here and the device there.

Knows settings, and tables and calibrations by what they give; knows no model.
"""

from dataclasses import dataclass, replace
from typing import Final

from edge_client.plan_settings import PlanSettings
from isthmus.errors import UsageError
from isthmus.planning.fit import Limits
from isthmus.planning.links import Link
from isthmus.planning.machines import Machine, Speed, machine_of
from isthmus.planning.seconds import ASSUMED, Handling

USUAL_EDGE: Final = "laptop"
USUAL_CLOUD: Final = "a100"

TERA: Final = 1e12


@dataclass(frozen=True)
class Place:
    """A line with a device at each end of it.

    Attributes:
        link: between them.
        line: what the link was called.
        edge, cloud: the devices.
        handling: of messages, by both.
    """

    link: Link
    line: str
    edge: Machine
    cloud: Machine
    handling: Handling = ASSUMED

    @classmethod
    def of(cls, settings: PlanSettings) -> "Place":
        """The place that settings name.

        Raises:
            UsageError: no link or device is called so, or the calibration cannot be read.
        """
        edge = _device(settings.edge, settings.edge_tflops, USUAL_EDGE, "edge")
        cloud = _device(settings.cloud, settings.cloud_tflops, USUAL_CLOUD, "cloud")
        return cls(Link.parse(settings.link), settings.link, edge, cloud)

    def limits(self, settings: PlanSettings) -> Limits:
        """What a run may take: as told; of memory, what a device that was named has left for it."""
        memory = settings.edge_memory
        if memory is None and settings.edge is not None and self.edge.memory_bytes is not None:
            memory = int(self.edge.memory_bytes)
        return Limits(memory, settings.max_bytes, settings.max_hours)


def _device(name: str | None, tflops: float | None, usual: str, side: str) -> Machine:
    try:
        known = machine_of(name or usual)
    except UsageError as error:
        raise UsageError(f"--{side}: {error}") from None
    if tflops is None:
        return known
    told = Machine.by_hand(tflops * TERA)
    return told if name is None else replace(known, speed=Speed.of(tflops * TERA), source=told.source)
