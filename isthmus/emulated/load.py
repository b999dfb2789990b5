"""Put an emulator into a model: empty, for whoever fills it, or loaded from its bundle together with the ends.

Knows recipes, blocks and their linear modules; knows no training, no text and no wire.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from isthmus.blocks import BlockList, find_blocks
from isthmus.cut import Cut
from isthmus.emulated.forms import form_of, shape_of
from isthmus.emulated.recipe import Emulator, Recipe
from isthmus.errors import BundleError
from isthmus.linears import is_linear
from isthmus.load import load_trimmed


@dataclass(frozen=True)
class Emulated:
    """The ends with an emulator in their middle.

    Attributes:
        model: frozen, in evaluation mode.
        found: its blocks; numbers are those of the whole model.
        cut: where the span was.
        about: what the emulator is.
    """

    model: PreTrainedModel
    found: BlockList
    cut: Cut
    about: Emulator


def load_emulated(directory: Path, dtype: torch.dtype | Literal["auto"]) -> Emulated:
    """Load the bundle in `directory`, which was verified before.

    Raises:
        BundleError: its recipe is malformed, or is for another model or other weights than those beside it.
        CutError, ModelError: as `isthmus.load.load_ends`.
    """
    about = Emulator.load(directory)
    repeated: dict[int, nn.Module] = {}

    def put_in(model: PreTrainedModel) -> BlockList:
        found = find_blocks(model)
        repeated.update(shape_span(found, about.recipe))
        _check_shapes(model, directory / "model.safetensors")
        return found

    model, found = load_trimmed(directory, dtype, put_in)
    repeat_blocks(found, about.recipe, repeated)
    return Emulated(model, found, Cut.parse(about.recipe.cut), about)


def shape_span(found: BlockList, recipe: Recipe) -> dict[int, nn.Module]:
    """Put empty forms and pass-throughs into a model's span; blocks that stay as they are keep their weights.

    Returns:
        By place, the blocks that shall have the weights of another: they are put in by `repeat_blocks`, once the others
        are filled, so that whoever loads weights meets each but once. A pass-through stands there meanwhile.

    Raises:
        BundleError: the recipe is for another model.
    """
    span = Cut.parse(recipe.cut).span(len(found.blocks))
    if len(span) != len(recipe.blocks):
        raise BundleError(f"the emulator stands for {len(recipe.blocks)} blocks, and the model's span has {len(span)}")
    repeated = {}
    for number, source in zip(span, recipe.blocks, strict=True):
        block = found.blocks[number]
        if source != number:
            found.replace(number)
        if source is not None:
            _shape(block, recipe)
            if source != number:
                repeated[number] = block
    return repeated


def repeat_blocks(found: BlockList, recipe: Recipe, repeated: dict[int, nn.Module]) -> None:
    """Put in blocks that have another's weights: each keeps its own number, which caches go by."""
    bottom = Cut.parse(recipe.cut).bottom
    for number, block in repeated.items():
        source = found.blocks[recipe.blocks[number - bottom] or 0]
        for name, module in block.named_modules():
            other = source.get_submodule(name)
            module._parameters.update(other._parameters)
            module._buffers.update(other._buffers)
        found.blocks[number] = block.requires_grad_(False).eval()


def linears_in(block: nn.Module) -> dict[str, nn.Module]:
    """The linear modules of a block that an emulator may hold in another form, by their names in it."""
    return {name: module for name, module in block.named_modules() if is_linear(module)}


def _check_shapes(model: nn.Module, path: Path) -> None:
    """Say which weight does not fit: from `transformers` comes only that one does not."""
    try:
        with safe_open(path, framework="pt") as stored:
            found = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} cannot be read ({error}): fetch the emulator again") from None
    for name, tensor in model.state_dict().items():
        if found.get(name, list(tensor.shape)) != list(tensor.shape):
            raise BundleError(
                f"{name} is {found[name]} where the recipe needs {list(tensor.shape)}: have it built anew"
            )


def _shape(block: nn.Module, recipe: Recipe) -> None:
    linears = linears_in(block)
    unknown = recipe.ranks.keys() - linears.keys()
    if unknown:
        raise BundleError(
            f"the emulator has factors of {min(unknown)}, which is no linear module of the model's blocks"
        )
    for name, module in linears.items():
        rank = recipe.ranks.get(name)
        if rank is not None and rank > min(shape_of(module)[:2]):
            raise BundleError(f"the emulator's factors of {name} are wider than the module; have it built anew")
        parent, _, last = name.rpartition(".")
        setattr(block.get_submodule(parent), last, form_of(module, rank, recipe.bits))
