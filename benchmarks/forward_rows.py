"""The forward-only rows: which runs are compared, on which data, and how one of them is carried out.

Knows data and command lines; what a run came to is read in `forward_figures`.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Literal

from benchmarks.forward_figures import figures
from benchmarks.place import Place
from benchmarks.results import Outcome
from benchmarks.review_rows import ReviewRows

PREFIX = "forward-only/"
DTYPE: Final = "bfloat16"
BATCH, EPOCHS = 16, 3
TRAINED, VALIDATED, HELD_OUT = 960, 400, 2000
LORA_RATE, DEEP_RATE, SIDE_RATE = "1e-3", "3e-4", "3e-3"

METHOD = (
    f"SmolLM2-135M (30 blocks) in {DTYPE} on both sides, movie reviews: {TRAINED:,} rows to train on, batches of "
    f"{BATCH}, {EPOCHS} epochs, scored on {HELD_OUT:,} other rows that were held out. `split` sends hidden states and "
    "gradients, each both ways, in every step, and trains the blocks at both ends. `top-b:t` (`--train top` at cut "
    "b:t) trains the t blocks above the span and `side-1/n` (`--method side --cut 0:0`, 64 values a token from every "
    "4th block) a network beside the model, n times narrower: the edge sends the hidden states that enter the span, "
    "receives what leaves it (and the taps), and keeps that for the later epochs; no gradient crosses. `local` is LoRA "
    "in one process with the whole model, at cut 15:14: on 29 of the 30 blocks, for the span keeps one. LoRA is of "
    f"rank 8 on every linear module of those blocks, learning rate {LORA_RATE} ({DEEP_RATE} for `local`) with 10 steps "
    f"of warm-up; side networks use {SIDE_RATE}. Nothing was tuned on held-out rows. Rates were tried in a few runs on "
    "the validation rows, and not for each row; the best top cut is chosen "
    f"by accuracy on {VALIDATED} validation rows, which are neither trained on nor held out. What `top` and `side` "
    "send hides labels, not text: at cuts 0:t the hidden states are embeddings, which a server reads off exactly. "
    "Rows are measured one after the other; where the machine had other work meanwhile, the seconds of a row compare "
    "with each other rather than with those of another row."
)


@dataclass(frozen=True)
class Variant:
    """A row: its name, and the flags of `edge_client train` in which it differs from the others."""

    name: str
    method: Literal["split", "side", "local"]
    cut: str
    codec: str | None = "bf16"
    own: tuple[str, ...] = ()

    @property
    def forward_only(self) -> bool:
        """Whether no gradient crosses and outputs are kept."""
        return self.method == "side" or self.top

    @property
    def top(self) -> bool:
        """Whether it is `--train top`."""
        return "top" in self.own

    def flags(self) -> list[str]:
        """What it says to `edge_client train`."""
        codec = ["--codec", self.codec] if self.codec else []
        tuned = ["--targets", "all-linear", "--rank", "8", "--lr", DEEP_RATE if self.method == "local" else LORA_RATE]
        rate = ["--lr", SIDE_RATE] if self.method == "side" else tuned
        return ["--method", self.method, "--cut", self.cut, *codec, *rate, "--warmup-steps", "10", *self.own]


def _top(cut: str, codec: str = "bf16") -> Variant:
    name = f"top-{cut}" if codec == "bf16" else f"top-{cut}-{codec}"
    return Variant(name, "split", cut, codec, ("--train", "top"))


def _side(reduction: int) -> Variant:
    taps = ("--tap-every", "4", "--tap-width", "64")
    return Variant(f"side-1/{reduction}", "side", "0:0", "bf16", ("--reduction", str(reduction), *taps))


REFERENCE = Variant("split-2:2-bf16", "split", "2:2")
VARIANTS = (
    REFERENCE,
    Variant("split-2:2-int8", "split", "2:2", "int8"),
    *(_top(cut) for cut in ("0:2", "0:4", "0:8", "4:4", "8:4")),
    _top("0:8", "int8"),
    *(_side(reduction) for reduction in (8, 4)),
    Variant("local", "local", "15:14", None),
)


def reviews() -> ReviewRows:
    """The data that every row uses."""
    return ReviewRows(PREFIX, TRAINED, VALIDATED, HELD_OUT)


def measure(variant: Variant, place: Place, run: Path) -> Outcome:
    """Train it into `run`, whatever lay there before, and score the validation rows."""
    shutil.rmtree(run, ignore_errors=True)
    rows, served = reviews(), None if variant.method == "local" else variant.cut
    with place.training(variant.flags(), DTYPE, served) as train, TemporaryDirectory(dir=place.directory) as cache:
        amount = ["--batch-size", BATCH, "--epochs", EPOCHS]
        files = ["--data", rows.train, "--eval-data", rows.held_out, "--out", run]
        place.run(*train, *amount, *files, *(["--cache", cache] if variant.forward_only else []))
        scores = place.run_json("edge_client", "evaluate", "--run", run, "--data", rows.validation, "--json")
    return Outcome(figures(run, math.ceil(TRAINED / BATCH), scores["accuracy"]), ())
