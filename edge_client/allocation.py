"""AdaLoRA's own part of a step: its term of the loss, and after the optimizer the ranks that it takes away.

Knows an adapted model of `peft` and its rank allocator; knows no optimizer, no data and no files.
Method: Zhang et al., AdaLoRA (2023), arXiv:2303.10512, as peft has it.
"""

from collections.abc import Mapping

import peft
import torch
from torch import nn

from edge_client.port_adapters import ADAPTER

PREFIX = "allocation/"
_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
_RANKS = "rank_pattern"


class Allocation:
    """Spends a shrinking budget of ranks on the modules where they matter most."""

    def __init__(self, model: peft.PeftModel, trainable: Mapping[str, nn.Parameter]) -> None:
        self._tuner = model.base_model
        self._config = model.peft_config[ADAPTER]
        self._trainable = trainable
        # Not in the configuration: saved from there it would make the files' matrices smaller than those here.
        self._ranks: dict[str, list[bool]] | None = None

    def penalty(self) -> torch.Tensor:
        """How far A and B are from orthogonal: the weighted mean of |P·Pᵀ - 1| over all of them, in nats."""
        terms = []
        for name, matrix in self._trainable.items():
            if ".lora_A." in name or ".lora_B." in name:
                square = matrix @ matrix.T if ".lora_A." in name else matrix.T @ matrix
                terms.append(torch.norm(square - torch.eye(len(square), dtype=square.dtype, device=square.device)))
        mean: torch.Tensor = torch.stack(terms).mean()
        return float(self._config.orth_reg_weight) * mean

    def allocate(self, step: int, gradients: Mapping[str, torch.Tensor]) -> None:
        """Take ranks away after step `step` (0-based) of the optimizer, which was given these gradients."""
        for name, parameter in self._trainable.items():
            parameter.grad = gradients[name]
        self._config.rank_pattern = self._ranks
        self._tuner.update_and_allocate(step)
        self._ranks, self._config.rank_pattern = self._config.rank_pattern, None
        for parameter in self._trainable.values():
            parameter.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed run must know."""
        allocator = self._tuner.rankallocator
        tensors = {f"{PREFIX}{kind}/{name}": one for kind in _SCORES for name, one in getattr(allocator, kind).items()}
        tensors |= {f"{PREFIX}{_RANKS}/{name}": torch.tensor(kept) for name, kept in (self._ranks or {}).items()}
        return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from a `state`, among other tensors."""
        allocator, device = self._tuner.rankallocator, next(iter(self._trainable.values())).device
        allocator.reset_ipt()
        ranks: dict[str, list[bool]] = {}
        for key, tensor in state.items():
            if key.startswith(PREFIX):
                kind, _, name = key.removeprefix(PREFIX).partition("/")
                if kind == _RANKS:
                    ranks[name] = tensor.tolist()
                elif kind in _SCORES:
                    getattr(allocator, kind)[name] = tensor.to(device, copy=True)
        self._ranks = ranks or None
