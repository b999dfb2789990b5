"""Rows that one command measures: one by one, those that have no result for the present commit.

Knows their order, where runs are kept and what a command line says; what a row is, and what it came to, stands in
modules of its own. A row whose run is compared with others is done when it has a result for the commit and its run
directory is kept.
"""

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.place import Place
from benchmarks.results import Figure, Machine, Outcome, Row, commit, latest
from isthmus import command
from isthmus.command import cache_directory
from isthmus.errors import IsthmusError

Only = Annotated[list[str] | None, typer.Option(help="name of a row to measure; may be repeated")]
Again = Annotated[bool, typer.Option("--again", help="measure rows that have a result too")]
Repeats = Annotated[int, typer.Option(help="turns of each timed measurement", min=1)]
Threads = Annotated[int | None, typer.Option(help="threads that each process computes with [all cores]")]
Model = Annotated[Path | None, typer.Option(help="directory of SmolLM2-135M, if it is here already")]

COMPARISON = "comparison"
"""The row that says how the others differ."""

Measured = Mapping[str, Mapping[str, Figure]]
"""Figures of rows by the rows' names."""

Compare = Callable[[Measured, Mapping[str, Path]], Outcome]
"""Says how rows differ that are measured, from their figures and their run directories, by the rows' names."""


@dataclass(frozen=True)
class Asked:
    """What the command line said."""

    only: Sequence[str] | None
    again: bool
    repeats: int
    threads: int | None
    model: Path | None


@dataclass(frozen=True)
class Series:
    """Rows of one command.

    Attributes:
        module: the command, as `python -m` takes it.
        prefix: what the rows are called before their names in the results; ends in a slash, or is empty.
        runs: how to measure each row that leaves a run in the directory it is given, by name.
        others: how to measure each of the others, which come after.
    """

    module: str
    prefix: str = ""
    runs: Mapping[str, Callable[[Place, Path], Outcome]] = field(default_factory=dict)
    others: Mapping[str, Callable[[Place], Outcome]] = field(default_factory=dict)

    def measure(self, asked: Asked, console: Console) -> str:
        """Measure what is asked for and not done; returns the commit that it is measured at.

        Raises:
            typer.BadParameter: there is no row of a name.
        """
        names = [*self.runs, *self.others]
        unknown = set(asked.only or ()) - set(names)
        if unknown:
            raise typer.BadParameter(f"no row is named {', '.join(sorted(unknown))}; known are {', '.join(names)}")
        at, unchanged = commit()
        todo = []
        for name in asked.only or names:
            if unchanged and not asked.again and self._is_done(name, at):
                console.print(f"{name}: has a result for commit {at}")
            else:
                todo.append(name)
        with TemporaryDirectory(prefix="isthmus-bench-") as scratch:
            place = Place(Path(scratch), asked.model, asked.threads or Machine.here().cores, asked.repeats)
            for number, name in enumerate(todo, start=1):
                self._measure(name, f"{number} of {len(todo)}", place, at, console)
        return at

    def compare(self, at: str, judge: Compare) -> None:
        """Compare the runs measured at commit `at`, and add it to the results if it says something new."""
        results, there = latest(), [name for name in self.runs if self._is_done(name, at)]
        measured = {name: results[self.prefix + name].outcome.figures for name in there}
        outcome = judge(measured, {name: self.kept(name, at) for name in there})
        name = self.prefix + COMPARISON
        if name not in results or (results[name].commit, results[name].outcome) != (at, outcome):
            Row.of_today(name, outcome, f"python -m {self.module}", at, 1).append()

    def kept(self, name: str, at: str) -> Path:
        """Where a row's run stays, so that rows measured on different days can be compared row by row."""
        folder = cache_directory() / "benchmarks" / self.prefix / at.replace(" ", "-")
        return folder / name.replace("/", "-")

    def _is_done(self, name: str, at: str) -> bool:
        row = latest().get(self.prefix + name)
        found = row is not None and row.commit == at
        return found and (name not in self.runs or (self.kept(name, at) / "scores.json").is_file())

    def _measure(self, name: str, which: str, place: Place, at: str, console: Console) -> None:
        kept = name in self.runs
        work = partial(self.runs[name], place, self.kept(name, at)) if kept else partial(self.others[name], place)
        with console.status(f"{name}: measuring, {which}"):
            outcome = work()
        said = f"python -m {self.module} --only {name} --repeats {place.repeats} --threads {place.threads}"
        Row.of_today(self.prefix + name, outcome, said, at, place.repeats).append()
        figures = [[label, str(figure)] for label, figure in outcome.figures.items()]
        show(console, f"{name}, {which}", figures)
        show_targets(console, outcome)


def show(console: Console, title: str, rows: Sequence[Sequence[str]], heading: Sequence[str] = ()) -> None:
    """Print a table."""
    table = Table(*heading, title=title, show_header=bool(heading))
    for cells in rows:
        table.add_row(*cells)
    console.print(table)


def show_targets(console: Console, outcome: Outcome) -> None:
    """Print what should be reached, and whether it was."""
    for target in outcome.targets:
        verdict = "met" if target.met else "missed"
        console.print(f"target: {target.text}: {target.reached}: {verdict}", soft_wrap=True)


def start(main: Callable[..., None]) -> None:
    """Run a module's command line; an error of the catalogue becomes one line and its exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the processes it started end with it
    command.keep_freed_memory()  # as both commands do
    try:
        typer.run(main)
    except IsthmusError as error:
        sys.stderr.write(f"benchmarks: {error}\n")
        raise SystemExit(error.exit_code) from None
