"""Spans loaded for the cuts that are offered, their weights as stored, in another type, or in few bits.

Knows files and bitsandbytes; runs nothing but one dry pass. Weights that several cuts need are held once.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from cloud_node.config import Quantize
from cloud_node.span import Span
from isthmus.blocks import narrowed, route_by_token
from isthmus.cut import Cut
from isthmus.errors import ModelError, UsageError
from isthmus.load import load_span, outline


def load_spans(
    directory: Path, cuts: list[Cut], dtype: torch.dtype, device: torch.device, quantize: Quantize | None = None
) -> dict[Cut, Span]:
    """A span for each cut.

    Args:
        directory: of the model.
        cuts: what is offered.
        dtype: to compute in.
        device: where.
        quantize: hold linear modules of the span in few bits; each is quantised as it is read.

    Raises:
        CutError, ModelError: the model cannot be cut or loaded so.
        UsageError: bitsandbytes is not installed.
    """
    widest = Cut(min(cut.bottom for cut in cuts), min(cut.top for cut in cuts))
    if quantize is None:
        model, found = load_span(directory, widest, dtype)
        model.to(device)
        return {cut: Span(*narrowed(model, found, cut.span(len(found.blocks))), cut) for cut in cuts}
    model, found = load_span(directory, widest, dtype, _quantization(quantize, dtype), device)
    plain, plain_found = outline(directory)
    plain.to(dtype)
    route_by_token(plain)
    shared = _prepared(model)
    spans: dict[Cut, Span] = {}
    for cut in cuts:
        numbers = cut.span(len(found.blocks))
        counted = narrowed(plain, plain_found, numbers)
        try:
            spans[cut] = Span(*narrowed(model, found, numbers, shared), cut, dtype, quantize, counted)
        except (RuntimeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ModelError(
                f"--quantize {quantize} does not run this model on {device} ({reason}); use another, or leave it out"
            ) from None
    return spans


def _quantization(quantize: Quantize, dtype: torch.dtype) -> BitsAndBytesConfig:
    if find_spec("bitsandbytes") is None:
        raise UsageError("--quantize needs bitsandbytes; install it with: pip install 'isthmus[quantize]'")
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _prepared(model: Any) -> list[object]:
    """Make bitsandbytes' modules fit to be served; returns what they keep beside their weights, to be shared too.

    On some processors a pass without gradients would pack 4-bit weights into a form that has no backward.
    """
    states = []
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if hasattr(module, "init_8bit_state"):
            module.init_8bit_state()
            states.append(module.state)
    return states
