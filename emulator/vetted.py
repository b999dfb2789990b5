"""The folder of an adapter before anything of it is believed: its size, its format, and the manifest beside it.

Knows files, one manifest and the model's outline; knows no settings, no tensors and no merging.
"""

from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from emulator import damage
from emulator.outline import Outline
from isthmus import bundle
from isthmus.adapter_files import FILES, OWN_WEIGHTS, PEFT_WEIGHTS
from isthmus.cut import Cut
from isthmus.errors import BundleError
from isthmus.trust.credentials import fingerprint
from isthmus.trust.sealing import ENDING

EMULATOR = "emulator"
"""Where a submission's manifest names the emulator that its run was tuned on."""

SMALL_BYTES = 4 << 20
"""Room for manifest, settings, and the names and shapes of thousands of tensors."""


def vetted(adapter: Path, outline: Outline, signer: Ed25519PublicKey | None) -> tuple[bool, bundle.Manifest | None]:
    """Whether a folder is an adapter in peft's format, not ours, and its manifest, if it has one that holds.

    Raises:
        BundleError: it is neither, too large, damaged, of another model or signer, or nobody signed it who must.
    """
    sizes = _sizes(adapter)
    in_peft = _is_in_peft(adapter, sizes)
    listed = sizes if bundle.MANIFEST in sizes else FILES["peft" if in_peft else "isthmus"]  # else more may lie there
    _check_room(adapter, sum(sizes.get(name, 0) for name in listed), _most_values(outline, in_peft))
    manifest = _manifest(adapter, outline.digest, signer) if bundle.MANIFEST in sizes else None
    if manifest is None and signer is not None:
        raise BundleError(f"{adapter} is not signed: have it submitted with `edge_client submit`")
    return in_peft, manifest


def origin_of(manifest: bundle.Manifest | None, signer: Ed25519PublicKey | None) -> dict[str, Any]:
    """What a manifest and its signature say of where tuned ends are from: fields of `TunedEnds`."""
    if manifest is None:
        return {}
    told = manifest.about.get(EMULATOR)
    return {
        "cut": Cut.parse(manifest.cut),
        "bundle": manifest.id,
        "signer": None if signer is None else fingerprint(signer),
        "emulator": told if isinstance(told, str) else None,
    }


def _sizes(adapter: Path) -> dict[str, int]:
    """Bytes of each file, links not followed."""
    try:
        return {path.name: path.lstat().st_size for path in adapter.iterdir()}
    except OSError as error:
        raise BundleError(f"{adapter} cannot be read ({error.strerror}): name a run's adapter folder") from None


def _is_in_peft(adapter: Path, names: Collection[str]) -> bool:
    here = [name for name in (PEFT_WEIGHTS, OWN_WEIGHTS) if name in names]
    if not here and any(name.endswith(ENDING) for name in names):
        raise BundleError(
            f"{adapter} is sealed: have it unsealed with `edge_client unseal`, or handed in with `submit`"
        )
    if len(here) != 1:
        held = "both" if here else "neither"
        raise BundleError(f"{adapter} holds {held} of {PEFT_WEIGHTS} and {OWN_WEIGHTS}: name one run's adapter folder")
    return here == [PEFT_WEIGHTS]


def _most_values(outline: Outline, in_peft: bool) -> int:
    """More values than an adapter of any rank, or of all blocks and the output layer, can hold."""
    if in_peft:
        return sum((inputs + outputs) * max(inputs, outputs) for inputs, outputs in outline.linears.values())
    return sum(map(prod, (*outline.weights.values(), *outline.linears.values())))


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
