"""FLOPs of the edge's own part of a model: stem, end blocks, adapters, and the head where it is needed.

Knows the edge model and what trains; the counting itself is the ledger's.
"""

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from edge_client.cached import CachedSpan, Spared
from edge_client.edge_model import EdgeModel
from edge_client.port_adapters import ADAPTER
from edge_client.remote import RemoteSpan
from edge_client.tuning import Tuning
from isthmus.architectures import reads_both_ways
from isthmus.blocks import PassThrough
from isthmus.ledger.flops import ModelFlops, count, on_meta
from isthmus.ports import tapped
from isthmus.training.outputs import wanting


def count_edge_flops(edge: EdgeModel, tuning: Tuning) -> ModelFlops:
    """Count both passes on the meta device, what runs elsewhere being a pass-through.

    A prompt's tokens are to be counted with each row's own.
    """
    twin = _twin(edge, tuning)
    counted = count(lambda tokens, outputs: _run(twin, edge, tuning, tokens, outputs))
    return counted + _of_prompt(tuning) if tuning.virtual_tokens else counted


def trains_below(edge: EdgeModel, tuning: Tuning) -> bool:
    """Whether the gradient of the span's input is wanted, found by running the edge's part on the meta device."""
    twin = _twin(edge, tuning)
    _run(twin, edge, tuning, tokens=2, outputs=1)
    return any(module.gradient_wanted for module in twin.modules() if isinstance(module, _Elsewhere))


def _twin(edge: EdgeModel, tuning: Tuning) -> nn.Module:
    twin = on_meta(tuning.base if tuning.virtual_tokens else tuning.model)
    for blocks in [module for module in twin.modules() if isinstance(module, nn.ModuleList)]:
        for number, block in enumerate(blocks):
            if isinstance(block, RemoteSpan | CachedSpan | Spared):
                blocks[number] = _Elsewhere(number, edge, block, edge.adapters is not None)
    return twin


def _of_prompt(tuning: Tuning) -> ModelFlops:
    """Of whatever makes a prompt."""
    encoder = on_meta(tuning.model.get_submodule(f"prompt_encoder.{ADAPTER}"))
    tokens_V = torch.empty(tuning.virtual_tokens, dtype=torch.long, device="meta")
    return count(lambda *_: encoder(tokens_V[None]))


class _Elsewhere(PassThrough):
    """Stands where blocks run elsewhere or, below a span whose outputs are known, not at all."""

    def __init__(self, number: int, edge: EdgeModel, replaced: nn.Module, trains: bool) -> None:
        self._trains = trains
        super().__init__(number, edge.found.returns_tuple, replaced)
        self._ports = replaced.ports if isinstance(replaced, CachedSpan) else ()
        self.gradient_wanted = False

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        for port in self._ports:
            tapped()[port.block] = hidden_states.new_empty(*hidden_states.shape[:2], port.width)
        self.gradient_wanted = hidden_states.requires_grad
        if self._trains and not hidden_states.requires_grad:
            hidden_states = hidden_states.detach().requires_grad_()  # so that what is above has its backward
        return super().forward(hidden_states, *args, **kwargs)


def _run(twin: Any, edge: EdgeModel, tuning: Tuning, tokens: int, outputs: int) -> torch.Tensor:
    # Token ids, and masks made without a cache, would be looked at by value, which meta tensors lack.
    weight = edge.model.get_input_embeddings().weight
    embeds_BTD = torch.empty(1, tokens, weight.shape[1], dtype=weight.dtype, device="meta")
    stem_trains = any(one.requires_grad for one in tuning.base.get_input_embeddings().parameters())
    embeds_BTD.requires_grad_(stem_trains or tuning.virtual_tokens > 0)
    wanted_BT = (torch.arange(tokens) < outputs)[None]
    keeping = {} if reads_both_ways(twin.config) else {"past_key_values": DynamicCache(), "use_cache": True}
    with wanting(wanted_BT):
        logits: torch.Tensor = twin(inputs_embeds=embeds_BTD, **keeping).logits
    return logits
