"""What a table of offsite tuning comes to, in words: gain, share of the gain to be had, and the owner's protection.

Knows rows and what `isthmus.report.verdict` finds of two of them; claims nothing that their 95 % intervals leave open.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.report.offsite import Row, Table
from isthmus.report.verdict import Measure, Rises, Verdict


@dataclass(frozen=True)
class _Change:
    """From one row's score to another's: points of accuracy (None: not measured), nats per token, and what is sure.

    `rises` is None where figures of the same rows and tokens are not at hand for both.
    """

    points: float | None
    loss: float
    rises: Rises | None

    @classmethod
    def between(cls, old: Row, new: Row) -> "_Change | None":
        """None where one of them has no score."""
        before, after = old.score, new.score
        if before is None or after is None or before.loss is None or after.loss is None:
            return None
        points = None
        if before.accuracy is not None and after.accuracy is not None:
            points = 100 * (after.accuracy - before.accuracy)
        return cls(points, after.loss - before.loss, _rises(old, new))

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


def in_words(table: Table) -> tuple[str, ...]:
    """Sentences about a table, of what there are scores for; none promises more than the scores show."""
    gain = _Change.between(table.untouched, table.plugged_in)
    whole = _Change.between(table.untouched, table.throughout)
    protection = _Change.between(table.tuned, table.plugged_in)
    return (
        *([_gain(gain)] if gain is not None else []),
        *(_share(table, whole) if whole is not None else []),
        *([_protection(protection)] if protection is not None else []),
        *_unlike(table),
        *_begun(table),
    )


def _rises(old: Row, new: Row) -> Rises | None:
    if old.per_row is None or new.per_row is None:
        return None
    try:
        return Rises.between(old.per_row, new.per_row)
    except ValueError:  # shortened to another length, one is of other tokens
        return None


def _incomparable(which: str, change: _Change) -> str:
    return f"{which} cannot be compared row by row, for want of both ones' figures of the same rows: {change}."


def _gain(change: _Change) -> str:
    better, worse = change.found("better"), change.found("worse")
    if change.rises is None:
        return _incomparable("The plugged-in and the untouched model", change)
    if better and worse:
        verdict = "Plugging in made one thing better and the other worse than the untouched model"
    elif worse:
        verdict = "Plugging in made things worse than the untouched model"
    elif better:
        verdict = "Plugging in gained over the untouched model"
    else:
        verdict = f"{change.untold} whether plugging in gained over the untouched model"
    return f"{verdict}: {change}."


def _share(table: Table, whole: _Change) -> list[str]:
    """How much of the gain of tuning on the true span throughout there is without it, where that is a gain at all."""
    tuning = "tuning on the true span throughout"
    if whole.rises is None:
        return [_incomparable("The untouched model and that tuned on the true span throughout", whole)]
    gained, worse, undecided = whole.found("better"), whole.found("worse"), whole.found("undecided")
    said = []
    shares = [_shares(row, table, whole, gained) for row in (table.plugged_in, *table.carried_on)]
    if gained and any(shares):
        figures = ", ".join(map(whole.of, gained))
        said.append(f"Of the gain of {tuning} ({figures}): {'; '.join(filter(None, shares))}.")
    none = "there is no share of it"
    if worse:
        figures = ", ".join(map(whole.of, worse))
        said.append(f"{tuning.capitalize()} made things worse in {' and '.join(worse)} ({figures}): {none}.")
    if undecided:
        figures = ", ".join(map(whole.of, undecided))
        said.append(f"{whole.untold} whether {tuning} gained in {' or '.join(undecided)} ({figures}): {none}.")
    return said


def _shares(row: Row, table: Table, whole: _Change, gained: Sequence[Measure]) -> str:
    part, plugged_in = _Change.between(table.untouched, row), row is table.plugged_in
    if part is None:
        return ""
    if part.rises is None or whole.rises is None:
        return f"{'plugging in' if plugged_in else row.label} cannot be compared row by row"
    shares = [f"{_percent(part, whole, measure)} in {measure}" for measure in gained]
    return f"{'plugging in has' if plugged_in else row.label} {' and '.join(shares)}"


def _percent(part: _Change, whole: _Change, measure: Measure) -> str:
    match part.verdicts[measure]:
        case "better" if measure == "loss":
            return f"about {100 * part.loss / whole.loss:.0f} %"
        case "better":
            return f"about {100 * (part.points or 0) / (whole.points or 1):.0f} %"
        case "worse":
            return "none"
        case "undecided":
            return f"none that {part.rises.rows if part.rises else 0:,} rows tell"


def _protection(change: _Change) -> str:
    """By how much the emulator alone is worse than what the owner has."""
    better, worse = change.found("better"), change.found("worse")
    if change.rises is None:
        return _incomparable("The plugged-in model and the tuned emulator", change)
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


def _unlike(table: Table) -> list[str]:
    """Where tuning on the true span throughout was not the same tuning."""
    run, other = table.run, table.reference
    if other is None:
        return []
    pairs = [
        (f"{other.steps:,} steps", f"{run.steps:,}", other.steps != run.steps),
        (f"{other.peft_type}", f"{run.peft_type}", other.peft_type != run.peft_type),
        (
            f"{other.params.trainable:,} trained parameters" if other.params.trainable is not None else "",
            f"{run.params.trainable:,}" if run.params.trainable is not None else "",
            other.params.trainable != run.params.trainable,
        ),
    ]
    unlike = [f"{theirs} where this one had {own}" for theirs, own, differ in pairs if differ and theirs and own]
    name = table.throughout.runs[0]
    return [f"{name}, on the true span throughout, was not the same tuning: {', '.join(unlike)}."] if unlike else []


def _begun(table: Table) -> list[str]:
    earlier = table.run.begun_from
    if earlier is None:
        return []
    return [f"{table.name} began with the adapter of an earlier run ({earlier.method}); what that cost is not in it."]
