"""A model's sides without weights, on the meta device, from its configuration alone.

Knows configurations, cuts and recipes of emulators; reads no weights, and runs nothing but a dry run to find blocks.
"""

from copy import deepcopy
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from isthmus.architectures import check_architecture, class_of, reads_both_ways
from isthmus.blocks import BlockList, find_blocks
from isthmus.classifier import Head
from isthmus.cut import Cut
from isthmus.emulated.load import repeat_blocks, shape_span
from isthmus.emulated.recipe import Recipe
from isthmus.errors import IsthmusError, ModelError
from isthmus.head import modules_anew
from isthmus.load import UNREADABLE
from isthmus.sides import keep_ends, keep_span

Placed = tuple[PreTrainedModel, BlockList]
"""A model on the meta device, frozen and in evaluation mode, and its blocks."""


def place_whole(configuration: PreTrainedConfig, dtype: torch.dtype, head: Head | None = None) -> Placed:
    """The whole model; `head` makes it a classifier, as `isthmus.load.load_whole` does.

    Raises:
        CutError, ModelError: the model is of no kind that can be cut, or its configuration makes no sense.
    """
    check_architecture(configuration)
    config = deepcopy(configuration)
    if head is not None:
        head.told(config)
    family: Any = class_of(config, classifies=head is not None)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = family._from_config(config, dtype=dtype)
        found = find_blocks(model)
    except IsthmusError:
        raise
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"no {config.model_type} can be made of this configuration ({reason}); correct it") from None
    new = modules_anew(model, ()) if reads_both_ways(config) or head is not None else ()
    named = BlockList(found.owner, found.path, found.blocks, found.returns_tuple, new)
    return model.requires_grad_(False).eval(), named


def place_ends(configuration: PreTrainedConfig, cut: Cut, dtype: torch.dtype, head: Head | None = None) -> Placed:
    """What an edge holds: stem, end blocks and head.

    Raises:
        CutError, ModelError: as `place_whole`, or the cut does not fit the model.
    """
    model, found = place_whole(configuration, dtype, head)
    keep_ends(found, cut)
    return model, found


def place_span(configuration: PreTrainedConfig, cut: Cut, dtype: torch.dtype) -> Placed:
    """What a cloud node computes with: the span's blocks and nothing else that has weights.

    Raises:
        CutError, ModelError: as `place_ends`.
    """
    config = deepcopy(configuration)
    config.tie_word_embeddings = False  # nothing is left to tie
    model, found = place_whole(config, dtype)
    keep_span(model, found, cut)
    return model, found


def place_emulated(configuration: PreTrainedConfig, recipe: Recipe, dtype: torch.dtype) -> Placed:
    """The ends with an emulator in their middle.

    Raises:
        BundleError: the recipe is for another model.
        CutError, ModelError: as `place_ends`.
    """
    model, found = place_whole(configuration, dtype)
    repeated = shape_span(found, recipe)
    repeat_blocks(found, recipe, repeated)
    return model.requires_grad_(False).eval(), found
