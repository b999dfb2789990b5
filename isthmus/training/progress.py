"""Progress for people: a bar on a terminal, a line every few seconds elsewhere; always with the time left.

Knows counts and seconds; knows nothing of what is counted.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

EVERY_S = 5.0
"""Seconds between lines where there is no terminal."""

BAR = 16
"""Characters of such a line's bar."""


class Meter:
    """One thing that takes a while."""

    def __init__(self, console: Console, label: str, total: int, bar: Progress | None, start: int = 0) -> None:
        """Begin with `start` of the total done; the time left goes by what is done from then on."""
        self._console = console
        self._label = label
        self._total = total
        self._bar = bar
        self._task: TaskID | None = (
            bar.add_task(label, total=total, completed=start, note="") if bar is not None else None
        )
        self._began = self._printed = time.monotonic()
        self._start = start

    def update(self, done: int, note: str = "") -> None:
        """`done` of the total are done; `note` says more."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif time.monotonic() - self._printed >= EVERY_S or done == self._total:
            self._printed = time.monotonic()
            bar = _bar(done / self._total if self._total else 1.0)
            line = f"{self._label} {bar} {done}/{self._total}  {note}  {self._left(done)}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def _left(self, done: int) -> str:
        elapsed = time.monotonic() - self._began
        if done >= self._total:
            return f"took {_clock(elapsed)}"
        rate = (done - self._start) / elapsed if elapsed else 0.0
        return f"{_clock((self._total - done) / rate)} left" if rate else ""


def _bar(share: float) -> str:
    full = round(BAR * share)
    return "█" * full + "░" * (BAR - full)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@contextmanager
def meter(console: Console, label: str, total: int, start: int = 0) -> Iterator[Meter]:
    """Show progress on `console` while in here; `start` of the total are done already."""
    if not console.is_terminal:
        yield Meter(console, label, total, None, start)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=False) as bar:
        yield Meter(console, label, total, bar, start)
