"""What a table of offsite tuning comes to, in words: gain, share of the gain to be had, and the owner's protection.

Knows rows and what `isthmus.report.verdict` finds of two of them; claims nothing that their 95 % intervals leave open.
"""

from collections.abc import Sequence

from isthmus.report import likeness
from isthmus.report.change import Change, gain_in_words, points, protection_in_words
from isthmus.report.offsite import Row, Table
from isthmus.report.verdict import Measure, Rises


def in_words(table: Table) -> tuple[str, ...]:
    """Sentences about a table, of what there are scores for; none promises more than the scores show."""
    gain = _change(table.untouched, table.plugged_in)
    whole = _change(table.untouched, table.throughout)
    protection = _change(table.tuned, table.plugged_in)
    return (
        *([gain_in_words(gain)] if gain is not None else []),
        *(likeness.in_words(table.throughout.runs[0], table.run, table.reference) if table.reference else ()),
        *(_share(table, whole) if whole is not None else []),
        *([protection_in_words(protection)] if protection is not None else []),
        *_begun(table),
    )


def _change(old: Row, new: Row) -> Change | None:
    """None where one of them has no score."""
    before, after = old.score, new.score
    if before is None or after is None or before.loss is None or after.loss is None:
        return None
    return Change(points(before.accuracy, after.accuracy), after.loss - before.loss, _rises(old, new))


def _rises(old: Row, new: Row) -> Rises | None:
    if old.per_row is None or new.per_row is None:
        return None
    try:
        return Rises.between(old.per_row, new.per_row)
    except ValueError:  # shortened to another length, one is of other tokens
        return None


def _share(table: Table, whole: Change) -> list[str]:
    """How much of the gain of tuning on the true span throughout there is without it, where that is a gain at all."""
    tuning = "tuning on the true span throughout"
    if whole.rises is None:
        return [whole.incomparable("The untouched model and that tuned on the true span throughout")]
    gained, worse, undecided = whole.found("better"), whole.found("worse"), whole.found("undecided")
    said = _of_the_gain(table, whole, gained, tuning) if gained else []
    none = "there is no share of it"
    if worse:
        figures = ", ".join(map(whole.of, worse))
        said.append(f"{tuning.capitalize()} made things worse in {' and '.join(worse)} ({figures}): {none}.")
    if undecided:
        figures = ", ".join(map(whole.of, undecided))
        said.append(f"{whole.untold} whether {tuning} gained in {' or '.join(undecided)} ({figures}): {none}.")
    return said


def _of_the_gain(table: Table, whole: Change, gained: Sequence[Measure], tuning: str) -> list[str]:
    figures = ", ".join(map(whole.of, gained))
    if table.reference is not None and likeness.unlike(table.run, table.reference):
        return [f"{tuning.capitalize()} gained ({figures}), but by another tuning: no share of it is told."]
    shares = [_shares(row, table, whole, gained) for row in (table.plugged_in, *table.carried_on)]
    return [f"Of the gain of {tuning} ({figures}): {'; '.join(filter(None, shares))}."] if any(shares) else []


def _shares(row: Row, table: Table, whole: Change, gained: Sequence[Measure]) -> str:
    part, plugged_in = _change(table.untouched, row), row is table.plugged_in
    if part is None:
        return ""
    if part.rises is None or whole.rises is None:
        return f"{'plugging in' if plugged_in else row.label} cannot be compared row by row"
    shares = [f"{_percent(part, whole, measure)} in {measure}" for measure in gained]
    return f"{'plugging in has' if plugged_in else row.label} {' and '.join(shares)}"


def _percent(part: Change, whole: Change, measure: Measure) -> str:
    match part.verdicts[measure]:
        case "better" if measure == "loss":
            return f"about {100 * part.loss / whole.loss:.0f} %"
        case "better":
            return f"about {100 * (part.points or 0) / (whole.points or 1):.0f} %"
        case "worse":
            return "none"
        case "undecided":
            return f"none that {part.rises.rows if part.rises else 0:,} rows tell"


def _begun(table: Table) -> list[str]:
    earlier = table.run.begun_from
    if earlier is None:
        return []
    return [f"{table.name} began with the adapter of an earlier run ({earlier.method}); what that cost is not in it."]
