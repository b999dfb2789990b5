"""A plan as JSON: everything that the tables leave out, and what it was made for.

Knows fields; computes no figure. Its schema is docs/plan.schema.json.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from isthmus.planning.figures import Costs
from isthmus.planning.plan import Plan
from isthmus.planning.seconds import StepSeconds


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Whole(_Part):
    """A run as a whole: fetching and training, not evaluating."""

    steps: int
    steps_per_epoch: int
    up_bytes: float
    down_bytes: float
    round_trips: float
    fetch_seconds: float
    epoch_seconds: float
    later_epoch_seconds: float
    hours: float


class PlannedRun(_Part):
    """One way to train; bytes are as serialised, FLOPs are multiplications and additions, memory is live tensors."""

    name: str
    cut: str
    command: str
    costs: Costs
    first_step_seconds: float
    first_step: StepSeconds
    later_step_seconds: float
    later_step: StepSeconds
    run: Whole

    @classmethod
    def of(cls, plan: Plan) -> "PlannedRun":
        """A plan's figures."""
        crossing = plan.crossing
        whole = Whole(
            steps=plan.steps,
            steps_per_epoch=plan.steps_per_epoch,
            up_bytes=crossing.up_bytes,
            down_bytes=crossing.down_bytes,
            round_trips=crossing.round_trips,
            fetch_seconds=plan.fetch_s,
            epoch_seconds=plan.epoch_s,
            later_epoch_seconds=plan.later_epoch_s,
            hours=plan.hours,
        )
        return cls(
            name=plan.name,
            cut=plan.cut,
            command=plan.command,
            costs=plan.costs,
            first_step_seconds=plan.first.total,
            first_step=plan.first,
            later_step_seconds=plan.later.total,
            later_step=plan.later,
            run=whole,
        )


class Rows(_Part):
    """The rows that were planned with; `rows` is null where the steps alone say how many are seen."""

    rows: int | None
    mean_length: float
    mean_losses: float


class Device(_Part):
    """A device that was planned with."""

    name: str
    flops: float
    memory_bytes: float | None
    source: str


class Line(_Part):
    """The line that was planned with; bytes a second."""

    name: str
    round_trip_s: float
    up: float
    down: float


class Fit(_Part):
    """What `--fit` came to.

    Attributes:
        limits: that were kept, by name.
        used: the share of each that the plan takes.
        binding: limits without which alone a better plan would have been taken, and its command.
        together: a better plan breaks several limits at once.
        tried: plans that were looked at.
    """

    limits: dict[str, float]
    used: dict[str, float]
    binding: dict[str, str]
    together: bool
    tried: int


class PlanReport(_Part):
    """What `edge_client plan --json` prints; `plans` holds the one that fits best with `--fit`."""

    format: Literal["isthmus-plan/1"] = "isthmus-plan/1"
    model: str
    rows: Rows
    link: Line
    edge: Device
    cloud: Device
    plans: tuple[PlannedRun, ...]
    refused: dict[str, str]
    fit: Fit | None = None


def schema() -> dict[str, Any]:
    """The JSON schema of it."""
    return PlanReport.model_json_schema()
