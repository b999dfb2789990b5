"""How a run learned: its loss step by step and what had crossed until then, and the scores it was given on the way.

Knows reports, histories and how long rows of figures are thinned; draws nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from isthmus.report.fields.score import Score
from isthmus.report.fronts import bundle_bytes
from isthmus.report.history import History
from isthmus.report.schema import RunReport

MOST_POINTS: Final = 1_000
"""Of a curve: a screen shows no more."""

SMOOTHED: Final = 20
"""A smoothed curve's window is this part of its points, one in so many."""


@dataclass(frozen=True)
class Scored:
    """A score of held-out rows once `step` steps were done.

    Attributes:
        crossed: bytes of training until then, both ways, after the emulator's bundle where there is one.
        emulated: it was the emulator that was scored, not the true span.
    """

    step: int
    crossed: int
    loss: float | None
    accuracy: float | None
    emulated: bool = False


@dataclass(frozen=True)
class Curve:
    """The loss of a run's steps; where there were too many each point is the mean of `together` of them.

    Attributes:
        steps: the last of each point's.
        crossed: bytes, as `Scored` has them.
        smoothed: the mean of each point and those before it, within a window of `window`.
    """

    steps: tuple[int, ...]
    crossed: tuple[int, ...]
    loss: tuple[float, ...]
    smoothed: tuple[float, ...]
    together: int
    window: int


def curve(report: RunReport, history: History) -> Curve | None:
    """The loss of each step; None where no step left a line."""
    if not history.metrics:
        return None
    metrics = history.metrics
    together = -(-len(metrics) // MOST_POINTS)
    parts = [metrics[at : at + together] for at in range(0, len(metrics), together)]
    loss = tuple(sum(each.loss for each in part) / len(part) for part in parts)
    window = max(1, len(loss) // SMOOTHED)
    steps = tuple(part[-1].step for part in parts)
    crossed = tuple(_crossed(report, history, steps))
    return Curve(steps, crossed, loss, _smoothed(loss, window), together, window)


def scored(report: RunReport, history: History, plugged_in: Score | None = None) -> tuple[Scored, ...]:
    """Scores before, while and after training, in this order.

    Args:
        report: of the run.
        history: of the same.
        plugged_in: of a run on an emulator: what its adapter came to on the true span afterwards.
    """
    emulator = report.offsite
    found = [(0, report.eval.before, emulator is not None), (report.steps, report.eval.after, emulator is not None)]
    if emulator is not None:
        looks = (Score(loss=look.loss, accuracy=look.accuracy) for look in emulator.watched)
        found += [(look.step, score, False) for look, score in zip(emulator.watched, looks, strict=True)]
        looked = {look.step for look in emulator.watched}
        if plugged_in is not None and report.steps not in looked:
            found.append((report.steps, plugged_in, False))
    kept = sorted((each for each in found if each[1].loss is not None), key=lambda each: each[0])
    crossed = _crossed(report, history, [step for step, _, _ in kept])
    return tuple(
        Scored(step, until, score.loss, score.accuracy, emulated)
        for (step, score, emulated), until in zip(kept, crossed, strict=True)
    )


def _crossed(report: RunReport, history: History, steps: Sequence[int]) -> list[int]:
    """Bytes until each of these steps was done; steps ascend. What a run's end has crossed its report knows."""
    wire, begun = report.cost.wire, bundle_bytes(report) or 0
    until = {step: sum(both) for step, both in history.crossed.items()} | {
        report.steps: wire.up_bytes + wire.down_bytes
    }
    found: list[int] = []
    latest = 0
    for step in steps:
        latest = max(latest, until.get(step, latest)) if step else 0
        found.append(begun + latest)
    return found


def _smoothed(values: Sequence[float], window: int) -> tuple[float, ...]:
    parts = (values[max(0, at + 1 - window) : at + 1] for at in range(len(values)))
    return tuple(sum(part) / len(part) for part in parts)
