"""What a plan is made for beside the model: the line, the device here and the device there.

Knows settings, and tables and calibrations by what they give; knows no model.
"""

from dataclasses import dataclass, replace
from typing import Final

from edge_client.plan_settings import PlanSettings
from isthmus.errors import UsageError
from isthmus.planning.calibration import Calibration, Measured, read
from isthmus.planning.fit import Limits
from isthmus.planning.links import Link
from isthmus.planning.machines import Machine, Speed, machine_of
from isthmus.planning.seconds import ASSUMED, Handling

USUAL: Final = {"edge": "laptop", "cloud": "a100"}
USUAL_LINK: Final = "fibre"

TERA: Final = 1e12

PROCESS: Final = 580e6
"""Bytes that an edge's process takes beside live tensors: 396 MB once Python and its libraries are imported, and 182 MB
to work with. From docs/devices.md, where edges were measured."""


@dataclass(frozen=True)
class Place:
    """A line with a device at each end of it.

    Attributes:
        link: between them.
        line: what the link was called.
        edge, cloud: the devices.
        handling: of messages, by both.
        measured: what the edge was measured with, where it is as fast as was measured.
    """

    link: Link
    line: str
    edge: Machine
    cloud: Machine
    handling: Handling = ASSUMED
    measured: Measured | None = None

    @classmethod
    def of(cls, settings: PlanSettings) -> "Place":
        """The place that settings name or that was measured.

        Raises:
            UsageError: no link or device is called so, the calibration cannot be read, or it has no device whose
                threads could be told.
        """
        measured = read(settings.calibration) if settings.calibration is not None else None
        if settings.threads is not None and measured is not None and measured.edge is None:
            raise UsageError(f"--threads is of a device, and {settings.calibration} has only a line; leave it out")
        as_measured = measured is not None and settings.edge is None and settings.edge_tflops is None
        return cls(
            *_line(settings.link, measured),
            _device("edge", settings.edge, settings.edge_tflops, _edge(measured, settings.threads)),
            _device(
                "cloud",
                settings.cloud,
                settings.cloud_tflops,
                measured.cloud if measured else None,
                settings.cloud_dtype,
            ),
            measured.handling if measured else ASSUMED,
            measured.model if measured is not None and as_measured else None,
        )

    def limits(self, settings: PlanSettings) -> Limits:
        """What a run may take: as told; of memory, what a device that was named has left for tensors."""
        memory: int | None = settings.edge_memory
        if memory is None and settings.edge is not None and self.edge.memory_bytes is not None:
            memory = int(self.edge.memory_bytes - PROCESS)
        return Limits(memory, settings.max_bytes, settings.max_hours)


def _line(told: str | None, measured: Calibration | None) -> tuple[Link, str]:
    if told is None and measured is not None and measured.link is not None:
        return measured.link, "the line that was measured"
    return Link.parse(told or USUAL_LINK), told or USUAL_LINK


def _edge(measured: Calibration | None, threads: int | None) -> Machine | None:
    if measured is None:
        return None
    return measured.edge if threads is None else measured.edge_at(threads)


def _device(
    side: str, name: str | None, tflops: float | None, measured: Machine | None, dtype: str = "float32"
) -> Machine:
    """What was named, else what was measured, else the usual one; as fast as was told, if that was."""
    if name is None and measured is None and tflops is not None:
        return Machine.by_hand(tflops * TERA)
    try:
        known = measured if name is None and measured is not None else machine_of(name or USUAL[side], dtype)
    except UsageError as error:
        raise UsageError(f"--{side}: {error}") from None
    if tflops is None:
        return known
    return replace(known, speed=Speed.of(tflops * TERA), source="as told")
