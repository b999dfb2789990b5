"""The ledger: what a run cost, by phase and by place in the model, as it is spent, and on disk as JSON Lines.

Knows sums; which names there are stands in `figures`. Measures nothing itself, and turns nothing into words for people.
"""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from isthmus.errors import RunError
from isthmus.ledger.figures import (
    COUNTS,
    EVERY_PHASE,
    FIGURES,
    PEAKS,
    PHASES,
    Phase,
    a_figure,
    an_object,
    known_phase,
    known_place,
    unknown_figure,
    whole,
)
from isthmus.ledger.files import append, create

__all__ = ["FIGURES", "PEAKS", "PHASES", "Ledger", "Phase"]

_Account: TypeAlias = tuple[Phase, str | None]
"""A phase's own figures, or those of one place in it."""


class Ledger:
    """What a run cost so far. Any thread may add to it.

    A figure that was never added does not exist; one to which 0 was added is known to be 0.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Begin an empty ledger in a new file, or in memory alone.

        Raises:
            RunError: the file exists already or cannot be made.
        """
        self._path = path
        self._lock = threading.Lock()
        self._closed: dict[_Account, dict[str, float]] = {}
        self._open: dict[_Account, dict[str, float]] = {}
        self._peaks: dict[Phase, dict[str, int]] = {}
        self._changed_peaks: set[tuple[Phase, str]] = set()
        if path is not None:
            create(path)

    @classmethod
    def resume(cls, path: Path) -> "Ledger":
        """Read a ledger back and go on writing to it: what was spent stays spent, steps done again included.

        A last line torn by a crash is cut off the file.

        Raises:
            RunError: the file is missing, or another line of it is malformed.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise RunError(f"{path}: cannot read the ledger to resume: {error.strerror}") from None
        whole = content[: content.rfind(b"\n") + 1]
        ledger = cls()
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                ledger.replay(json.loads(line))
            except ValueError as error:
                raise RunError(f"{path}:{number}: not a line of a ledger ({error}); restore the file") from None
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        ledger._path = path
        return ledger

    def add(self, phase: Phase, /, *, at: str | None = None, **figures: float) -> None:
        """Add to a phase's figures (the names in `COUNTS` and `SECONDS`), or to those of one place in it.

        What is added at a place is "of which": the phase's totals do not rise, whoever counts adds there too.

        Args:
            phase: what the edge was doing.
            at: a block of the whole model, such as "12", or a module in one, such as "12.self_attn.q_proj".
            **figures: what was spent.

        Raises:
            ValueError: an unknown phase or figure, a place of another form, a count that is no whole number, or a
                number below 0 or not finite.
        """
        self._take(phase, at, figures)

    def add_at(self, phase: Phase, at: str, /, **figures: float) -> None:
        """Add to a place in a phase and to the phase, in one; as `add` does it in two.

        Raises:
            ValueError: as `add`.
        """
        self._take(phase, at, figures, both=True)

    def peak(self, name: str, value: int, phase: Phase = "control") -> None:
        """Keep the greatest value of a peak (the names in `PEAKS`) that a phase had, in bytes.

        Raises:
            ValueError: an unknown name or phase, or a value that is no whole number of at least 0.
        """
        if name not in PEAKS:
            raise ValueError(f"unknown peak {name!r}; known: {', '.join(sorted(PEAKS))}")
        value, phase = whole(name, value), known_phase(phase)
        with self._lock:
            own = self._peaks.setdefault(phase, {})
            if value > own.get(name, -1):
                own[name] = value
                self._changed_peaks.add((phase, name))

    def close_step(self, step: int) -> None:
        """Write what was added since the last call, one line for each phase that has something.

        Zeros are left out, except the first of a figure; a peak stands on its phase's line where it rose.

        Raises:
            RunError: the file cannot be written.
        """
        with self._lock:
            lines = self._lines(whole("step", step))
            if self._path is not None and lines:
                append(self._path, lines)
            self._close()

    def total(self, phase: Phase, figure: str) -> float:
        """One figure of one phase, 0 where nothing was added.

        Raises:
            ValueError: an unknown phase or figure.
        """
        if figure not in FIGURES:
            raise ValueError(unknown_figure(figure))
        return self.totals(phase).get(figure, 0)

    def totals(self, phase: Phase) -> dict[str, float]:
        """Every figure of a phase that exists; counts are ints, seconds floats.

        Raises:
            ValueError: an unknown phase.
        """
        with self._lock:
            return self._sum((known_phase(phase), None))

    def places(self, phase: Phase) -> dict[str, dict[str, float]]:
        """Every figure of a phase that was added at a place, by place; they are no part of `totals`.

        Raises:
            ValueError: an unknown phase.
        """
        known_phase(phase)
        with self._lock:
            accounts = {**self._closed, **self._open}
            return {at: self._sum((of, at)) for of, at in accounts if of == phase and at is not None}

    def peaks(self, phase: Phase | None = None) -> dict[str, int]:
        """The greatest value of each peak that a phase ever had, or any phase, in bytes.

        Raises:
            ValueError: an unknown phase.
        """
        with self._lock:
            if phase is not None:
                return dict(self._peaks.get(known_phase(phase), {}))
            names = {name for own in self._peaks.values() for name in own}
            return {name: max(own[name] for own in self._peaks.values() if name in own) for name in sorted(names)}

    def overhead_bytes(self, phase: Phase) -> int:
        """Bytes in both directions that were neither encoded tensors nor bundle files.

        Raises:
            ValueError: an unknown phase.
        """
        spent = self.totals(phase)
        up, down = (spent.get(f"{way}_bytes", 0) - spent.get(f"{way}_payload_bytes", 0) for way in ("up", "down"))
        return int(up + down)

    def _take(self, phase: object, at: object, figures: Mapping[str, object], both: bool = False) -> None:
        account = known_phase(phase), None if at is None else known_place(at)
        checked = {
            name: value if type(value) is int and value >= 0 and name in COUNTS else a_figure(name, value)
            for name, value in figures.items()
        }
        with self._lock:
            _add_up(self._open, account, checked)
            if both:
                _add_up(self._open, (account[0], None), checked)

    def _sum(self, account: _Account) -> dict[str, float]:
        """All that was added to an account; the caller holds the lock, here and below."""
        closed, spent = self._closed.get(account, {}), self._open.get(account, {})
        return {name: closed.get(name, 0) + spent.get(name, 0) for name in {**closed, **spent}}

    def _unwritten(self, account: _Account) -> dict[str, float]:
        closed, spent = self._closed.get(account, {}), self._open.get(account, {})
        return {name: value for name, value in spent.items() if value or name not in closed}

    def _lines(self, step: int) -> list[dict[str, object]]:
        """What `close_step` writes."""
        spent: dict[Phase, dict[str | None, dict[str, float]]] = {phase: {} for phase, _ in self._changed_peaks}
        for phase, at in self._open:
            spent.setdefault(phase, {})[at] = self._unwritten((phase, at))
        lines: list[dict[str, object]] = []
        for phase in sorted(spent, key=EVERY_PHASE.index):
            own = spent[phase].pop(None, {})
            peaks = {name: self._peaks[phase][name] for of, name in sorted(self._changed_peaks) if of == phase}
            places = {at: figures for at, figures in spent[phase].items() if figures}
            if own or peaks or places:
                lines.append({"step": step, "phase": phase, **own, **({"places": places} if places else {}), **peaks})
        return lines

    def _close(self) -> None:
        """Close what is open, so that a resumed ledger adds up the same floats in the same order."""
        for account, figures in self._open.items():
            _add_up(self._closed, account, figures)
        self._open = {}
        self._changed_peaks = set()

    def replay(self, line: object) -> None:
        """Take one line of a file back in; it is not written again.

        Raises:
            ValueError: it is none that `close_step` writes.
        """
        own = dict(an_object("the line", line))
        whole("step", own.pop("step", None))
        phase = own.pop("phase", None)
        for name in PEAKS & own.keys():
            self.peak(name, own.pop(name), known_phase(phase))
        for at, figures in an_object("places", own.pop("places", {})).items():
            self._take(phase, at, an_object(at, figures))
        self._take(phase, None, own)
        self._close()


def _add_up(accounts: dict[_Account, dict[str, float]], account: _Account, figures: Mapping[str, float]) -> None:
    sums = accounts.setdefault(account, {}) if figures else {}
    for name, value in figures.items():
        sums[name] = sums.get(name, 0) + value
