"""What a table of offsite tuning comes to, in words: gain, share of the gain to be had, and the owner's protection.

Knows scores and their intervals; claims nothing that they do not show. Intervals that overlap are said to be noise.
"""

from dataclasses import dataclass

from isthmus.report.offsite import Table
from isthmus.report.schema import Score


@dataclass(frozen=True)
class _Change:
    """From one score to another on the same rows: points of accuracy (None: not measured), and nats per token."""

    points: float | None
    loss: float
    noise: str

    @classmethod
    def between(cls, old: Score, new: Score, rows: int | None) -> "_Change":
        """Rounded as they are shown, so that a change that reads as none is none."""
        points = None
        if old.accuracy is not None and new.accuracy is not None:
            points = round(100 * (new.accuracy - old.accuracy), 1)
        one, other = old.accuracy_interval, new.accuracy_interval
        overlap = one is not None and other is not None and one[0] <= other[1] and other[0] <= one[1]
        noise = f" (within the noise of {f'{rows:,}' if rows else 'the'} rows)" if overlap else ""
        return cls(points, round((new.loss or 0.0) - (old.loss or 0.0), 4), noise)

    @property
    def rises(self) -> tuple[float, ...]:
        """Of accuracy and loss, above 0 where it became better."""
        return (-self.loss,) if self.points is None else (self.points, -self.loss)

    def __str__(self) -> str:
        loss = f"loss {self.loss:+.4f}"
        return loss if self.points is None else f"accuracy {self.points:+.1f} points{self.noise}, {loss}"


def in_words(table: Table) -> tuple[str, ...]:
    """Sentences about a table, of what there are scores for; none promises more than the scores show."""
    rows = table.run.eval.rows
    untouched, tuned, plugged_in, throughout = (
        row.score for row in (table.untouched, table.tuned, table.plugged_in, table.throughout)
    )
    said = []
    if untouched and plugged_in:
        said.append(_gain(_Change.between(untouched, plugged_in, rows)))
    if untouched and throughout:
        said += _share(table, untouched, _Change.between(untouched, throughout, rows))
    if tuned and plugged_in:
        said.append(_protection(_Change.between(tuned, plugged_in, rows)))
    return (*said, *_unlike(table), *_begun(table))


def _gain(change: _Change) -> str:
    better, worse = (any(sign * rise > 0 for rise in change.rises) for sign in (1, -1))
    if better and worse:
        verdict = "Plugging in made one thing better and the other worse than the untouched model"
    elif worse:
        verdict = "Plugging in made things worse than the untouched model"
    elif better:
        verdict = "Plugging in gained over the untouched model"
    else:
        verdict = "Plugging in left the untouched model's scores as they were"
    return f"{verdict}: {change}."


def _share(table: Table, untouched: Score, whole: _Change) -> list[str]:
    """How much of the gain of tuning on the true span throughout there is without it, where that is a gain at all."""
    names = ("loss",) if whole.points is None else ("accuracy", "loss")
    gained = [at for at, rise in enumerate(whole.rises) if rise > 0]
    said = []
    for row in (table.plugged_in, *table.carried_on) if gained else ():
        if row.score is None:
            continue
        part = _Change.between(untouched, row.score, table.run.eval.rows)
        if len(part.rises) == len(names):
            shares = [f"{_percent(part.rises[at], whole.rises[at])} in {names[at]}" for at in gained]
            whose = "plugging in has" if row is table.plugged_in else row.label
            said.append(f"{whose} {' and '.join(shares)}")
    if said:
        said = [f"Of the gain of tuning on the true span throughout ({whole}): {'; '.join(said)}."]
    lost = [names[at] for at in range(len(names)) if at not in gained]
    if lost:
        found = "" if said else f" ({whole})"
        missed = " or ".join(lost)
        said.append(f"Tuning on the true span throughout gained nothing in {missed}{found}: there is no share of it.")
    return said


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if part > 0 else "none"


def _protection(change: _Change) -> str:
    """By how much the emulator alone is worse than what the owner has."""
    if all(rise <= 0 for rise in change.rises):
        verdict = "No protection for the owner: the tuned emulator alone is as good as the plugged-in model"
        verdict += " or better" if any(change.rises) else ""
    elif all(rise >= 0 for rise in change.rises):
        verdict = "The plugged-in model is better than the tuned emulator alone, which is the owner's protection"
    else:
        verdict = "The owner's protection is in one measure only, the plugged-in model against the tuned emulator alone"
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
