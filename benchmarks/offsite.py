"""`python -m benchmarks.offsite`: measure the Offsite-Tuning rows that have no result for the present commit.

Knows which they are and what is compared; what a row is, and what it came to, stands in modules of its own.
"""

from functools import partial

from benchmarks import offsite_importances, offsite_shape, offsite_targets
from benchmarks.chapters import OFFSITE
from benchmarks.offsite_figures import MEMORY, SPEED
from benchmarks.offsite_rows import PREFIX, VARIANTS, measure
from benchmarks.offsite_targets import SHARE
from benchmarks.run import measure_chapter
from benchmarks.scores import ACCURACY
from benchmarks.series import Again, Asked, Model, Only, Repeats, Series, Threads, start

SHOWN = (ACCURACY, SHARE, SPEED, MEMORY)
"""What of the page's table a terminal has room for."""

SERIES = Series(
    "benchmarks.offsite",
    PREFIX,
    {variant.name: partial(measure, variant) for variant in VARIANTS},
    {offsite_shape.NAME: offsite_shape.measure, offsite_importances.NAME: offsite_importances.measure},
)


def main(
    only: Only = None, again: Again = False, repeats: Repeats = 11, threads: Threads = None, model: Model = None
) -> None:
    """Measure, compare, print tables and write docs/benchmarks.md.

    Example: python -m benchmarks.offsite --only split --only rank-0.75
    """
    measure_chapter(SERIES, offsite_targets.compare, OFFSITE, SHOWN, Asked(only, again, repeats, threads, model))


if __name__ == "__main__":
    start(main)
