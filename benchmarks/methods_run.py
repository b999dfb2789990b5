"""How a row that compares methods is carried out: processes over loopback, then scores on the true span.

Knows processes, files and what is kept of other rows; what a run came to is read in `methods_figures`.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.cores import Cores
from benchmarks.methods_data import HELD_OUT, DomainRows, kept
from benchmarks.methods_figures import MINUTES, OTHERS, figures, keep_scores
from benchmarks.methods_rows import DTYPE, Variant
from benchmarks.offsite_rows import EMULATORS, build_emulator
from benchmarks.place import Place
from benchmarks.results import Figure, Outcome

EMULATOR = "rank-0.75"


def measure(variant: Variant, place: Place) -> Outcome:
    """Train it, score it, and compare it with the untouched model and, where that is kept here, its domain's `split`.

    Its processes have a cache of their own, so that what a run fetches is what its report says.

    Raises:
        RuntimeError: a process failed.
    """
    run, emulator = run_of(variant), _emulator(variant, place)
    shutil.rmtree(run, ignore_errors=True)
    rows = DomainRows.of(variant.domain, place.model)
    before, began = Cores.now(), time.perf_counter()
    with TemporaryDirectory(dir=place.directory) as scratch:
        own = replace(place, directory=Path(scratch), variables={"ISTHMUS_CACHE": scratch}, given_model=place.model)
        with _processes(variant, own, emulator) as (train, evaluate):
            own.run(*train, *variant.flags(), "--data", rows.train, "--out", run)
            score = [*evaluate, "--run", run, "--data", rows.held_out]
            untouched = kept() / f"untouched-{variant.domain}-{HELD_OUT}"
            if not (untouched / "scores.json").is_file():
                own.run(*score, "--untouched")
                keep_scores(run, untouched)
            own.run(*score)
    keep_scores(run, run)
    bundle = None if emulator is None else sum(path.stat().st_size for path in emulator.iterdir())
    found = figures(run, untouched, run_of(variant.reference), bundle)
    found[OTHERS] = Figure(100 * Cores.now().others_since(before), "%")
    found[MINUTES] = Figure((time.perf_counter() - began) / 60, "min")
    return Outcome(found, ())


def run_of(variant: Variant) -> Path:
    """Where a row's run stays."""
    return kept() / "runs" / variant.name.replace("/", "-").replace(":", "_")


@contextmanager
def _processes(variant: Variant, place: Place, emulator: Path | None) -> Iterator[tuple[list[object], list[object]]]:
    """The commands that train and that score, while what they need is there."""
    computing: list[object] = ["--dtype", DTYPE, "--threads", place.threads]
    train, evaluate = ["edge_client", "train", *computing], ["edge_client", "evaluate", "--json"]
    if variant.place == "here":
        yield [*train, "--model", place.model], evaluate
        return
    with place.node(DTYPE, variant.cut) as address:
        line = ["--server", address, "--certs", place.edge_certs]
        if emulator is not None:
            yield [*train, "--emulator", emulator], [*evaluate, "--span", "remote", *line]
        else:
            yield [*train, *line], evaluate


def _emulator(variant: Variant, place: Place) -> Path | None:
    """The folder of the emulator that a row is tuned on, built unless it is kept; it is of the row's cut."""
    if variant.place != "emulated":
        return None
    owns = "products" if variant.domain == "news" else "news"
    folder = kept() / "emulators" / f"{EMULATOR}-{variant.cut.replace(':', '_')}-{owns}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        build_emulator(EMULATORS[EMULATOR], place, folder, owns=owns, cut=variant.cut)
    return folder
