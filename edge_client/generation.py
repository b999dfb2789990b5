"""Continuing a prompt with an edge model.

Knows `generate` and tokenizers; the span's key-value cache is the span's own affair.
"""

import torch

from edge_client.edge_model import EdgeModel, device_of
from edge_client.tuning import Tuning

WHOLE_TEXT_AGAIN = "side network: no keys and values are kept, so each token runs the whole text again"


def continued(edge: EdgeModel, tuning: Tuning, prompt: str, new_tokens: int) -> str:
    """What a model adds to `prompt`, greedily, at most `new_tokens` tokens.

    Beside a side network no keys and values are kept: each token runs the whole text again.
    """
    inputs = edge.tokenizer(prompt, return_tensors="pt").to(device_of(edge))
    with torch.no_grad():
        output: torch.Tensor = tuning.model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False, use_cache=tuning.side is None
        )  # type: ignore[operator]
    return str(edge.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
