"""The tables of offsite tuning, drawn for the terminal and as Markdown, with their words and what is missing from them.

Knows rows, units and widths: 100 columns on one line a row, 80 on two. Computes no figure.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from isthmus.report import offsite
from isthmus.report.fields.offsite import Offsite
from isthmus.report.fields.score import Score
from isthmus.report.gains import in_words
from isthmus.report.spent import Spent
from isthmus.report.units import NONE, rounded

_ACCURACY: Final = "Accuracy %"
_FETCH: Final = "Fetch"
_FOLDED: Final = {_ACCURACY: 12, _FETCH: 14}
"""Columns whose cells may break, and how narrow they may become."""

_LEGEND: Final = "In brackets: the accuracy's 95 % interval. FLOPs, peak memory and tokens a second: in training."
_CROSSED: Final = "What crossed the wire, both ways; already here: fetched before, or given as a folder."
_PAIRED: Final = "In brackets: the difference's 95 % interval, paired row by row."
_MISSING: Final = (
    "Missing; name the run that has it, scored on the same rows, or, with what stands in capitals filled in:"
)


@dataclass(frozen=True)
class Grid:
    """Cells under their heads; the first head, of the labels, may be empty."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def drawn(self) -> Table:
        """For the terminal."""
        grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        for head in self.heads:
            folds = head in _FOLDED
            justify = "right" if head else "left"
            width = 12 if not head else _FOLDED.get(head)
            shown = head.replace(" ", "\n", 1) if len(head) > 6 else head
            grid.add_column(shown, justify=justify, no_wrap=bool(head) and not folds, min_width=width)  # type: ignore[arg-type]
        for row in self.rows:
            grid.add_row(*(Text(cell, "dim" if cell == NONE else "") for cell in row))
        return grid

    def markdown(self) -> list[str]:
        """Lines of Markdown."""
        first = "---|" if not self.heads[0] else "---:|"
        lines = [f"| {' | '.join(self.heads)} |".replace("|  |", "| |"), f"|{first}{'---:|' * (len(self.heads) - 1)}"]
        return [*lines, *(f"| {' | '.join(row)} |" for row in self.rows)]


@dataclass(frozen=True)
class Told:
    """A table of offsite tuning for a page: its heading, grids with what is said above each, and what stands below."""

    heading: str
    grids: tuple[tuple[str, Grid], ...]
    below: tuple[str, ...]


def told(made: offsite.Table) -> Told:
    """For a page."""
    grids = [(_LEGEND, _scores(made)), (_CROSSED, _wire(made)), (_looked(made), _looks(made.emulator))]
    below = tuple(line.removeprefix("- ") for line in _below(made, "") if line)
    heading = f"{made.name}, tuned on an emulator: {_emulator(made.emulator)}"
    return Told(heading, tuple((said, grid) for said, grid in grids if grid.rows), below)


def drawn(made: offsite.Table) -> Group:
    """For the terminal."""
    heading = Text.assemble("\n", (made.name, "bold"), f", tuned on an emulator: {_emulator(made.emulator)}\n")
    scores, wire, looks = _scores(made).drawn(), _wire(made).drawn(), _looks(made.emulator)
    looked: list[Text | Table] = [Text(f"\n{_looked(made)}\n"), looks.drawn()] if looks.rows else []
    below = (Text(line) for line in _below(made, ""))
    return Group(heading, scores, Text(f"\n{_LEGEND}", "dim"), Text(f"\n{_CROSSED}\n"), wire, *looked, *below)


def markdown(made: offsite.Table) -> list[str]:
    """Lines of Markdown."""
    lines = ["### Offsite: " + made.name.replace("\n", " "), "", f"Emulator: {_emulator(made.emulator)}.", ""]
    lines += [*_scores(made).markdown(), "", _LEGEND, "", _CROSSED, "", *_wire(made).markdown()]
    looks = _looks(made.emulator)
    if looks.rows:
        lines += ["", _looked(made), "", *looks.markdown()]
    return [*lines, *_below(made, "`"), ""]


def _scores(made: offsite.Table) -> Grid:
    """How good each row is, and what it took to compute."""
    heads = ("", _ACCURACY, "Loss", "Edge FLOPs", "Edge process", "Edge tensors", "Tokens a second")
    return Grid(heads, tuple((row.label, *_cells(row)) for row in made.rows))


