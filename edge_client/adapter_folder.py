"""A tuned adapter's folder: in peft's format where peft has the method, else in a signed bundle of ours.

Knows files and tunings; knows no model's modules and no wire.
"""

import errno
import shutil
from pathlib import Path

import peft
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file

from edge_client.adapter_settings import check_content, check_settings, save_settings, settings_text
from edge_client.sealed_adapter import read_sealed, write_sealed
from edge_client.tuning import Tuning
from isthmus import bundle, held_bundle
from isthmus.adapter_files import FILES, OWN_WEIGHTS, PEFT_SETTINGS, PEFT_WEIGHTS
from isthmus.bundle import MANIFEST, SIGNATURE
from isthmus.cut import Cut
from isthmus.durable import DRAFT, sync
from isthmus.errors import BundleError
from isthmus.faults import Fault, passing
from isthmus.held_bundle import Files
from isthmus.tensors_in_memory import read_tensors
from isthmus.trust.sealing import Seal

PEFT_METADATA = {"format": "pt"}
"""What peft writes beside the tensors."""


def save_adapter(
    tuning: Tuning,
    directory: Path,
    model: str,
    model_digest: str,
    cut: Cut,
    key: Ed25519PrivateKey,
    seal: Seal | None = None,
) -> None:
    """Write the adapter in the format that `Tuning.saved_as` names; an earlier one stays until this one is whole.

    With a `seal` its files are sealed on their way to the disk.

    Raises:
        OSError: the disk refuses.
    """
    draft = directory.with_name(f"{directory.name}{DRAFT}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        if seal is None:
            _fill(tuning, draft, model, model_digest, cut, key)
        else:
            write_sealed(_held(tuning, model, model_digest, cut, key), draft, seal)
    except SafetensorError as error:  # how a full disk is told of there
        raise OSError(errno.EIO, str(error).partition("\n")[0]) from None
    for path in (*draft.iterdir(), draft):
        sync(path)
    if directory.exists():
        shutil.rmtree(directory)
    passing(Fault.ADAPTER_BEFORE_RENAME)
    draft.rename(directory)
    sync(directory.parent)
    passing(Fault.ADAPTER_AFTER_RENAME)


def _fill(tuning: Tuning, directory: Path, model: str, model_digest: str, cut: Cut, key: Ed25519PrivateKey) -> None:
    if isinstance(tuning.model, peft.PeftModel):
        save_file(tuning.saved(), directory / PEFT_WEIGHTS, metadata=PEFT_METADATA)
        save_settings(_config(tuning, model), directory)
    else:
        save_file(tuning.saved(), directory / OWN_WEIGHTS)
        bundle.write(directory, "adapter", model_digest, str(cut), _about(tuning), key)


def _held(tuning: Tuning, model: str, model_digest: str, cut: Cut, key: Ed25519PrivateKey) -> Files:
    """What `_fill` writes, bit for bit."""
    if isinstance(tuning.model, peft.PeftModel):
        settings = settings_text(_config(tuning, model)).encode()
        return {PEFT_WEIGHTS: save(tuning.saved(), metadata=PEFT_METADATA), PEFT_SETTINGS: settings}
    files = {OWN_WEIGHTS: save(tuning.saved())}
    manifest, signature = held_bundle.signed(files, "adapter", model_digest, str(cut), _about(tuning), key)
    return files | {MANIFEST: manifest.to_bytes(), SIGNATURE: signature}


def _config(tuning: Tuning, model: str) -> peft.PeftConfig:
    config = tuning.config()
    config.base_model_name_or_path = model
    return config


def _about(tuning: Tuning) -> dict[str, bundle.Scalar]:
    shape = tuning.side or tuning.cores
    return {"method": tuning.kind, **(vars(shape) if shape is not None else {})}


def load_adapter(tuning: Tuning, directory: Path, signer: Ed25519PublicKey | None, seal: Seal | None = None) -> None:
    """Read what `save_adapter` wrote into a tuning of the same shape; a bundle must be of `signer` if one is given.

    Raises:
        BundleError: it is missing, damaged or of another shape, or its settings are not this tuning's.
    """
    if seal is not None:
        _load_held(tuning, read_sealed(directory, seal), directory, signer)
        return
    if not isinstance(tuning.model, peft.PeftModel):
        bundle.verify(directory, signer)
        tuning.load_saved(_read(directory / OWN_WEIGHTS))
        return
    tuning.load_saved(_read(directory / PEFT_WEIGHTS))
    check_settings(directory, tuning.config())


def _load_held(tuning: Tuning, files: Files, directory: Path, signer: Ed25519PublicKey | None) -> None:
    own = not isinstance(tuning.model, peft.PeftModel)
    for name in FILES["isthmus" if own else "peft"]:
        if name not in files:
            raise BundleError(f"{directory} has no {name}; restore it, or train again")
    if own:
        held_bundle.verify(files, signer)
        tuning.load_saved(read_tensors(files[OWN_WEIGHTS], directory / OWN_WEIGHTS)[0])
        return
    tuning.load_saved(read_tensors(files[PEFT_WEIGHTS], directory / PEFT_WEIGHTS)[0])
    check_content(files[PEFT_SETTINGS], directory / PEFT_SETTINGS, tuning.config())


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        values: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}") from None
    return values
