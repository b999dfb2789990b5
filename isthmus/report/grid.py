"""Tables of a page: cells under heads, some of them greyed.

Knows text; knows no report and no HTML.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from isthmus.report.units import NONE

_UNIT: Final = re.compile(r"(?<=\d) +(?=[A-Za-z%])")
"""Between a figure and its unit, where no line may break."""


@dataclass(frozen=True)
class Cell:
    """What is said, and whether it counts for little."""

    text: str
    greyed: bool = False


@dataclass(frozen=True)
class Grid:
    """Cells under their heads; the first column names the rows."""

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def cell(text: str, greyed: bool = False) -> Cell:
    """A cell in which figures stay with their units."""
    return Cell(_UNIT.sub("\N{NO-BREAK SPACE}", text), greyed)


def plain_grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Grid:
    """Text under heads; what does not exist is greyed."""
    return Grid(heads, [[cell(text, text == NONE) for text in row] for row in rows])
