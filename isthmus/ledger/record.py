"""The ledger: what a run cost, by phase and by place in the model, as it is spent, and on disk as JSON Lines.

Knows names and numbers only: it measures nothing itself, and turns nothing into words for people.
"""

import json
import math
import operator
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

from isthmus.errors import RunError

Phase: TypeAlias = Literal["fetch", "train", "eval", "generate", "submit", "control"]
"""What the edge was doing when it spent something.

`submit` is handing its adapter in; `control` is what serves no single phase, such as heartbeats.
"""

PHASES: Final[tuple[Phase, ...]] = get_args(Phase)

COUNTS: Final[Mapping[str, str]] = {
    "up_bytes": "edge to cloud, as serialised, gRPC's 5-byte prefix included",
    "down_bytes": "cloud to edge, as serialised, gRPC's 5-byte prefix included",
    "up_payload_bytes": "of up_bytes: encoded tensors or bundle files",
    "down_payload_bytes": "of down_bytes: encoded tensors or bundle files",
    "round_trips": "requests answered, and questions at ports",
    "resent_bytes": "of up_bytes: sent again, after a lost connection or because the cloud had not kept an activation",
    "recomputed_calls": "backwards for which the cloud ran its forward again",
    "cached_rows": "rows whose span output came from the edge's cache",
    "fetched_rows": "rows whose span output came over the wire and into the cache",
    "real_tokens": "tokens of the data",
    "padded_tokens": "positions computed on the edge, padding included",
    "edge_forward_flops": "floating-point operations",
    "edge_backward_flops": "floating-point operations",
    "cloud_forward_flops": "floating-point operations, recomputation included",
    "cloud_backward_flops": "floating-point operations",
    "cloud_recompute_flops": "of cloud_forward_flops: forwards run again for a backward",
}
"""Figures counted in whole numbers."""

SECONDS: Final[Mapping[str, str]] = {
    "edge_forward_s": "computing forwards on the edge",
    "edge_backward_s": "computing backwards on the edge",
    "edge_wait_s": "the edge waiting for the cloud",
    "cloud_forward_s": "computing forwards on the cloud",
    "cloud_backward_s": "computing backwards on the cloud",
    "cloud_queue_s": "requests waiting on the cloud for their turn",
    "cloud_port_s": "requests waiting on the cloud for the edge at ports",
}
"""Figures in seconds."""

FIGURES: Final = frozenset((*COUNTS, *SECONDS))

PEAKS: Final = frozenset(
    f"{side}_peak_{kind}_bytes" for side in ("edge", "cloud") for kind in ("tensor", "memory")
)  # tensor: live tensors; memory: the process's high-water mark

