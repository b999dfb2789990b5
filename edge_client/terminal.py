"""What the commands print on: progress apart from results, results as wide as the terminal.

Knows streams and libraries' notices; knows no command.
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from isthmus.report import render
from isthmus.report.schema import RunReport


def show(reports: dict[str, RunReport], evaluations: render.Evaluations, console: Console) -> None:
    """Print runs' tables and charts."""
    console.print(render.table(reports))
    stages, emulators = render.stage_tables(reports, evaluations), render.offsite_tables(reports, evaluations)
    for shown in (*render.charts(reports), *stages, *emulators):
        console.print(shown)


def console_of_progress() -> Console:
    """Where progress goes: standard error, so that results alone are on standard output."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else 200)


def width() -> int | None:
    """Columns of what goes to a file or a pipe; None: as many as the terminal has."""
    return None if sys.stdout.isatty() else 100


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries' notices out of the user's terminal while they load and run."""
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    yield
