"""Plug tuned ends into the whole model, by block name.

Knows the model's weights, peft's merging and a folder to write; knows no adapter's files, no data and no scores. What
peft is given is made here from checked values: a rank, a scale and names that the model has.
"""

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from emulator.folder import appearing, refuse_taken
from emulator.tuned_ends import TunedEnds
from isthmus import __version__
from isthmus.architectures import reads_both_ways
from isthmus.blocks import find_blocks
from isthmus.errors import BundleError, ModelError, UsageError
from isthmus.load import DTYPES, Head, load_trimmed
from isthmus.training.progress import meter
from isthmus.weights import COMPANIONS

ADAPTER = "default"
"""What peft calls an adapter that nobody named."""

ORIGIN, ORIGIN_FORMAT = "plugged_in.json", "isthmus-plugged-in/1"
"""What says where a plugged-in model is from; it is no part of the model, and no bundle made of it has it."""

PROBED = 16
"""Tokens, spread over the vocabulary, that a plugged-in model is tried on."""


@dataclass(frozen=True)
class Changed:
    """What plugging in changed.

    Attributes:
        weights: tensors that were replaced or merged into.
        parameters: values in them that are not what they were.
        untied: the output layer got a matrix of its own: it was adapted, and shared that of the embedding.
        dtype: the model's, before and after.
    """

    weights: int
    parameters: int
    untied: bool
    dtype: str


def plug_in(tuned: TunedEnds, model: Path, out: Path, console: Console) -> Changed:
    """Write the whole model with tuned ends, in its own dtype: weights, tokenizer and what else stands beside them.

    The folder appears whole or not at all. Replaced weights are what the edge had, rounded to the model's dtype; merged
    ones are W + s·BA, so that in float32 the logits are those of the model with the adapter beside it, to 1e-5 by norm.
    An adapted output layer that shares its matrix with the embedding gets one of its own, since the adapter never
    changed the embedding.

    `plugged_in.json` beside them says where the model is from: digest of the model that was plugged into
    (`model_digest`), id of the adapter's bundle (`adapter`; null: it has no manifest), SHA-256 of the public key that
    it was checked against (`signer`; null: against none) and the version that did it (`isthmus`).

    Raises:
        BundleError: a weight would no longer be finite, or what the model makes of a few tokens is not.
        ModelError: the model cannot be read, or peft is not installed.
        UsageError: `out` holds something, or cannot be written.
    """
    out = out.resolve()
    refuse_taken(out)
    with meter(console, "plug in", 3) as progress:
        head = None if tuned.labels is None else Head(tuned.labels)
        whole, _ = load_trimmed(model, "auto", find_blocks, head=head)
        progress.update(1, "merging")
        changed = _merge(whole, tuned) if tuned.kind == "lora" else _replace(whole, tuned)
        progress.update(2, "saving")
        save(whole, model, out, origin_of(tuned.model, tuned.bundle, tuned.signer))
        progress.update(3)
    return changed


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
        result = _adapted(model, tuned)
    else:
        _replace(model, tuned)
    return result.eval()


