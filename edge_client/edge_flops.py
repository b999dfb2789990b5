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
    return count(lambda tokens, outputs: _run(twin, tokens, outputs))


def _run(twin: nn.Module, tokens: int, outputs: int) -> torch.Tensor:
    input_ids_BT = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    wanted_BT = (torch.arange(tokens) < outputs)[None]
    with wanting(wanted_BT):
        # without a cache, masks look at values, which meta tensors lack
        logits: torch.Tensor = twin(input_ids=input_ids_BT, past_key_values=DynamicCache(), use_cache=True).logits
    return logits
