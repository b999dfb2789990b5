"""From one score to another of the same rows, in words: the same for an edge's table and for whoever plugs in.

Knows two figures and what `isthmus.report.verdict` finds of them; claims nothing that 95 % intervals leave open.
"""

from dataclasses import dataclass

from isthmus.report.verdict import Measure, Rises, Verdict


@dataclass(frozen=True)
class Change:
    """Points of accuracy (None: not measured), nats per token, and what is sure.

    `rises` is None where figures of the same rows and tokens are not at hand for both.
    """

    points: float | None
    loss: float
    rises: Rises | None

    @property
    def verdicts(self) -> dict[Measure, Verdict]:
        """By measure; none where nothing can be judged."""
        return {} if self.rises is None else self.rises.verdicts

    def found(self, *verdicts: Verdict) -> list[Measure]:
        """Measures of which one of these is true."""
        return [measure for measure, verdict in self.verdicts.items() if verdict in verdicts]

    @property
    def untold(self) -> str:
        """How a sentence begins about what is undecided."""
        return f"{self.rises.rows if self.rises else 0:,} rows do not tell"

    def __str__(self) -> str:
        return self.of("loss") if self.points is None else f"{self.of('accuracy')}, {self.of('loss')}"

    def of(self, measure: Measure) -> str:
        """One measure, with its interval, and where only the other is decided, that this one is not."""
        open_ = self.found("undecided")
        note = f" ({self.untold})" if measure in open_ and len(open_) < len(self.verdicts) else ""
        accuracy, loss = (self.rises.accuracy, self.rises.loss) if self.rises is not None else (None, None)
        if measure == "accuracy":
            limits = f" [{100 * accuracy[1]:+.1f}, {100 * accuracy[2]:+.1f}]" if accuracy is not None else ""
            return f"accuracy {self.points:+.1f} points{limits}{note}"
        limits = f" [{loss[1]:+.4f}, {loss[2]:+.4f}]" if loss is not None else ""
        return f"loss {self.loss:+.4f}{limits}{note}"

    def incomparable(self, which: str) -> str:
        """What is said of two scores that nothing can be judged of."""
        return f"{which} cannot be compared row by row, for want of both ones' figures of the same rows: {self}."


def points(before: float | None, after: float | None) -> float | None:
    """Points of accuracy from one share to another; None where one was not measured."""
    return None if before is None or after is None else 100 * (after - before)


def gain_in_words(change: Change) -> str:
    """Whether plugging in paid, of the change from the untouched to the plugged-in model."""
    if change.rises is None:
        return change.incomparable("The plugged-in and the untouched model")
    match change.rises.verdict:
        case "mixed":
            better, worse = change.found("better"), change.found("worse")
            verdict = f"Plugging in made {better[0]} better and {worse[0]} worse than the untouched model"
        case "worse":
            verdict = "Plugging in made things worse than the untouched model"
        case "better":
            verdict = "Plugging in gained over the untouched model"
        case "undecided":
            verdict = f"{change.untold} whether plugging in gained over the untouched model"
    return f"{verdict}: {change}."


def protection_in_words(change: Change) -> str:
    """By how much the tuned emulator alone is worse than what the owner has, of the change from it to that."""
    better, worse = change.found("better"), change.found("worse")
    if change.rises is None:
        return change.incomparable("The plugged-in model and the tuned emulator")
    if better and len(better) < len(change.verdicts):
        verdict = "The owner's protection is in one measure only, the plugged-in model against the tuned emulator alone"
    elif better:
        verdict = "The plugged-in model is better than the tuned emulator alone, which is the owner's protection"
    elif worse:
        verdict = "No protection for the owner: the tuned emulator alone is better than the plugged-in model"
    else:
        verdict = (
            f"{change.untold} the plugged-in model from the tuned emulator alone: no protection for the owner shows"
        )
    return f"{verdict}: {change}."