def save(whole: PreTrainedModel, model: Path, out: Path, origin: Mapping[str, str | None]) -> None:
    """Write a changed model, what stands beside the one it was made of, and its origin, if it gives finite values.

    Raises:
        BundleError: it does not.
        UsageError: `out` cannot be written.
    """
    try:
        with appearing(out) as folder:
            whole.save_pretrained(folder)
            for name in COMPANIONS:
                if name != "config.json" and (model / name).is_file():
                    shutil.copyfile(model / name, folder / name)
            (folder / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
            probe(whole)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{out} cannot be written ({error}); make room, or name another folder with --out") from None


def origin_of(model: str, bundle: str | None, signer: str | None) -> dict[str, str | None]:
    """What `plugged_in.json` says; see `plug_in`."""
    return {
        "format": ORIGIN_FORMAT,
        "model_digest": model,
        "adapter": bundle,
        "signer": signer,
        "isthmus": __version__,
    }


@torch.no_grad()
def probe(whole: PreTrainedModel) -> None:
    """Run a model once, in a type that it can be served in, which it is in afterwards.

    Values can each be finite and yet overflow where they meet.

    Raises:
        BundleError: a hidden state or a logit is not finite.
    """
    if whole.dtype not in DTYPES.values():
        whole.float()
    made = whole(**_probing(whole), output_hidden_states=True)
    if not all(tensor.isfinite().all() for tensor in (*made.hidden_states, made.logits)):
        raise BundleError(
            "with these tuned ends what the model gives is not finite: have the ends tuned again, with less --lr"
        )


def _probing(whole: PreTrainedModel) -> dict[str, Any]:
    """One row of tokens from all over the vocabulary, or one picture."""
    if whole.main_input_name == "pixel_values":
        shape_CHW = (whole.config.num_channels, whole.config.image_size, whole.config.image_size)
        return {"pixel_values": torch.linspace(-1, 1, prod(shape_CHW), dtype=whole.dtype).view(1, *shape_CHW)}
    vocabulary = whole.get_input_embeddings().num_embeddings
    ids_BT = torch.arange(PROBED)[None] * vocabulary // PROBED
    return {"input_ids": ids_BT} | ({} if reads_both_ways(whole.config) else {"use_cache": False})


@torch.no_grad()
def _replace(whole: PreTrainedModel, tuned: TunedEnds) -> Changed:
    untied = tuned.kind == "head" and tuned.labels is None and untie(whole)
    parameters = 0
    for name, value in tuned.values.items():
        weight = whole.get_parameter(name)
        new = value.to(weight.dtype)
        parameters += differing(name, weight, new)
        weight.copy_(new)
    return Changed(len(tuned.values), parameters, untied, name_of(whole.dtype))


@torch.no_grad()
def _merge(whole: PreTrainedModel, tuned: TunedEnds) -> Changed:
    head = whole.get_output_embeddings()
    untied = any(whole.get_submodule(name) is head for name in tuned.modules) and untie(whole)
    adapted = _adapted(whole, tuned)
    parameters = 0
    for name in tuned.modules:
        layer: Any = whole.get_submodule(name)
        weight = layer.get_base_layer().weight
        parameters += differing(name, weight, weight + layer.get_delta_weight(ADAPTER).to(weight.dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.merge_and_unload()
    return Changed(len(tuned.modules), parameters, untied, name_of(whole.dtype))


def untie(whole: PreTrainedModel) -> bool:
    """Give the output layer its own copy of what it shares with the embedding, and have the model saved so.

    Returns:
        whether it shared anything.
    """
    head, stem = whole.get_output_embeddings(), whole.get_input_embeddings()
    if head.weight is not stem.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (whole.config, whole.config.get_text_config()):
        config.tie_word_embeddings = False
    return True


def _adapted(whole: PreTrainedModel, tuned: TunedEnds) -> Any:
    """The model with peft's own layers around exactly the modules that were tuned, holding the edge's values."""
    peft = imported_peft()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=tuned.rank, lora_alpha=tuned.alpha, target_modules=list(tuned.modules)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a weight's layout goes by its module, whatever the settings say
        adapted = peft.get_peft_model(whole, config)
    places = {
        name.replace(f".{ADAPTER}.", "."): parameter
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    if places.keys() != tuned.values.keys():
        odd = min(places.keys() ^ tuned.values.keys())
        raise BundleError(f"peft adapts other modules than were tuned ({odd}): install another version of peft")
    for name, value in tuned.values.items():
        places[name].copy_(value)
    return adapted


def imported_peft() -> Any:
    """The package, which plugging in needs and serving does not.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise ModelError("the package peft is missing; run: pip install 'isthmus[cloud]'") from None
    return peft


def differing(name: str, old: torch.Tensor, new: torch.Tensor) -> int:
    """How many values of a weight are not what they were.

    Raises:
        BundleError: one is not finite.
    """
    if not new.isfinite().all():
        raise BundleError(f"{name} is not finite with the adapter in it: have the ends tuned again, with less --lr")
    return int((new != old).sum())


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16`."""
    return str(dtype).removeprefix("torch.")
