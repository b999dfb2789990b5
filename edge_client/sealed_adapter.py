"""A tuned adapter's folder where the run is sealed: each file under its own name and an ending, and sealed.

Knows names, bytes and a seal; what the files say is the business of `edge_client.adapter_folder`. An adapter is held in
memory as a whole here, as it is where it is used, so that nothing of it stands on a disk as it is.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from isthmus.adapter_files import FILES, OWN_WEIGHTS, PEFT_WEIGHTS
from isthmus.bundle import MANIFEST, SIGNATURE
from isthmus.errors import BundleError
from isthmus.held_bundle import Files
from isthmus.trust import sealing
from isthmus.trust.sealing import ENDING, Seal

NAMES = sorted({*FILES["peft"], *FILES["isthmus"], MANIFEST, SIGNATURE})
"""What may be in an adapter's folder."""


def write_sealed(files: Mapping[str, bytes], directory: Path, seal: Seal) -> None:
    """Write an adapter's files into a folder.

    Raises:
        OSError: the disk refuses.
    """
    for name, content in files.items():
        seal.write(directory / f"{name}{ENDING}", _purpose(name), [content])


def read_sealed(directory: Path, seal: Seal) -> Files:
    """All files of an adapter, by the names that they had.

    Raises:
        BundleError: one is damaged or cannot be read, or there are none.
    """
    try:
        files = {
            name: seal.read(directory / f"{name}{ENDING}", _purpose(name))
            for name in NAMES
            if os.path.lexists(directory / f"{name}{ENDING}")
        }
    except OSError as error:
        raise BundleError(f"{error.filename or directory} cannot be read ({error.strerror}); restore it") from None
    if not files.keys() & {PEFT_WEIGHTS, OWN_WEIGHTS}:
        raise BundleError(f"{directory} holds no sealed adapter; restore it, or train again")
    return files


def sealed_digest(directory: Path, seal: Seal) -> str | None:
    """SHA-256 in hex of the tensors of an adapter, as they were before they were sealed; None where there are none.

    Raises:
        BundleError: they are damaged, or cannot be read.
    """
    for name in (PEFT_WEIGHTS, OWN_WEIGHTS):
        path = directory / f"{name}{ENDING}"
        if path.is_file():
            try:
                return sealing.sha256(path, _purpose(name), seal)
            except OSError as error:
                raise BundleError(f"{path} cannot be read ({error.strerror}); restore it") from None
    return None


def is_sealed(directory: Path) -> bool:
    """Whether an adapter's folder holds a sealed one."""
    return any((directory / f"{name}{ENDING}").is_file() for name in (PEFT_WEIGHTS, OWN_WEIGHTS))


def _purpose(name: str) -> str:
    return f"adapter/{name}"
