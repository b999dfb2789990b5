"""A look at the true span while the emulator is tuned on: does plugging in pay so far?

Knows rows and an edge model whose true span can be at hand; each look sends hidden states, which the ledger counts. A
look that fails ends the looks and never the run, and none waits where the user asks to stop: tuning needs no server.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import peft
from rich.console import Console

from edge_client.counting import Counting
from edge_client.edge_flops import count_edge_flops
from edge_client.edge_model import EdgeModel
from edge_client.tuning import Tuning
from isthmus.errors import IsthmusError, LimitError
from isthmus.ledger.flops import ModelFlops
from isthmus.ledger.record import Ledger
from isthmus.report.change import Change, gain_in_words, points
from isthmus.report.fields.offsite import Watched
from isthmus.report.verdict import Rises
from isthmus.training.data import Example
from isthmus.training.scoring import Scores
from isthmus.training.stopping import stopping

BATCHES = 4
"""How many scoring requests one look takes."""

HEED_S = 0.1
"""Seconds between looks at whether the user asks to stop."""


class Watch:
    """Scores a few rows on the true span every few steps.

    Attributes:
        points: what it saw.
        seconds: what all looks took.
        untouched: the same rows on the true span without the adapter, which every look is compared with; None before
            the first.
    """

    def __init__(
        self,
        every: int,
        edge: EdgeModel,
        tuning: Tuning,
        ledger: Ledger,
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
        self._ledger = ledger
        self._flops: dict[bool, ModelFlops] = {}
        self._examples = examples
        self._batch_size = batch_size
        self._console = console
        self._open_line = open_line
        self._gone = False
        self.points: tuple[Watched, ...] = ()
        self.seconds = 0.0
        self.untouched: Scores | None = None

    def open(self) -> None:
        """Let the true span be at hand, unless it is.

        Raises:
            IsthmusError: whatever stands in the way.
        """
        if not self._edge.true_span:
            self._open_line()

    def look(self, step: int, last: bool = False) -> bool:
        """Score the true span if it is due after `step` steps, and say so where the adapter made it worse.

        Returns:
            Whether it was due.
        """
        due = last or step % self._every == 0
        if self._gone or not due or any(point.step == step for point in self.points):
            return False
        began = time.perf_counter()
        with stopping() as asked, _hung_up_when(asked, self._hang_up):
            found = self._found()
        self.seconds += time.perf_counter() - began
        if isinstance(found, IsthmusError):
            self._gone = True
            if not asked:
                self._say(f"step {step}: no more looks at the true span: {_reason(found)}; tuning goes on")
        else:
            self._note(step, *found, last)
        if asked:
            signal.raise_signal(asked[0])  # to whom it would have come, had no look been under way
        return True

    def _found(self) -> tuple[Scores, Scores] | IsthmusError:
        try:
            return self._scored()
        except IsthmusError as error:
            return error

    def _note(self, step: int, now: Scores, untouched: Scores, last: bool) -> None:
        self.points = (*self.points, Watched(step=step, loss=now.loss, accuracy=now.accuracy))
        rises = Rises.between(untouched, now)
        change = Change(points(untouched.accuracy, now.accuracy), now.loss - untouched.loss, rises)
        if last or change.found("worse"):
            self._say(f"step {step}, a look at {now.rows} rows: {gain_in_words(change)}")

    def _hang_up(self) -> None:
        if self._edge.link is not None:
            self._edge.link.close()

    def _scored(self) -> tuple[Scores, Scores]:
        """The true span with the adapter, and without."""
        self.open()
        rows = self._rows()
        with self._edge.plugged_in():
            now = self._score(rows)
            if self.untouched is None or self.untouched.tokens != now.tokens:  # a server's limit may have changed
                self.untouched = self._score_without(rows) if self._moved() else now
        return now, self.untouched

    def _moved(self) -> bool:
        """Whether the model does anything else than it did untouched."""
        return bool(self._tuning.changed() or self._tuning.virtual_tokens)

    def _rows(self) -> list[Example]:
        """Rows spread over those that the server takes."""
        limit, virtual = self._edge.row_tokens, self._tuning.virtual_tokens
        fitting = [example for example in self._examples if limit is None or _longest(example) + virtual <= limit]
        if not fitting:
            raise LimitError(f"every row is longer than the {limit} tokens that the server takes; lower --max-length")
        rows = min(len(fitting), BATCHES * self._batch_size)
        return [fitting[row * len(fitting) // rows] for row in range(rows)]

    def _score(self, rows: list[Example], adapted: bool = True) -> Scores:
        def flops() -> ModelFlops:
            if adapted not in self._flops:
                self._flops[adapted] = count_edge_flops(self._edge, self._tuning)
            return self._flops[adapted]

        return Counting(self._edge, self._tuning, self._ledger, flops).score("look", rows, self._batch_size)

    def _score_without(self, rows: list[Example]) -> Scores:
        with without_adapter(self._tuning):
            return self._score(rows, adapted=False)

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def state(self) -> dict[str, Any]:
        """What a resumed run must know, as JSON."""
        untouched = vars(self.untouched) if self.untouched is not None else None
        seen = [point.model_dump() for point in self.points]
        return {"points": seen, "seconds": self.seconds, "untouched": untouched}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.points = tuple(Watched.model_validate(point) for point in state["points"])
        self.seconds = state.get("seconds", 0.0)  # which older runs lack
        self.untouched = Scores.restored(state["untouched"]) if state["untouched"] is not None else None


@contextmanager
def _hung_up_when(asked: list[int], hang_up: Callable[[], None]) -> Iterator[None]:
    """In here whatever waits for an answer fails as soon as the user has asked to stop."""
    over = threading.Event()

    def heed() -> None:
        while not over.wait(HEED_S):
            if asked:
                hang_up()
                return

    heeding = threading.Thread(target=heed, name="look", daemon=True)
    heeding.start()
    try:
        yield
    finally:
        over.set()
        heeding.join()


def _reason(error: IsthmusError) -> str:
    """Without the remedies of a run that needs its server."""
    return "the server is gone, or does not answer" if error.retryable else str(error)


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
