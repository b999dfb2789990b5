"""The emulator that a plan of `--method offsite` is made for: one that was built, or one that might be.

Knows recipes; reads no weights. `drop:0.5` is written as `cloud_node emulator build --method drop --keep 0.5` has it,
`quant:4` as `--method quant --bits 4`, and `rank:0.5:8` as `--method rank --keep 0.5 --bits 8`.
"""

import re
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedConfig

from isthmus.cut import Cut
from isthmus.emulated.recipe import Emulator, Recipe
from isthmus.emulated.shrink import make_recipe
from isthmus.errors import UsageError
from isthmus.linears import linears_of
from isthmus.planning.placed import place_whole

WRITTEN: Final = re.compile(
    r"(?P<method>drop|share|rank):(?P<keep>[0-9.]+)(:(?P<bits>[48]))?|(?P<quant>quant):(?P<few>[48])"
)


def recipe_for(told: str, configuration: PreTrainedConfig, cut: Cut) -> Recipe:
    """The recipe of the emulator that was told.

    Args:
        told: an emulator's folder, or METHOD:KEEP[:BITS].
        configuration: of the model.
        cut: of it.

    Raises:
        UsageError: it is neither, or for another cut, or makes no sense.
        BundleError: the folder holds no emulator.
        CutError, ModelError: the model cannot be cut so.
    """
    written = WRITTEN.fullmatch(told)
    if written is None:
        return _built(told, cut)
    model, found = place_whole(configuration, torch.float32)
    method: Any = written["method"] or written["quant"]
    bits: Any = int(written["bits"] or written["few"] or 0) or None
    linears = linears_of(model, found, cut.span(len(found.blocks)))
    return make_recipe(method, cut, len(found.blocks), _keep(written["keep"]), bits, linears)


def _keep(text: str | None) -> float | None:
    """A whole number is so many blocks, as `emulator build --keep` reads it."""
    if text is None:
        return None
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise UsageError(f"--emulator keeps {text}, which is no number; write drop:0.5") from None


def _built(told: str, cut: Cut) -> Recipe:
    folder = Path(told).expanduser()
    if not folder.is_dir():
        raise UsageError(f"--emulator {told!r:.80} is no folder, and not METHOD:KEEP or quant:BITS, such as drop:0.5")
    recipe = Emulator.load(folder).recipe
    if Cut.parse(recipe.cut) != cut:
        raise UsageError(f"the emulator is for cut {recipe.cut}, not {cut}; give --cut {recipe.cut}")
    return recipe
