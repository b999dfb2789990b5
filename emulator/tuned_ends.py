"""What an edge made of the ends: read, if it fits the model, from the folder where the edge saved or submitted it.

Knows adapters' files and the model's outline; knows no weights of the model, no merging and no wire. An adapter comes
from a peer: sizes are bounded before files are read, names and shapes are checked before tensors are read, and nothing
in it is followed, imported or given on as it came.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from safetensors import SafetensorError, safe_open

from emulator import damage
from emulator.lora_settings import LoraSettings, shown
from emulator.outline import Outline
from isthmus import bundle
from isthmus.adapter_files import OWN_WEIGHTS, PEFT_SETTINGS, PEFT_WEIGHTS
from isthmus.cut import Cut
from isthmus.errors import BundleError
from isthmus.trust.credentials import fingerprint

RUN = "run"
"""Where a submission's manifest says by which method its run was trained."""

EMULATOR = "emulator"
"""Where it names the emulator that its run was tuned on."""

STORED_AS = ("F32", "BF16")
"""The types that an edge computes in."""

SMALL_BYTES = 4 << 20
"""Room for manifest, settings, and the names and shapes of thousands of tensors."""


Replaced: TypeAlias = Literal["bitfit", "full"]


@dataclass(frozen=True)
class TunedEnds:
    """What an edge made, checked against the model.

    Attributes:
        kind: `lora`, or `bitfit` and `full`, which replace weights.
        values: by the names in the adapter's file, on the CPU.
        model: digest of the model that they were checked against.
        modules: of `lora` alone: the linear modules that it adapts, from the model's root.
        rank, alpha: of `lora` alone: its r, and its scale times r.
        cut: where the edge's model was cut; None where no manifest says so.
        bundle: id of the manifest; None where there is none.
        signer: fingerprint of the key that was given and whose signature stands under it; None where none was given.
        emulator: id of the emulator that it was tuned on; None where no manifest says so.
    """

    kind: Literal["lora", "bitfit", "full"]
    values: dict[str, torch.Tensor]
    model: str
    modules: tuple[str, ...] = ()
    rank: int = 0
    alpha: float = 0.0
    cut: Cut | None = None
    bundle: str | None = None
    signer: str | None = None
    emulator: str | None = None

    @property
    def signed(self) -> bool:
        """Whether somebody vouches for it whose key was given."""
        return self.signer is not None


def check(adapter: Path, outline: Outline, signer: Ed25519PublicKey | None = None) -> TunedEnds:
    """Read an adapter's folder, as an edge saves it or as it submits it, if it fits the model.

    What a manifest says of the cut binds: tuned parts are of the ends' blocks, or the output layer. LoRA may also be in
    the span if the manifest says that it is of a run of `dlora`, which has adapters there. Without a manifest, as a run
    keeps LoRA, the cut is unknown, and any of the model's blocks may be adapted.

    Args:
        adapter: `adapter_model.safetensors` and `adapter_config.json`, with or without a manifest, or
            `adapter.safetensors` with one.
        outline: of the whole model.
        signer: whose signature must stand under the manifest; None: whoever made it.

    Raises:
        BundleError: it is damaged, for another model, of another signer, or holds what is no part of tuned ends.
    """
    sizes = _sizes(adapter)
    lora = _is_lora(adapter, sizes)
    _check_room(adapter, sum(sizes.values()), _most_values(outline, lora))
    manifest = _manifest(adapter, outline.digest, signer) if bundle.MANIFEST in sizes else None
    if manifest is None and signer is not None:
        raise BundleError(f"{adapter} is not signed: have it submitted with `edge_client submit`")
    origin = _origin(manifest, signer)
    if lora:
        settings = LoraSettings.load(adapter)
        shapes = _lora_shapes(settings, outline.linears)
        modules = tuple(sorted(set(settings.target_modules)))
        if manifest is not None and manifest.about.get(RUN) != "dlora":
            _check_ends(modules, outline, Cut.parse(manifest.cut))
        values = _read(adapter, PEFT_WEIGHTS, shapes, every=True)
        return TunedEnds("lora", values, outline.digest, modules, settings.r, settings.lora_alpha, **origin)
    if manifest is None:
        raise BundleError(
            f"{adapter} has no {bundle.MANIFEST}, so what its weights are is unknown: name a whole folder"
        )
    kind = _own_kind(manifest)
    values = _read(adapter, OWN_WEIGHTS, _own_shapes(kind, Cut.parse(manifest.cut), outline), every=False)
    return TunedEnds(kind, values, outline.digest, **origin)


def _origin(manifest: bundle.Manifest | None, signer: Ed25519PublicKey | None) -> dict[str, Any]:
    """What a manifest and its signature say of where tuned ends are from."""
    if manifest is None:
        return {}
    told = manifest.about.get(EMULATOR)
    return {
        "cut": Cut.parse(manifest.cut),
        "bundle": manifest.id,
        "signer": None if signer is None else fingerprint(signer),
        "emulator": told if isinstance(told, str) else None,
    }


def _check_ends(modules: Collection[str], outline: Outline, cut: Cut) -> None:
    inside = outline.in_span(modules, cut)
    if inside:
        raise BundleError(
            f"{PEFT_SETTINGS} adapts {inside[0]}, which is in the span of cut {cut}, and the manifest says of no dlora "
            "run: have the ends alone tuned"
        )


