"""Plug tuned ends into the whole model, by block name.

Knows the model's weights and how each kind of tuned ends goes into them; knows no adapter's files, no data and no
scores. Its LoRA is merged as any other: of a rank, a scale and names that the model has.
"""

from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from emulator import peft_layers
from emulator.adapted_modules import AdaptedModules
from emulator.changes import Changed, Counting, untie
from emulator.merge import Adapter, merge_into
from emulator.merge_settings import MergeSettings
from emulator.saving import rewrite
from emulator.tuned_ends import TunedEnds

_CALLED = {"bitfit": "biases", "full": "tensors", "head": "tensors"}
"""What each kind replaces."""


def plug_in(tuned: TunedEnds, model: Path, out: Path, console: Console) -> Changed:
    """Write the whole model with tuned ends, as `emulator.saving.rewrite` does.

    Replaced weights are what the edge had, rounded to the model's dtype; LoRA is merged as `emulator.merge.merge` does.
    An adapted output layer that shares its matrix with the embedding gets one of its own, since the adapter never
    changed the embedding.

    Raises:
        BundleError: a weight would no longer be finite, or what the model makes of a few tokens is not.
        ModelError: the model cannot be read, or peft is not installed.
        UsageError: `out` holds something, or cannot be written.
    """

    def change(whole: PreTrainedModel) -> Changed:
        return merge_into(whole, _as_adapter(whole, tuned)) if tuned.kind == "lora" else _replace(whole, tuned)

    return rewrite(model, out, tuned, change, console)


@torch.no_grad()
def tuned_on(model: PreTrainedModel, tuned: TunedEnds) -> nn.Module:
    """A model with tuned ends in it, in memory, such as the ends with an emulator in their middle.

    Args:
        model: changed; LoRA stands beside its weights, since those of an emulator cannot be merged into.
        tuned: has no part in blocks that an emulator replaced.

    Raises:
        BundleError, ModelError: as `plug_in`.
    """
    result: nn.Module = model
    if tuned.kind == "lora":
        adapter = _as_adapter(model, tuned)
        result = peft_layers.adapted(model, adapter.settings, adapter.modules)
        peft_layers.fill(result, adapter.values)
    else:
        _replace(model, tuned)
    return result.eval()


def _as_adapter(model: PreTrainedModel, tuned: TunedEnds) -> Adapter:
    settings = MergeSettings.lora(tuned.rank, tuned.alpha, tuned.modules)
    return Adapter(settings, AdaptedModules.find(model, settings.names), tuned.values, {}, tuned.model)


@torch.no_grad()
def _replace(whole: PreTrainedModel, tuned: TunedEnds) -> Changed:
    untied = tuned.kind == "head" and tuned.labels is None and untie(whole)
    counting = Counting(_CALLED[tuned.kind])
    for name, value in tuned.values.items():
        weight = whole.get_parameter(name)
        counting.note(name, weight, value.to(weight.dtype))
        weight.copy_(value)
    return counting.changed(whole, untied)
