"""What plugging in came to on the same rows, for the owner: whether it paid, and what of it an edge does not have.

Knows scores and what an emulator says of itself; scores nothing.
"""

from dataclasses import dataclass
from typing import Any

from isthmus.emulated.recipe import Emulator
from isthmus.report.change import Change, gain_in_words, points, protection_in_words
from isthmus.report.fields.score import Score
from isthmus.report.verdict import Rises
from isthmus.training.scoring import Scores

ONLY_THE_EDGE = (
    "only the edge can tell what N true steps after plugging in, or tuning on the true span throughout, would give: "
    "`edge_client report` has those two rows"
)


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
    def gain(self) -> Change:
        """From the untouched to the plugged-in model."""
        return _change(self.untouched, self.plugged_in)

    @property
    def protection(self) -> Change | None:
        """From what the edge has by itself, the tuned emulator, to the plugged-in model."""
        return None if self.emulator is None else _change(self.emulator.tuned, self.plugged_in)

    def lines(self) -> list[str]:
        """For a terminal: each score, the emulator's sizes, what they come to, and what is not known here."""
        said = [f"{name:<16}{Score.of(one.loss, one.correct).in_words()}" for name, one in self._scores()]
        if self.emulator is not None:
            about = self.emulator.about
            said.append(f"{'bytes':<16}{against(about.weight_bytes, self.emulator.span_bytes)}")
            said.append(f"{'FLOPs/token':<16}{against(about.flops_per_token, about.span_flops_per_token)}")
        return [*said, *self.in_words(), ONLY_THE_EDGE]

    def in_words(self) -> list[str]:
        """Whether plugging in paid, and with an emulator the owner's protection; as the edge's report says them."""
        return [gain_in_words(self.gain), *([protection_in_words(self.protection)] if self.protection else [])]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the same."""
        found: dict[str, Any] = {"rows": self.untouched.rows}
        found |= {name.replace(" ", "_"): Score.of(one.loss, one.correct).model_dump() for name, one in self._scores()}
        found |= {**_as_dict(self.untouched, self.plugged_in), "words": gain_in_words(self.gain)}
        if self.emulator is not None and self.protection is not None:
            about = self.emulator.about
            sizes = {"weight_bytes": about.weight_bytes, "span_bytes": self.emulator.span_bytes}
            flops = {"flops_per_token": about.flops_per_token, "span_flops_per_token": about.span_flops_per_token}
            rises = _as_dict(self.emulator.tuned, self.plugged_in)
            protection = {**rises, "words": protection_in_words(self.protection)}
            found |= {**sizes, **flops, "protection": protection}
        return found

    def _scores(self) -> list[tuple[str, Scores]]:
        edges = (
            [("emulator", self.emulator.untouched), ("tuned emulator", self.emulator.tuned)] if self.emulator else []
        )
        return [("untouched", self.untouched), *edges, ("plugged in", self.plugged_in)]


def against(mine: int, whole: int) -> str:
    """An emulator's figure beside that of the span."""
    return f"{mine:,} of the span's {whole:,} ({mine / whole:.1%})"


def _change(old: Scores, new: Scores) -> Change:
    return Change(points(old.accuracy, new.accuracy), new.loss - old.loss, Rises.between(old, new))


def _as_dict(old: Scores, new: Scores) -> dict[str, Any]:
    rises = Rises.between(old, new)
    return {"loss_rise": rises.loss, "accuracy_rise": rises.accuracy, "verdict": rises.verdict}
