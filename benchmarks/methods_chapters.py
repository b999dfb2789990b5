"""The page's chapters on methods, what trains, and cuts: tables of rows that are there, whatever commit they are of.

Knows names and words; measures nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks import methods_figures as figures
from benchmarks.methods_data import PREFIX
from benchmarks.methods_rows import BY_CUT, BY_DOMAIN, BY_METHOD, BY_PEFT, CROSSED, METHOD, Variant
from benchmarks.page import Chapter
from benchmarks.results import Outcome, Row
from benchmarks.scores import ACCURACY, LOSS, change_of
from benchmarks.series import Measured

READING = (
    "Accuracy and loss stand with 95 % intervals; a change is against the untouched model on the same rows, its "
    "interval paired by row, as is the difference from `split` of the same domain at the same size. A kB is 1,000 "
    "bytes of gRPC messages as serialised, in training alone. What is fetched before is the ends, or the folder with "
    "emulator and ends; bytes to reach it are both, without the adapter, which only an owner who is to plug it in "
    "needs. FLOPs are of all steps. Memory is the peak of the edge's weights, gradients, optimizer and what autograd "
    "saved. Accuracy, bytes, FLOPs, memory and parameters are of these very runs whatever else the machine did; "
    "tokens/s are not, and compare only where little other work stands beside them: it is the share of the cores' "
    "time that others used while the row was measured and scored. Each row's own day, commit and machine are in "
    "`benchmarks/results.jsonl`; those of the last one stand below."
)
COLUMNS = (
    *(ACCURACY, LOSS, figures.stage_of(figures.UNTOUCHED, ACCURACY), figures.stage_of(figures.LESS_SPLIT, ACCURACY)),
    *(figures.UP, figures.DOWN, figures.TRIPS, figures.FETCHED, figures.CROSSED, figures.REACHED),
    *(figures.EDGE_FORWARD, figures.EDGE_BACKWARD, figures.CLOUD_FORWARD, figures.CLOUD_BACKWARD, figures.MEMORY),
    *(figures.TRAINABLE, figures.CHANGED, figures.ADAPTER, figures.TOKENS, figures.SPEED, figures.OTHERS),
    figures.MINUTES,
)


@dataclass(frozen=True)
class Standing(Chapter):
    """Rows that were each compared when they were measured, in the order of `rows`.

    Attributes:
        fewest: rows that make a table.
    """

    fewest: int

    def compared(self, results: Mapping[str, Row]) -> Row | None:
        """The last row, with the changes of all; None: there are too few."""
        measured = self.measured(results)
        if len(measured) < self.fewest:
            return None
        last = results[self.prefix + list(measured)[-1]]
        changes = {
            change_of(name, score): found[figures.stage_of(figures.CHANGE, score)]
            for name, found in measured.items()
            for score in (ACCURACY, LOSS)
        }
        return replace(last, outcome=Outcome(changes, ()), command="python -m benchmarks.methods")

    def measured(self, results: Mapping[str, Row]) -> Measured:
        """The rows that are there."""
        there = [name for name in self.rows if self.prefix + name in results]
        return {name: results[self.prefix + name].outcome.figures for name in there}


def _chapter(title: str, variants: Sequence[Variant], method: str, reading: str, fewest: int) -> Standing:
    names = tuple(variant.name for variant in variants)
    return Standing(title, method, reading, PREFIX, names, COLUMNS, (), fewest)


REFERENCE = BY_METHOD[0]
AS_ABOVE = "Measured and read as [the methods](#methods-side-by-side)."
METHODS = _chapter("Methods side by side", (*BY_METHOD, *BY_DOMAIN), METHOD, READING, 1)
TRAINED = _chapter("What trains, side by side", (REFERENCE, *BY_PEFT), AS_ABOVE, "Rates were not searched.", 2)
CUTS = _chapter("Cuts side by side", (REFERENCE, *BY_CUT, *CROSSED), AS_ABOVE, "The first row is the reference.", 2)
CHAPTERS = (METHODS, TRAINED, CUTS)
