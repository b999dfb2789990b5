"""The Offsite-Tuning rows: which emulators are compared, on which data, and how one of them is carried out.

Knows data and command lines; what a run came to is read in `offsite_figures`.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Literal

from benchmarks.offsite_figures import TRUE_RUN, figures, reference_figures
from benchmarks.place import CUT, Place
from benchmarks.results import Outcome
from benchmarks.review_rows import ReviewRows
from demo import reviews
from isthmus.command import cache_directory

PREFIX = "offsite/"
DTYPE: Final = "bfloat16"
BATCH, STEPS, WARM_UP = 8, 100, 10
TRUE_STEPS, TRUE_WARM_UP = 10, 2
RATE = "1e-3"
TRAINED, VALIDATED, HELD_OUT = BATCH * STEPS, 400, 1000
PRODUCTS_HELD_OUT = 1000
DISTILLED_STEPS, DISTILLED_BATCH, DISTILLED_RATE = 100, 8, "1e-4"
TEXT_TOKENS = 64
BUDGET_MINUTES = 30

METHOD = (
    f"SmolLM2-135M (30 blocks) at cut {CUT} in {DTYPE}, movie reviews: LoRA of rank 8, alpha 16, on every linear "
    f"module of the two blocks at each end, {STEPS} steps of {BATCH} rows, each of {TRAINED:,} rows once, of which the "
    f"first {WARM_UP} steps warm the learning rate up to {RATE}, that of `split` in the other chapters and one for all "
    f"rows here; scored on {HELD_OUT:,} other rows that were held out. `split` tunes on the true span throughout, over "
    "mutual TLS with codec bf16. Each of the others is tuned by `--method offsite` on an emulator that lies in a "
    "folder, so that nothing crosses; a run `--method split --from` it then scores its adapter on the true span "
    f"before it takes a step (plugged in) and after {TRUE_STEPS} true steps, a tenth of {STEPS}, at the same rate on "
    "rows seen before. `drop-n` keeps n of the span's 26 blocks, `share-n` repeats n of them to 26, `rank-p` keeps "
    "the share p of each linear module's parameters as two factors, `quant-n` has n bits a weight, as has "
    "`rank-0.75-4-bits`. They are calibrated, distilled and measured on news editorials, plain text without ratings "
    f"in rows of {TEXT_TOKENS} tokens, of which the last 64 rows give the gap: the owner's text is of another domain "
    f"than the data, and says nothing of the task. `distilled` took {DISTILLED_STEPS} steps of {DISTILLED_BATCH} such "
    f"rows, peak rate {DISTILLED_RATE}. `products:` are rows on product reviews, {PRODUCTS_HELD_OUT:,} held out, with "
    "the same emulators built again. Targets are judged on the emulator that does best, plugged in, on "
    f"{VALIDATED} validation rows, which are neither trained on nor held out. "
    f"A row may take {BUDGET_MINUTES} minutes on two cores, building, distilling and "
    "all scoring included; what each took stands in the table. Rows are measured one after the other; where the "
    "machine had other work meanwhile, seconds of a row compare with each other rather than with those of another row."
)

Domain = Literal["movies", "products"]
LORA = ("--targets", "all-linear", "--rank", 8, "--alpha", 16)


@dataclass(frozen=True)
class Variant:
    """A row: an emulator and whether it is distilled, or none, and the domain of the data.

    Attributes:
        emulator: what it is called; None: the true span throughout.
        build: the flags of `cloud_node emulator build` that make it.
    """

    emulator: str | None = None
    build: tuple[object, ...] = ()
    distilled: bool = False
    domain: Domain = "movies"

    @property
    def name(self) -> str:
        """What the row is called."""
        name = (self.emulator or "split") + ("-distilled" if self.distilled else "")
        return name if self.domain == "movies" else f"{self.domain}:{name}"

    @property
    def reference(self) -> str:
        """The row that it is compared with."""
        return Variant(domain=self.domain).name


EMULATORS: dict[str, tuple[object, ...]] = {
    "drop-20": ("--method", "drop", "--keep", 20),
    "drop-13": ("--method", "drop", "--keep", 13),
    "share-20": ("--method", "share", "--keep", 20),
    "share-13": ("--method", "share", "--keep", 13),
    "rank-0.75": ("--method", "rank", "--keep", 0.75),
    "rank-0.5": ("--method", "rank", "--keep", 0.5),
    "quant-8": ("--method", "quant", "--bits", 8),
    "quant-4": ("--method", "quant", "--bits", 4),
    "rank-0.75-4-bits": ("--method", "rank", "--keep", 0.75, "--bits", 4),
}
ELSEWHERE = ("rank-0.75", "quant-4")
"""The emulators that are tried on product reviews too."""

VARIANTS = (
    Variant(),
    *(Variant(name, build, distilled) for name, build in EMULATORS.items() for distilled in (False, True)),
    Variant(domain="products"),
    *(Variant(name, EMULATORS[name], domain="products") for name in ELSEWHERE),
)


def measure(variant: Variant, place: Place, run: Path) -> Outcome:
    """Train it into `run`, whatever lay there before, and what goes on from there into a folder in it."""
    shutil.rmtree(run, ignore_errors=True)
    began = time.perf_counter()
    amount = [*_files(variant.domain), "--batch-size", BATCH, "--lr", RATE]
    whole = [*LORA, *amount, "--steps", STEPS, "--warmup-steps", WARM_UP, "--out", run]
    if variant.emulator is None:
        with _on_the_true_span(place) as train:
            place.run(*train, "--cut", CUT, *whole)
        return Outcome(reference_figures(run, time.perf_counter() - began), ())
    with TemporaryDirectory(dir=place.directory) as scratch:
        emulator = Path(scratch) / variant.name
        seconds = _build(variant, place, emulator)
        offline = ["edge_client", "train", "--method", "offsite", "--emulator", emulator]
        place.run(*offline, "--dtype", DTYPE, "--threads", place.threads, *whole)
        with _on_the_true_span(place) as train:
            few = ["--steps", TRUE_STEPS, "--warmup-steps", TRUE_WARM_UP, "--out", run / TRUE_RUN]
            place.run(*train, "--from", run, *amount, *few)
        right = _validated(place, run) if variant.domain == "movies" else None
        return Outcome(figures(run, emulator, right, seconds, time.perf_counter() - began), ())


@contextmanager
def _on_the_true_span(place: Place) -> Iterator[list[object]]:
    with place.training(["--method", "split", "--codec", "bf16"], DTYPE, CUT) as train:
        yield train


def _validated(place: Place, run: Path) -> float:
    """The share of right validation rows, plugged in."""
    plugged_in = ["--span", "local", "--model", place.model, "--data", movies().validation]
    return float(place.run_json("edge_client", "evaluate", "--run", run, *plugged_in, "--json")["accuracy"])


def build_emulator(
    build: Sequence[object],
    place: Place,
    out: Path,
    *distil: object,
    owns: reviews.Domain = "news",
    cut: str = CUT,
) -> None:
    """Build an emulator with the flags `build`, and distil it with those of `distil`, on the owner's text.

    `owns` is the domain that the owner has text of.
    """
    command = ["cloud_node", "emulator", "build", "--model", place.model, "--cut", cut, *build]
    settings = ["--text", _public_text(owns), "--max-length", TEXT_TOKENS, "--threads", place.threads, "--out", out]
    place.run(*command, *settings, *distil)


def _build(variant: Variant, place: Place, out: Path) -> float:
    """Seconds that building took, with distilling where it is distilled."""
    amount = ["--steps", DISTILLED_STEPS, "--batch-size", DISTILLED_BATCH, "--lr", DISTILLED_RATE]
    began = time.perf_counter()
    build_emulator(variant.build, place, out, *(["--distill", _public_text(), *amount] if variant.distilled else []))
    return time.perf_counter() - began


def _files(domain: Domain) -> list[object]:
    """The data owner's rows, as flags."""
    if domain == "movies":
        return ["--data", movies().train, "--eval-data", movies().held_out]
    train, held_out = reviews.prepare(_data(), domain, PRODUCTS_HELD_OUT)
    return ["--data", train, "--eval-data", held_out]


def movies() -> ReviewRows:
    """The data owner's rows, but for those on products."""
    return ReviewRows(PREFIX, TRAINED, VALIDATED, HELD_OUT)


def _public_text(owns: reviews.Domain = "news") -> Path:
    """The model owner's text."""
    path = _data() / f"{owns}.txt"
    lines = reviews.texts(path.parent, owns)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def _data() -> Path:
    return cache_directory() / "benchmarks" / PREFIX / "data"
