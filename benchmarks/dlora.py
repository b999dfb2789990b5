"""`python -m benchmarks.dlora`: measure the DLoRA rows that have no result for the present commit.

Knows which they are and what is compared; what a row is, and what it came to, stands in modules of its own.
"""

from functools import partial

from benchmarks import dlora_targets, overlap
from benchmarks.chapters import DLORA
from benchmarks.dlora_figures import BYTES, TRIPS
from benchmarks.dlora_rows import PREFIX, VARIANTS, measure
from benchmarks.run import measure_chapter
from benchmarks.scores import ACCURACY
from benchmarks.series import Again, Asked, Model, Only, Repeats, Series, Threads, start

SHOWN = (ACCURACY, BYTES, TRIPS)
"""What of the page's table a terminal has room for."""

SERIES = Series(
    "benchmarks.dlora",
    PREFIX,
    {variant.name: partial(measure, variant) for variant in VARIANTS},
    {overlap.NAME: overlap.measure},
)


def main(
    only: Only = None, again: Again = False, repeats: Repeats = 11, threads: Threads = None, model: Model = None
) -> None:
    """Measure, compare, print tables and write docs/benchmarks.md.

    Example: python -m benchmarks.dlora --only all:0 --only kr-1/8:0
    """
    measure_chapter(SERIES, dlora_targets.compare, DLORA, SHOWN, Asked(only, again, repeats, threads, model))


if __name__ == "__main__":
    start(main)
