"""Which of several runs are worth their cost: accuracy against bytes, round trips and the edge's FLOPs.

Knows reports and their evaluations; draws nothing. A run is dominated where another one costs no more and is no worse,
and is better in one of the two; what is left is the front (Pareto). Only runs scored on the same rows are compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from isthmus.report import offsite
from isthmus.report.evaluated import Kept
from isthmus.report.fields.score import Score
from isthmus.report.schema import RunReport

Cost: TypeAlias = Literal["bytes", "round trips", "edge FLOPs"]
Measure: TypeAlias = Literal["accuracy", "loss"]

COSTS: Final[tuple[Cost, ...]] = ("bytes", "round trips", "edge FLOPs")


@dataclass(frozen=True)
class Point:
    """One run: what it cost, and how good it became.

    Attributes:
        run: its name.
        cost: bytes, round trips or FLOPs.
        quality: accuracy, or loss, of its last scores on the true span.
        interval: its 95 % limits, where there are any.
        beaten_by: names of the runs that dominate it, in the order of the runs.
        reference: the model is whole on the edge (`--method local`); such a run is shown and beats none.
    """

    run: str
    cost: float
    quality: float
    interval: tuple[float, float] | None = None
    beaten_by: tuple[str, ...] = ()
    reference: bool = False

    @property
    def on_front(self) -> bool:
        """Whether no run dominates it."""
        return not (self.beaten_by or self.reference)


@dataclass(frozen=True)
class Front:
    """Runs that were scored on the same rows, by one of their costs, the cheapest first."""

    cost: Cost
    measure: Measure
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Group:
    """Runs that were scored on the same rows: a front for each cost.

    Attributes:
        measure: accuracy, or loss where no run of them has an accuracy.
        fronts: of `COSTS`, in order; without those that no run has.
        left_out: names of runs that are on no front, and why.
    """

    measure: Measure
    fronts: tuple[Front, ...]
    left_out: Mapping[str, str]

    def beaten(self) -> dict[str, dict[Cost, tuple[str, ...]]]:
        """For each run that is on a front's picture, by cost, who dominates it."""
        found: dict[str, dict[Cost, tuple[str, ...]]] = {}
        for front in self.fronts:
            for point in front.points:
                found.setdefault(point.run, {})[front.cost] = point.beaten_by
        return found


def groups(reports: Mapping[str, RunReport], kept: Mapping[str, Kept]) -> tuple[Group, ...]:
    """The fronts of runs that were scored on the same rows; runs that nobody scored stand alone.

    Args:
        reports: by the runs' names.
        kept: what their directories have beside the reports, by the same names.
    """
    plugged = {made.name: made.plugged_in.score for made in offsite.tables(reports, kept)}
    scores = {name: plugged.get(name, run.eval.after) for name, run in reports.items()}
    rows: dict[str | None, list[str]] = {}
    for name, run in reports.items():
        rows.setdefault(run.eval_data, []).append(name)
    return tuple(_group({name: reports[name] for name in names}, scores) for names in rows.values())


def cost_of(run: RunReport, cost: Cost) -> float | None:
    """What a run cost; bytes are those of training, both ways, and of the emulator's bundle where there is one.

    Ends are left out: every run needs them, and whether they crossed depends on what was on the edge before.
    """
    wire, edge = run.cost.wire, run.cost.edge
    if cost == "bytes":
        bundle = bundle_bytes(run)
        return wire.up_bytes + wire.down_bytes + bundle if bundle is not None else None
    if cost == "round trips":
        return wire.round_trips
    if edge.forward_flops is None or edge.backward_flops is None:
        return None
    return edge.forward_flops + edge.backward_flops


def bundle_bytes(run: RunReport) -> int | None:
    """How much the emulator that a run was tuned on is to fetch; 0 without one.

    Where an older report does not say it is what was fetched; None where nothing was, since it was here already.
    """
    if run.offsite is None:
        return 0
    fetched = run.cost.wire.by_phase.fetch
    return run.offsite.bundle_bytes or fetched.up_bytes + fetched.down_bytes or None


def _group(reports: Mapping[str, RunReport], scores: Mapping[str, Score | None]) -> Group:
    known = {name: score for name in reports if (score := scores[name]) is not None}
    measure: Measure = "accuracy" if any(score.accuracy is not None for score in known.values()) else "loss"
    shown = [name for name, score in known.items() if getattr(score, measure) is not None]
    fronts = tuple(_front(cost, measure, {name: (reports[name], known[name]) for name in shown}) for cost in COSTS)
    left_out = {name: _why(reports[name], measure) for name in reports if name not in shown}
    return Group(measure, tuple(front for front in fronts if front.points), left_out)


def _front(cost: Cost, measure: Measure, runs: Mapping[str, tuple[RunReport, Score]]) -> Front:
    points = [
        Point(
            name,
            spent,
            getattr(score, measure),
            score.accuracy_interval if measure == "accuracy" else None,
            reference=run.method == "local",
        )
        for name, (run, score) in runs.items()
        if (spent := cost_of(run, cost)) is not None
    ]
    judged = [_judged(point, points, -1 if measure == "loss" else 1) for point in points]
    return Front(cost, measure, tuple(sorted(judged, key=lambda point: (point.cost, point.run))))


def _judged(point: Point, points: Sequence[Point], sign: int) -> Point:
    """A point with the names of those that dominate it; `sign` is -1 where less is better."""
    if point.reference:
        return point
    beaten_by = tuple(
        other.run
        for other in points
        if not other.reference
        and other.cost <= point.cost
        and sign * other.quality >= sign * point.quality
        and (other.cost, other.quality) != (point.cost, point.quality)
    )
    return Point(point.run, point.cost, point.quality, point.interval, beaten_by)


def _why(run: RunReport, measure: Measure) -> str:
    if run.method == "offsite":
        return f"no {measure} on the true span; plug it in with: edge_client evaluate --span remote"
    return f"no {measure} after training"
