"""`python -m benchmarks.forward_only`: measure the forward-only rows that have no result for the present commit.

Knows their order and what to do again; what a row is, and what it came to, stands in modules of its own. A row is done
when it has a result for the commit and its run directory is kept, which comparing it needs.
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks import forward_targets, page, warm_step
from benchmarks.forward_figures import ACCURACY, FIRST, VALIDATION
from benchmarks.forward_rows import PREFIX, VARIANTS, Rows, kept, measure
from benchmarks.place import Place
from benchmarks.results import Machine, Row, commit, latest
from benchmarks.run import write_page
from isthmus import command
from isthmus.command import cache_directory
from isthmus.errors import IsthmusError

SHOWN = (ACCURACY, FIRST, VALIDATION)
"""What of the page's table a terminal has room for."""

BY_NAME = {variant.name: variant for variant in VARIANTS}


def main(
    only: Annotated[list[str] | None, typer.Option(help="name of a row to measure; may be repeated")] = None,
    again: Annotated[bool, typer.Option("--again", help="measure rows that have a result too")] = False,
    repeats: Annotated[int, typer.Option(help="turns of the warm step", min=1)] = 11,
    threads: Annotated[int | None, typer.Option(help="threads that each process computes with [all cores]")] = None,
    model: Annotated[Path | None, typer.Option(help="directory of SmolLM2-135M, if it is here already")] = None,
) -> None:
    """Measure, compare, print a table and write docs/benchmarks.md.

    Example: python -m benchmarks.forward_only --only top-0:4 --only warm-step
    """
    console, names = Console(), [*BY_NAME, warm_step.NAME]
    unknown = set(only or ()) - set(names)
    if unknown:
        raise typer.BadParameter(f"no row is named {', '.join(sorted(unknown))}; known are {', '.join(names)}")
    at, unchanged = commit()
    todo = []
    for name in only or names:
        if unchanged and not again and _is_done(name, at):
            console.print(f"{name}: has a result for commit {at}")
        else:
            todo.append(name)
    with TemporaryDirectory(prefix="isthmus-bench-") as scratch:
        place = Place(Path(scratch), model, threads or Machine.here().cores, repeats)
        for number, name in enumerate(todo, start=1):
            _measure(name, f"{number} of {len(todo)}", place, at, console)
    _compare(at)
    write_page()
    _show(console)


def _measure(name: str, which: str, place: Place, at: str, console: Console) -> None:
    rows = Rows(cache_directory() / "benchmarks" / "forward-only" / "data")
    work = partial(warm_step.measure, place, rows)
    if name in BY_NAME:
        work = partial(measure, BY_NAME[name], place, rows, kept(BY_NAME[name], at))
    with console.status(f"{name}: measuring, {which}"):
        outcome = work()
    said = f"python -m benchmarks.forward_only --only {name} --repeats {place.repeats} --threads {place.threads}"
    Row.of_today(PREFIX + name, outcome, said, at, place.repeats).append()
    console.print(f"{name}: measured, {which}")


def _compare(at: str) -> None:
    """Compare what has been measured on the same commit, and add it to the results if it says something new."""
    results, there = latest(), [variant for variant in VARIANTS if _is_done(variant.name, at)]
    measured = {variant.name: results[PREFIX + variant.name].outcome.figures for variant in there}
    outcome = forward_targets.compare(measured, {variant.name: kept(variant, at) for variant in there})
    name = PREFIX + forward_targets.NAME
    if name not in results or (results[name].commit, results[name].outcome) != (at, outcome):
        Row.of_today(name, outcome, "python -m benchmarks.forward_only", at, 1).append()


def _is_done(name: str, at: str) -> bool:
    """Whether it has a result for commit `at` and, unless it needs none, its run is kept."""
    row, variant = latest().get(PREFIX + name), BY_NAME.get(name)
    found = row is not None and row.commit == at
    return found and (variant is None or (kept(variant, at) / "scores.json").is_file())


def _show(console: Console) -> None:
    results = latest()
    heading, *rows = page.forward_only_table(results, SHOWN)
    table = Table(title="forward-only")
    for column in heading:
        table.add_column(column)
    for cells in rows:
        table.add_row(*cells)
    console.print(table)
    for name in (forward_targets.NAME, warm_step.NAME):
        for target in results[PREFIX + name].outcome.targets if PREFIX + name in results else ():
            verdict = "met" if target.met else "missed"
            console.print(f"target: {target.text}: {target.reached}: {verdict}", soft_wrap=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the processes it started end with it
    command.keep_freed_memory()  # as both commands do
    try:
        typer.run(main)
    except IsthmusError as error:
        sys.stderr.write(f"benchmarks: {error}\n")
        raise SystemExit(error.exit_code) from None