_PLACE: Final = re.compile(r"(0|[1-9]\d*)(\.\w+)*", re.ASCII)

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
        self._peaks: dict[str, int] = {}
        self._changed_peaks: set[str] = set()
        if path is not None:
            _create(path)

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

    def peak(self, name: str, value: int) -> None:
        """Keep the greatest value of a peak (the names in `PEAKS`), in bytes.

        Raises:
            ValueError: an unknown name, or a value that is no whole number of at least 0.
        """
        if name not in PEAKS:
            raise ValueError(f"unknown peak {name!r}; known: {', '.join(sorted(PEAKS))}")
        value = _whole(name, value)
        with self._lock:
            if value > self._peaks.get(name, -1):
                self._peaks[name] = value
                self._changed_peaks.add(name)

    def close_step(self, step: int) -> None:
        """Write what was added since the last call, one line for each phase that has something.

        Zeros are left out, except the first of a figure; peaks that changed stand on the step's first line.

        Raises:
            RunError: the file cannot be written.
        """
        with self._lock:
            lines = self._lines(_whole("step", step))
            if self._path is not None and lines:
                _append(self._path, lines)
            self._close()

    def total(self, phase: Phase, figure: str) -> float:
        """One figure of one phase, 0 where nothing was added.

        Raises:
            ValueError: an unknown phase or figure.
        """
        if figure not in FIGURES:
            raise ValueError(_unknown(figure))
        return self.totals(phase).get(figure, 0)

    def totals(self, phase: Phase) -> dict[str, float]:
        """Every figure of a phase that exists; counts are ints, seconds floats.

        Raises:
            ValueError: an unknown phase.
        """
        with self._lock:
            return self._sum((_phase(phase), None))

    def places(self, phase: Phase) -> dict[str, dict[str, float]]:
        """Every figure of a phase that was added at a place, by place; they are no part of `totals`.

        Raises:
            ValueError: an unknown phase.
        """
        _phase(phase)
        with self._lock:
            accounts = {**self._closed, **self._open}
            return {at: self._sum((of, at)) for of, at in accounts if of == phase and at is not None}

    def peaks(self) -> dict[str, int]:
        """The greatest value of each peak that was ever given, in bytes."""
        with self._lock:
            return dict(self._peaks)

    def overhead_bytes(self, phase: Phase) -> int:
        """Bytes in both directions that were neither encoded tensors nor bundle files.

        Raises:
            ValueError: an unknown phase.
        """
        spent = self.totals(phase)
        up, down = (spent.get(f"{way}_bytes", 0) - spent.get(f"{way}_payload_bytes", 0) for way in ("up", "down"))
        return int(up + down)

    def _take(self, phase: object, at: object, figures: Mapping[str, object]) -> None:
        account = _phase(phase), None if at is None else _place(at)
        checked = {name: _figure(name, value) for name, value in figures.items()}
        with self._lock:
            _add_up(self._open, account, checked)

    def _sum(self, account: _Account) -> dict[str, float]:
        """All that was added to an account; the caller holds the lock, here and below."""
        closed, spent = self._closed.get(account, {}), self._open.get(account, {})
        return {name: closed.get(name, 0) + spent.get(name, 0) for name in {**closed, **spent}}

    def _unwritten(self, account: _Account) -> dict[str, float]:
        closed, spent = self._closed.get(account, {}), self._open.get(account, {})
        return {name: value for name, value in spent.items() if value or name not in closed}

    def _lines(self, step: int) -> list[dict[str, object]]:
        """What `close_step` writes."""
        peaks = {name: self._peaks[name] for name in sorted(self._changed_peaks)}
        lines: list[dict[str, object]] = []
        for phase in PHASES:
            spent = {at: self._unwritten((of, at)) for of, at in self._open if of == phase}
            own = spent.pop(None, {})
            places = {at: figures for at, figures in spent.items() if figures}
            if own or places:
                lines.append({"step": step, "phase": phase, **own, **({"places": places} if places else {})})
        if peaks and not lines:
            lines.append({"step": step, "phase": "control"})
        if lines:
            lines[0].update(peaks)
        return lines

    def _close(self) -> None:
        """Move what is open to what is closed, so that a resumed ledger adds up the same floats in the same order."""
        for account, figures in self._open.items():
            _add_up(self._closed, account, figures)
        self._open = {}
        self._changed_peaks = set()

    def replay(self, line: object) -> None:
        """Take one line of a file back in; it is not written again.

        Raises:
            ValueError: it is none that `close_step` writes.
        """
        own = dict(_object("the line", line))
        _whole("step", own.pop("step", None))
        phase = own.pop("phase", None)
        for name in PEAKS & own.keys():
            self.peak(name, own.pop(name))
        for at, figures in _object("places", own.pop("places", {})).items():
            self._take(phase, at, _object(at, figures))
        self._take(phase, None, own)
        self._close()


def _add_up(accounts: dict[_Account, dict[str, float]], account: _Account, figures: Mapping[str, float]) -> None:
    for name, value in figures.items():
        sums = accounts.setdefault(account, {})
        sums[name] = sums.get(name, 0) + value


def _create(path: Path) -> None:
    try:
        path.open("x").close()
    except FileExistsError:
        raise RunError(f"{path} exists already; resume that run or choose another directory") from None
    except OSError as error:
        raise RunError(f"{path}: cannot begin a ledger: {error.strerror}") from None


def _append(path: Path, lines: list[dict[str, object]]) -> None:
    try:
        with path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise RunError(f"{path}: cannot write the ledger: {error.strerror}; make room and resume the run") from None


def _phase(name: object) -> Phase:
    for phase in PHASES:
        if name == phase:
            return phase
    raise ValueError(f"unknown phase {name!r}; known: {', '.join(PHASES)}")


def _place(at: object) -> str:
    if not isinstance(at, str) or not _PLACE.fullmatch(at):
        raise ValueError(f"{at!r} is no place; name a block, such as '12', or a module in one, '12.self_attn.q_proj'")
    return at


def _object(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not an object")  # noqa: TRY004 - one kind of error for all that a file may hold
    return value


def _figure(name: str, value: object) -> float:
    if name in COUNTS:
        return _whole(name, value)
    if name not in SECONDS:
        raise ValueError(_unknown(name))
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is in seconds of at least 0, not {value!r}")
    return float(value)


def _whole(name: str, value: object) -> int:
    try:
        count = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        count = -1
    if count < 0:
        raise ValueError(f"{name} is a whole number of at least 0, not {value!r}")
    return count


def _unknown(figure: str) -> str:
    return f"unknown figure {figure!r}; known: {', '.join(sorted(FIGURES))}"
