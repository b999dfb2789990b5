"""The table of offsite tuning, drawn for the terminal and as Markdown, with its words and what is missing from it.

Knows rows, units and widths: 100 columns on one line a row, 80 on two. Computes no figure.
"""

from typing import Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from isthmus.report import likeness, offsite
from isthmus.report.fields.offsite import Offsite
from isthmus.report.fields.score import Score
from isthmus.report.gains import in_words as gains_in_words
from isthmus.report.ports import NONE, scale

_ACCURACY: Final = "Accuracy %"
_HEADS: Final = (_ACCURACY, "Loss", "Wire", "Edge FLOPs", "Edge process", "Edge tensors", "Tokens a second")
_LEGEND: Final = (
    "In brackets: 95 % interval, of a difference paired row by row. Wire: all phases, both ways. "
    "FLOPs, peak memory and tokens a second: in training."
)
_MISSING: Final = (
    "Missing; name the run that has it, scored on the same rows, or, with what stands in capitals filled in:"
)


_LOOKS: Final = ("Steps", _ACCURACY, "Loss")


def in_words(made: offsite.Table) -> tuple[str, ...]:
    """What the scores come to, and where what is compared was not tuned alike."""
    unlike: tuple[str, ...] = ()
    if made.reference is not None:
        unlike = likeness.in_words(made.throughout.runs[0], made.run, made.reference)
    return (*gains_in_words(made), *unlike)


def drawn(made: offsite.Table) -> Group:
    """For the terminal."""
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    grid.add_column("", min_width=12)
    for head in _HEADS:
        folds = head == _ACCURACY
        grid.add_column(head.replace(" ", "\n", 1), justify="right", no_wrap=not folds, min_width=12 if folds else None)
    for row in made.rows:
        grid.add_row(Text(row.label), *(Text(cell, "dim" if cell == NONE else "") for cell in _cells(row)))
    heading = Text.assemble("\n", (made.name, "bold"), f", tuned on an emulator: {_emulator(made.emulator)}\n")
    below = (Text(line) for line in _below(made, ""))
    return Group(heading, grid, Text(f"\n{_LEGEND}", "dim"), *_looks_drawn(made.emulator), *below)


def _looks_drawn(emulator: Offsite) -> list[Text | Table]:
    looks = _looks(emulator)
    if not looks:
        return []
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for head in _LOOKS:
        grid.add_column(head, justify="right", no_wrap=True)
    for look in looks:
        grid.add_row(*look)
    return [Text(f"\n{_looked(emulator)}\n"), grid]


def markdown(made: offsite.Table) -> list[str]:
    """Lines of Markdown."""
    lines = ["### Offsite: " + made.name.replace("\n", " "), "", f"Emulator: {_emulator(made.emulator)}.", ""]
    lines += [f"| | {' | '.join(_HEADS)} |", f"|---|{'---:|' * len(_HEADS)}"]
    lines += [f"| {row.label} | {' | '.join(_cells(row))} |" for row in made.rows]
    lines += ["", _LEGEND]
    looks = _looks(made.emulator)
    if looks:
        lines += ["", _looked(made.emulator), "", f"| {' | '.join(_LOOKS)} |", f"|{'---:|' * len(_LOOKS)}"]
        lines += [f"| {' | '.join(look)} |" for look in looks]
    return [*lines, *_below(made, "`"), ""]


def _looked(emulator: Offsite) -> str:
    rows = f"{emulator.watched_rows:,} rows" if emulator.watched_rows is not None else "some rows"
    return f"Looks at the true span while tuning; hidden states of {rows} were sent for each:"


def _looks(emulator: Offsite) -> list[tuple[str, ...]]:
    """Of each look its cells; the first is the model without the adapter."""
    untouched = emulator.watched_untouched
    without = [("untouched", untouched.accuracy, untouched.loss)] if untouched is not None else []
    found = [*without, *((f"{look.step:,}", look.accuracy, look.loss) for look in emulator.watched)]
    return [
        (
            label,
            f"{100 * accuracy:.1f}" if accuracy is not None else NONE,
            f"{loss:.4f}" if loss is not None else NONE,
        )
        for label, accuracy, loss in found
    ]


def _below(made: offsite.Table, quote: str) -> list[str]:
    """The words, and what would make the rows that are missing; a command stands between quotes."""
    lines = ["", *(f"- {sentence}" for sentence in in_words(made))]
    missing = [f"- {', '.join(labels)}: {quote}{command}{quote}" for command, labels in made.missing.items()]
    if missing:
        lines += [*([""] if lines[1:] else []), _MISSING, "", *missing]
    return lines


def _cells(row: offsite.Row) -> tuple[str, ...]:
    score, spent = row.score, row.spent
    loss, speed = score.loss if score is not None else None, spent.tokens_per_s
    return (
        _accuracy(score),
        f"{loss:.4f}" if loss is not None else NONE,
        _rounded(spent.wire_bytes, "B"),
        _rounded(spent.flops, ""),
        _rounded(spent.memory_bytes, "B"),
        _rounded(spent.tensor_bytes, "B"),
        f"{speed:,.1f}" if speed is not None else NONE,
    )


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
    gap = f", loss {emulator.gap:+.3f} against the model on its owner's text" if emulator.gap is not None else ""
    size = _rounded(emulator.weight_bytes, "B")
    return f"{emulator.method}, {emulator.blocks} blocks{bits}, {size}, {share}{distilled}{gap}"


def _rounded(value: float | None, unit: str) -> str:
    """A decimal multiple of the unit to three digits: MB is 10^6 bytes."""
    if value is None:
        return NONE
    divisor, prefix = scale(value)
    figure = value / divisor
    digits = 0 if not prefix or figure >= 100 else 1 if figure >= 10 else 2
    return f"{figure:,.{digits}f} {prefix}{unit}".rstrip()
