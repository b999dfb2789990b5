"""Token sequences as one padded batch, and the loss of a model on it.

Knows tensors and how a causal model predicts the next token; knows no files and no optimizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from isthmus.training.data import TokenSequence
from isthmus.training.outputs import wanting


@dataclass(frozen=True)
class Batch:
    """B rows padded on the right to T tokens; K of the positions predict a token that counts.

    A row's last token predicts nothing that counts, so it is not run.
    """

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    wanted_BT: torch.Tensor
    targets_K: torch.Tensor

    @property
    def real_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.attention_mask_BT.sum())

    @property
    def counted(self) -> int:
        """Tokens that the loss is taken on: K."""
        return len(self.targets_K)

    @classmethod
    def of(cls, sequences: Sequence[TokenSequence]) -> "Batch":
        """Pad sequences to the longest."""
        width = max(len(sequence.ids) for sequence in sequences) - 1
        input_ids_BT = torch.full((len(sequences), width), sequences[0].padding)
        attention_mask_BT, wanted_BT = torch.zeros_like(input_ids_BT), torch.zeros_like(input_ids_BT, dtype=torch.bool)
        targets: list[int] = []
        for row, sequence in enumerate(sequences):
            length = len(sequence.ids) - 1
            input_ids_BT[row, :length] = torch.tensor(sequence.ids[:-1])
            attention_mask_BT[row, :length] = 1
            wanted_BT[row, :length] = torch.tensor(sequence.counted[1:])
            targets.extend(
                token for token, counts in zip(sequence.ids[1:], sequence.counted[1:], strict=True) if counts
            )
        return cls(input_ids_BT, attention_mask_BT, wanted_BT, torch.tensor(targets))


def logits_where_wanted(model: nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
    """A model's logits at the wanted positions, in float32: [K, V]; a classifier has one for each row."""
    with wanting(batch.wanted_BT):
        logits: torch.Tensor = model(
            input_ids=batch.input_ids_BT.to(device),
            attention_mask=batch.attention_mask_BT.to(device),
            use_cache=False,
        ).logits
    return (logits if logits.dim() == 2 else logits[0]).float()


def summed_loss(model: nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
    """Sum of the cross entropies of the tokens that count, in nats."""
    return cross_entropy(logits_where_wanted(model, batch, device), batch.targets_K.to(device), reduction="sum")
