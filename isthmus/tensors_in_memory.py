"""Tensors of a safetensors file whose bytes are in memory, with the text that stands beside them.

Knows that format; knows no disk, so that what may not touch one can be read.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from isthmus.errors import BundleError

_LENGTH_BYTES = 8


def read_tensors(content: bytes, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors by name on the CPU, and the metadata.

    Raises:
        BundleError: it is no safetensors file; `path` is what the message names.
    """
    try:
        tensors: dict[str, torch.Tensor] = load(content)
        return tensors, metadata_of(content)
    except (SafetensorError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}") from None


def metadata_of(content: bytes) -> dict[str, str]:
    """The text beside the tensors of a file that has been read before; no more than the file's own header.

    Raises:
        ValueError: it has none that can be read.
    """
    header = json.loads(content[_LENGTH_BYTES : _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")])
    found = header.get("__metadata__", {})
    return {str(name): str(value) for name, value in found.items()}