def _sizes(adapter: Path) -> dict[str, int]:
    """Bytes of each file, links not followed."""
    try:
        return {path.name: path.lstat().st_size for path in adapter.iterdir()}
    except OSError as error:
        raise BundleError(f"{adapter} cannot be read ({error.strerror}): name a run's adapter folder") from None


def _is_lora(adapter: Path, names: Collection[str]) -> bool:
    here = [name for name in (PEFT_WEIGHTS, OWN_WEIGHTS) if name in names]
    if len(here) != 1:
        held = "both" if here else "neither"
        raise BundleError(f"{adapter} holds {held} of {PEFT_WEIGHTS} and {OWN_WEIGHTS}: name one run's adapter folder")
    return here == [PEFT_WEIGHTS]


def _most_values(outline: Outline, lora: bool) -> int:
    """More values than an adapter of any rank, or of all blocks, can hold."""
    if lora:
        return sum((inputs + outputs) * max(inputs, outputs) for inputs, outputs in outline.linears.values())
    return sum(map(prod, outline.weights.values()))


def _check_room(adapter: Path, size: int, most_values: int) -> None:
    most = 4 * most_values + SMALL_BYTES
    if size > most:
        raise BundleError(f"{adapter} has {size} bytes, and no adapter of this model over {most}: name the right model")


def _manifest(adapter: Path, model_digest: str, signer: Ed25519PublicKey | None) -> bundle.Manifest:
    manifest = damage.verify(adapter, "have it submitted again")
    if signer is not None and not bundle.is_signed_by(signer, manifest.to_bytes(), bundle.read_signature(adapter)):
        raise BundleError(f"{adapter} was signed by another key than the one given: ask who submitted it")
    if manifest.kind != "adapter":
        raise BundleError(f"{adapter} is a bundle of {manifest.kind} and no adapter: name a run's adapter folder")
    if manifest.model_digest != model_digest:
        raise BundleError(
            f"{adapter} was tuned on model {manifest.model_digest[:12]} and this one is {model_digest[:12]}: "
            "name the model whose ends the edge had"
        )
    return manifest


def _lora_shapes(settings: LoraSettings, linears: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name in settings.target_modules:
        if name not in linears:
            raise BundleError(
                f"{PEFT_SETTINGS} adapts {shown(name)}, which is no linear module of the model's blocks and not its "
                "output layer: have the edge train with other --targets"
            )
        inputs, outputs = linears[name]
        if settings.r > max(inputs, outputs):
            raise BundleError(
                f"{PEFT_SETTINGS} has rank {settings.r}, more than {name} is wide: have it trained with less"
            )
        down, up = _stored(name)
        shapes |= {down: (settings.r, inputs), up: (outputs, settings.r)}
    return shapes


def _stored(module: str) -> tuple[str, str]:
    """What peft calls the two matrices of a module's adapter in its files."""
    stem = f"base_model.model.{module}"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _own_kind(manifest: bundle.Manifest) -> Replaced:
    match manifest.about.get("method"):
        case "bitfit" | "full" as kind:
            return kind
        case "side":
            raise BundleError("a side network is no part of the model: have the ends tuned with --peft lora or full")
        case other:
            raise BundleError(f"no method {shown(other)} can be plugged in: have the ends tuned with lora or full")


def _own_shapes(kind: Replaced, cut: Cut, outline: Outline) -> dict[str, tuple[int, ...]]:
    return {
        name: outline.weights[name]
        for name in outline.in_ends(outline.weights, cut)
        if kind == "full" or name.rpartition(".")[2] == "bias"
    }


def _read(adapter: Path, name: str, shapes: Mapping[str, tuple[int, ...]], every: bool) -> dict[str, torch.Tensor]:
    """A file's tensors, whose names are among those of `shapes`, or are exactly those."""
    path = adapter / name
    bundle.open_listed(adapter, name).close()  # no link to a file elsewhere
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            _check_names(path, set(names), set(shapes), every)
            for stored in names:
                _check_header(path, stored, file.get_slice(stored), shapes[stored])
            values = {stored: file.get_tensor(stored).clone() for stored in names}  # of the file, which may change
    except (OSError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise BundleError(f"{path} cannot be read ({reason}): have it submitted again") from None
    for stored, value in values.items():
        if not value.isfinite().all():
            raise BundleError(f"{path}: {stored} holds values that are not finite: have the ends tuned again")
    return values


def _check_names(path: Path, names: set[str], known: set[str], every: bool) -> None:
    if names - known:
        raise BundleError(f"{path} holds {shown(min(names - known))}, which is no part of tuned ends of this model")
    if not names or (every and known - names):
        raise BundleError(f"{path} lacks {shown(min(known - names, default='weights'))}: have it submitted again")


def _check_header(path: Path, name: str, stored: Any, shape: tuple[int, ...]) -> None:
    if tuple(stored.get_shape()) != shape:
        raise BundleError(f"{path}: {name} has shape {tuple(stored.get_shape())} where the model needs {shape}")
    if stored.get_dtype() not in STORED_AS:
        raise BundleError(f"{path}: {name} is stored as {stored.get_dtype()}: save it as one of {', '.join(STORED_AS)}")
