"""A model, and the same model with an emulator in its middle: what the two make of the same rows.

Knows two models that share their ends; knows no files and no optimizer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from isthmus.blocks import BlockList, narrowed
from isthmus.cut import Cut
from isthmus.emulated.load import repeat_blocks, shape_span
from isthmus.emulated.recipe import Recipe
from isthmus.training.collate import Batch, logits_where_wanted
from isthmus.training.outputs import select_outputs


@dataclass(frozen=True)
class Compared:
    """What one batch showed.

    Attributes:
        hidden: mean squared error of the emulator's output over the mean square of the span's; scalar, differentiable.
        nats_K: of each of the K counted tokens, row by row, of the model with the emulator; likewise.
        nats_of_span_K: of the model itself; None where they were not asked for.
        values: real tokens that `hidden` is of.
        mean_square: of the span's output at those, the denominator of `hidden`; scalar.
    """

    hidden: torch.Tensor
    nats_K: torch.Tensor
    nats_of_span_K: torch.Tensor | None
    values: int
    mean_square: torch.Tensor

    @property
    def loss(self) -> torch.Tensor:
        """Nats per counted token of the model with the emulator; scalar, differentiable."""
        return self.nats_K.mean()


@dataclass(frozen=True)
class Pair:
    """Both models; `repeated` are blocks that `repeat_blocks` puts in once the others are filled."""

    model: PreTrainedModel
    found: BlockList
    twin: PreTrainedModel
    twin_found: BlockList
    cut: Cut
    recipe: Recipe
    repeated: dict[int, nn.Module]

    @classmethod
    def of(cls, model: PreTrainedModel, found: BlockList, recipe: Recipe) -> "Pair":
        """Share every weight that stays as it is; what changes its form is empty yet."""
        select_outputs(model)
        twin, twin_found = narrowed(model, found, range(len(found.blocks)))
        repeated = shape_span(twin_found, recipe)
        return cls(model, found, twin, twin_found, Cut.parse(recipe.cut), recipe, repeated)

    def own(self) -> dict[str, nn.Parameter]:
        """Give the emulator copies of the weights that it shares with the model, and put in the repeated blocks.

        Returns:
            Each parameter of the emulator once, by its name in the whole model; blocks that repeat another's follow.
        """
        shared = {id(parameter) for parameter in self.model.parameters()}
        copies: dict[int, nn.Parameter] = {}
        for module in (module for number in self.recipe.kept for module in self.twin_found.blocks[number].modules()):
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in shared:
                    copy = copies.setdefault(id(parameter), nn.Parameter(parameter.detach().clone(), False))
                    module._parameters[name] = copy
        repeat_blocks(self.twin_found, self.recipe, self.repeated)
        return {
            f"{self.twin_found.path}.{number}.{name}": parameter
            for number in self.recipe.kept
            for name, parameter in self.twin_found.blocks[number].named_parameters()
        }

    def compare(self, batch: Batch, both_losses: bool = False) -> Compared:
        """Run both models on a batch, the whole one without autograd; `both_losses` runs its head too."""
        last = self.cut.span(len(self.found.blocks)).stop - 1
        device = self.model.device
        with torch.no_grad(), _output_of(self.found.blocks[last]) as aim:
            if both_losses:
                nats_of_span_K = _nats(self.model, batch)
            else:
                nats_of_span_K = None
                ids_BT, mask_BT = batch.input_ids_BT.to(device), batch.attention_mask_BT.to(device)
                self.model.base_model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        with _output_of(self.twin_found.blocks[last]) as got:
            nats_K = _nats(self.twin, batch)
        real_BT = batch.attention_mask_BT.bool().to(device)
        aim_ND, got_ND = aim[0][real_BT].float(), got[0][real_BT].float()
        mean_square = aim_ND.square().mean()
        hidden = (got_ND - aim_ND).square().mean() / mean_square
        return Compared(hidden, nats_K, nats_of_span_K, len(aim_ND), mean_square)


def _nats(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Cross entropy of each token that counts: [K]."""
    logits_KV = logits_where_wanted(model, batch, model.device)
    return cross_entropy(logits_KV, batch.targets_K.to(model.device), reduction="none")


@contextmanager
def _output_of(block: nn.Module) -> Iterator[list[torch.Tensor]]:
    """The hidden states [B, T, D] that a block returns in here."""
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hook = block.register_forward_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()
