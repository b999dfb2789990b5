"""Merge an adapter of any method of peft that can be merged into the whole model.

Knows the model's weights and peft's merging; knows no data, no scores and no folder that is written. An adapter
comes from a stranger: peft is given a configuration that is made here of checked fields and exact names, and values
whose names and shapes are those that peft makes for this model, which is first asked of a model without weights.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from emulator import peft_layers
from emulator.adapted_modules import AdaptedModules
from emulator.built_as import BuiltAs, shapes_in
from emulator.changes import Changed, Counting, untie
from emulator.kept_ranks import filled, narrowed
from emulator.merge_settings import MergeSettings
from emulator.outline import Outline
from emulator.peft_layers import ADAPTER, PREFIX, imported_peft
from emulator.saving import rewrite
from emulator.tuned_ends import RUN, check_ends, read_values
from emulator.vetted import origin_of, vetted
from isthmus.adapter_files import PEFT_WEIGHTS
from isthmus.cut import Cut
from isthmus.errors import BundleError


@dataclass(frozen=True)
class Adapter:
    """An adapter in peft's format, checked against the model.

    Attributes:
        settings: of its method.
        modules: those that it adapts.
        values: by the names in its file, on the CPU; of AdaLoRA with every rank.
        base: weights of the model itself that peft put beside them, by the names of their modules.
        model: digest of the model that they were checked against.
        labels: of a classifier, whose head is among the values; None: it is none.
        cut, bundle, signer, emulator: as `emulator.tuned_ends.TunedEnds` has them.
    """

    settings: MergeSettings
    modules: AdaptedModules
    values: Mapping[str, torch.Tensor]
    base: Mapping[str, torch.Tensor]
    model: str
    labels: int | None = None
    cut: Cut | None = None
    bundle: str | None = None
    signer: str | None = None
    emulator: str | None = None


def examine(adapter: Path, model: Path, whole: Outline, signer: Ed25519PublicKey | None = None) -> Adapter:
    """Read an adapter's folder in peft's format, if it fits the model and its method can be merged.

    Args:
        adapter: `adapter_model.safetensors` and `adapter_config.json`, with or without a manifest.
        model: folder of the model, which no weights are read of.
        whole: its outline.
        signer: whose signature must stand under the manifest; None: whoever made it.

    Raises:
        BundleError: it is damaged, for another model or of another signer; its method or settings cannot be merged; or
            it holds other tensors than peft makes for this model, or a classifier's without its head.
    """
    _, manifest = vetted(adapter, whole, signer)
    settings = MergeSettings.load(adapter)
    held = {name.removeprefix(PREFIX): shape for name, shape in shapes_in(adapter, PEFT_WEIGHTS).items()}
    built = BuiltAs.of(model, whole, held, settings.classifies)
    besides = _embeddings(built.outline.bare)
    modules = AdaptedModules.find(built.outline.bare, settings.names)
    settings.refuse_larger(modules.widest, len(modules.targets))
    if manifest is not None and manifest.about.get(RUN) != "dlora":
        check_ends((*modules.targets, *modules.saved), built.outline, Cut.parse(manifest.cut))
    adapted = peft_layers.adapted(deepcopy(built.outline.bare), settings, modules, low_cpu_mem_usage=True)
    shapes = peft_layers.stored_shapes(adapted)
    built.refuse_headless([name.removeprefix(PREFIX) for name in shapes])
    stored = narrowed(shapes, settings.kept)
    values = read_values(adapter, PEFT_WEIGHTS, {**{n: s for n, (_, s) in besides.items()}, **stored}, needed=stored)
    base = {besides[name][0]: values.pop(name) for name in values.keys() - stored.keys()}
    values = filled(values, shapes, settings.kept)
    return Adapter(settings, modules, values, base, whole.digest, built.labels, **origin_of(manifest, signer))


def merge(adapter: Adapter, model: Path, out: Path, console: Console) -> Changed:
    """Write the whole model with an adapter in its weights, as `emulator.saving.rewrite` does.

    A classifier's adapter makes a classifier, with its head. Weights are merged in float32 and rounded once, so that in
    float32 the logits are those of the model with the adapter beside it, to 1e-5 by norm.

    Raises:
        BundleError: peft cannot merge it, a weight would no longer be finite, or what the model then makes of a few
            tokens is not.
        ModelError: the model cannot be read, or peft is not installed.
        UsageError: `out` holds something, or cannot be written.
    """
    return rewrite(model, out, adapter, lambda whole: merge_into(whole, adapter), console)


@torch.no_grad()
def merge_into(whole: PreTrainedModel, adapter: Adapter) -> Changed:
    """Merge an adapter into a model's weights, in memory.

    Raises:
        BundleError: as `merge`.
    """
    for name, value in adapter.base.items():
        weight = whole.get_submodule(name).weight
        if not torch.equal(value.to(weight.dtype), weight):
            raise BundleError(f"{PEFT_WEIGHTS} holds another {name} than the model: merge it into the model it is of")
    untied = adapter.modules.untied and untie(whole)
    counting = Counting()
    biases = [(name, one, one.clone()) for name, one in whole.named_parameters() if name.endswith(".bias")]
    adapted = peft_layers.adapted(whole, adapter.settings, adapter.modules)
    with peft_layers.told_in_one_line(adapter.settings.called):
        peft_layers.fill(adapted, adapter.values)
        for name, parameter, before in biases:  # which some methods train beside their own
            counting.note(name, before, parameter)
        _merge_layers(adapted, counting)
        adapted.merge_and_unload()
    return counting.changed(whole, untied)


def _merge_layers(adapted: nn.Module, counting: Counting) -> None:
    """Merge one layer after the other, so that never more than one is held twice."""
    peft = imported_peft()
    layers, saved = peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.ModulesToSaveWrapper
    for name, module in list(adapted.named_modules()):
        one: Any = module
        if isinstance(module, layers):
            before = _own(one.get_base_layer())
            one.get_base_layer().float()
            one.merge()
            _round(name, before, one.get_base_layer(), counting)
        elif isinstance(module, saved):
            _round(name, _own(one.original_module), one.modules_to_save[ADAPTER], counting)


def _own(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def _round(path: str, before: Mapping[str, torch.Tensor], module: nn.Module, counting: Counting) -> None:
    """Store a module's parameters as they were stored before, and note what changed."""
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(before[name].dtype)
        counting.note(f"{path.removeprefix(PREFIX)}.{name}", before[name], parameter)


def _embeddings(model: PreTrainedModel) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Modules whose weights peft may save besides an adapter, and their shapes, by the names that it gives them."""
    ends = [one for one in (model.get_input_embeddings(), model.get_output_embeddings()) if hasattr(one, "weight")]
    found = {name: tuple(module.weight.shape) for name, module in model.named_modules() if module in ends}
    return {
        f"{PREFIX}{name}.{last}": (name, shape)
        for name, shape in found.items()
        for last in ("weight", "base_layer.weight")
    }
