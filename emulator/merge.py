"""Merge an adapter of any method of peft that can be merged into the whole model.

Knows the model's weights, peft's layers and merging, and a folder to write; knows no data and no scores. An adapter
comes from a stranger: peft is given a configuration that is made here of checked fields and exact names, and values
whose names and shapes are those that peft makes for this model, which is first asked of a model without weights.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from emulator import plug_in
from emulator.adapted_modules import AdaptedModules
from emulator.built_as import BuiltAs, shapes_in
from emulator.folder import refuse_taken
from emulator.kept_ranks import filled, narrowed
from emulator.merge_settings import MergeSettings
from emulator.outline import Outline
from emulator.plug_in import ADAPTER
from emulator.tuned_ends import RUN, check_ends, read_values
from emulator.vetted import origin_of, vetted
from isthmus.adapter_files import PEFT_WEIGHTS
from isthmus.blocks import find_blocks
from isthmus.cut import Cut
from isthmus.errors import BundleError, IsthmusError
from isthmus.load import UNREADABLE, Head, load_trimmed
from isthmus.training.progress import meter

PREFIX = "base_model.model."
"""What peft puts before the names of a model's own modules."""


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


@dataclass(frozen=True)
class Merged:
    """What merging changed.

    Attributes:
        tensors: how many hold other values than before, by what they are.
        parameters: values in them that are not what they were.
        untied: the output layer got a matrix of its own: it or the embedding was adapted, and they shared one.
        dtype: the model's, before and after.
    """

    tensors: Mapping[str, int]
    parameters: int
    untied: bool
    dtype: str


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
    besides = _embeddings(built.bare)
    modules = AdaptedModules.find(built.bare, settings.names)
    settings.refuse_larger(modules.widest, len(modules.targets))
    if manifest is not None and manifest.about.get(RUN) != "dlora":
        check_ends((*modules.targets, *modules.saved), built.outline, Cut.parse(manifest.cut))
    adapted = _adapted(built.bare, settings, modules, low_cpu_mem_usage=True)
    shapes = {name: tuple(value.shape) for name, value in _state(adapted).items()}
    built.refuse_headless([name.removeprefix(PREFIX) for name in shapes])
    stored = narrowed(shapes, settings.kept)
    values = read_values(adapter, PEFT_WEIGHTS, {**{n: s for n, (_, s) in besides.items()}, **stored}, needed=stored)
    base = {besides[name][0]: values.pop(name) for name in values.keys() - stored.keys()}
    values = filled(values, shapes, settings.kept)
    return Adapter(settings, modules, values, base, whole.digest, built.labels, **origin_of(manifest, signer))


def merge(adapter: Adapter, model: Path, out: Path, console: Console) -> Merged:
    """Write the whole model with an adapter in its weights, in its own dtype, and what else stands beside them.

    The folder is as `emulator.plug_in.plug_in` makes it; a classifier's adapter makes a classifier, with its head.
    Weights are merged in float32 and rounded once, so that in float32 the logits are those of the model with the
    adapter beside it, to 1e-5 by norm.

    Raises:
        BundleError: peft cannot merge it, a weight would no longer be finite, or what the model then makes of a few
            tokens is not.
        ModelError: the model cannot be read, or peft is not installed.
        UsageError: `out` holds something, or cannot be written.
    """
    out = out.resolve()
    refuse_taken(out)
    with meter(console, "merge", 3) as progress:
        head = None if adapter.labels is None else Head(adapter.labels)
        whole, _ = load_trimmed(model, "auto", find_blocks, head=head)
        progress.update(1, "merging")
        merged = merge_into(whole, adapter)
        progress.update(2, "saving")
        plug_in.save(whole, model, out, plug_in.origin_of(adapter.model, adapter.bundle, adapter.signer))
        progress.update(3)
    return merged


