"""The DLoRA rows: which runs are compared, on which data, and how one of them is carried out.

Knows data and command lines; what a run came to is read in `dlora_figures`.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Literal

from benchmarks.dlora_figures import figures, slow_step, worth_of_last
from benchmarks.place import Place
from benchmarks.results import Outcome
from benchmarks.review_rows import ReviewRows

PREFIX = "dlora/"
DTYPE: Final = "bfloat16"
BATCH = 8
TRAINED, VALIDATED, HELD_OUT = 1440, 400, 2000
WARM_UP = 10
RATE = "3e-3"
"""The learning rate of adapters in the span, remote or local."""
ENDS_RATE = "1e-3"
"""That of adapters at the ends, as the forward-only rows have it."""
LINK, SLOW_STEPS = "50:100:100", 4
SEEDS = (0, 1, 2)

METHOD = (
    f"SmolLM2-135M (30 blocks) in {DTYPE} on both sides, movie reviews: {TRAINED:,} rows to train on in batches of "
    f"{BATCH}, one epoch, {TRAINED // BATCH} steps of which the first {WARM_UP} warm the learning rate up; scored on "
    f"{HELD_OUT:,} other rows that were held out. Everything is LoRA of rank 8, alpha 16. `all` is `--method dlora` at "
    "cut 0:0, where every adapter stands at a module on the cloud, as published: q and v of each of the 30 blocks, 60 "
    "ports. `kr-1/n` adds Kill-and-Revive, which keeps 1 of n ports alive (7 of 60 for 1/8), with its defaults: every "
    "port in the first 5 steps, a decision every 10 steps, and in the step before one as many dead ports probed. "
    "`random-1/8` draws as many ports once by the seed, `top-1/8` takes those of the highest blocks (neither measures "
    "anything, so neither has a warm-up), `gradient-1/8` those with the greatest gradients, and `park-1/8` leaves "
    "killed adapters frozen on the cloud in place of dropping them. `all-linear` has ports at all seven linear modules "
    "of each block, 210, and `all-linear-kr-1/8` keeps 26 of them. `local` is the same LoRA as `all` in one process "
    "that holds the whole model. `split` at cut 2:2 trains every linear module of the two blocks at each end, and "
    "needs no port. What crosses is encoded as bf16, but for `split-int8`. What follows the colon is the seed, of "
    f"adapters and the order of rows. The learning rate is {RATE}, one for all rows with adapters in the span "
    f"({ENDS_RATE} for `split`); it was chosen on {VALIDATED} validation rows that are neither trained on nor held "
    "out. The paper's criterion is not public: Kill-and-Revive here is our own reading of it. Rows are measured one "
    "after the other; where the machine had other work meanwhile, the seconds of a row compare with each other rather "
    "than with those of another row."
)


@dataclass(frozen=True)
class Variant:
    """A row: a configuration, the flags of `edge_client train` in which it differs, and a seed."""

    configuration: str
    method: Literal["split", "dlora", "local"]
    own: tuple[str, ...]
    seed: int = 0

    @property
    def name(self) -> str:
        """What the row is called."""
        return f"{self.configuration}:{self.seed}"

    @property
    def cut(self) -> str:
        """Where the model is cut."""
        return "2:2" if self.method == "split" else "0:0"

    @property
    def timed_on_a_slow_line(self) -> bool:
        """Whether a few more steps are timed: once for each configuration that has a line."""
        return self.method != "local" and self.seed == 0

    def flags(self) -> list[object]:
        """What it says to `edge_client train`."""
        where = ["--cut", self.cut, *([] if self.method == "split" else ["--exchange", "activations"])]
        rate = ["--lr", ENDS_RATE if self.method == "split" else RATE, "--warmup-steps", WARM_UP]
        return ["--method", self.method, *where, *rate, "--rank", 8, "--alpha", 16, *self.own, "--seed", self.seed]


def _in_span(name: str, *own: str, targets: str = "q_proj,v_proj", seeds: tuple[int, ...] = (0,)) -> list[Variant]:
    return [Variant(name, "dlora", ("--codec", "bf16", "--targets", targets, *own), seed) for seed in seeds]


def _kept(share: float, criterion: str = "importance") -> tuple[str, ...]:
    return ("--kr-active", str(share), "--kr-criterion", criterion)


ALL, OURS, RANDOM, TOP = "all", "kr-1/8", "random-1/8", "top-1/8"
VARIANTS = (
    Variant("local", "local", ("--targets", "q_proj,v_proj")),
    *(Variant(f"split-{codec}", "split", ("--codec", codec, "--targets", "all-linear")) for codec in ("bf16", "int8")),
    *_in_span(ALL, seeds=SEEDS),
    *_in_span(OURS, *_kept(1 / 8), seeds=SEEDS),
    *_in_span("kr-1/4", *_kept(1 / 4)),
    *_in_span("kr-1/16", *_kept(1 / 16)),
    *_in_span(RANDOM, *_kept(1 / 8, "random"), seeds=SEEDS),
    *_in_span(TOP, *_kept(1 / 8, "top"), seeds=SEEDS),
    *_in_span("gradient-1/8", *_kept(1 / 8, "gradient")),
    *_in_span("park-1/8", *_kept(1 / 8), "--kr-idle", "park"),
    *_in_span("all-linear", targets="all-linear"),
    *_in_span("all-linear-kr-1/8", *_kept(1 / 8), targets="all-linear"),
)


def reviews() -> ReviewRows:
    """The data that every row uses."""
    return ReviewRows(PREFIX, TRAINED, VALIDATED, HELD_OUT)


def measure(variant: Variant, place: Place, run: Path) -> Outcome:
    """Train it into `run`, whatever lay there before, and time a few steps on a slow line where that is due."""
    shutil.rmtree(run, ignore_errors=True)
    served = None if variant.method == "local" else variant.cut
    with place.training(variant.flags(), DTYPE, served) as train:
        rows = reviews()
        train += ["--data", rows.train, "--batch-size", BATCH]
        place.run(*train, "--epochs", 1, "--eval-data", rows.held_out, "--out", run)
        found = figures(run)
        if variant.timed_on_a_slow_line:
            with TemporaryDirectory(dir=place.directory) as scratch:
                again = _those_alive(run, Path(scratch))
                slow = Path(scratch) / "run"
                place.run(*train, *again, "--steps", SLOW_STEPS, "--link", LINK, "--out", slow)
                found |= slow_step(slow)
    return Outcome(found, ())


def _those_alive(run: Path, scratch: Path) -> list[object]:
    """Flags that keep alive from the start what was alive at the end of `run`."""
    worth = worth_of_last(run)
    if worth is None:
        return []
    file = scratch / "scores.json"
    file.write_text(json.dumps(worth), encoding="utf-8")
    return ["--kr-criterion", "importance", "--kr-scores", file]
