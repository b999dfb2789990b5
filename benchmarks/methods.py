"""`python -m benchmarks.methods`: measure the rows that compare methods and are not there yet, one by one.

Knows their order and when to stop; what a row is, and what it came to, stands in modules of its own. A row that has a
result is left alone whatever the commit: each says what it was measured at.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.methods_data import PREFIX
from benchmarks.methods_rows import VARIANTS, Variant
from benchmarks.methods_run import measure
from benchmarks.place import Place
from benchmarks.results import Machine, Outcome, Row, commit, latest
from benchmarks.run import write_page
from benchmarks.series import Again, Model, Only, Threads, show, start

Minutes = Annotated[float | None, typer.Option(help="begin no row after so many", min=0)]
UntilFile = Annotated[Path | None, typer.Option(help="begin no row once this file is there")]


@dataclass(frozen=True)
class Sitting:
    """What one call does: rows in order, until the time is up or a file says so."""

    todo: Sequence[Variant]
    minutes: float | None
    until_file: Path | None

    def carry_out(self, work: Callable[[Variant], Outcome], done: Callable[[Variant, Outcome], None]) -> list[str]:
        """Do the rows; returns a line for each that failed, which does not keep the others from being measured."""
        began, failed = time.monotonic(), []
        for variant in self.todo:
            if self._over(time.monotonic() - began):
                break
            try:
                outcome = work(variant)
            except RuntimeError as error:
                failed.append(f"{variant.name}: {error}")
            else:
                done(variant, outcome)
        return failed

    def _over(self, seconds: float) -> bool:
        said = self.until_file is not None and self.until_file.exists()
        return said or (self.minutes is not None and seconds >= 60 * self.minutes)


def rows_to_do(only: Sequence[str] | None, again: bool, there: set[str]) -> list[Variant]:
    """What is asked for and not there, in the order of the table.

    Args:
        only: names; None: all.
        again: those that are there too.
        there: names of rows that have a result, as the results have them.

    Raises:
        typer.BadParameter: there is no row of a name.
    """
    names = [variant.name for variant in VARIANTS]
    unknown = set(only or ()) - set(names)
    if unknown:
        raise typer.BadParameter(f"no row is named {', '.join(sorted(unknown))}; known are {', '.join(names)}")
    asked = [variant for variant in VARIANTS if not only or variant.name in only]
    return [variant for variant in asked if again or PREFIX + variant.name not in there]


def main(
    only: Only = None,
    minutes: Minutes = None,
    until_file: UntilFile = None,
    again: Again = False,
    threads: Threads = None,
    model: Model = None,
) -> None:
    """Measure, print each row and write docs/benchmarks.md; goes on where it stopped.

    Example: python -m benchmarks.methods --minutes 30
    """
    console, at, sitting = Console(), commit()[0], Sitting(rows_to_do(only, again, set(latest())), minutes, until_file)
    with TemporaryDirectory(prefix="isthmus-bench-") as scratch:
        place = Place(Path(scratch), model, threads or Machine.here().cores, repeats=1)

        def work(variant: Variant) -> Outcome:
            with console.status(f"{variant.name}: measuring"):
                return measure(variant, place)

        def done(variant: Variant, outcome: Outcome) -> None:
            said = f"python -m benchmarks.methods --only {variant.name} --threads {place.threads}"
            Row.of_today(PREFIX + variant.name, outcome, said, at, 1).append()
            show(console, variant.name, [[label, str(figure)] for label, figure in outcome.figures.items()])

        failed = sitting.carry_out(work, done)
    write_page()
    for line in failed:
        console.print(line, soft_wrap=True, markup=False)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    start(main)
