"""The rows that a plan is made for.

Knows how long rows are and how many make a step; knows no text.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Batches of a run, as the ledger counts them.

    Attributes:
        lengths: real tokens of each row of one batch, in the batch's order (all of them count: prompts too).
        losses: positions of each row that carry loss.
        rows: rows in the data, so that epochs have a length; None: as many as the steps need once.
    """

    lengths: tuple[int, ...]
    losses: tuple[int, ...]
    rows: int | None = None
