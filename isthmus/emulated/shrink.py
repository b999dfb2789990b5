"""Recipes: which blocks of a span an emulator keeps, and how thin its linear modules become.

Knows block numbers and matrix sizes; knows no weights and no text.
"""

from collections.abc import Mapping, Sequence

from isthmus.cut import Cut
from isthmus.emulated.forms import Bits
from isthmus.emulated.recipe import Method, Recipe
from isthmus.errors import UsageError
from isthmus.linears import Linear, Site


def make_recipe(
    method: Method, cut: Cut, blocks: int, keep: float | None, bits: Bits | None, linears: Mapping[Site, Linear]
) -> Recipe:
    """The recipe that a method and its dial come to.

    Args:
        method: `drop` keeps evenly spaced blocks; `share` has each of them stand for its neighbours too, which restores
            the depth (CRaSh, Zhang et al., 2023); `rank` makes every linear module two thin ones; `quant` stores its
            weights in few bits.
        cut: of the model.
        blocks: of the whole model.
        keep: a whole number of blocks (int), or a share between 0 and 1 of the blocks, for `rank` of each linear
            module's parameters. None for `quant`.
        bits: of each weight of linear modules, with any method; None: as they are.
        linears: of the span's blocks that run once in a pass.

    Raises:
        CutError: the cut leaves no span.
        UsageError: keep or bits do not fit the method or the model.
    """
    span = cut.span(blocks)
    stand: Sequence[int | None] = span
    ranks: dict[str, int] = {}
    if method == "quant":
        if bits is None or keep is not None:
            raise UsageError("method quant takes --bits 4 or 8, and no --keep")
    elif keep is None:
        what = "a share of each matrix, such as 0.5" if method == "rank" else "so many blocks, or a share such as 0.5"
        raise UsageError(f"method {method} needs --keep: {what}")
    elif method == "rank":
        ranks = _ranks(keep, linears)
    else:
        stand = _stand(span, _kept(len(span), _count(len(span), keep)), repeat=method == "share")
    return Recipe(method=method, cut=str(cut), blocks=tuple(stand), ranks=ranks, bits=bits)


def _count(blocks: int, keep: float) -> int:
    """How many blocks are kept: of a share, the nearest whole number (ties: the even one), at least one."""
    if isinstance(keep, int) and 1 <= keep <= blocks:
        return keep
    if isinstance(keep, float) and 0 < keep < 1:
        return max(1, round(keep * blocks))
    raise UsageError(f"--keep {keep} is neither 1 to {blocks} blocks, which the span has, nor a share such as 0.5")


def _kept(blocks: int, count: int) -> list[int]:
    """Offsets of `count` evenly spaced blocks of `blocks`, first and last among them; of one, the (lower) middle.

    As Offsite-Tuning has it (Xiao, Lin and Han, 2023). Where a place is half way between two, `round` takes the even.
    """
    if count == 1:
        return [(blocks - 1) // 2]
    return [round(place * (blocks - 1) / (count - 1)) for place in range(count)]


def _stand(span: range, kept: Sequence[int], repeat: bool) -> list[int | None]:
    """What stands at each place: a kept block at its own; elsewhere nothing, or the nearest kept (ties: the lower)."""
    if repeat:
        return [span[min(kept, key=lambda offset: (abs(offset - place), offset))] for place in range(len(span))]
    return [span[place] if place in kept else None for place in range(len(span))]


def _ranks(keep: float, linears: Mapping[Site, Linear]) -> dict[str, int]:
    """Inner sizes that leave a share of each module's parameters, for modules that run once in every block."""
    if not isinstance(keep, float) or not 0 < keep < 1:
        raise UsageError(f"method rank keeps a share of each matrix, such as --keep 0.5; {keep} is not between 0 and 1")
    numbers = {number for number, _ in linears}
    sizes: dict[str, list[int]] = {}
    for (_, name), linear in linears.items():
        sizes.setdefault(name, []).append(_rank(keep, linear))
    return {name: min(found) for name, found in sizes.items() if len(found) == len(numbers)}


def _rank(keep: float, linear: Linear) -> int:
    whole = linear.inputs * linear.outputs
    return max(1, int(keep * whole / (linear.inputs + linear.outputs)))
