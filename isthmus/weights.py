"""A model's weights and the files beside them, saved as a folder that can be loaded without the model's own.

Knows Hugging Face models and safetensors; knows no cuts and no bundles.
"""

import shutil
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "preprocessor_config.json",
)
"""Files that an edge needs beside the weights to build the model and read text or pictures."""


def save_weights(
    model: nn.Module, source: Path, folder: Path, dtype: torch.dtype | None = None, without: Collection[str] = ()
) -> None:
    """Save a model's weights, tied ones once, and the companions that lie in `source`.

    Args:
        model: whose state is saved.
        source: the folder of the model that it was made from.
        folder: is there, and holds none of these files.
        dtype: what floating-point weights are saved in; None: as they are.
        without: paths of modules whose weights are left out.
    """
    held: dict[int, str] = {}
    weights = {}
    for name, tensor in model.state_dict().items():
        if any(name.startswith(f"{path}.") for path in without):
            continue
        if held.setdefault(tensor.data_ptr(), name) == name:
            stored = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
            weights[name] = stored.contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # as its companions, so that a folder can be handed on
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
