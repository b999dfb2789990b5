"""How fast a device goes through blocks, from passes that were timed.

Knows timed passes and least squares; times nothing itself.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from isthmus.planning.machines import PassSpeed


@dataclass(frozen=True)
class Timed:
    """One pass through so many blocks: its FLOPs, of them the output layer's, and the seconds it took."""

    blocks: float
    flops: float
    head_flops: float
    seconds: float


def undisturbed(seconds: Sequence[float]) -> float:
    """The median of the faster half of repeats: what disturbs a computation only ever slows it."""
    faster = sorted(seconds)[: (len(seconds) + 1) // 2]
    middle = len(faster) // 2
    return faster[middle] if len(faster) % 2 else (faster[middle - 1] + faster[middle]) / 2


def not_negative(rows: Sequence[Sequence[float]], seconds: Sequence[float], needed: Sequence[int] = ()) -> list[float]:
    """Factors of columns, none below 0 and those `needed` above it, whose sums come nearest to what was timed.

    Near in proportion: ten per cent off counts the same of a short pass as of a long one. Columns are few, so every
    choice of those that count is tried.
    """
    timed = torch.tensor(seconds, dtype=torch.float64)[:, None]
    shares = torch.tensor(rows, dtype=torch.float64) / timed
    columns = [column for column in range(shares.shape[1]) if column not in needed]
    best, found = float("inf"), [0.0] * shares.shape[1]
    for count in range(len(columns) + 1):
        for more in itertools.combinations(columns, count):
            chosen = sorted((*needed, *more))
            if not chosen:
                continue
            factors = _least_squares(shares[:, chosen])
            off = float((shares[:, chosen] @ factors - 1).square().sum())
            if bool((factors > 0).all()) and off < best:
                best = off
                found = [0.0] * shares.shape[1]
                for column, factor in zip(chosen, factors.tolist(), strict=True):
                    found[column] = factor
    return found


def _least_squares(shares: torch.Tensor) -> torch.Tensor:
    """Factors of columns that differ by many orders of magnitude, for sums of 1."""
    scale = shares.abs().amax(0).clamp_min(1e-300)
    factors: torch.Tensor = torch.linalg.lstsq(shares / scale, torch.ones(len(shares), 1, dtype=shares.dtype)).solution
    return factors[:, 0] / scale


def pass_speed(timed: Sequence[Timed], apart: bool = True) -> PassSpeed:
    """The speed that explains timed passes best.

    Args:
        timed: passes of different sizes.
        apart: tell what a call takes from what each of its blocks does; needs passes through different numbers of them.
    """
    rows = [[float(apart), one.blocks, one.flops - one.head_flops, one.head_flops] for one in timed]
    seconds = [one.seconds for one in timed]
    headed = any(one.head_flops for one in timed)
    call_s, block_s, of_blocks, of_head = not_negative(rows, seconds, needed=(2, 3) if headed else (2,))
    if not of_blocks:  # the output layer's part is too small to be told apart
        rows = [[float(apart), one.blocks, one.flops, 0.0] for one in timed]
        call_s, block_s, of_blocks, of_head = not_negative(rows, seconds, needed=(2,))
    flops = 1 / of_blocks
    return PassSpeed(flops=flops, head_flops=1 / of_head if of_head else flops, block_s=block_s, call_s=call_s)
