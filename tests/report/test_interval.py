"""Intervals equal published worked examples and keep inside what is possible."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.report.interval import paired, wilson


@pytest.mark.parametrize(
    ("correct", "rows", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_intervals_of_newcombes_table(correct: int, rows: int, low: float, high: float) -> None:
    """Newcombe, Two-sided confidence intervals for the single proportion, Statistics in Medicine 17 (1998) 857-872."""
    assert wilson(correct, rows) == pytest.approx((low, high), abs=5e-5)


def answers(both: int, gained: int, lost: int, neither: int) -> tuple[list[bool], list[bool]]:
    before = [True] * both + [False] * gained + [True] * lost + [False] * neither
    after = [True] * both + [True] * gained + [False] * lost + [False] * neither
    return before, after


@pytest.mark.parametrize(
    ("cells", "difference", "low", "high"),
    [((59, 6, 16, 80), -0.0621, -0.1186, -0.0046), ((1, 1, 7, 12), -0.2857, -0.5069, -0.0256)],
)
def test_paired_gives_the_published_square_and_add_intervals(
    cells: tuple[int, int, int, int], difference: float, low: float, high: float
) -> None:
    """Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables (2017), chapter 8: Cavo, Bentur."""
    assert paired(*answers(*cells)) == pytest.approx((difference, low, high), abs=5e-5)


def test_where_no_row_changed_there_is_still_an_interval_around_nothing() -> None:
    difference, low, high = paired(*answers(50, 0, 0, 50))
    assert difference == 0
    assert -0.05 < low < 0 < high < 0.05
    assert paired([True] * 9, [True] * 9)[0] == 0


cells = st.integers(0, 200)


@given(cells, cells, cells, cells)
def test_intervals_contain_the_estimate_mirror_and_stay_possible(both: int, gained: int, lost: int, none: int) -> None:
    before, after = answers(both, gained, lost, none)
    if not before:
        return
    difference, low, high = paired(before, after)
    assert -1 <= low <= difference <= high <= 1
    assert paired(after, before) == pytest.approx((-difference, -high, -low))
    share = sum(after) / len(after)
    low, high = wilson(sum(after), len(after))
    assert 0 <= low <= share <= high <= 1


def test_more_confidence_is_a_wider_interval() -> None:
    narrow, wide = wilson(30, 40, 0.5), wilson(30, 40, 0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_what_is_no_proportion_is_refused() -> None:
    for correct, rows in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="no proportion"):
            wilson(correct, rows)
    with pytest.raises(ValueError, match="confidence"):
        wilson(1, 2, 1.0)
    for before, after in (([], []), ([True], [True, False])):
        with pytest.raises(ValueError, match="paired"):
            paired(before, after)
