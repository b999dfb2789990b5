"""Which positions of a batch reach the head: logits are computed only where there is a loss or a choice.

Knows a mask and the output layer; knows no loss. The mask is per thread, so microbatches may run side by side.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from isthmus.blocks import during_calls

_wanted: ContextVar[torch.Tensor | None] = ContextVar("wanted", default=None)


@contextmanager
def wanting(wanted_BT: torch.Tensor) -> Iterator[None]:
    """Let a model with `select_outputs` return logits [1, K, V] of the K true positions of bool [B, T], row by row."""
    token = _wanted.set(wanted_BT)
    try:
        yield
    finally:
        _wanted.reset(token)


def wanted_positions() -> torch.Tensor | None:
    """The mask in force in this thread: bool [B, T], or None where every position is wanted."""
    return _wanted.get()


def select_outputs(model: PreTrainedModel) -> None:
    """Make `wanting` effective on a model, whatever its head does after its output layer position by position.

    Call it again once an adapter stands around the output layer. A classifier has none: it picks a position by itself.
    """
    head = model.get_output_embeddings()
    if head is None:
        return

    def keep_wanted(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        wanted_BT = _wanted.get()
        hidden_BTD, *rest = args
        if wanted_BT is None or hidden_BTD.shape[:2] != wanted_BT.shape:  # an adapter around this layer has selected
            return None
        index_K = wanted_BT.reshape(-1).nonzero()[:, 0].to(hidden_BTD.device)
        return (hidden_BTD.reshape(-1, hidden_BTD.shape[-1]).index_select(0, index_K)[None], *rest)

    head.register_forward_pre_hook(keep_wanted)


def stand_behind(model: PreTrainedModel, tokens: int) -> None:
    """Let `wanting` speak of the positions behind so many others that callers of `model` put in front of each row."""

    def shifted(given: dict[str, Any]) -> torch.Tensor | None:
        wanted_BT = _wanted.get()
        hidden_or_ids = given.get("inputs_embeds") if given.get("inputs_embeds") is not None else given.get("input_ids")
        if wanted_BT is None or hidden_or_ids is None or hidden_or_ids.shape[1] == wanted_BT.shape[1]:
            return wanted_BT  # nothing was put in front
        return torch.cat([wanted_BT.new_zeros(len(wanted_BT), tokens), wanted_BT], 1)

    during_calls(model, _wanted, shifted)
