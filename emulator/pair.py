"""A model, and the same model with an emulator in its middle: what the two make of the same rows.

Knows two models that share their ends; knows no files and no optimizer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from isthmus.blocks import BlockList, narrowed
from isthmus.cut import Cut
from isthmus.emulated.load import repeat_blocks, shape_span
from isthmus.emulated.recipe import Recipe
from isthmus.training.collate import Batch, summed_loss
from isthmus.training.outputs import select_outputs


@dataclass(frozen=True)
class Compared:
    """What one batch showed.

    Attributes:
        hidden: mean squared error of the emulator's output over the mean square of the span's; scalar, differentiable.
        loss: nats, summed over the counted tokens, of the model with the emulator; likewise.
        loss_of_span: of the model itself; None where it was not asked for.
        counted: tokens that the losses are of.
        values: real tokens that `hidden` is of.
    """

    hidden: torch.Tensor
    loss: torch.Tensor
    loss_of_span: torch.Tensor | None
    counted: int
    values: int


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
                loss_of_span = summed_loss(self.model, batch, device)
            else:
                loss_of_span = None
                ids_BT, mask_BT = batch.input_ids_BT.to(device), batch.attention_mask_BT.to(device)
                self.model.base_model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        with _output_of(self.twin_found.blocks[last]) as got:
            loss = summed_loss(self.twin, batch, device)
        real_BT = batch.attention_mask_BT.bool().to(device)
        aim_ND, got_ND = aim[0][real_BT].float(), got[0][real_BT].float()
        hidden = (got_ND - aim_ND).square().mean() / aim_ND.square().mean()
        return Compared(hidden, loss, loss_of_span, batch.counted, len(aim_ND))


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
