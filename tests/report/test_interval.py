"""Intervals equal published worked examples and keep inside what is possible."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.report.interval import paired, ratio_interval, wilson


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


ROWS, REPEATS = 120, 1_000


def coverage(intervals: list[tuple[float, float, float]], truth: float) -> float:
    return sum(low <= truth <= high for _, low, high in intervals) / len(intervals)


def test_a_mean_has_the_interval_of_the_textbook() -> None:
    expected = 1.959964 * math.sqrt(((1 + 4 + 9) / 3) / 4)
    assert ratio_interval([1.0, 2.0, 3.0, 6.0], [1] * 4) == pytest.approx(
        (3.0, 3.0 - expected, 3.0 + expected), rel=1e-6
    )


def test_the_interval_of_a_mean_covers_it_in_about_95_of_100_samples_of_skewed_figures() -> None:
    samples = np.random.default_rng(1).gamma(2.0, 0.5, (REPEATS, ROWS)).tolist()
    assert 0.92 <= coverage([ratio_interval(sample, [1] * ROWS) for sample in samples], 1.0) <= 0.98


def test_the_interval_of_a_ratio_covers_it_where_long_rows_differ_from_short_ones() -> None:
    """Nats grow with the square of the tokens, so that the ratio is neither a mean of ratios nor free of the tokens."""
    random = np.random.default_rng(2)
    tokens = random.integers(1, 20, (REPEATS, ROWS))
    nats = 0.1 * tokens**2 + random.normal(0, 1, tokens.shape)
    intervals = [ratio_interval(*pair) for pair in zip(nats.tolist(), tokens.tolist(), strict=True)]
    assert 0.92 <= coverage(intervals, 0.1 * (19 * 20 * 39 / 6) / (19 * 20 / 2)) <= 0.98


def test_pairing_the_rows_of_two_scores_narrows_their_difference_and_still_covers_it() -> None:
    random = np.random.default_rng(3)
    tokens = random.integers(1, 20, (REPEATS, ROWS))
    before = tokens * random.gamma(2.0, 1.0, tokens.shape)
    after = before - tokens * random.normal(0.05, 0.2, tokens.shape)
    paired_rows = list(zip((after - before).tolist(), tokens.tolist(), strict=True))
    assert 0.92 <= coverage([ratio_interval(*pair) for pair in paired_rows], -0.05) <= 0.98
    _, low, high = ratio_interval(*paired_rows[0])
    _, low_alone, high_alone = ratio_interval(after[0].tolist(), tokens[0].tolist())
    assert high - low < (high_alone - low_alone) / 3


def test_a_ratio_is_exactly_the_sums_quotient_whatever_the_rows_are() -> None:
    nats, tokens = [0.1, 0.2, 1e9, 0.3], [3, 1, 2, 5]
    assert ratio_interval(nats, tokens)[0] == sum(nats) / sum(tokens)
    assert ratio_interval([0.5, 1.0, 1.5], [1, 2, 3]) == (0.5, 0.5, 0.5)


def test_what_has_no_spread_or_no_ratio_is_refused() -> None:
    for values in ([], [1.0]):
        with pytest.raises(ValueError, match="no interval"):
            ratio_interval(values, [1] * len(values))
    with pytest.raises(ValueError, match="2 numerators and 1 denominators"):
        ratio_interval([1.0, 2.0], [1])
    for tokens in ([1, 0], [2, -1]):
        with pytest.raises(ValueError, match="not above 0"):
            ratio_interval([1.0, 2.0], tokens)
