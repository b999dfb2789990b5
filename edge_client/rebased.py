"""LoRA that begins as a part of the weights it adapts (PiSSA, OLoRA): kept as plain LoRA on the untouched weights.

Knows LoRA layers of `peft`; knows no model as a whole and no files. Where peft takes what the adapter begins as,
s·B0·A0, out of the weights, it stands here beside what trains: s·(B·A - B0·A0) is LoRA of twice the rank, the same for
every reader, whatever an SVD gives on another machine.
Methods: Meng, Wang and Zhang, PiSSA (2024), arXiv:2404.02948; Büyükakyüz, OLoRA (2024), arXiv:2406.01775.
"""

from collections.abc import Mapping
from typing import Any

import peft
import torch
from torch import nn
from torch.nn.functional import linear

from edge_client.port_adapters import ADAPTER
from isthmus.errors import UsageError

TRAINED = ".trained"
"""Last part of a trained half's name."""


class Halves(nn.Module):
    """One of LoRA's two matrices: the half that trains, then the half that it began as; it is saved as the whole."""

    def __init__(self, trained: nn.Parameter, start: torch.Tensor, along: int) -> None:
        """Join them along an axis: 0 for A, 1 for B."""
        super().__init__()
        self.trained = trained
        self.start: torch.Tensor
        self.register_buffer("start", start)
        self._along = along

    @property
    def weight(self) -> torch.Tensor:
        """The whole matrix."""
        return torch.cat([self.trained, self.start], self._along)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` [..., I] times the whole matrix."""
        return linear(hidden, self.weight)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        if f"{prefix}weight" in state_dict:
            halves = state_dict[f"{prefix}weight"].chunk(2, self._along)
            with torch.no_grad():
                for own, value in zip((self.trained, self.start), halves, strict=True):
                    own.copy_(value)


def begins_in_weights(config: peft.PeftConfig) -> bool:
    """Whether peft takes what the adapter begins as out of the weights."""
    start = getattr(config, "init_lora_weights", None)
    return isinstance(start, str) and start.startswith(("pissa", "olora"))


def rebase(model: peft.PeftModel, untouched: Mapping[str, torch.Tensor]) -> None:
    """Give adapted modules their weights back, by the modules' names, and double the rank of the adapters instead.

    Raises:
        UsageError: peft took the weights of a module for their transpose.
    """
    config = model.peft_config[ADAPTER]
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2  # the scale stays
    config.r *= 2
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    for name, weight in untouched.items():
        layer = model.get_base_model().get_submodule(name)
        layer.get_base_layer().weight.data = weight
        down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        if down.shape[1] != layer.in_features:
            raise UsageError(f"peft begins this adapter on {name} the wrong way round; use --peft pissa or lora")
        layer.lora_A[ADAPTER] = Halves(down, down.detach().clone(), 0)
        layer.lora_B[ADAPTER] = Halves(up, -up.detach().clone(), 1)
        layer.r[ADAPTER], layer.lora_alpha[ADAPTER], layer.scaling[ADAPTER] = config.r, config.lora_alpha, scale
