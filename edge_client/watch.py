"""A look at the true span while the emulator is tuned on: does plugging in pay so far?

Knows rows and an edge model whose true span can be at hand; each look sends hidden states, which the ledger counts. A
look that fails ends the looks and never the run: tuning needs no server.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import peft
from rich.console import Console

from edge_client.edge_model import EdgeModel, device_of
from edge_client.tuning import Tuning
from isthmus.errors import IsthmusError, LimitError
from isthmus.report.change import Change, gain_in_words, points
from isthmus.report.fields.offsite import Watched
from isthmus.report.verdict import Rises
from isthmus.training.data import Example
from isthmus.training.scoring import Scores, score

BATCHES = 4
"""How many scoring requests one look takes."""


class Watch:
    """Scores a few rows on the true span every few steps.

    Attributes:
        points: what it saw.
        untouched: the same rows on the true span without the adapter, which every look is compared with; None before
            the first.
    """

    def __init__(
        self,
        every: int,
        edge: EdgeModel,
        tuning: Tuning,
        examples: Sequence[Example],
        batch_size: int,
        console: Console,
        open_line: Callable[[], None],
    ) -> None:
        """Look every `every` steps at rows spread over `examples`, in `BATCHES` requests of `batch_size`.

        `open_line` brings the true span; it raises an IsthmusError where it cannot.
        """
        self._every = every
        self._edge = edge
        self._tuning = tuning
        self._examples = examples
        self._batch_size = batch_size
        self._console = console
        self._open_line = open_line
        self._gone = False
        self.points: tuple[Watched, ...] = ()
        self.untouched: Scores | None = None

    def open(self) -> None:
        """Let the true span be at hand, unless it is.

        Raises:
            IsthmusError: whatever stands in the way.
        """
        if not self._edge.true_span:
            self._open_line()

    def look(self, step: int, last: bool = False) -> None:
        """Score the true span if it is due after `step` steps, and say so where the adapter made it worse."""
        due = last or step % self._every == 0
        if self._gone or not due or any(point.step == step for point in self.points):
            return
        try:
            now, untouched = self._scored()
        except IsthmusError as error:
            self._gone = True
            self._say(f"step {step}: no more looks at the true span: {error}")
            return
        self.points = (*self.points, Watched(step=step, loss=now.loss, accuracy=now.accuracy))
        found = points(untouched.accuracy, now.accuracy), now.loss - untouched.loss, Rises.between(untouched, now)
        change = Change(*found)
        if last or change.found("worse"):
            self._say(f"step {step}, a look at {now.rows} rows: {gain_in_words(change)}")

    def _scored(self) -> tuple[Scores, Scores]:
        """The true span with the adapter, and without."""
        self.open()
        rows = self._rows()
        with self._edge.phase("eval"), self._edge.plugged_in():
            now = self._score(rows)
            if self.untouched is None or self.untouched.tokens != now.tokens:  # a server's limit may have changed
                self.untouched = self._score_without(rows) if self._tuning.changed() else now
        return now, self.untouched

    def _rows(self) -> list[Example]:
        """Rows spread over those that the server takes."""
        limit = self._edge.row_tokens
        fitting = [example for example in self._examples if limit is None or _longest(example) <= limit]
        if not fitting:
            raise LimitError(f"every row is longer than the {limit} tokens that the server takes; lower --max-length")
        rows = min(len(fitting), BATCHES * self._batch_size)
        return [fitting[row * len(fitting) // rows] for row in range(rows)]

    def _score(self, rows: list[Example]) -> Scores:
        return score(self._tuning.model, rows, self._batch_size, device_of(self._edge))

    def _score_without(self, rows: list[Example]) -> Scores:
        with without_adapter(self._tuning):
            return self._score(rows)

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def state(self) -> dict[str, Any]:
        """What a resumed run must know, as JSON."""
        untouched = vars(self.untouched) if self.untouched is not None else None
        return {"points": [point.model_dump() for point in self.points], "untouched": untouched}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.points = tuple(Watched.model_validate(point) for point in state["points"])
        self.untouched = Scores.restored(state["untouched"]) if state["untouched"] is not None else None


@contextmanager
def without_adapter(tuning: Tuning) -> Iterator[None]:
    """In here the model is as it was before anything was tuned."""
    if isinstance(tuning.model, peft.PeftModel):
        with tuning.model.disable_adapter():
            yield
        return
    tuned = tuning.values()
    tuning.load(tuning.initial)
    try:
        yield
    finally:
        tuning.load(tuned)


def _longest(example: Example) -> int:
    return max(len(sequence.ids) for sequence in (example.train, *example.choices))
