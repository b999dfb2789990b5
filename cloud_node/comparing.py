"""What plugging in came to on the same rows, for the owner: whether it paid, and what of it an edge does not have.

Knows scores and what an emulator says of itself; scores nothing.
"""

from dataclasses import dataclass
from typing import Any

from isthmus.emulated.recipe import Emulator
from isthmus.report.fields.score import Score
from isthmus.report.verdict import Rises, Verdict
from isthmus.training.scoring import Scores


@dataclass(frozen=True)
class OnEmulator:
    """What an edge has by itself: the emulator, its scores untouched, and those with the tuned ends around it.

    `span_bytes` are those of the blocks that it stands for, as the model stores them.
    """

    about: Emulator
    span_bytes: int
    untouched: Scores
    tuned: Scores


@dataclass(frozen=True)
class Comparison:
    """The untouched and the plugged-in model on the same rows, and the emulator where one was given."""

    untouched: Scores
    plugged_in: Scores
    emulator: OnEmulator | None = None

    @property
    def gain(self) -> Rises:
        """From the untouched to the plugged-in model."""
        return Rises.between(self.untouched, self.plugged_in)

    @property
    def protection(self) -> Rises | None:
        """From what the edge has by itself, the tuned emulator, to the plugged-in model."""
        return None if self.emulator is None else Rises.between(self.emulator.tuned, self.plugged_in)

    def lines(self) -> list[str]:
        """For a terminal: each score, the emulator's sizes, and what they come to."""
        said = [f"{name:<16}{Score.of(one.loss, one.correct).in_words()}" for name, one in self._scores()]
        if self.emulator is not None:
            about = self.emulator.about
            said.append(f"{'bytes':<16}{against(about.weight_bytes, self.emulator.span_bytes)}")
            said.append(f"{'FLOPs/token':<16}{against(about.flops_per_token, about.span_flops_per_token)}")
        return [*said, self.in_words(), *self.protection_in_words()]

    def in_words(self) -> str:
        """Whether plugging in paid."""
        rows, figures = self.gain.rows, _figures(self.gain)
        match judged(self.gain):
            case "better":
                return f"plugging in paid: {figures} on {rows} rows"
            case "worse":
                return f"plugging in made the model worse: {figures} on {rows} rows; do not serve it for such rows"
            case "undecided":
                return f"{rows} rows do not tell whether plugging in paid: {figures}; score it on more"

    def protection_in_words(self) -> list[str]:
        """The owner's protection, which is none where the tuned emulator does as well; nothing without an emulator."""
        more = self.protection
        if more is None:
            return []
        figures = f"plugged in minus tuned emulator: {_figures(more)} on {more.rows} rows"
        match judged(more):
            case "better":
                return [f"protected: the edge's tuned emulator is worse than the plugged-in model; {figures}"]
            case "worse":
                return [f"no protection: the edge's tuned emulator is better than the plugged-in model; {figures}"]
            case "undecided":
                return [f"no protection shows: {more.rows} rows do not tell the edge's tuned emulator apart; {figures}"]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the same."""
        found: dict[str, Any] = {"rows": self.gain.rows}
        found |= {name.replace(" ", "_"): Score.of(one.loss, one.correct).model_dump() for name, one in self._scores()}
        found |= {**_as_dict(self.gain), "words": self.in_words()}
        if self.emulator is not None and self.protection is not None:
            about = self.emulator.about
            sizes = {"weight_bytes": about.weight_bytes, "span_bytes": self.emulator.span_bytes}
            flops = {"flops_per_token": about.flops_per_token, "span_flops_per_token": about.span_flops_per_token}
            protection = {**_as_dict(self.protection), "words": " ".join(self.protection_in_words())}
            found |= {**sizes, **flops, "protection": protection}
        return found

    def _scores(self) -> list[tuple[str, Scores]]:
        edges = (
            [("emulator", self.emulator.untouched), ("tuned emulator", self.emulator.tuned)] if self.emulator else []
        )
        return [("untouched", self.untouched), *edges, ("plugged in", self.plugged_in)]


def judged(rises: Rises) -> Verdict:
    """By accuracy where there is one, else by loss."""
    return rises.verdicts["loss" if rises.accuracy is None else "accuracy"]


def against(mine: int, whole: int) -> str:
    """An emulator's figure beside that of the span."""
    return f"{mine:,} of the span's {whole:,} ({mine / whole:.1%})"


def _figures(rises: Rises) -> str:
    """The rise that is judged by."""
    name, rise = ("loss", rises.loss) if rises.accuracy is None else ("accuracy", rises.accuracy)
    if rise is None:
        return f"{name} without an interval, for want of rows"
    return f"{name} {rise[0]:+.4f} (95 % {rise[1]:+.4f} to {rise[2]:+.4f})"


def _as_dict(rises: Rises) -> dict[str, Any]:
    return {"loss_rise": rises.loss, "accuracy_rise": rises.accuracy, "verdict": judged(rises)}
