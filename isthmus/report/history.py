"""What a run did step by step, as its `metrics.jsonl` and `ledger.jsonl` tell it.

Knows these two files, and that a crash may tear off their last lines; changes neither, and draws nothing.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from isthmus.errors import RunError
from isthmus.ledger.record import PEAKS, Ledger
from isthmus.report.costs import from_ledger
from isthmus.report.schema import RunReport

METRICS_NAME: Final = "metrics.jsonl"
LEDGER_NAME: Final = "ledger.jsonl"

Figures = Mapping[str, float]
"""Names of the ledger, and what was spent."""


class Metrics(BaseModel):
    """A line of `metrics.jsonl`: a training step, and the run's seconds and real tokens once it was done."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    step: int
    loss: float
    gradient_norm: float
    lr: float
    seconds: float
    tokens: int


@dataclass(frozen=True)
class Spent:
    """What one training step spent, in all and by place in the model."""

    figures: Figures
    places: Mapping[str, Figures] = field(default_factory=dict)

    def __add__(self, other: "Spent") -> "Spent":
        names = {**self.places, **other.places}
        places = {at: _sum(self.places.get(at, {}), other.places.get(at, {})) for at in names}
        return Spent(_sum(self.figures, other.figures), places)


@dataclass(frozen=True)
class History:
    """A run's two files, line by line; empty where they are not there.

    Attributes:
        metrics: of each step that counts, in order.
        lines: of the ledger, in order: steps that were done again after a crash are in it as often as they were done.
    """

    metrics: tuple[Metrics, ...] = ()
    lines: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def read(cls, run: Path) -> "History":
        """Read what a run's directory has of them, whether the run has ended or not.

        Raises:
            RunError: a file cannot be read, or a line is malformed that is not the torn last one.
        """
        metrics = tuple(_parsed(place, line) for place, line in _lines(run / METRICS_NAME))
        lines = tuple(_checked(place, line) for place, line in _lines(run / LEDGER_NAME))
        return cls(metrics, lines)

    @cached_property
    def ledger(self) -> Ledger:
        """All that was spent, steps done twice included."""
        ledger = Ledger()
        for line in self.lines:
            ledger.replay(line)
        return ledger

    @cached_property
    def steps(self) -> dict[int, Spent]:
        """What each training step spent, by its number; of one that was done again, the last time.

        A line without tokens is of what came late, and is added to its step.
        """
        found: dict[int, Spent] = {}
        for line in self._training():
            step, spent = line["step"], Spent(_figures(line), line.get("places", {}))
            if "real_tokens" not in line:
                found[step] = found[step] + spent if step in found else spent
                continue
            found = {earlier: kept for earlier, kept in found.items() if earlier < step} if step in found else found
            found[step] = spent
        return found

    @cached_property
    def crossed(self) -> dict[int, tuple[int, int]]:
        """Bytes of training, up and down, until each step was done, those of steps done again included."""
        found: dict[int, tuple[int, int]] = {}
        up = down = 0
        for line in self._training():
            up, down = up + line.get("up_bytes", 0), down + line.get("down_bytes", 0)
            found[line["step"]] = (up, down)
        return found

    @cached_property
    def seconds(self) -> dict[int, float]:
        """How long each step took, by the clock."""
        ends = {0: 0.0, **{each.step: each.seconds for each in self.metrics}}
        return {step: max(0.0, end - ends[step - 1]) for step, end in ends.items() if step - 1 in ends}

    def goes_beyond(self, report: RunReport) -> bool:
        """Whether the run trained on after its report was written, and was killed before it could write another."""
        edge = from_ledger(self.ledger).edge
        return (edge.forward_flops or 0) > (report.cost.edge.forward_flops or 0)

    def missing(self, report: RunReport) -> str:
        """Words for steps of a report of which the files tell nothing; none where they tell of all, or of none."""
        told = {METRICS_NAME: {each.step for each in self.metrics}, LEDGER_NAME: set(self.steps)}
        for name, steps in told.items():
            if steps and (left := report.steps - max(steps)) > 0:
                return (
                    f"Its {name} ends {left:,} steps before the run did; what is shown of single steps leaves them out."
                )
        return ""

    def _training(self) -> Iterator[Mapping[str, Any]]:
        return (line for line in self.lines if line["phase"] == "train")


def _figures(line: Mapping[str, Any]) -> Figures:
    return {name: value for name, value in line.items() if name not in {"step", "phase", "places", *PEAKS}}


def _sum(one: Figures, other: Figures) -> Figures:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """Whole lines and where they stand; what has no end was torn off."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(f"{file} cannot be read ({error.strerror}); check the disk") from None
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        yield f"{file}:{number}", line


def _parsed(place: str, line: bytes) -> Metrics:
    try:
        return Metrics.model_validate_json(line)
    except ValidationError as error:
        raise RunError(f"{place}: not a line of metrics ({error.errors()[0]['msg']}); restore the file") from None


def _checked(place: str, line: bytes) -> Mapping[str, Any]:
    """A line of a ledger, tried on one.

    Raises:
        RunError: a ledger does not take it.
    """
    try:
        found: dict[str, Any] = json.loads(line)
        Ledger().replay(found)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{place}: not a line of a ledger ({error}); restore the file") from None
    return found
