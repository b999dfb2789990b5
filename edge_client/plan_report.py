"""From what was planned to its JSON.

Knows both forms; computes no figure.
"""

from edge_client.plan_devices import Place
from edge_client.plan_json import Device, Fit, Line, PlannedRun, PlanReport, Rows
from edge_client.plan_making import Made
from edge_client.plan_rows import PlannedRows
from edge_client.plan_settings import PlanSettings
from isthmus.planning.fit import Fitted, Limits
from isthmus.planning.machines import Machine


def report_of(settings: PlanSettings, made: Made, limits: Limits) -> PlanReport:
    """What `--json` prints."""
    return PlanReport(
        model=settings.model,
        rows=_rows(made.rows),
        link=_line(made.place),
        edge=_device(made.place.edge),
        cloud=_device(made.place.cloud),
        plans=tuple(map(PlannedRun.of, made.plans)),
        refused=made.refused,
        fit=_fit(made.fitted, limits) if made.fitted is not None else None,
    )


def _rows(rows: PlannedRows) -> Rows:
    lengths, losses = rows.lengths, rows.losses
    return Rows(
        rows=rows.count if rows.known else None,
        mean_length=sum(lengths) / len(lengths),
        mean_losses=sum(losses) / len(losses),
    )


def _line(place: Place) -> Line:
    link = place.link
    return Line(name=place.line, round_trip_s=link.round_trip_s, up=link.up, down=link.down)


def _device(machine: Machine) -> Device:
    return Device(name=machine.name, flops=machine.flops, memory_bytes=machine.memory_bytes, source=machine.source)


def _fit(fitted: Fitted, limits: Limits) -> Fit:
    return Fit(
        limits=limits.told(),
        used=limits.shares(fitted.plan) if fitted.plan is not None else {},
        binding={name: better.command for name, better in fitted.binding.items()},
        together=fitted.together and not fitted.binding,
        tried=fitted.tried,
    )
