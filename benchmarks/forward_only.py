"""`python -m benchmarks.forward_only`: measure the forward-only rows that have no result for the present commit.

Knows which they are and what is compared; what a row is, and what it came to, stands in modules of its own.
"""

from functools import partial

from benchmarks import forward_targets, warm_step
from benchmarks.chapters import FORWARD_ONLY
from benchmarks.forward_figures import FIRST, VALIDATION
from benchmarks.forward_rows import PREFIX, VARIANTS, measure
from benchmarks.run import measure_chapter
from benchmarks.scores import ACCURACY
from benchmarks.series import Again, Asked, Model, Only, Repeats, Series, Threads, start

SHOWN = (ACCURACY, FIRST, VALIDATION)
"""What of the page's table a terminal has room for."""

SERIES = Series(
    "benchmarks.forward_only",
    PREFIX,
    {variant.name: partial(measure, variant) for variant in VARIANTS},
    {warm_step.NAME: warm_step.measure},
)


def main(
    only: Only = None, again: Again = False, repeats: Repeats = 11, threads: Threads = None, model: Model = None
) -> None:
    """Measure, compare, print tables and write docs/benchmarks.md.

    Example: python -m benchmarks.forward_only --only top-0:4 --only warm-step
    """
    measure_chapter(SERIES, forward_targets.compare, FORWARD_ONLY, SHOWN, Asked(only, again, repeats, threads, model))


if __name__ == "__main__":
    start(main)
