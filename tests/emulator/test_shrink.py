"""A method and its dial come to exactly these blocks and ranks."""

from dataclasses import replace
from typing import Any

import pytest

from isthmus.cut import Cut
from isthmus.emulated.shrink import make_recipe
from isthmus.linears import Linear

LINEAR = Linear(inputs=100, outputs=50, transposed=False, shared=("a",))


def kept(count: int, blocks: int, method: Any = "drop") -> tuple[int | None, ...]:
    return make_recipe(method, Cut(0, 0), blocks, count, None, {}).blocks


def standing(count: int, blocks: int) -> list[int]:
    return [block for block in kept(count, blocks) if block is not None]


@pytest.mark.parametrize(
    ("count", "blocks", "places"),
    [
        (1, 5, [2]),
        (1, 6, [2]),
        (2, 6, [0, 5]),
        (3, 6, [0, 2, 5]),  # 2.5 goes to the even
        (3, 8, [0, 4, 7]),  # and so does 3.5
        (4, 6, [0, 2, 3, 5]),
        (5, 7, [0, 2, 3, 4, 6]),  # 1.5 up and 4.5 down, and no two places are one
        (8, 20, [0, 3, 5, 8, 11, 14, 16, 19]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_blocks_are_kept_at_even_distances_and_ties_go_to_the_even_place(
    count: int, blocks: int, places: list[int]
) -> None:
    assert standing(count, blocks) == places


def test_however_many_blocks_are_asked_for_so_many_are_kept() -> None:
    for blocks in range(1, 34):
        for count in range(1, blocks + 1):
            assert len(set(standing(count, blocks))) == count, (count, blocks)


def test_blocks_are_numbered_as_in_the_whole_model() -> None:
    assert make_recipe("drop", Cut(2, 1), 9, 2, None, {}).blocks == (2, None, None, None, None, 7)


def test_a_shared_block_stands_at_every_place_that_it_is_nearest_to_and_the_lower_of_two() -> None:
    assert kept(2, 7, "share") == (0, 0, 0, 0, 6, 6, 6)
    assert kept(3, 6, "share") == (0, 0, 2, 2, 5, 5)
    assert kept(1, 4, "share") == (1, 1, 1, 1)


@pytest.mark.parametrize(("keep", "count"), [(0.5, 3), (0.01, 1), (0.99, 6), (0.25, 2)])
def test_a_share_of_the_blocks_is_the_nearest_whole_number_and_never_none(keep: float, count: int) -> None:
    assert len(standing(keep, 6)) == count  # type: ignore[arg-type]


def test_a_rank_leaves_at_most_the_share_of_parameters_and_at_least_one() -> None:
    linears = {(0, "a"): LINEAR, (1, "a"): LINEAR, (0, "b"): replace(LINEAR, outputs=1), (1, "b"): LINEAR}
    ranks = make_recipe("rank", Cut(0, 0), 2, 0.5, None, linears).ranks
    assert ranks == {"a": 16, "b": 1}  # 0.5 * 5000 / 150 = 16.7; of differing blocks the thinner


def test_a_module_that_some_block_does_not_run_once_stays_as_it_is() -> None:
    linears = {(0, "a"): LINEAR, (1, "a"): LINEAR, (1, "b"): LINEAR}
    assert make_recipe("rank", Cut(0, 0), 2, 0.5, None, linears).ranks.keys() == {"a"}
