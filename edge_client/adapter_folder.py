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
from safetensors.torch import load_file, save_file

from edge_client.adapter_settings import check_settings, save_settings
from edge_client.tuning import Tuning
from isthmus import bundle
from isthmus.adapter_files import OWN_WEIGHTS, PEFT_WEIGHTS
from isthmus.cut import Cut
from isthmus.durable import DRAFT, sync
from isthmus.errors import BundleError
from isthmus.faults import Fault, passing


def save_adapter(
    tuning: Tuning, directory: Path, model: str, model_digest: str, cut: Cut, key: Ed25519PrivateKey
) -> None:
    """Write the adapter in the format that `Tuning.saved_as` names; an earlier one stays until this one is whole.

    Raises:
        OSError: the disk refuses.
    """
    draft = directory.with_name(f"{directory.name}{DRAFT}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        _fill(tuning, draft, model, model_digest, cut, key)
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
        config = tuning.config()
        config.base_model_name_or_path = model
        save_file(tuning.saved(), directory / PEFT_WEIGHTS, metadata={"format": "pt"})
        save_settings(config, directory)
    else:
        save_file(tuning.values(), directory / OWN_WEIGHTS)
        about = {"method": tuning.kind, **(vars(tuning.side) if tuning.side is not None else {})}
        bundle.write(directory, "adapter", model_digest, str(cut), about, key)


def load_adapter(tuning: Tuning, directory: Path, signer: Ed25519PublicKey | None) -> None:
    """Read what `save_adapter` wrote into a tuning of the same shape; a bundle must be of `signer` if one is given.

    Raises:
        BundleError: it is missing, damaged or of another shape, or its settings are not this tuning's.
    """
    if not isinstance(tuning.model, peft.PeftModel):
        bundle.verify(directory, signer)
        tuning.load(_read(directory / OWN_WEIGHTS))
        return
    tuning.load_saved(_read(directory / PEFT_WEIGHTS))
    check_settings(directory, tuning.config())


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        values: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}") from None
    return values
