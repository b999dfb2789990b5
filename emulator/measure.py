"""How far an emulator is from its span, on rows that neither was made with.

Knows a pair and rows; knows no files, and nothing of how the emulator was made.
"""

import math
from collections.abc import Sequence

import torch
from rich.console import Console

from emulator.costs import Costs
from emulator.pair import Pair
from isthmus.emulated.recipe import Distance
from isthmus.errors import ModelError
from isthmus.report.interval import ratio_interval
from isthmus.training.collate import Batch
from isthmus.training.data import TokenSequence
from isthmus.training.progress import meter

AT_ONCE = 256
"""Tokens that are measured at once, few enough that progress shows on a slow machine; a longer row goes alone."""


def batches(rows: Sequence[TokenSequence], tokens: int) -> list[Batch]:
    """Rows of like length together, at most so many tokens with padding, in an order that only the rows decide."""
    groups: list[list[TokenSequence]] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if groups and (len(groups[-1]) + 1) * len(row.ids) <= tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [Batch.of(group) for group in groups]


@torch.no_grad()
def measure(
    pair: Pair, rows: Sequence[TokenSequence], text: str, console: Console, costs: Costs | None = None
) -> Distance:
    """Distance, losses and the gap between them, of a pair whose repeated blocks have been put in.

    Args:
        pair: both models.
        rows: of the owner's public text, held out.
        text: SHA-256 of the file that they are from.
        console: where progress is shown.
        costs: counts what is spent.

    Raises:
        ModelError: what the model or the emulator makes of the rows is not finite.
    """
    errors, squares, tokens = 0.0, 0.0, 0
    counted: list[int] = []
    nats: list[float] = []
    nats_of_span: list[float] = []
    costs = Costs(pair) if costs is None else costs
    with meter(console, "measure", len(rows)) as progress, costs.stage("measure"):
        for batch in batches(rows, AT_ONCE):
            with costs.seconds("measure", "cloud_forward_s"):
                compared = pair.compare(batch, both_losses=True)
            costs.compared("measure", batch, both_heads=True)
            widths = batch.wanted_BT.sum(1).tolist()
            counted += widths
            nats += _by_row(compared.nats_K, widths)
            nats_of_span += _by_row(compared.nats_of_span_K, widths)
            weight = compared.values * float(compared.mean_square)
            errors, squares = errors + float(compared.hidden) * weight, squares + weight
            tokens += compared.values
            progress.update(len(counted), "held-out rows")
    loss, loss_of_span = math.fsum(nats) / sum(counted), math.fsum(nats_of_span) / sum(counted)
    hidden = errors / squares if squares else math.nan
    _check_finite(hidden, loss, loss_of_span)
    return Distance(
        text=text,
        rows=len(rows),
        tokens=tokens,
        hidden=hidden,
        loss=loss,
        loss_of_span=loss_of_span,
        gap_interval=_interval(nats, nats_of_span, counted),
    )


def _by_row(nats_K: torch.Tensor | None, widths: list[int]) -> list[float]:
    """The sum of each row's."""
    return [] if nats_K is None else [float(row.sum(dtype=torch.float64)) for row in nats_K.cpu().split(widths)]  # type: ignore[no-untyped-call]


def _interval(nats: list[float], nats_of_span: list[float], counted: list[int]) -> tuple[float, float] | None:
    """Limits of the gap at 95 %, paired by row; None for a single row, which has none."""
    if len(counted) < 2:
        return None
    _, low, high = ratio_interval([one - other for one, other in zip(nats, nats_of_span, strict=True)], counted)
    return low, high


def _check_finite(hidden: float, loss: float, loss_of_span: float) -> None:
    if not math.isfinite(loss_of_span):
        raise ModelError(f"the model's own loss on the held-out rows is {loss_of_span}: check the model's weights")
    if not math.isfinite(hidden + loss):
        raise ModelError(
            f"the emulator's loss on the held-out rows is {loss} and its distance {hidden}: give it more blocks, ranks "
            "or bits, or distil it with less --lr"
        )
