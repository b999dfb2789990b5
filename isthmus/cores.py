"""The frozen factors around a core: what a linear module of weight W adds is up·core·down times its input.

Knows matrices, their singular vectors and seeded random numbers; knows no ports, no sessions and no optimizer. Methods:
LoRA-XS (Bałazy et al., 2024), arXiv:2405.17604, for `svd`;
PrivateLoRA (Wang et al., 2023), arXiv:2311.14030, for `random`.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from isthmus.errors import UsageError
from isthmus.linears import Linear, Site


@dataclass(frozen=True)
class Frozen:
    """The factors around a core: down [R, I] and up [O, R]."""

    down_RI: torch.Tensor
    up_OR: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.down_RI.nbytes + self.up_OR.nbytes

    def at(self, device: torch.device, dtype: torch.dtype) -> "Frozen":
        """The same there, in this dtype."""
        return Frozen(self.down_RI.to(device, dtype), self.up_OR.to(device, dtype))

    def reduced(self, hidden: torch.Tensor) -> torch.Tensor:
        """What goes to the core, [..., R], of the module's input [..., I]."""
        return hidden @ self.down_RI.T

    def added(self, answer: torch.Tensor) -> torch.Tensor:
        """What to add to the module's output, [..., O], for what the core made, [..., R]."""
        return answer @ self.up_OR.T


@torch.no_grad()
def frozen_around(module: nn.Module, linear: Linear, site: Site, rank: int, init: str, seed: int) -> Frozen:
    """The factors of a module, where it is, in float32.

    Args:
        module: whose weight W is.
        linear: its sizes.
        site: its place in the whole model, which seeds `random` too.
        rank: R.
        init: `svd`: down and up·diag(1 / S) are W's first singular vectors, up having the singular values S in it;
            `random`: both Gaussian, so that a core of the identity would keep the size of its input.
        seed: of `random` alone.

    Raises:
        UsageError: the weight is quantized, so that it has no singular vectors to read.
    """
    weight: Any = module.weight
    if weight.is_meta:
        return Frozen(*outline(linear, rank))
    if init == "random":
        return Frozen(*(drawn.to(weight.device) for drawn in _drawn(linear, site, rank, seed)))
    if not weight.is_floating_point() or weight.numel() != linear.inputs * linear.outputs:
        raise UsageError("--init svd reads weights, which this server has quantized; use --init random")
    matrix_OI = weight.T if linear.transposed else weight
    return Frozen(*_leading(matrix_OI.float(), rank))


def outline(linear: Linear, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors without values."""
    return torch.empty(rank, linear.inputs, device="meta"), torch.empty(linear.outputs, rank, device="meta")


def _leading(matrix_OI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The truncated SVD as Vh [R, I] and U·S [O, R]; each right vector's greatest value is positive."""
    left_OK, values_K, right_KI = torch.linalg.svd(matrix_OI, full_matrices=False)
    right_RI = right_KI[:rank]
    signs_R = torch.sign(right_RI.gather(1, right_RI.abs().argmax(1, keepdim=True))).squeeze(1)
    down_RI = right_RI * signs_R[:, None]
    up_OR = left_OK[:, :rank] * (values_K[:rank] * signs_R)
    return down_RI.contiguous(), up_OR.contiguous()


def _drawn(linear: Linear, site: Site, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    named = hashlib.sha256(f"{seed} {site[0]} {site[1]}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(named[:7], "big"))
    down_RI = torch.randn(rank, linear.inputs, dtype=torch.float64, generator=generator)
    up_OR = torch.randn(linear.outputs, rank, dtype=torch.float64, generator=generator)
    return (down_RI * linear.inputs**-0.5).float(), (up_OR * rank**-0.5).float()
