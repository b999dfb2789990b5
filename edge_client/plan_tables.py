"""Plans as tables for a terminal of 80 columns: several side by side, or one in detail.

Knows plans, units and widths; computes no figure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from isthmus.planning.figures import Step
from isthmus.planning.plan import HOUR_S, Plan
from isthmus.planning.seconds import StepSeconds
from isthmus.report.units import NONE, rounded

MINUTE_S = 60.0
DAY_S = 24 * HOUR_S
LATER = "  later epochs"

WIRE_HEADS = ("", "Step:\nup", "\ndown", "\ntrips", "\ntime", "First\nepoch", "Whole run:\nbytes", "\ntime")
SIDE_HEADS = (
    "",
    "Trains",
    "Edge\nfwd",
    "FLOPs\nbwd",
    "Cloud\nfwd",
    "FLOPs\nbwd",
    "Edge\npeak",
    "Cloud\npeak",
    "Edge\ndisk",
)


def compared(plans: Sequence[Plan], refused: Mapping[str, str]) -> Group:
    """Ways to train side by side, and why others cannot be taken.

    Args:
        plans: in the order of the rows.
        refused: the reason by way.
    """
    wire, sides = _grid(WIRE_HEADS, 1), _grid(SIDE_HEADS, 1)
    for plan in plans:
        _add(wire, plan.name, *_wire(plan), bold=True)
        if plan.quiet_later:
            _add(wire, LATER, *_crossing(plan.costs.later), duration(plan.later.total), duration(plan.later_epoch_s))
        _add(sides, plan.name, *_sides(plan), bold=True)
    below = [Text(f"{name}: {reason}", "dim") for name, reason in refused.items()]
    return Group(wire, Text(), sides, *([Text(), *below] if below else []))


def detailed(plan: Plan) -> RenderableType:
    """Everything about one plan, two columns; three where later epochs differ."""
    quiet = plan.quiet_later
    drawn = _grid(("", "A step", "A later epoch's") if quiet else ("", "A step"), 3)
    steps = [(plan.costs.first, plan.first)] + ([(plan.costs.later, plan.later)] if quiet else [])
    for label, cells in _rows_of(steps).items():
        _add(drawn, label, *cells)
    run = _grid(("", "The run"), 3)
    for label, cell in _run_rows(plan).items():
        _add(run, label, cell)
    return Group(drawn, Text(), run)


def _rows_of(steps: Sequence[tuple[Step, StepSeconds]]) -> dict[str, list[str]]:
    columns = [_step_rows(step, seconds) for step, seconds in steps]
    return {label: [column[label] for column in columns] for label in columns[0]}


def _step_rows(step: Step, seconds: StepSeconds) -> dict[str, str]:
    return {
        "Bytes up": rounded(step.crossing.up_bytes, "B"),
        "Bytes down": rounded(step.crossing.down_bytes, "B"),
        "Round trips": f"{step.crossing.round_trips:,.4g}",
        "Edge FLOPs, forward": rounded(step.edge.forward, ""),
        "Edge FLOPs, backward": rounded(step.edge.backward, ""),
        "Cloud FLOPs, forward": rounded(step.cloud.forward, ""),
        "Cloud FLOPs, backward": rounded(step.cloud.backward, ""),
        "Time": duration(seconds.total),
        "  computing on the edge": duration(seconds.edge),
        "  computing on the cloud": duration(seconds.cloud),
        "  bytes on the line": duration(seconds.wire),
        "  round trips": duration(seconds.latency),
        "  handling messages": duration(seconds.handling),
        "  of these at once": f"-{duration(seconds.hidden)}" if seconds.hidden else NONE,
    }


def _run_rows(plan: Plan) -> dict[str, str]:
    costs, disk = plan.costs, plan.costs.storage
    return {
        "Parameters that train": f"{costs.trained.adapter:,}",
        "Edge, peak of live tensors": rounded(costs.edge_peak_tensor_bytes, "B"),
        "Cloud, peak of live tensors": rounded(costs.cloud_peak_tensor_bytes, "B"),
        "Edge's disk: fetched": rounded(disk.fetched, "B"),
        "  the adapter": rounded(disk.adapter, "B"),
        "  checkpoints, two kept": rounded(disk.checkpoint, "B"),
        "  kept outputs": rounded(disk.cache, "B"),
        "Fetched once, bytes": rounded(costs.fetch.up_bytes + costs.fetch.down_bytes, "B"),
        "Fetched once, time": duration(plan.fetch_s),
        "Steps": f"{plan.steps:,} ({plan.steps_per_epoch:,} an epoch)",
        "First epoch, time": duration(plan.epoch_s),
        "Bytes up": rounded(plan.crossing.up_bytes, "B"),
        "Bytes down": rounded(plan.crossing.down_bytes, "B"),
        "Time": duration(plan.total_s),
    }


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best: ms, s, min, h or days."""
    if seconds < 0.9995:  # of which three digits are less than a second
        return f"{1e3 * seconds:.3g} ms"
    for most, unit, name in ((100.0, 1.0, "s"), (100 * MINUTE_S, MINUTE_S, "min"), (4 * DAY_S, HOUR_S, "h")):
        if seconds < most:
            return f"{seconds / unit:.3g} {name}"
    days = seconds / DAY_S
    return f"{days:.3g} d" if days < 999.5 else f"{days:,.0f} d"


def _wire(plan: Plan) -> tuple[str, ...]:
    whole = rounded(plan.total_bytes, "B"), duration(plan.total_s)
    return (*_crossing(plan.costs.first), duration(plan.first.total), duration(plan.epoch_s), *whole)


def _crossing(step: Step) -> tuple[str, ...]:
    up, down, trips = astuple(step.crossing)
    sizes = (rounded(size, "B") if size else NONE for size in (up, down))
    return (*sizes, f"{trips:,.4g}" if trips else NONE)


def _sides(plan: Plan) -> tuple[str, ...]:
    step, costs, disk = plan.costs.first, plan.costs, plan.costs.storage
    flops = (step.edge.forward, step.edge.backward, step.cloud.forward, step.cloud.backward)
    peaks = (costs.edge_peak_tensor_bytes, costs.cloud_peak_tensor_bytes, sum(astuple(disk)))
    return (
        rounded(costs.trained.total, ""),
        *(rounded(one, "") if one else NONE for one in flops),
        *(rounded(one, "B") if one else NONE for one in peaks),
    )


def _grid(heads: Sequence[str], padding: int) -> Table:
    drawn = Table(box=None, padding=(0, padding, 0, 0), pad_edge=False, header_style="bold")
    for head in heads:
        drawn.add_column(head, justify="right" if head else "left", no_wrap=True)
    return drawn


def _add(drawn: Table, name: str, *cells: str, bold: bool = False) -> None:
    drawn.add_row(Text(name, "bold" if bold else ""), *(Text(cell, "dim" if cell == NONE else "") for cell in cells))