def _cells(row: offsite.Row) -> tuple[str, ...]:
    score, spent = row.score, row.spent
    loss, speed = score.loss if score is not None else None, spent.tokens_per_s
    return (
        _accuracy(score),
        f"{loss:.4f}" if loss is not None else NONE,
        rounded(spent.flops, ""),
        rounded(spent.memory_bytes, "B"),
        rounded(spent.tensor_bytes, "B"),
        f"{speed:,.1f}" if speed is not None else NONE,
    )


def _wire(made: offsite.Table) -> Grid:
    """What crossed for each row, apart by what it was for."""
    return Grid(
        ("", _FETCH, "Training", "Scoring", "Looks", "In all"),
        tuple((row.label, _fetched(row.spent), *_crossed(row.spent)) for row in made.rows),
    )


def _crossed(spent: Spent) -> Sequence[str]:
    return [
        rounded(figure, "B") for figure in (spent.train_bytes, spent.score_bytes, spent.look_bytes, spent.wire_bytes)
    ]


def _fetched(spent: Spent) -> str:
    """Such as "160 MB", "160 MB (already here)" or both; the size of what was here is not always known."""
    if spent.fetch_bytes is None:
        return NONE
    crossed = [rounded(spent.fetch_bytes, "B")] if spent.fetch_bytes or spent.here_bytes == 0 else []
    if spent.here_bytes is None:
        return " + ".join([*crossed, "already here"])
    here = [f"{rounded(spent.here_bytes, 'B')} (already here)"] if spent.here_bytes else []
    return " + ".join([*crossed, *here])


def _looked(made: offsite.Table) -> str:
    emulator, crossed = made.emulator, made.tuned.spent.look_bytes
    rows = f"{emulator.watched_rows:,} rows" if emulator.watched_rows is not None else "some rows"
    took = f" and {emulator.watched_seconds:,.1f} s" if emulator.watched_seconds is not None else ""
    spent = f" ({rounded(crossed, 'B')}{took} in all)" if crossed is not None else ""
    return f"Looks at the true span while tuning; hidden states of {rows} were sent for each{spent}:"


def _looks(emulator: Offsite) -> Grid:
    """Of each look its cells; the first is the model without the adapter."""
    untouched = emulator.watched_untouched
    without = [("untouched", untouched.accuracy, untouched.loss)] if untouched is not None else []
    found = [*without, *((f"{look.step:,}", look.accuracy, look.loss) for look in emulator.watched)]
    return Grid(
        ("Steps", _ACCURACY, "Loss"),
        tuple(
            (
                label,
                f"{100 * accuracy:.1f}" if accuracy is not None else NONE,
                f"{loss:.4f}" if loss is not None else NONE,
            )
            for label, accuracy, loss in found
        ),
    )


def _below(made: offsite.Table, quote: str) -> list[str]:
    """The words, and what would make the rows that are missing; a command stands between quotes."""
    words = in_words(made)
    lines = ["", *(f"- {sentence}" for sentence in words)]
    if any("[" in sentence for sentence in words):
        lines += ["", _PAIRED]
    missing = [f"- {', '.join(labels)}: {quote}{command}{quote}" for command, labels in made.missing.items()]
    if missing:
        lines += [*([""] if lines[1:] else []), _MISSING, "", *missing]
    return lines


def _accuracy(score: Score | None) -> str:
    if score is None or score.accuracy is None:
        return NONE
    low_high = score.accuracy_interval
    interval = f" [{100 * low_high[0]:.1f},{100 * low_high[1]:.1f}]" if low_high else ""
    return f"{100 * score.accuracy:.1f}{interval}"  # a line breaks only between the two


def _emulator(emulator: Offsite) -> str:
    """Such as "drop, 13 blocks, 85.2 MB, 50 % of the span's FLOPs"."""
    bits = f" in {emulator.bits} bits" if emulator.bits is not None else ""
    share = f"{100 * emulator.flops_per_token / max(1, emulator.span_flops_per_token):.0f} % of the span's FLOPs"
    distilled = f", distilled in {emulator.distilled_steps:,} steps" if emulator.distilled_steps else ""
    gap = f", gap {emulator.gap:+z.3f} nats per token (owner's public text)" if emulator.gap is not None else ""
    size = rounded(emulator.weight_bytes, "B")
    return f"{emulator.method}, {emulator.blocks} blocks{bits}, {size}, {share}{distilled}{gap}"
