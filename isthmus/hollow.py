"""What stands on the cloud for the parts of a model outside its blocks: modules without weights.

Knows modules; knows no files and no wire.
"""

from typing import Any

import torch
from torch import nn

from isthmus.blocks import BlockList


class _Nothing(nn.Module):
    """Stands where an embedding was on the cloud: adds nothing to hidden states of any shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.empty(0, device="cpu")  # for families that draw it before weights are read

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros(())


class _Same(nn.Module):
    """Stands where a norm or projection outside the blocks was on the cloud: returns its input."""

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden


def hollow_out(model: nn.Module, found: BlockList) -> None:
    """Replace every module outside the blocks that has weights, so that none of them is loaded or needed."""
    done: tuple[str, ...] = (f"{found.path}.",)
    for path, module in list(model.named_modules()):
        if not f"{path}.".startswith(done) and next(module.parameters(recurse=False), None) is not None:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _Nothing() if isinstance(module, nn.Embedding) else _Same())
            done = (*done, f"{path}.")  # nothing is left in there
