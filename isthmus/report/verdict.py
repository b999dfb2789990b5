"""Whether one score is better than another of the same rows, by paired 95 % intervals of accuracy and of loss.

Knows figures of rows; knows no model, no file and no report, and puts nothing into words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias

from isthmus.report.interval import paired, ratio_interval

FEWEST_ROWS: Final = 24
"""With fewer the normal approximation behind a loss's interval does not hold; it is then left open."""

Verdict: TypeAlias = Literal["better", "worse", "undecided"]
Overall: TypeAlias = Literal["better", "worse", "mixed", "undecided"]
"""Mixed: better by one measure and worse by the other."""

Measure: TypeAlias = Literal["accuracy", "loss"]
Interval: TypeAlias = tuple[float, float, float]
"""A figure, its lower and its upper limit at 95 %."""


class Figures(Protocol):
    """Figures of each row, in the rows' order; `correct` of the rows with choices alone."""

    @property
    def nats(self) -> Sequence[float]:
        """Negative log-likelihood of each row's counted tokens, summed."""

    @property
    def tokens(self) -> Sequence[int]:
        """How many tokens of each row counted."""

    @property
    def correct(self) -> Sequence[bool]:
        """Whether the right choice was the likeliest."""


@dataclass(frozen=True)
class Rises:
    """How far accuracy (a share) and loss (nats per token) rose from one score to another of the same rows.

    Attributes:
        accuracy: None where no row has choices.
        loss: None where there are fewer than `FEWEST_ROWS` rows.
    """

    rows: int
    accuracy: Interval | None
    loss: Interval | None

    @classmethod
    def between(cls, old: Figures, new: Figures) -> "Rises":
        """Compare row by row.

        Raises:
            ValueError: no rows, or not the same rows and tokens of them.
        """
        if not old.nats or tuple(old.tokens) != tuple(new.tokens) or len(old.correct) != len(new.correct):
            raise ValueError(f"{len(old.nats)} and {len(new.nats)} rows are not the same rows and tokens")
        rises = [after - before for before, after in zip(old.nats, new.nats, strict=True)]
        return cls(
            len(rises),
            paired(old.correct, new.correct) if old.correct else None,
            ratio_interval(rises, old.tokens) if len(rises) >= FEWEST_ROWS else None,
        )

    @property
    def verdicts(self) -> dict[Measure, Verdict]:
        """By measure; without accuracy where no row has choices."""
        loss = self.loss and (-self.loss[0], -self.loss[2], -self.loss[1])
        found: dict[Measure, Verdict] = {} if self.accuracy is None else {"accuracy": verdict(self.accuracy)}
        return {**found, "loss": verdict(loss)}

    @property
    def verdict(self) -> Overall:
        """By both measures: what one of them decides stands, unless the other decides against it."""
        found = set(self.verdicts.values())
        if {"better", "worse"} <= found:
            return "mixed"
        return "better" if "better" in found else "worse" if "worse" in found else "undecided"


def verdict(gain: Interval | None) -> Verdict:
    """Better or worse where the whole interval is above or below 0; undecided otherwise, and without an interval.

    Limits count to four digits: what is below is noise of arithmetic, which can be the same in every row.
    """
    if gain is None:
        return "undecided"
    low, high = round(gain[1], 4), round(gain[2], 4)
    return "better" if low > 0 else "worse" if high < 0 else "undecided"
