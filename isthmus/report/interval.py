"""Confidence intervals for accuracies and losses: of one score, and of the difference of two on the same rows.

Knows answers, right or wrong, and figures of independent rows; knows neither models nor data.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

_Z95 = NormalDist().inv_cdf(0.975)


def wilson(correct: int, rows: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a proportion.

    Method: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).

    Raises:
        ValueError: no rows, more correct than rows, or a confidence outside 0..1.
    """
    if not 0 <= correct <= rows or rows == 0:
        raise ValueError(f"{correct} correct of {rows} rows is no proportion")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = correct / rows
    centre = share + z * z / (2 * rows)
    spread = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    low = 0.0 if correct == 0 else (centre - spread) / scale
    high = 1.0 if correct == rows else (centre + spread) / scale
    return low, high


def paired(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float, float]:
    """How much the share of right answers rose on the same rows, and the rise's 95 % interval.

    Method: R. G. Newcombe, Improved confidence intervals for the difference between binomial proportions based on
    paired data, Statistics in Medicine 17 (1998) 2635-2650, method 10. Rows that are right both times, or wrong both
    times, narrow it; it stays an interval where no row changed.

    Returns:
        The difference after - before, its lower and its upper limit, each in -1..1.

    Raises:
        ValueError: no rows, or not the same number of them.
    """
    rows = len(before)
    if rows == 0 or len(after) != rows:
        raise ValueError(f"{rows} answers before and {len(after)} after cannot be paired")
    both = sum(1 for old, new in zip(before, after, strict=True) if old and new)
    right_before, right_after = sum(map(bool, before)), sum(map(bool, after))
    share_before, share_after = right_before / rows, right_after / rows
    low_before, high_before = wilson(right_before, rows)
    low_after, high_after = wilson(right_after, rows)
    phi = _phi(both, right_before, right_after, rows)
    difference = (right_after - right_before) / rows
    below = _distance(share_after - low_after, high_before - share_before, phi)
    above = _distance(high_after - share_after, share_before - low_before, phi)
    return difference, max(-1.0, difference - below), min(1.0, difference + above)


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float, float]:
    """sum(numerators) / sum(denominators) over independent rows and its 95 % interval, such as nats per token.

    With differences of two scores' nats as numerators it is the paired difference of their losses.
    Method: the ratio linearised (delta method), W. G. Cochran, Sampling Techniques, 3rd ed. (1977), chapter 6, and
    the normal approximation, which needs some dozens of rows.

    Returns:
        The ratio, its lower and its upper limit.

    Raises:
        ValueError: fewer than two rows, not one denominator for each numerator, or one that is not above 0.
    """
    rows = len(numerators)
    if rows < 2 or len(denominators) != rows:
        raise ValueError(f"{rows} numerators and {len(denominators)} denominators have no interval")
    if min(denominators) <= 0:
        raise ValueError(f"denominator {min(denominators)} is not above 0")
    whole = sum(denominators)
    ratio = sum(numerators) / whole
    left = math.fsum((n - ratio * d) ** 2 for n, d in zip(numerators, denominators, strict=True))
    spread = _Z95 * math.sqrt(left * rows / (rows - 1)) / whole
    return ratio, ratio - spread, ratio + spread


def _phi(both: int, first: int, second: int, rows: int) -> float:
    """The correlation of two columns of answers, corrected for continuity where it is positive."""
    marginals = first * (rows - first) * second * (rows - second)
    if marginals == 0:
        return 0.0
    neither = rows - first - second + both
    product = both * neither - (first - both) * (second - both)
    corrected = max(product - rows / 2, 0) if product > 0 else product
    return corrected / math.sqrt(marginals)


def _distance(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(0.0, one * one - 2 * phi * one * other + other * other))
