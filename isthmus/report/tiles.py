"""The few figures of a run that are read first, and how it ended.

Knows the report's fields, units and plain words; computes no figure but sums of two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from isthmus.report.history import History
from isthmus.report.median_step import median_step
from isthmus.report.schema import RunReport
from isthmus.report.units import NONE, rounded, size

Mood = Literal["good", "warn", "bad", "quiet"]

_MOODS: Final[dict[str | None, Mood]] = {"complete": "good", "interrupted": "warn", "failed": "bad", None: "warn"}


@dataclass(frozen=True)
class Tile:
    """A figure, what it is of, and a little more."""

    head: str
    figure: str
    note: str


@dataclass(frozen=True)
class State:
    """How runs ended, in words."""

    text: str
    mood: Mood


def state_of(runs: Sequence[RunReport]) -> State:
    """Of one run how it ended; of several how many did not complete."""
    if len(runs) == 1:
        return State(runs[0].status or "no end is known", _MOODS[runs[0].status])
    others = sum(run.status != "complete" for run in runs)
    return State(f"{others} not complete" if others else "all complete", "warn" if others else "good")


def about(run: RunReport) -> str:
    """What was trained, in a line, such as "split, cut 2:2, LORA of smollm2-135m"."""
    method = " ".join(filter(None, (run.method, run.exchange, "top" if run.train == "top" else None)))
    cut = f"cut {run.cut}" if run.cut is not None else None
    what = f"{run.peft_type} of {run.model}" if run.peft_type is not None else run.model
    return ", ".join(filter(None, (method, cut, what)))


def tiles(run: RunReport, history: History) -> tuple[Tile, ...]:
    """Quality, bytes, time and memory, each in one figure."""
    return _quality(run), _crossed(run), _step(run, history), _memory(run)


def _quality(run: RunReport) -> Tile:
    before, after = run.eval.before, run.eval.after
    if before.accuracy is not None or after.accuracy is not None:
        told = f"{100 * after.accuracy:.1f} %" if after.accuracy is not None else NONE
        return Tile("Accuracy", told, f"{100 * before.accuracy:.1f} % before" if before.accuracy is not None else "")
    if before.loss is not None or after.loss is not None:
        told = f"{after.loss:.4f}" if after.loss is not None else NONE
        return Tile("Loss", told, f"{before.loss:.4f} before" if before.loss is not None else "")
    told = f"{run.final_loss:.4f}" if run.final_loss is not None else NONE
    return Tile("Last training loss", told, "no held-out rows were scored")


def _crossed(run: RunReport) -> Tile:
    wire = run.cost.wire
    ways = f"{size(wire.up_bytes)} up, {size(wire.down_bytes)} down"
    return Tile("Crossed in training", rounded(wire.up_bytes + wire.down_bytes, "B"), ways)


def _step(run: RunReport, history: History) -> Tile:
    median = median_step(history)
    seconds = median.seconds if median is not None else None
    speed = run.throughput.train_tokens_per_s
    note = f"{run.steps:,} steps" + (f", {speed:,.1f} tokens a second" if speed is not None else "")
    return Tile("Median step", f"{seconds:.2f} s" if seconds is not None else NONE, note)


def _memory(run: RunReport) -> Tile:
    edge = run.cost.edge
    note = f"{size(edge.peak_tensor_bytes)} of tensors" if edge.peak_tensor_bytes is not None else ""
    return Tile("Edge memory, peak", rounded(edge.peak_memory_bytes, "B"), note)
