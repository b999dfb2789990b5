"""Put an emulator into a model: empty, for whoever fills it, or loaded from its bundle together with the ends.

Knows recipes, blocks and their linear modules; knows no training, no text and no wire.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from isthmus.blocks import BlockList, find_blocks
from isthmus.cut import Cut
from isthmus.emulated.forms import form_of, shape_of
from isthmus.emulated.recipe import Emulator, Recipe
from isthmus.errors import BundleError
from isthmus.linears import linears_in
from isthmus.load import load_config, load_trimmed

WEIGHTS = "model.safetensors"

FLOATING = ("F64", "F32", "F16", "BF16")
"""What weights may be stored as, by safetensors' names."""

WHOLE = {torch.uint8: ("U8",), torch.int64: ("I64",), torch.bool: ("BOOL",)}
"""What whole numbers must be stored as."""


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


def load_emulated(directory: Path, dtype: torch.dtype) -> Emulated:
    """Load the bundle in `directory`, which was verified before.

    Raises:
        BundleError: its recipe is malformed, or is for another model or other weights than those beside it, or a weight
            is not finite.
        CutError, ModelError: as `isthmus.load.load_ends`.
    """
    about = Emulator.load(directory)
    repeated: dict[int, nn.Module] = {}

    def put_in(model: PreTrainedModel) -> BlockList:
        found = find_blocks(model)
        repeated.update(shape_span(found, about.recipe))
        _check_headers(model, directory / WEIGHTS)
        return found

    config = load_config(directory)
    config.transformers_weights = WEIGHTS  # or transformers reads another file, if this names one
    model, found = load_trimmed(directory, dtype, put_in, config)
    _check_values(model)
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


def _check_headers(model: PreTrainedModel, path: Path) -> None:
    """Refuse tensors that are not exactly the model's, before any is read: `transformers` casts and passes over."""
    try:
        with safe_open(path, framework="pt") as stored:
            headers = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
            found = {name: (header.get_dtype(), header.get_shape()) for name, header in headers.items()}
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} cannot be read ({error}): fetch the emulator again") from None
    state = model.state_dict()
    _check_names(found.keys(), state.keys(), model.all_tied_weights_keys)
    for name, (dtype, shape) in found.items():
        due = state[name]
        if shape != list(due.shape):
            raise _unfit(f"{name} is {shape} where the recipe needs {list(due.shape)}")
        fitting = FLOATING if due.is_floating_point() else WHOLE.get(due.dtype, ())
        if dtype not in fitting:
            raise _unfit(f"{name} is stored as {dtype} where the recipe needs {' or '.join(fitting)}")


def _check_names(stored: Set[str], own: Set[str], tied: Mapping[str, str]) -> None:
    """Refuse what the model has no place for, and what it lacks; of weights that are tied, one will do."""
    if stored - own:
        raise _unfit(f"{min(stored - own)[:200]!r} is no weight of the model with this recipe")
    given = {name for pair in tied.items() if stored & set(pair) for name in pair}
    lacking = own - stored - given
    if lacking:
        raise _unfit(f"{min(lacking)} is not there, which the recipe needs")


def _check_values(model: PreTrainedModel) -> None:
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise _unfit(f"{name} holds values that are not finite")


def _unfit(what: str) -> BundleError:
    return BundleError(f"the emulator's {what}: have it built anew")


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
