"""What an edge made of the ends: read, if it fits the model, from the folder where the edge saved or submitted it.

Knows adapters' files and the model's outline; knows no weights of the model, no merging and no wire. An adapter comes
from a peer: sizes are bounded before files are read, names and shapes are checked before tensors are read, and nothing
in it is followed, imported or given on as it came.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from safetensors import SafetensorError, safe_open

from emulator.built_as import BuiltAs, shapes_in
from emulator.lora_settings import LoraSettings, shown
from emulator.merge_settings import is_classifiers
from emulator.outline import Outline
from emulator.vetted import origin_of, vetted
from isthmus import bundle
from isthmus.adapter_files import OWN_WEIGHTS, PEFT_SETTINGS, PEFT_WEIGHTS
from isthmus.cut import Cut
from isthmus.errors import BundleError

RUN = "run"
"""Where a submission's manifest says by which method its run was trained."""

STORED_AS = ("F32", "BF16", "F16")
"""The types that adapters are computed in."""

_MERGE = "make a whole model of it with `cloud_node merge`"

Replaced: TypeAlias = Literal["bitfit", "full", "head"]


@dataclass(frozen=True)
class TunedEnds:
    """What an edge made, checked against the model.

    Attributes:
        kind: `lora`, or `bitfit`, `full` and `head`, which replace weights.
        values: by the names in the adapter's file, on the CPU.
        model: digest of the model that they were checked against.
        modules: of `lora` alone: the linear modules that it adapts, from the model's root.
        rank, alpha: of `lora` alone: its r, and its scale times r.
        labels: of a classifier, whose head is among the values; None: it is none.
        cut: where the edge's model was cut; None where no manifest says so.
        bundle: id of the manifest; None where there is none.
        signer: fingerprint of the key that was given and whose signature stands under it; None where none was given.
        emulator: id of the emulator that it was tuned on; None where no manifest says so.
    """

    kind: Literal["lora"] | Replaced
    values: dict[str, torch.Tensor]
    model: str
    modules: tuple[str, ...] = ()
    rank: int = 0
    alpha: float = 0.0
    labels: int | None = None
    cut: Cut | None = None
    bundle: str | None = None
    signer: str | None = None
    emulator: str | None = None

    @property
    def signed(self) -> bool:
        """Whether somebody vouches for it whose key was given."""
        return self.signer is not None


def check(
    adapter: Path,
    outline: Outline,
    signer: Ed25519PublicKey | None = None,
    model: Path | None = None,
) -> TunedEnds:
    """Read an adapter's folder, as an edge saves it or as it submits it, if it fits the model.

    What a manifest says of the cut binds: tuned parts are of the ends' blocks, or the output layer. LoRA may also be in
    the span if the manifest says that it is of a run of `dlora`, which has adapters there. Without a manifest, as a run
    keeps LoRA, the cut is unknown, and any of the model's blocks may be adapted.

    Args:
        adapter: `adapter_model.safetensors` and `adapter_config.json`, with or without a manifest, or
            `adapter.safetensors` with one.
        outline: of the whole model.
        signer: whose signature must stand under the manifest; None: whoever made it.
        model: folder of the whole model; None: a tuned output layer and a classifier are refused.

    Raises:
        BundleError: it is damaged, for another model, of another signer, or holds what is no part of tuned ends.
    """
    in_peft, manifest = vetted(adapter, outline, signer)
    if model is None and not outline.head:
        raise BundleError(
            f"this model has no output layer, so that what is tuned on it is a classifier's, not plugged in: {_MERGE}"
        )
    origin = origin_of(manifest, signer)
    if in_peft:
        if is_classifiers(adapter):
            raise BundleError(f"{adapter} is a classifier's, which is not plugged in: {_MERGE}")
        settings = LoraSettings.load(adapter)
        shapes = _lora_shapes(settings, outline.linears)
        modules = tuple(sorted(set(settings.target_modules)))
        if manifest is not None and manifest.about.get(RUN) != "dlora":
            check_ends(modules, outline, Cut.parse(manifest.cut))
        values = read_values(adapter, PEFT_WEIGHTS, shapes, needed=shapes)
        return TunedEnds("lora", values, outline.digest, modules, settings.r, settings.lora_alpha, **origin)
    if manifest is None:
        raise BundleError(
            f"{adapter} has no {bundle.MANIFEST}, so what its weights are is unknown: name a whole folder"
        )
    kind, held = _own_kind(manifest, model is not None), shapes_in(adapter, OWN_WEIGHTS)
    if model is None:
        _refuse_others(adapter, outline, held)
        own = _own_shapes(kind, Cut.parse(manifest.cut), outline)
        return TunedEnds(kind, read_values(adapter, OWN_WEIGHTS, own, needed=()), outline.digest, **origin)
    built = BuiltAs.of(model, outline, held, classifies=False)
    head = built.head if kind == "head" or built.labels is not None else {}
    own = {} if kind == "head" else _own_shapes(kind, Cut.parse(manifest.cut), built.outline)
    values = read_values(adapter, OWN_WEIGHTS, {**own, **head}, needed=head)
    return TunedEnds(kind, values, outline.digest, labels=built.labels, **origin)


