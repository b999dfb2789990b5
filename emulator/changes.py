"""What becomes of a model's weights when something is put into them: counted by what they are, and untied.

Knows tensors and their names; knows no adapters and no files.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from isthmus.errors import BundleError


@dataclass(frozen=True)
class Changed:
    """What changed in a model.

    Attributes:
        tensors: how many hold other values than before, by what they are.
        parameters: values in them that are not what they were.
        untied: the output layer got a matrix of its own: it or the embedding was changed, and they shared one.
        dtype: the model's, before and after.
    """

    tensors: Mapping[str, int]
    parameters: int
    untied: bool
    dtype: str

    @property
    def weights(self) -> int:
        """How many tensors hold other values, whatever they are."""
        return sum(self.tensors.values())

    def in_words(self) -> str:
        """`9,152 parameters changed in 4 weight matrices`."""
        where = " and ".join(f"{count:,} {what}" for what, count in self.tensors.items()) or "no tensor"
        return f"{self.parameters:,} parameters changed in {where}"


class Counting:
    """Counts what holds other values than it did; `called`: what all of it is called, None: each by what it is."""

    def __init__(self, called: str | None = None) -> None:
        self._called = called
        self._tensors: Counter[str] = Counter()
        self._parameters = 0

    def note(self, name: str, before: torch.Tensor, after: torch.Tensor) -> None:
        """Count a tensor's values that are to be saved, and are not what they were.

        Raises:
            BundleError: one is not finite.
        """
        if not after.isfinite().all():
            raise BundleError(f"{name} is not finite with the adapter in it: have the ends tuned again, with less --lr")
        count = int((after != before).sum())
        self._parameters += count
        if count:
            self._tensors[self._called or _kind(name, after)] += 1

    def changed(self, model: PreTrainedModel, untied: bool) -> Changed:
        """All that was counted of a model."""
        return Changed(dict(self._tensors), self._parameters, untied, str(model.dtype).removeprefix("torch."))


def _kind(name: str, tensor: torch.Tensor) -> str:
    if name.endswith("bias"):
        return "biases"
    return "weight matrices" if tensor.dim() > 1 else "norms"


def untie(whole: PreTrainedModel) -> bool:
    """Give the output layer its own copy of what it shares with the embedding, and have the model saved so.

    Returns:
        whether it shared anything.
    """
    head, stem = whole.get_output_embeddings(), whole.get_input_embeddings()
    if head.weight is not stem.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (whole.config, whole.config.get_text_config()):
        config.tie_word_embeddings = False
    return True
