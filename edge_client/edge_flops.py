"""FLOPs of the edge's own part of a model: stem, end blocks, adapters, and the head where it is needed.

Knows the edge model and what trains; the counting itself is the ledger's.
"""

import torch
from torch import nn
from transformers import DynamicCache

from edge_client.assemble import EdgeModel
from edge_client.outputs import wanting
from edge_client.remote import RemoteSpan
from edge_client.tuning import Tuning
from isthmus.blocks import PassThrough
from isthmus.ledger.flops import ModelFlops, count, on_meta


def count_edge_flops(edge: EdgeModel, tuning: Tuning) -> ModelFlops:
    """Count both passes on the meta device, the remote span being a pass-through."""
    twin = on_meta(tuning.model)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RemoteSpan):
                filler = PassThrough(edge.cut.bottom, edge.found.returns_tuple, child)
                setattr(parent, name, filler)
    weight = edge.model.get_input_embeddings().weight
    return count(lambda tokens, outputs: _run(twin, weight, tokens, outputs))


def _run(twin: nn.Module, weight: torch.Tensor, tokens: int, outputs: int) -> torch.Tensor:
    # Token ids, and masks made without a cache, would be looked at by value, which meta tensors lack.
    embeds_BTD = torch.empty(1, tokens, weight.shape[1], dtype=weight.dtype, device="meta")
    wanted_BT = (torch.arange(tokens) < outputs)[None]
    with wanting(wanted_BT):
        logits: torch.Tensor = twin(inputs_embeds=embeds_BTD, past_key_values=DynamicCache(), use_cache=True).logits
    return logits
