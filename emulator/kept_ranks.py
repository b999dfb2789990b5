"""The ranks that AdaLoRA kept: peft stores matrices without the others, and says which these were beside them.

Knows shapes and tensors by peft's names; knows no files and no model. A rank that was taken away is one of zeros.
"""

from collections.abc import Mapping

import torch

from emulator.lora_settings import shown
from isthmus.adapter_files import PEFT_SETTINGS
from isthmus.errors import BundleError

_AXIS = {"lora_A": 0, "lora_B": 1, "lora_E": 0}
_HOLDER = ".lora_E"


def narrowed(shapes: Mapping[str, tuple[int, ...]], kept: Mapping[str, list[bool]]) -> dict[str, tuple[int, ...]]:
    """The shapes of what is stored.

    Args:
        shapes: of whole matrices, by their names in the file.
        kept: for each rank of a module whether it was kept, by the name of what holds them, as peft has it.

    Raises:
        BundleError: `kept` is of other modules or ranks.
    """
    stored = dict(shapes)
    for name, mask in _masks(shapes, kept).items():
        axis, shape = _AXIS[name.rpartition(".")[2]], list(shapes[name])
        shape[axis] = int(mask.sum())
        stored[name] = tuple(shape)
    return stored


def filled(
    values: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], kept: Mapping[str, list[bool]]
) -> dict[str, torch.Tensor]:
    """Whole matrices, zeros standing for the ranks that were taken away; arguments as `narrowed` has them."""
    whole = dict(values)
    for name, mask in _masks(shapes, kept).items():
        full = values[name].new_zeros(shapes[name])
        if _AXIS[name.rpartition(".")[2]] == 0:
            full[mask] = values[name]
        else:
            full[:, mask] = values[name]
        whole[name] = full
    return whole


def _masks(shapes: Mapping[str, tuple[int, ...]], kept: Mapping[str, list[bool]]) -> dict[str, torch.Tensor]:
    masks: dict[str, torch.Tensor] = {}
    for holder, mask in kept.items():
        stem = f"base_model.model.{holder.partition(_HOLDER)[0]}"
        if len(mask) != shapes.get(f"{stem}{_HOLDER}", (-1,))[0]:
            raise BundleError(
                f"{PEFT_SETTINGS} has other ranks for {shown(holder)} than it adapts: have it saved again"
            )
        masks |= {f"{stem}.{matrix}": torch.tensor(mask) for matrix in _AXIS}
    return masks
