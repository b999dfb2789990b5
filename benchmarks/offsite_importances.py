"""Importances found on emulators against those of the true span: are the same modules of the span worth an adapter?

Knows two ways to score modules and how alike two orders are; trains nothing.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.offsite_rows import EMULATORS, build_emulator, movies
from benchmarks.place import CUT, Place
from benchmarks.results import Figure, Outcome

NAME = "importances"
BATCHES, BATCH, TARGETS, SHARE = 20, 8, "q_proj,v_proj", 8
USED = ("rank-0.75", "rank-0.5", "quant-8", "quant-4", "rank-0.75-4-bits")

METHOD = (
    f"`edge_client importances` of {TARGETS} in the 26 blocks of the span (52 modules), cut {CUT}, float32, {BATCHES} "
    f"batches of {BATCH} movie reviews, the same for all: on emulators as built, with which nothing crosses, and on "
    "the true span. The correlation is Spearman's, of ranks; the overlap is how many of the best eighth of the modules "
    f"on the true span ({52 // SHARE}) are among the best eighth on the emulator; by chance an eighth of them would be."
)


def measure(place: Place) -> Outcome:
    """How alike each emulator's importances are to the true span's."""
    with TemporaryDirectory(dir=place.directory) as scratch:
        folder = Path(scratch)
        true = _scores(place, folder / "true.json", "--method", "local", "--model", place.model, "--cut", CUT)
        found: dict[str, Figure] = {}
        for name in USED:
            build_emulator(EMULATORS[name], place, folder / name)
            mine = _scores(place, folder / f"{name}.json", "--emulator", folder / name)
            found[f"{name}: correlation of ranks"] = Figure(_spearman(true, mine), "")
            found[f"{name}: of the best eighth"] = Figure(100 * _overlap(true, mine), "%")
    return Outcome(found, ())


def _scores(place: Place, out: Path, *where: object) -> Mapping[str, float]:
    amount = ["--data", movies().train, "--steps", BATCHES, "--batch-size", BATCH, "--targets", TARGETS]
    place.run("edge_client", "importances", *where, *amount, "--threads", place.threads, "--out", out)
    scores: dict[str, float] = json.loads(out.read_text())
    return scores


def _spearman(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    names = sorted(one)
    ranks = [np.argsort(np.argsort([scores[name] for name in names])) for scores in (one, other)]
    return float(np.asarray(np.corrcoef(ranks))[0, 1])


def _overlap(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    count = len(one) // SHARE
    best = [set(sorted(scores, key=scores.__getitem__, reverse=True)[:count]) for scores in (one, other)]
    return len(best[0] & best[1]) / count
