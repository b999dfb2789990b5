"""Cores: small square matrices that train between the frozen factors of linear modules.

Knows modules and the factors of those that are here; of modules on the cloud the factors are there, and a core answers
at their ports.
"""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from isthmus.core_shape import CoreShape
from isthmus.cores import Frozen, frozen_around
from isthmus.errors import UsageError
from isthmus.linears import Linear, Site


class Core(nn.Module):
    """A core, [R, R] in float32 and zero at the start; its module's own factors stand by where the module is here."""

    def __init__(self, shape: CoreShape, device: torch.device, frozen: Frozen | None) -> None:
        """Put it on a device."""
        super().__init__()
        self.scale = shape.scale
        self.weight = nn.Parameter(torch.zeros(shape.rank, shape.rank, device=device))
        self.register_buffer("down_RI", frozen.down_RI if frozen is not None else None, persistent=False)
        self.register_buffer("up_OR", frozen.up_OR if frozen is not None else None, persistent=False)

    def answered(self, reduced: torch.Tensor) -> torch.Tensor:
        """What it makes of [..., R], in that dtype."""
        made: torch.Tensor = (reduced.to(self.weight.dtype) @ self.weight.T) * self.scale
        return made.to(reduced.dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """What to add to the module's output for its input."""
        frozen = Frozen(self.get_buffer("down_RI"), self.get_buffer("up_OR"))
        return frozen.added(self.answered(frozen.reduced(hidden)))


def core_at(module: Any, site: Site, shape: CoreShape, here: bool) -> Core:
    """Put a core at a linear module; where that is `here`, it adds to what the module puts out.

    Raises:
        UsageError: the rank does not fit the module.
    """
    transposed = isinstance(module, Conv1D)
    inputs, outputs = (module.nx, module.nf) if transposed else (module.in_features, module.out_features)
    most = min(inputs, outputs)
    if shape.rank > most:
        raise UsageError(f"--rank {shape.rank} is more than {site[1]} of block {site[0]} has room for, which is {most}")
    frozen = None
    if here:
        linear = Linear(inputs, outputs, transposed, ())
        made = frozen_around(module, linear, site, shape.rank, shape.init, shape.seed)
        frozen = made.at(module.weight.device, module.weight.dtype)
    core = Core(shape, module.weight.device, frozen)
    module.core = core
    if here:
        module.register_forward_hook(_add)
    return core


def _add(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    added: torch.Tensor = module.get_submodule("core")(args[0])
    return output + added
