"""A tiny whole model with a side network, and values under which all of it matters: what these tests share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from edge_client.side import SideShape, attach_side
from isthmus.blocks import BlockList
from isthmus.cut import Cut
from isthmus.load import load_whole
from tests.parity.reference import HIDDEN

SIZE, WIDTH, VOCABULARY = HIDDEN // 4, 24, 259
SHAPE, CUT, NUMBERS = SideShape(reduction=4, every=2, width=WIDTH), Cut(0, 0), (1, 3)


@dataclass
class Side:
    """A whole model with a side network, and the network's parameters."""

    model: PreTrainedModel
    found: BlockList
    trained: dict[str, nn.Parameter]

    def logits(self, ids_BT: torch.Tensor, **arguments: Any) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.model(input_ids=ids_BT, use_cache=False, **arguments).logits
        return logits


def attached(directory: Path, shape: SideShape = SHAPE, seed: int = 0, dtype: torch.dtype = torch.float32) -> Side:
    model, found = load_whole(directory, dtype)
    return Side(model, found, attach_side(model, found, CUT, shape, seed, here=True))


def moved(side: Side) -> Side:
    """The same with values under which every parameter matters; each gate has another value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in side.trained.items():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.add_((0.05 if name.endswith("gate") else 0.2) * noise)
    return side


def token_ids(rows: int = 2, tokens: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
