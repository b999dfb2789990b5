"""docs/benchmarks.md, written from the results.

Knows rows and Markdown; measures nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console

from benchmarks.results import PAGE, Figure, Row, Target, latest
from benchmarks.scores import ACCURACY, BEFORE, LOSS, change_of
from benchmarks.series import COMPARISON, Measured, show, show_targets

INTRODUCTION = """# Benchmarks

What it costs to train a model whose middle runs on somebody else's machine. This page is written by `make bench`
from `benchmarks/results.jsonl`; do not edit it. Run `make bench` to measure on a machine of your own (it fetches a
model of 135 million parameters at first). It goes on where it stopped: what has a result for the present commit is
skipped. `python -m benchmarks.run --again` measures it afresh, `--only NAME` measures one row. `make
bench-forward-only` and `python -m benchmarks.forward_only` do the same for the forward-only rows, `make bench-dlora`
and `python -m benchmarks.dlora` for those of DLoRA, `make bench-offsite` and `python -m benchmarks.offsite` for those
of Offsite-Tuning, `make bench-methods` and `python -m benchmarks.methods` for those that compare all methods, where a
row that is there stays.

Edge and cloud are processes of their own on one machine, with mutual TLS between them over loopback. Times are
compared side by side in one run, taking turns, after a round that is not counted. A figure is the median; the least
and the greatest of its repeats stand in brackets.
"""


@dataclass(frozen=True)
class Chapter:
    """Rows that are compared with each other, and measurements that stand beside them.

    Attributes:
        title: of the page's section.
        method: how the rows are measured.
        reading: how the table is read.
        prefix: what the rows are called before their names in the results.
        rows: their names.
        columns: the figures that the table shows.
        beside: title, method and name of each of the measurements.
    """

    title: str
    method: str
    reading: str
    prefix: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    beside: tuple[tuple[str, str, str], ...]

    def compared(self, results: Mapping[str, Row]) -> Row | None:
        """The comparison, if there is one."""
        return results.get(self.prefix + COMPARISON)

    def measured(self, results: Mapping[str, Row]) -> Measured:
        """The rows that were compared."""
        compared, found = self.compared(results), {name: results.get(self.prefix + name) for name in self.rows}
        return {
            name: row.outcome.figures
            for name, row in found.items()
            if row is not None and compared is not None and row.commit == compared.commit
        }

    def besides(self, results: Mapping[str, Row]) -> list[tuple[str, str, Row]]:
        """Title, method and row of each measurement that there is."""
        named = [(title, method, results.get(self.prefix + name)) for title, method, name in self.beside]
        return [(title, method, row) for title, method, row in named if row is not None]

    def show(self, console: Console, columns: Sequence[str]) -> None:
        """Print `columns` of the last comparison, and all targets."""
        results = latest()
        compared = self.compared(results)
        if compared is not None:
            heading, *rows = _cells(compared, self.measured(results), columns)
            show(console, self.title, rows, heading)
            show_targets(console, compared.outcome)
        for _, _, row in self.besides(results):
            show_targets(console, row.outcome)


def write(rows: Iterable[tuple[str, str, Row]], chapters: Iterable[Chapter], results: Mapping[str, Row]) -> None:
    """Write the page from (title, method, row) triples, in their order, and the chapters' rows of `results`."""
    summed = list(rows)
    parts = [_section(*each) for each in summed]
    for chapter in chapters:
        compared, beside = chapter.compared(results), chapter.besides(results)
        if compared is not None:
            summed.append((chapter.title, "", compared))
            parts.append(_chapter(chapter, compared, chapter.measured(results)))
        summed += beside
        parts += [_section(*each, mark="###") for each in beside]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join([INTRODUCTION, _summary(summed), *parts]), encoding="utf-8")


def _summary(rows: list[tuple[str, str, Row]]) -> str:
    lines = ["| benchmark | target | reached | met |", "|---|---|---|---|"]
    for title, _, row in rows:
        if not row.outcome.targets:
            lines.append(f"| {title} | none set | see below | |")
        lines += [
            f"| {title} | {target.text} | {target.reached} | {'yes' if target.met else '**no**'} |"
            for target in row.outcome.targets
        ]
    return "\n".join(lines) + "\n"


def _section(title: str, method: str, row: Row, mark: str = "##") -> str:
    lines = [f"{mark} {title}", "", method, "", *_figures(row.outcome.figures)]
    lines += ["", *(_verdict(target) for target in row.outcome.targets)]
    return "\n".join([*lines, "", _origin(row), ""])


def _figures(figures: Mapping[str, Figure]) -> list[str]:
    return ["| figure | |", "|---|---|", *(f"| {name} | {figure} |" for name, figure in figures.items())]


def _chapter(chapter: Chapter, compared: Row, measured: Measured) -> str:
    heading, *rows = (f"| {' | '.join(cells)} |" for cells in _cells(compared, measured, chapter.columns))
    ruler = "|" + "---|" * (heading.count("|") - 1)
    shown = {change_of(name, score) for name in measured for score in (ACCURACY, LOSS)}
    others = {name: figure for name, figure in compared.outcome.figures.items() if name not in shown}
    lines = [f"## {chapter.title}", "", chapter.method, "", chapter.reading, "", heading, ruler, *rows, ""]
    lines += [*_figures(others), ""] if others else []
    lines += [_verdict(target) for target in compared.outcome.targets]
    return "\n".join([*lines, "", _origin(compared), ""])


def _cells(compared: Row, measured: Measured, columns: Sequence[str]) -> list[list[str]]:
    """Columns of the rows that were compared last, as cells; the first list is the heading."""
    heading, before = ["row"], [BEFORE]
    cells = {name: [name] for name in measured}
    for column in columns:
        known = [figures[column] for figures in measured.values() if column in figures]
        heading.append(f"{column}, {known[0].unit}" if known and known[0].unit else column)
        before.append(next((_cell(figures.get(f"{column} {BEFORE}")) for figures in measured.values()), ""))
        for name, figures in measured.items():
            cells[name].append(_cell(figures.get(column)))
        if column in (ACCURACY, LOSS):
            heading.append("change, points" if column == ACCURACY else "change, nats")
            before.append("")
            for name in measured:
                cells[name].append(_cell(compared.outcome.figures.get(change_of(name, column))))
    return [heading, *([before] if any(before[1:]) else []), *cells.values()]


def _cell(figure: Figure | None) -> str:
    return "" if figure is None else figure.bare


def _origin(row: Row) -> str:
    return f"`{row.command}`, commit {row.commit}, {row.date}, on {row.machine} ({row.machine.versions})."


def _verdict(target: Target) -> str:
    verdict = "met" if target.met else f"missed: {target.reason}"
    return f"- Target: {target.text}. Reached: {target.reached}. {verdict[0].upper()}{verdict[1:]}."