@torch.no_grad()
def merge_into(whole: PreTrainedModel, adapter: Adapter) -> Merged:
    """Merge an adapter into a model's weights, in memory.

    Raises:
        BundleError: as `merge`.
    """
    dtype = plug_in.name_of(whole.dtype)
    for name, value in adapter.base.items():
        weight = whole.get_submodule(name).weight
        if not torch.equal(value.to(weight.dtype), weight):
            raise BundleError(f"{PEFT_WEIGHTS} holds another {name} than the model: merge it into the model it is of")
    untied = adapter.modules.untied and plug_in.untie(whole)
    changes = _Changes()
    biases = [(name, one, one.clone()) for name, one in whole.named_parameters() if name.endswith(".bias")]
    adapted = _adapted(whole, adapter.settings, adapter.modules)
    with _told_in_one_line(adapter.settings.called):
        lost = plug_in.imported_peft().set_peft_model_state_dict(adapted, dict(adapter.values)).unexpected_keys
        if lost:
            raise BundleError(f"peft has no place for {min(lost)}: install another version of peft")
        for name, parameter, before in biases:  # which some methods train beside their own
            changes.note(name, before, parameter)
        _merge_layers(adapted, changes)
        adapted.merge_and_unload()
    return Merged(dict(changes.tensors), changes.parameters, untied, dtype)


class _Changes:
    """What holds other values than it did."""

    def __init__(self) -> None:
        self.tensors: Counter[str] = Counter()
        self.parameters = 0

    def note(self, name: str, before: torch.Tensor, after: torch.Tensor) -> None:
        count = plug_in.differing(name, before, after)
        self.parameters += count
        if count:
            self.tensors[_kind(name, after)] += 1


def _kind(name: str, tensor: torch.Tensor) -> str:
    if name.endswith("bias"):
        return "biases"
    return "weight matrices" if tensor.dim() > 1 else "norms"


def _merge_layers(adapted: nn.Module, changes: _Changes) -> None:
    """Merge one layer after the other, so that never more than one is held twice."""
    peft = plug_in.imported_peft()
    layers, saved = peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.ModulesToSaveWrapper
    for name, module in list(adapted.named_modules()):
        one: Any = module
        if isinstance(module, layers):
            before = _own(one.get_base_layer())
            one.get_base_layer().float()
            one.merge()
            _round(name, before, one.get_base_layer(), changes)
        elif isinstance(module, saved):
            _round(name, _own(one.original_module), one.modules_to_save[ADAPTER], changes)


def _own(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def _round(path: str, before: Mapping[str, torch.Tensor], module: nn.Module, changes: _Changes) -> None:
    """Store a module's parameters as they were stored before, and note what changed."""
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(before[name].dtype)
        changes.note(f"{path.removeprefix(PREFIX)}.{name}", before[name], parameter)


def _embeddings(model: PreTrainedModel) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Modules whose weights peft may save besides an adapter, and their shapes, by the names that it gives them."""
    ends = [one for one in (model.get_input_embeddings(), model.get_output_embeddings()) if hasattr(one, "weight")]
    found = {name: tuple(module.weight.shape) for name, module in model.named_modules() if module in ends}
    return {
        f"{PREFIX}{name}.{last}": (name, shape)
        for name, shape in found.items()
        for last in ("weight", "base_layer.weight")
    }


def _state(adapted: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that peft would save, by the names that it would give them."""
    peft = plug_in.imported_peft()
    state: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return state


def _adapted(model: PreTrainedModel, settings: MergeSettings, modules: AdaptedModules, **how: bool) -> Any:
    """A model with peft's own layers around exactly the modules that were adapted."""
    peft = plug_in.imported_peft()
    if not hasattr(peft, settings.method.config):
        raise BundleError(
            f"the peft that is installed, {peft.__version__}, has no {settings.called}: install a newer one"
        )
    with _told_in_one_line(settings.called):
        told = {**settings.told, **modules.told(settings.names)}
        config = getattr(peft, settings.method.config)(**told)
        return peft.get_peft_model(model, config, **how).eval()


@contextmanager
def _told_in_one_line(method: str) -> Iterator[None]:
    """Let our own errors through, and turn those of peft, which settings may bring about, into one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that are merged already, or that share a matrix
            yield
    except IsthmusError:
        raise
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise BundleError(f"peft cannot merge this {method} into the model ({reason}): have it trained again") from None
