"""How far an emulator is from its span, on rows that neither was made with.

Knows a pair and rows; knows no files, and nothing of how the emulator was made.
"""

from collections.abc import Sequence

import torch
from rich.console import Console

from emulator.pair import Pair
from isthmus.emulated.recipe import Distance
from isthmus.training.collate import Batch
from isthmus.training.data import TokenSequence
from isthmus.training.progress import meter

BATCH_SIZE = 8


def batches(rows: Sequence[TokenSequence]) -> list[Batch]:
    """Rows of like length together, in an order that only they decide."""
    ordered = sorted(rows, key=lambda row: len(row.ids))
    return [Batch.of(ordered[start : start + BATCH_SIZE]) for start in range(0, len(ordered), BATCH_SIZE)]


@torch.no_grad()
def measure(pair: Pair, rows: Sequence[TokenSequence], text: str, console: Console) -> Distance:
    """Distance and losses of a pair; repeated blocks have been put in.

    Args:
        pair: both models.
        rows: of the owner's public text, held out.
        text: SHA-256 of the file that they are from.
        console: where progress is shown.
    """
    hidden = loss = loss_of_span = 0.0
    counted = tokens = 0
    todo = batches(rows)
    with meter(console, "measure", len(todo)) as progress:
        for done, batch in enumerate(todo, start=1):
            compared = pair.compare(batch, both_losses=True)
            hidden += float(compared.hidden) * compared.values
            loss += float(compared.loss)
            loss_of_span += float(compared.loss_of_span or 0.0)
            tokens, counted = tokens + compared.values, counted + compared.counted
            progress.update(done)
    return Distance(
        text=text,
        rows=len(rows),
        tokens=tokens,
        hidden=hidden / tokens,
        loss=loss / counted,
        loss_of_span=loss_of_span / counted,
    )
