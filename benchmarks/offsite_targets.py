"""The Offsite-Tuning rows against `split` and the untouched model, on the same held-out rows, and the targets.

Knows rows that are measured and where their runs are kept; measures nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.forward_figures import VALIDATION
from benchmarks.offsite_figures import BEFORE_IT, BUNDLE, MEMORY, PROTECTION, SPEED, TRUE_RUN, stage_of
from benchmarks.offsite_rows import STEPS, TRUE_STEPS, VARIANTS, Variant
from benchmarks.results import Figure, Outcome, Target
from benchmarks.scores import ACCURACY, LOSS, change_of, changes_of, differences
from benchmarks.series import Measured

LEAST_PLUGGED_IN, LEAST_WITH_STEPS = 0.9, 0.98
SHARE, SHARE_WITH_STEPS = "of the gain, plugged in", "of the gain, with true steps"
LESS_SPLIT = tuple(stage_of("plugged in less split", score) for score in (ACCURACY, LOSS))
STEPS_LESS_SPLIT = tuple(stage_of("with true steps less split", score) for score in (ACCURACY, LOSS))


@dataclass(frozen=True)
class Point:
    """An emulator's shares of the gain of `split`, its owner's protection, and what tuning on it took; all its own."""

    name: str
    validation: float
    plugged_in: Figure
    with_steps: Figure
    protection: Figure
    cost: str

    @property
    def met(self) -> tuple[bool, bool, bool]:
        """Which targets it meets."""
        low = self.protection.value if self.protection.low is None else self.protection.low
        return (
            self.plugged_in.value >= 100 * LEAST_PLUGGED_IN,
            self.with_steps.value >= 100 * LEAST_WITH_STEPS,
            low > 0,
        )


def compare(measured: Measured, runs: Mapping[str, Path]) -> Outcome:
    """Each row's differences from the untouched model and from `split` in its domain, shares of the gain, targets.

    Args:
        measured: what has been measured.
        runs: their run directories.
    """
    found: dict[str, Figure] = {}
    for variant in VARIANTS:
        if variant.name in measured and variant.reference in measured:
            compared = _compared(variant, runs[variant.name], runs[variant.reference])
            found |= changes_of(variant.name, compared)
    points = [_point(name, measured[name], found) for name in _emulators(measured, found)]
    return Outcome(found, tuple(_targets(points)) if points else ())


def _compared(variant: Variant, run: Path, split: Path) -> dict[str, Figure]:
    untouched = split / BEFORE_IT
    gain = differences(split, untouched)
    if variant.emulator is None:
        return gain
    plugged_in = differences(run / TRUE_RUN / BEFORE_IT, split)
    with_steps = differences(run / TRUE_RUN, split)
    return {
        **differences(run / TRUE_RUN / BEFORE_IT, untouched),
        **dict(zip(LESS_SPLIT, plugged_in.values(), strict=True)),
        **dict(zip(STEPS_LESS_SPLIT, with_steps.values(), strict=True)),
        **_share(SHARE, plugged_in[ACCURACY], gain[ACCURACY]),
        **_share(SHARE_WITH_STEPS, with_steps[ACCURACY], gain[ACCURACY]),
    }


def _share(label: str, change: Figure, gain: Figure) -> dict[str, Figure]:
    """Of the gain of `split`, which is taken as it was found: the interval is that of the difference from `split`."""
    if gain.value <= 0:
        return {}
    low, value, high = (
        100 * (1 + (change.value if points is None else points) / gain.value)
        for points in (change.low, change.value, change.high)
    )
    return {label: Figure(value, "%", low, high)}


def _emulators(measured: Measured, found: Mapping[str, Figure]) -> list[str]:
    """Rows on movie reviews that have a share of the gain."""
    names = [variant.name for variant in VARIANTS if variant.domain == "movies" and variant.emulator is not None]
    return [name for name in names if name in measured and change_of(name, SHARE) in found]


def _point(name: str, figures: Mapping[str, Figure], found: Mapping[str, Figure]) -> Point:
    cost = f"{figures[SPEED]} tokens/s, {figures[MEMORY]} of tensors, {figures[BUNDLE]} to fetch"
    plugged_in, with_steps = (found[change_of(name, label)] for label in (SHARE, SHARE_WITH_STEPS))
    return Point(name, figures[VALIDATION].value, plugged_in, with_steps, figures[PROTECTION], cost)


def _targets(points: list[Point]) -> list[Target]:
    """All of one and the same emulator: the one that is best on the validation rows."""
    best = max(points, key=lambda point: point.validation)
    shown = (
        (f"plugged in, at least {LEAST_PLUGGED_IN:.0%} of the gain of `split` in accuracy, as found", "plugged_in"),
        (
            f"with {TRUE_STEPS} true steps of {STEPS}, at least {LEAST_WITH_STEPS:.0%} of it, as found",
            "with_steps",
        ),
        ("the tuned emulator is below what is plugged in, at the lower bound of the difference", "protection"),
    )
    return [
        Target(
            text,
            f"`{best.name}`: {getattr(best, kind)} ({best.cost})",
            best.met[number],
            None if best.met[number] else _others(points, number, kind),
        )
        for number, (text, kind) in enumerate(shown)
    ]


def _others(points: list[Point], number: int, kind: str) -> str:
    """Why the emulator that is shown misses a target: which of the others meet it, or which comes nearest."""
    meeting = [f"`{point.name}` ({getattr(point, kind)})" for point in points if point.met[number]]
    if meeting:
        return f"of the others {', '.join(meeting)} would meet it"
    most = max(points, key=lambda point: float(getattr(point, kind).value))
    return f"no emulator meets it; the nearest is `{most.name}` with {getattr(most, kind)} ({most.cost})"
