"""A look at the true span while the emulator is tuned on: does plugging in pay so far?

Knows rows and an edge model whose true span is at hand; each look sends hidden states, which the ledger counts.
"""

from collections.abc import Sequence

from rich.console import Console

from edge_client.edge_model import EdgeModel, device_of
from edge_client.tuning import Tuning
from isthmus.errors import UnreachableError
from isthmus.report.fields.offsite import Watched
from isthmus.training.data import Example
from isthmus.training.scoring import score

BATCHES = 4
"""How many scoring requests one look takes."""


class Watch:
    """Scores a few rows on the true span every few steps; `points` are what it saw."""

    def __init__(
        self,
        every: int,
        edge: EdgeModel,
        tuning: Tuning,
        examples: Sequence[Example],
        batch_size: int,
        console: Console,
    ) -> None:
        """Look every `every` steps at rows spread over `examples`, in `BATCHES` requests of `batch_size`."""
        self._every = every
        self._edge = edge
        self._tuning = tuning
        rows = min(len(examples), BATCHES * batch_size)
        self._examples = [examples[row * len(examples) // rows] for row in range(rows)]
        self._batch_size = batch_size
        self._console = console
        self._gone = False
        self.points: tuple[Watched, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of a look."""
        return len(self._examples)

    def look(self, step: int, last: bool = False) -> None:
        """Score the true span if it is due after `step` steps, and say so where the adapter made it worse."""
        due = last or step % self._every == 0
        if self._gone or not due or any(point.step == step for point in self.points):
            return
        try:
            with self._edge.phase("eval"), self._edge.plugged_in():
                scores = score(self._tuning.model, self._examples, self._batch_size, device_of(self._edge))
        except UnreachableError as error:  # tuning needs no server
            self._gone = True
            self._say(f"step {step}: no more looks at the true span: {error}")
            return
        now = Watched(step=step, loss=scores.loss, accuracy=scores.accuracy if scores.correct else None)
        self.points = (*self.points, now)
        before = self.points[0]
        if now.loss > before.loss:
            self._say(
                f"step {step}: plugged into the true model the loss is {now.loss:.4f} on {self.rows} rows; it was "
                f"{before.loss:.4f} before: plugging in does not pay so far"
            )

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def state(self) -> list[dict[str, float | None]]:
        """What a resumed run must know, as JSON."""
        return [point.model_dump() for point in self.points]

    def load(self, state: list[dict[str, float | None]]) -> None:
        """Go on from a `state`."""
        self.points = tuple(Watched.model_validate(point) for point in state)
