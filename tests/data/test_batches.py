"""Batches: every row once an epoch, the same rows at the same step whatever came before, little padding."""

import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import UsageError
from isthmus.training.batches import batch_at, epoch_batches, split_rows

LENGTHS = tuple(5 + (index * 37) % 90 for index in range(1003))


@given(st.lists(st.integers(1, 50), max_size=400), st.integers(1, 9), st.integers(0, 5), st.integers(0, 3))
def test_every_row_stands_in_exactly_one_batch_of_an_epoch(
    lengths: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    batches = epoch_batches(lengths, batch_size, seed, epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert len(batches) == -(-len(lengths) // batch_size)


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """The share of positions, 0 to 1, that would be padding if each batch were padded to its longest row."""
    real = sum(lengths[row] for batch in batches for row in batch)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches if batch)
    return 1 - real / padded if padded else 0.0


def test_the_batches_depend_on_the_arguments_and_on_nothing_else() -> None:
    expected = epoch_batches(LENGTHS, 8, 3, 1)
    random.seed(1)
    np.random.seed(1)
    assert epoch_batches(LENGTHS, 8, 3, 1) == expected
    assert epoch_batches(LENGTHS, 8, 3, 2) != expected
    assert epoch_batches(LENGTHS, 8, 4, 1) != expected


def test_batches_do_not_come_in_order_of_length() -> None:
    means = [sum(LENGTHS[row] for row in batch) / len(batch) for batch in epoch_batches(LENGTHS, 8, 0, 0)]
    falls = sum(later < earlier for earlier, later in pairwise(means))
    assert falls > len(means) / 4


def test_a_step_counts_on_over_the_epochs_in_any_order_of_asking() -> None:
    epochs = [batch for epoch in range(3) for batch in epoch_batches(LENGTHS, 8, 7, epoch)]
    steps = random.Random(0).sample(range(len(epochs)), 40)
    assert [batch_at(LENGTHS, 8, 7, step) for step in steps] == [epochs[step] for step in steps]


def test_changing_a_returned_batch_changes_no_later_one() -> None:
    batch_at(LENGTHS, 8, 0, 0).clear()
    assert batch_at(LENGTHS, 8, 0, 0) == epoch_batches(LENGTHS, 8, 0, 0)[0]


def test_batches_of_like_length_pad_far_less_than_random_ones() -> None:
    rows = random.Random(0).sample(range(len(LENGTHS)), len(LENGTHS))
    at_random = [rows[first : first + 8] for first in range(0, len(rows), 8)]
    assert padding_share(LENGTHS, epoch_batches(LENGTHS, 8, 0, 0)) < padding_share(LENGTHS, at_random) / 5


def test_the_padding_share_is_the_padded_positions_over_all_positions() -> None:
    assert padding_share([1, 3, 4], [[0, 1], [2]]) == pytest.approx(2 / 10)
    assert padding_share([1, 3, 4], []) == 0


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 50))
def test_microbatches_keep_the_order_and_differ_by_at_most_one_row(rows: list[int], parts: int) -> None:
    pieces = split_rows(rows, parts)
    assert [row for piece in pieces for row in piece] == rows
    assert len(pieces) == min(parts, len(rows))
    sizes = [len(piece) for piece in pieces]
    assert not sizes or (min(sizes) >= 1 and max(sizes) - min(sizes) <= 1)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="batch size"):
        epoch_batches(LENGTHS, 0, 0, 0)
    with pytest.raises(UsageError, match="batch size"):
        batch_at(LENGTHS, 0, 0, 0)
    with pytest.raises(UsageError, match="no rows"):
        batch_at([], 8, 0, 0)
    with pytest.raises(UsageError, match="microbatches"):
        split_rows([1], 0)
