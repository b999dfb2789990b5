"""Which rows form which batch: random, yet with rows of like length together, so that little is padded.

Knows lengths and seeds; nothing of tokens or tensors. Everything here is a pure function of its arguments, so a run
that resumes at any step meets the same rows.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from isthmus.errors import UsageError

POOL_BATCHES = 50  # large enough that lengths match within a batch, small enough that epochs differ


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch: shuffle, sort by length within pools of 50 batches, cut, shuffle the batches.

    Args:
        lengths: tokens of each row.
        batch_size: rows in a batch; one batch of the epoch may hold fewer.
        seed: of the run, not negative.
        epoch: 0 for the first.

    Returns:
        Row numbers; every row stands in exactly one batch.

    Raises:
        UsageError: the batch size is below 1.
    """
    if batch_size < 1:
        raise UsageError(f"the batch size must be at least 1, not {batch_size}")
    rng = np.random.default_rng((seed, epoch))
    order: list[int] = rng.permutation(len(lengths)).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(order), POOL_BATCHES * batch_size):
        pool = sorted(order[start : start + POOL_BATCHES * batch_size], key=lengths.__getitem__)
        batches += [pool[first : first + batch_size] for first in range(0, len(pool), batch_size)]
    return [batches[index] for index in rng.permutation(len(batches))]


def batch_at(lengths: Sequence[int], batch_size: int, seed: int, step: int) -> list[int]:
    """The batch of global step `step`, counted from 0 over all epochs, each of which follows the one before it.

    Calls within one epoch share its batches; pass `lengths` as a tuple to keep a call cheap.

    Raises:
        UsageError: there are no rows, or the batch size is below 1.
    """
    if not lengths:
        raise UsageError("there are no rows to form a batch of; give a data file with rows")
    steps_per_epoch = -(-len(lengths) // max(batch_size, 1))
    epoch, position = divmod(step, steps_per_epoch)
    return list(_cached_epoch(tuple(lengths), batch_size, seed, epoch)[position])


@lru_cache(maxsize=2)
def _cached_epoch(lengths: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    return epoch_batches(lengths, batch_size, seed, epoch)


def split_rows(indices: list[int], parts: int) -> list[list[int]]:
    """Cut a batch into microbatches: in order, sizes differing by at most one, none of them empty.

    Returns:
        `parts` lists, or as many as there are rows where those are fewer.

    Raises:
        UsageError: `parts` is below 1.
    """
    if parts < 1:
        raise UsageError(f"the number of microbatches must be at least 1, not {parts}")
    count = min(parts, len(indices))
    bounds = [len(indices) * part // count for part in range(count + 1)] if count else []
    return [indices[first:last] for first, last in pairwise(bounds)]
