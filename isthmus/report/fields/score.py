"""How good a model is: what a report says of one evaluation, and of those before and after training.

Knows accuracies, losses and their intervals; scores nothing.
"""

from collections.abc import Sequence
from typing import Annotated, Self, TypeAlias

from pydantic import Field

from isthmus.report.fields.block import Amount, Block, Count, Share
from isthmus.report.interval import wilson

Change: TypeAlias = Annotated[float, Field(ge=-1, le=1)]


class Score(Block):
    """One evaluation: mean loss in nats per token that carries loss; accuracy with its 95 % interval."""

    loss: Amount | None
    accuracy: Share | None
    correct: Count | None = None
    accuracy_interval: tuple[Share, Share] | None = None

    @classmethod
    def of(cls, loss: float, correct: Sequence[bool]) -> Self:
        """The loss, and the accuracy of the rows that have choices: whether each was answered right."""
        if not correct:
            return cls(loss=loss, accuracy=None)
        right = sum(correct)
        interval = wilson(right, len(correct))
        return cls(loss=loss, accuracy=right / len(correct), correct=right, accuracy_interval=interval)

    def in_words(self) -> str:
        """Accuracy, where there is one, and loss, for a terminal."""
        loss = f"loss {self.loss:.4f} nats per token"
        if self.accuracy is None or self.accuracy_interval is None:
            return loss
        low, high = (100 * limit for limit in self.accuracy_interval)
        return f"accuracy {100 * self.accuracy:.1f} % [{low:.1f}, {high:.1f}], {loss}"


class Evaluation(Block):
    """Scores before and after training on the same rows; `paired` is the 95 % interval of the accuracy's rise."""

    rows: Count | None
    before: Score
    after: Score
    paired: tuple[Change, Change] | None = None
