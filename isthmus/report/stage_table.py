"""Every stage of a run on a line of its own, for each side that had a part in it: before the run, in it and after it.

Knows what the report and the run's directory tell of stages, and what the owner told; computes no figure but sums of
seconds. Of what nobody told there is a line that says so.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from isthmus.ledger.figures import Phase
from isthmus.report.evaluated import Evaluated, Kept
from isthmus.report.fields.stage import Stage
from isthmus.report.schema import RunReport
from isthmus.report.six_rows import Grid
from isthmus.report.stages import stages_told
from isthmus.report.units import NONE, rounded

Side = Literal["edge", "cloud"]

LABELS: Final[dict[Phase, str]] = {
    "build": "Build",
    "distil": "Distil",
    "measure": "Measure",
    "fetch": "Fetch and load",
    "eval": "Evaluate",
    "train": "Tune",
    "look": "Look",
    "rounds": "Rounds",
    "generate": "Generate",
    "control": "Control",
    "submit": "Submit",
    "plug-in": "Plug in",
    "score": "Score, plugged in",
}
"""In the order in which they are shown."""

_BEFORE: Final[tuple[Phase, ...]] = ("build", "distil", "measure")
_AFTER: Final[tuple[Phase, ...]] = ("plug-in", "score")
_PASSES: Final = ("forward_s", "backward_s", "update_s")

LEGEND: Final = (
    "Edge seconds: by the clock where one ran for the stage alone, else computing and waiting; cloud seconds: "
    "computing. Memory: the stage's own peak; of a node that serves, in Control, since it started."
)


@dataclass(frozen=True)
class Line:
    """A stage; `cost` is None where nobody told it."""

    stage: Phase
    label: str
    cost: Stage | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        told = self.cost.model_dump(mode="json", exclude={"stage"}) if self.cost is not None else {}
        return {"stage": self.stage, "label": self.label, "told": self.cost is not None, **told}


def lines(run: RunReport, kept: Kept | None) -> tuple[Line, ...]:
    """All stages of a run in order; none where its report is older than stages are."""
    if not run.stages:
        return ()
    found = list(run.stages)
    for told in kept.told if kept is not None else ():
        if told.of in {run.adapter, run.offsite.emulator if run.offsite is not None else None}:
            known = {stage.stage for stage in found}
            found += [stage for stage in stages_told(told) if stage.stage not in known]
    made = [Line(stage.stage, LABELS[stage.stage], stage) for stage in found]
    made += [*_not_told(run, {stage.stage for stage in found}), *_later(run, kept)]
    order = list(LABELS)
    return tuple(sorted(made, key=lambda line: order.index(line.stage)))


def tables(reports: Mapping[str, RunReport], kept: Mapping[str, Kept]) -> dict[str, tuple[Line, ...]]:
    """The stages of each named run that tells any."""
    found = {name: lines(run, kept.get(name)) for name, run in reports.items()}
    return {name: made for name, made in found.items() if made}


def grid(made: tuple[Line, ...]) -> Grid:
    """For people: a row for each stage and side."""
    heads = ("", "Steps", "Seconds", "Up", "Down", "Forward", "Backward", "Tensors", "Process", "Stored")
    return Grid(heads, tuple(row for line in made for row in _rows(line)))


def _not_told(run: RunReport, known: set[Phase]) -> Iterator[Line]:
    """What an emulator's owner did, or will do, and has not told."""
    if run.offsite is None:
        return
    happened = {"build": True, "distil": run.offsite.distilled_steps > 0, "measure": run.offsite.gap is not None}
    for stage in (*_BEFORE, _AFTER[0]):
        if stage not in known and happened.get(stage, True):
            yield Line(stage, LABELS[stage], None)


def _later(run: RunReport, kept: Kept | None) -> Iterator[Line]:
    """What was done with the run's adapter once it was there."""
    if kept is None:
        return
    for scored in kept.evaluations:
        if scored.cost is not None and scored.adapter in (run.adapter, None):
            yield Line("eval", _scored(scored), scored.cost)
    for submitted in kept.submissions:
        if submitted.adapter == run.adapter:
            yield Line("submit", LABELS["submit"], submitted.cost)


def _scored(scored: Evaluated) -> str:
    what = "without adapter, " if scored.untouched else ""
    return f"Evaluate later, {what}{'emulator' if scored.span == 'emulated' else 'true span'}"


def _rows(line: Line) -> Iterator[tuple[str, ...]]:
    if line.cost is None:
        yield (f"{line.label}, cloud: not told", *[NONE] * 9)
        return
    cost = line.cost.model_dump()
    sides = [side for side in ("edge", "cloud") if _took_part(cost, side)]
    for number, side in enumerate(sides):
        owns = side == "edge" or len(sides) == 1
        first = number == 0
        yield (
            f"{line.label}, {side}",
            f"{cost['steps']:,}" if first and cost["steps"] is not None else NONE,
            _seconds(cost, side, owns),
            *(rounded(cost[f"{way}_bytes"] if owns else None, "B") for way in ("up", "down")),
            *(rounded(cost[f"{side}_{way}_flops"], "") for way in ("forward", "backward")),
            *(rounded(cost[f"{side}_peak_{kind}_bytes"], "B") for kind in ("tensor", "memory")),
            rounded(cost["stored_bytes"] if first else None, "B"),
        )


def _took_part(cost: Mapping[str, Any], side: str) -> bool:
    figures = [f"{side}_{name}" for name in (*_PASSES, "forward_flops", "peak_tensor_bytes", "peak_memory_bytes")]
    crossed = ["up_bytes", "edge_wait_s"] if side == "edge" else []
    return any(cost[name] is not None for name in (*figures, *crossed))


def _seconds(cost: Mapping[str, Any], side: str, clocked: bool) -> str:
    if clocked and cost["seconds"] is not None:
        return f"{cost['seconds']:,.2f}"
    names = [*(f"{side}_{name}" for name in _PASSES), *(["edge_wait_s"] if side == "edge" else [])]
    spent = [cost[name] for name in names if cost[name] is not None]
    return f"{sum(spent):,.2f}" if spent else NONE
