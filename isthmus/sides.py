"""What stays of a model on either side of a cut.

Knows modules; knows no weights and no files.
"""

from torch import nn

from isthmus.blocks import BlockList
from isthmus.cut import Cut
from isthmus.hollow import hollow_out


def keep_ends(found: BlockList, cut: Cut) -> None:
    """Take the span's blocks out of a model.

    Raises:
        CutError: the cut does not fit the model.
    """
    for number in cut.span(len(found.blocks)):
        found.replace(number)


def keep_span(model: nn.Module, found: BlockList, cut: Cut) -> None:
    """Take everything that has weights out of a model but the span's blocks.

    Raises:
        CutError: as `keep_ends`.
    """
    for number in cut.ends(len(found.blocks)):
        found.replace(number)
    hollow_out(model, found)