def _refuse_others(adapter: Path, outline: Outline, names: Collection[str]) -> None:
    """Return if names are all of weights in the model's blocks: a classifier's head is not, nor what is of its name."""
    beside = [name for name in names if not name.startswith(f"{outline.path}.")]
    if beside:
        raise BundleError(
            f"{adapter} holds {shown(min(beside))}, which is no part of tuned ends of this model; if it is a "
            f"classifier's, {_MERGE}"
        )


def check_ends(modules: Collection[str], outline: Outline, cut: Cut) -> None:
    """Return if no module is of the span's blocks.

    Raises:
        BundleError: one is, or there is no such cut of this model.
    """
    inside = outline.in_span(modules, cut)
    if inside:
        raise BundleError(
            f"{PEFT_SETTINGS} adapts {inside[0]}, which is in the span of cut {cut}, and the manifest says of no dlora "
            "run: have the ends alone tuned"
        )


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


def _own_kind(manifest: bundle.Manifest, head: bool) -> Replaced:
    match manifest.about.get("method"):
        case "bitfit" | "full" as kind:
            return kind
        case "head" if head:
            return "head"
        case "side":
            raise BundleError("a side network is no part of the model: have the ends tuned with --peft lora or full")
        case "head":
            raise BundleError(f"an output layer or a classifier's head is not plugged in: {_MERGE}")
        case other:
            raise BundleError(f"no method {shown(other)} can be plugged in: have the ends tuned with lora or full")


def _own_shapes(kind: Replaced, cut: Cut, outline: Outline) -> dict[str, tuple[int, ...]]:
    return {
        name: outline.weights[name]
        for name in outline.in_ends(outline.weights, cut)
        if kind == "full" or name.rpartition(".")[2] == "bias"
    }


def read_values(
    adapter: Path, name: str, shapes: Mapping[str, tuple[int, ...]], needed: Collection[str]
) -> dict[str, torch.Tensor]:
    """A file's tensors, whose names are among those of `shapes`, all `needed` ones there; all finite.

    Raises:
        BundleError: they are not, or one is of another shape or no type that adapters are computed in.
    """
    path = adapter / name
    bundle.open_listed(adapter, name).close()  # no link to a file elsewhere
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            _check_names(path, set(names), set(shapes), set(needed))
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


def _check_names(path: Path, names: set[str], known: set[str], needed: set[str]) -> None:
    if names - known:
        raise BundleError(f"{path} holds {shown(min(names - known))}, which is no part of tuned ends of this model")
    if not names or needed - names:
        raise BundleError(f"{path} lacks {shown(min(needed - names, default='weights'))}: have it submitted again")


def _check_header(path: Path, name: str, stored: Any, shape: tuple[int, ...]) -> None:
    if tuple(stored.get_shape()) != shape:
        raise BundleError(f"{path}: {name} has shape {tuple(stored.get_shape())} where the model needs {shape}")
    if stored.get_dtype() not in STORED_AS:
        raise BundleError(f"{path}: {name} is stored as {stored.get_dtype()}: save it as one of {', '.join(STORED_AS)}")
