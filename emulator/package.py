"""An emulator as a signed bundle: written whole or not at all, and put beside its model again.

Knows files, sizes and the base model's digest; knows no text, and nothing of how an emulator is made.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors import SafetensorError
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from emulator import damage
from emulator.folder import appearing
from emulator.pair import Pair
from isthmus import bundle
from isthmus.blocks import BlockList, narrowed
from isthmus.emulated.forms import Quantised
from isthmus.emulated.load import load_emulated
from isthmus.emulated.recipe import Distance, Distillation, Emulator
from isthmus.errors import BundleError
from isthmus.ledger.flops import count, on_meta
from isthmus.load import load_whole, model_digest
from isthmus.training.outputs import select_outputs
from isthmus.weights import save_weights


@dataclass(frozen=True)
class BuiltFrom:
    """The model that an emulator is of: its folder, its digest, and the type that its weights are stored in."""

    directory: Path
    digest: str
    dtype: torch.dtype


def describe(pair: Pair, dtype: torch.dtype, distance: Distance | None, distillation: Distillation | None) -> Emulator:
    """What `emulator.json` says of a pair whose repeated blocks were put in and whose weights are saved in `dtype`."""
    blocks = [pair.twin_found.blocks[number] for number in pair.recipe.kept]
    span = pair.cut.span(len(pair.found.blocks))
    return Emulator(
        recipe=pair.recipe,
        parameters=sum(map(_parameters, blocks)),
        span_parameters=sum(_parameters(pair.found.blocks[number]) for number in span),
        weight_bytes=sum(_bytes(block, dtype) for block in blocks),
        flops_per_token=_flops(pair.twin, pair.twin_found, span),
        span_flops_per_token=_flops(pair.model, pair.found, span),
        distance=distance,
        distillation=distillation,
    )


def write_bundle(
    pair: Pair, origin: BuiltFrom, about: Emulator, made_of: str, out: Path, key: Ed25519PrivateKey | None
) -> bundle.Manifest:
    """Write ends, emulator and companions to `out`, which is absent or empty; without a key any signature will do.

    Args:
        pair: whose twin is saved, from the CPU.
        origin: of the pair's model.
        about: goes to `emulator.json`.
        made_of: SHA-256 of what decides the content.
        out: the bundle's folder.
        key: of whoever publishes it.

    Raises:
        BundleError: it cannot be written; nothing stands in `out` then.
    """
    scalars: dict[str, bundle.Scalar] = {"method": about.recipe.method, "bits": about.recipe.bits}
    scalars |= {"name": origin.directory.resolve().name, "made_of": made_of}
    repeated = [f"{pair.twin_found.path}.{number}" for number in pair.repeated]
    try:
        with appearing(out) as folder:
            save_weights(pair.twin, origin.directory, folder, origin.dtype, repeated)
            about.save(folder)
            manifest = bundle.write(
                folder, "emulator", origin.digest, about.recipe.cut, scalars, key or Ed25519PrivateKey.generate()
            )
    except (OSError, SafetensorError) as error:  # the second is how a full disk is told of while weights are written
        reason = error.strerror if isinstance(error, OSError) else error
        raise BundleError(f"{out} cannot be written ({reason}): make room on the disk, and run it again") from None
    return manifest


def verified(directory: Path, model: Path, digest: str) -> bundle.Manifest:
    """The manifest of the emulator in `directory`, whoever signed it, if it is one of the model of this digest.

    Raises:
        BundleError: the bundle is damaged, or is not an emulator of this model.
    """
    manifest = damage.verify(directory, "build the emulator anew, or restore it from a copy")
    if manifest.kind != "emulator":
        raise BundleError(f"{directory} holds {manifest.kind}, not an emulator; name an emulator's folder")
    if manifest.model_digest != digest:
        raise BundleError(
            f"{directory} is an emulator of the model {manifest.model_digest[:16]}, and {model} is {digest[:16]}; "
            "name the model that it was built from"
        )
    return manifest


def open_pair(directory: Path, model: Path, device: torch.device) -> tuple[Pair, bundle.Manifest]:
    """A model and the emulator that lies in `directory`, as whoever fetches it would run it, on a device.

    Raises:
        BundleError: the bundle is damaged, or is not an emulator of this model.
        CutError, ModelError: the model cannot be read.
    """
    manifest = verified(directory, model, model_digest(model))
    loaded = load_emulated(directory, torch.float32)
    whole, found = load_whole(model, torch.float32)
    for one in (whole, loaded.model):
        one.to(device)
        select_outputs(one)
    return Pair(whole, found, loaded.model, loaded.found, loaded.cut, loaded.about.recipe, {}), manifest


def _parameters(block: nn.Module) -> int:
    """Weights and biases, a quantised weight as one and its share of a scale as none."""
    scales = {id(module.scale) for module in block.modules() if isinstance(module, Quantised)}
    whole = sum(module.in_features * module.out_features for module in block.modules() if isinstance(module, Quantised))
    return whole + sum(one.numel() for one in block.parameters() if id(one) not in scales)


def _bytes(block: nn.Module, dtype: torch.dtype) -> int:
    """Of everything that is saved of a block."""
    return sum(
        one.numel() * (dtype.itemsize if one.is_floating_point() else one.itemsize)
        for one in block.state_dict().values()
    )


def _flops(model: PreTrainedModel, found: BlockList, span: range) -> int:
    """FLOPs of a token's forward through blocks `span`, attention's share left out."""
    alone, _ = narrowed(model, found, span)
    bare = on_meta(alone.base_model)
    size = model.config.get_text_config().hidden_size

    def run(tokens: int, _: int) -> torch.Tensor:
        hidden_BTD = torch.empty(1, tokens, size, device="meta", dtype=model.dtype)
        # Without a cache Hugging Face looks at masks by value, which meta tensors lack.
        output: torch.Tensor = bare(
            inputs_embeds=hidden_BTD, past_key_values=DynamicCache(), use_cache=True
        ).last_hidden_state
        return output

    with torch.no_grad():
        return round(count(run).forward.per_token)
